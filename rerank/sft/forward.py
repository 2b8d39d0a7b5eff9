"""The model's forward pass when losses are computed inside it, from the states and the head.

Letters of shapes: B rows, T tokens, H hidden size.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from rerank.losses._inputs import Head

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
LEAST_SAVED = 0.2  # share of a batch's tokens, padding with them, that two forward passes must save to be made


def length_groups(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Rows (B,) in the two groups that pad least when each is padded to its own longest row.

    In one group where that is not worth it. A batch that mixes tasks, such as histories and iirg's relation rows, is
    mostly padding.

    Args:
        lengths: (B,) tokens of each row.
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order]
    sizes = torch.arange(1, len(lengths), device=lengths.device)
    costs = sizes * longest[0] + (len(lengths) - sizes) * longest[1:]  # of cutting after the first 1, 2, ... rows
    if not len(costs) or costs.min() > (1 - LEAST_SAVED) * len(lengths) * longest[0]:
        return [order]
    size = int(costs.argmin()) + 1
    return [order[:size], order[size:]]


def states_by_length(base: nn.Module, attention_mask: torch.Tensor, **inputs: torch.Tensor | None) -> torch.Tensor:
    """(B, T, H) the last hidden states of rows padded on the right, by `length_groups`; any value at padding.

    Args:
        base: The model without its head.
        attention_mask: (B, T).
        inputs: input_ids (B, T) or inputs_embeds (B, T, H); None for what is not given, as peft passes it on.
    """
    lengths = attention_mask.sum(dim=1)
    groups, parts = length_groups(lengths), []
    for rows in groups:
        end = int(lengths[rows].max())
        chosen = {name: values[rows, :end] for name, values in inputs.items() if values is not None}
        states = base(attention_mask=attention_mask[rows, :end], use_cache=False, **chosen).last_hidden_state
        parts.append(nn.functional.pad(states, (0, 0, 0, attention_mask.shape[1] - end)))
    return torch.cat(parts)[torch.cat(groups).argsort()]


def add_loss_forward(model: PreTrainedModel) -> None:
    """Let `model(..., compute=f)` return f(states (B, T, H), head, embedding) in place of logits.

    `embed` may replace embeddings. With `by_length` the states come from `states_by_length`. A model that scales its
    logits, which the losses would have to repeat, is refused.
    """
    config = model.config.get_text_config()
    scaled = [name for name in SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise ValueError(
            f"the model's {scaled[0]} is {getattr(config, scaled[0])}, but losses take logits as "
            "they are; use a model that does not scale them"
        )
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        compute: Callable | None = None,
        embed: Callable | None = None,
        by_length: bool = False,
        **kwargs: Any,
    ) -> Any:
        if compute is None:
            return plain_forward(*args, **kwargs)
        embedding = self.get_input_embeddings()
        if embed is not None and (embedded := embed(embedding)) is not None:
            kwargs["inputs_embeds"] = embedded
            kwargs.pop("input_ids")
        if by_length:
            states = states_by_length(self.base_model, **kwargs)
        else:
            states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        softcap = getattr(config, "final_logit_softcapping", None)
        with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 has it in parts
            return compute(states, Head(_gathered(head.weight), _gathered(head.bias), softcap), embedding)

    model.forward = types.MethodType(forward, model)


def _gathered(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """FSDP2 shows its parameters in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
