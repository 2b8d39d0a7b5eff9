"""Auxiliary loss: FIRST's weighted RankNet on the first label of a ranking, beside `nll`."""

import torch

from rerank.launch.values import check_range
from rerank.losses import AuxiliaryLoss, Batch, FirstLabels, LossInfo, LossInputs

INFO = LossInfo(
    tasks=("rerank",),
    first_label=True,
    needs="logits of the candidates' labels, each one token, at the first label of each row",
    costs="next to nothing",
)
ROWS = "ranknet_rows"


class ranknet(AuxiliaryLoss):  # noqa: N801 - a recipe's name
    """weight * mean over rows of `weighted_ranknet`, added to the token loss.

    Args:
        weight: lambda of L = L_LM + lambda L_Rank.

    Source: FIRST (arXiv:2406.15657), the joint loss; lambda = 10 as in its code (gangiswag/llm-reranker at 537a059,
    scripts/train_ranking.py).
    """

    def __init__(self, weight: float = 10.0) -> None:
        check_range("weight", weight, above=0)
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, int]:
        """The rows of a micro-batch."""
        return {ROWS: len(batch["first_label"])}

    def terms(self, inputs: LossInputs, embedding: torch.nn.Embedding) -> dict[str, torch.Tensor]:
        """The term of a micro-batch."""
        return {"ranknet": self.weight * weighted_ranknet(inputs.first_labels).sum() / inputs.counts[ROWS]}


def weighted_ranknet(labels: FirstLabels) -> torch.Tensor:
    """(B,) mean over the pairs of ranks i < j of log(1 + exp(s_j - s_i)) / (i + j), for logits s.

    Candidates that were not seen are in no pair, nor are two behind the best `top_k` in one.

    Source: FIRST (arXiv:2406.15657), the weighted RankNet loss; the mean over pairs as in its code
    (gangiswag/llm-reranker at 537a059, scripts/utils/loss.py).
    """
    ranks, logits = labels.ranks, labels.logits
    is_pair = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B, N, N)
    weights = is_pair / (ranks[:, :, None] + ranks[:, None, :]).clamp(min=1)
    values = torch.nn.functional.softplus(logits[:, None, :] - logits[:, :, None])
    return (weights * values).sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2)).clamp(min=1)
