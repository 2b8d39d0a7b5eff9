"""Token loss: negative log-likelihood, with GR2's weights for the trace and the ranking."""

import torch

from rerank.losses import LossInfo, LossInputs

INFO = LossInfo(
    needs="logits of the whole vocabulary at labelled positions, about 64 MB of them kept",
    costs="at most what TRL's own loss does",
)


def nll(inputs: LossInputs, reasoning_weight: float = 0.5, ranking_weight: float = 1.0) -> torch.Tensor:
    """-log p(label), (P,): tokens of the trace weigh `reasoning_weight`, all others `ranking_weight`.

    At weights of 1 it is TRL's loss. Neither weight is published; that the first is the smaller one is.

    Source: arXiv:2606.31984, eq. 3 (lambda_r, lambda_o).
    """
    if min(reasoning_weight, ranking_weight) < 0 or ranking_weight == 0:
        raise ValueError(
            f"reasoning_weight is {reasoning_weight} and ranking_weight {ranking_weight}; "
            "neither may be negative, and the ranking must weigh something"
        )
    values = -inputs.label_logps()
    if inputs.index is None:  # the task rerank
        for name, chosen in (("reasoning_nll", ~inputs.is_ranking), ("ranking_nll", inputs.is_ranking)):
            inputs.logged[name] = (values.detach() * chosen).sum(), chosen.sum()
    return values * torch.where(inputs.is_ranking, ranking_weight, reasoning_weight)
