"""Token loss: masked softmax, over the tokens that may follow in the catalogue; the second rung of BEAR's ladder."""

import torch

from rerank.launch.values import check_range
from rerank.losses import LossInfo, LossInputs

INFO = LossInfo(
    tasks=("next_item",),
    constrained=True,
    needs="logits of the catalogue's tokens at positions with a choice; each position's node of the prefix index",
    costs="less than TRL's loss where the vocabulary is larger than the catalogue's part of it",
)


def msl(inputs: LossInputs, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(valid logits / temperature)[label], (P,); the plain loss where the label is no token of an item.

    Valid are the tokens that continue the gold prefix to some item. Where every token is valid it is `lml`.

    Source: arXiv:2504.04178; fixed temperature (its adaptive one is not built).
    """
    check_range("temperature", temperature, above=0)
    logps, _, places = inputs.constrained_logps(temperature)
    return with_plain(inputs, -logps.gather(1, places[:, None])[:, 0])


def with_plain(inputs: LossInputs, item_values: torch.Tensor) -> torch.Tensor:
    """(P,) values of the item positions in their places, and the plain loss in all others."""
    if inputs.is_item.all():
        return item_values
    values = torch.zeros_like(inputs.hidden[:, 0], dtype=item_values.dtype)
    others = -inputs.label_logps(chosen=~inputs.is_item).to(item_values.dtype)
    return values.masked_scatter(inputs.is_item, item_values).masked_scatter(~inputs.is_item, others)
