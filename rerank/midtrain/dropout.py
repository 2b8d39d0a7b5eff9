"""Dropout in a decoder that has none: today's language models are built for more data than a catalogue's histories."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

BRANCHES = ("self_attn", "mlp")


@contextlib.contextmanager
def residual_dropout(model: Any, share: float) -> Iterator[None]:
    """Within it and in training mode, drop a share of what the embedding and each layer's branches give.

    Source: Vaswani et al. 2017 (arXiv:1706.03762) section 5.4, and SASRec (arXiv:1808.09781) section 3.2. Dropped
    values are zero and the others are scaled up, so that a trained model is used without it.

    Raises:
        ValueError: When the model's layers have no `self_attn` and `mlp`.
    """
    if not share:
        yield
        return
    layers = [module for module in model.modules() if all(hasattr(module, name) for name in BRANCHES)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers with {' and '.join(BRANCHES)}; set dropout to 0")

    def drop(module: nn.Module, given: Any, output: Any) -> Any:
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        first = nn.functional.dropout(first, share, module.training)
        return first if rest is None else (first, *rest)

    parts = [model.get_input_embeddings(), *(getattr(layer, name) for layer in layers for name in BRANCHES)]
    handles = [part.register_forward_hook(drop) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
