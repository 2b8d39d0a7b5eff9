"""Dropout for decoders that have none: language models are built for more data than a catalogue's histories."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BRANCHES = ("self_attn", "mlp")


@contextlib.contextmanager
def residual_dropout(model: "PreTrainedModel", share: float) -> Iterator[None]:
    """Within it and in training mode, drop a share of the outputs of the embedding and of each layer's branches.

    Source: Vaswani et al. 2017 (arXiv:1706.03762) section 5.4, and SASRec (arXiv:1808.09781) section 3.2. Dropped
    values are zero and the others are scaled up, so that a trained model is used without it. A model whose layers
    have no `self_attn` and `mlp` is refused.
    """
    if not share:
        yield
        return
    children = [dict(module.named_children()) for module in model.modules()]
    branches = [found[name] for found in children if found.keys() >= set(BRANCHES) for name in BRANCHES]
    if not branches:
        raise ValueError(f"{type(model).__name__} has no layers with {' and '.join(BRANCHES)}; set dropout to 0")

    def drop(module: nn.Module, _: object, output: "torch.Tensor | tuple[torch.Tensor, ...]") -> object:
        if isinstance(output, tuple):
            return nn.functional.dropout(output[0], share, module.training), *output[1:]
        return nn.functional.dropout(output, share, module.training)

    handles = [part.register_forward_hook(drop) for part in (model.get_input_embeddings(), *branches)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
