"""Token loss: language-model loss of next items, the first rung of BEAR's ladder."""

import torch

from rerank.launch.values import check_range
from rerank.losses import LossInfo, LossInputs

INFO = LossInfo(
    tasks=("next_item",),
    needs="logits of the whole vocabulary at labelled positions, about 64 MB of them kept",
    costs="at most what TRL's own loss does",
)


def lml(inputs: LossInputs, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature)[label] over the whole vocabulary, (P,); at temperature 1 TRL's loss.

    Source: the sibling loss LML of BEAR's code (arXiv:2601.22925; SFT in its section 3).
    """
    check_range("temperature", temperature, above=0)
    return -inputs.label_logps(temperature)
