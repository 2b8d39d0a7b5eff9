"""CUDA's attention operators on CPU tensors, under their own names: plain arithmetic, and what the kernels insist on.

Read in PyTorch's sources (aten/src/ATen/native/transformers/cuda): the backward pass of the flash kernel reads the
log-sum-exp as one block; the memory-efficient one takes as many heads of keys as of queries, reads an output whose
rows of a query lie together, and the log-sum-exp in blocks of 32 queries, inf behind the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK = 32


def scores_of(query, key, causal, scale):
    """(B, A, M, M') of queries and keys, -inf where a query must not look."""
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        assert query.shape[2] == key.shape[2]
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return scores


def widened(query, *tensors):
    """In at least float32, with as many heads as queries have, as the kernels compute."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return [tensor.to(dtype).repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (query, *tensors)]


def forward(query, key, value, causal, scale):
    wide_query, wide_key, wide_value = widened(query, key, value)
    scores = scores_of(wide_query, wide_key, causal, scale)
    output = (scores.softmax(-1) @ wide_value).to(query.dtype)
    return output.transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)


def backward(gradient, query, key, value, output, log_sums, causal, scale):
    """By the output and log-sum-exps that are given, of these keys or of more."""
    wide_query, wide_key, wide_value, wide_output, wide_gradient = widened(query, key, value, output, gradient)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    shares = (scores_of(wide_query, wide_key, causal, scale) - log_sums[..., None]).exp()
    delta = (wide_gradient * wide_output).sum(-1, keepdim=True)
    inner = shares * (wide_gradient @ wide_value.transpose(2, 3) - delta) * factor
    parts = inner @ wide_key, inner.transpose(2, 3) @ wide_query, shares.transpose(2, 3) @ wide_gradient
    shapes = [tensor.shape for tensor in (query, key, value)]
    summed = [part.unflatten(1, (shape[1], -1)).sum(2) for part, shape in zip(parts, shapes, strict=True)]
    return tuple(part.to(query.dtype) for part in summed)


class StandIns:
    """The operators; `keys` holds the storages of the keys and values that they were given."""

    def __init__(self) -> None:
        self.keys: set[int] = set()

    def note(self, *tensors) -> None:
        self.keys |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def flash(self, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert dropout_p == 0 and query.shape[1] % key.shape[1] == 0
        self.note(key, value)
        output, log_sums = forward(query, key, value, is_causal, scale)
        nothing = query.new_empty(0)
        return output, log_sums, None, None, query.shape[2], key.shape[2], nothing, nothing, nothing

    def flash_backward(
        self, gradient, query, key, value, output, log_sums, cum_q, cum_k, max_q, max_k, dropout_p, is_causal,
        seed, offset, *, scale=None,
    ):  # fmt: skip
        assert log_sums.is_contiguous() and (max_q, max_k) == (query.shape[2], key.shape[2])
        self.note(key, value)
        return backward(gradient, query, key, value, output, log_sums, is_causal, scale)

    def efficient(self, query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert bias is None and compute_log_sumexp and query.shape[:2] == key.shape[:2] == value.shape[:2]
        self.note(key, value)
        output, log_sums = forward(query, key, value, is_causal, scale)
        padded = torch.nn.functional.pad(log_sums, (0, -query.shape[2] % BLOCK), value=torch.inf)
        return output, padded, query.new_empty(0), query.new_empty(0)

    def efficient_backward(
        self, gradient, query, key, value, bias, output, log_sums, seed, offset, dropout_p, mask, is_causal=False,
        *, scale=None,
    ):  # fmt: skip
        queries = query.shape[2]
        assert output.shape[2] == 1 or output.stride(2) == output.shape[1] * output.shape[3]
        assert log_sums.shape[2] % BLOCK == 0 and (log_sums[:, :, queries:] == torch.inf).all()
        assert query.shape[:2] == key.shape[:2] and list(mask) == [True, True, True, False]
        self.note(key, value)
        return *backward(gradient, query, key, value, output, log_sums[:, :, :queries], is_causal, scale), None


@contextmanager
def stand_ins() -> Iterator[StandIns]:
    """PyTorch's dispatcher finds them for CPU tensors, by the schemas of the operators."""
    found, library = StandIns(), torch.library.Library("aten", "IMPL")
    for name in ("flash", "efficient"):
        for suffix in ("", "_backward"):
            library.impl(f"_scaled_dot_product_{name}_attention{suffix}", getattr(found, name + suffix), "CPU")
    try:
        yield found
    finally:
        library._destroy()
