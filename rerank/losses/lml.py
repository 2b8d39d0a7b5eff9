"""Token loss: language-model loss of next items, the first rung of BEAR's ladder."""

import torch

from rerank.losses import LossInputs

TASKS = ("next_item",)
NEEDS = "logits of the whole vocabulary at labelled positions, about 64 MB of them kept"
COSTS = "at most what TRL's own loss does"


def lml(inputs: LossInputs, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature)[label] over the whole vocabulary, (P,).

    At temperature 1 it is TRL's loss.

    Raises:
        ValueError: When the temperature is not above 0.

    Source: the sibling loss LML of BEAR's code (arXiv:2601.22925; SFT in its section 3).
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be above 0")
    return -inputs.label_logps(temperature)
