"""Attention of packed rows by PyTorch's kernels, whose log-sum-exp keeps a prompt's keys and values in one place.

The completions of a group attend to its prompt in one call and to themselves in one call each; the two outputs are
weighted by their softmax sums. The kernels' backward passes need only the output and log-sum-exp of a softmax: given
those of the total, each returns its part's gradients, exactly (Ring Attention, arXiv:2310.01889).

    attend(query, key, value, groups, scaling)

Keys and values are never copied, for grouped heads neither: CUDA's flash kernel takes fewer heads of keys than of
queries; for the others a head of keys is a batch row that its queries share, by a view of stride 0 (their gradients
are made for each head of queries, then summed). The operators are those of PyTorch 2.13, whose schemas a test holds.

Letters of shapes: N tokens of a packed row, A attention heads, H heads of keys, D size of a head, M queries of a part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.backends import cuda
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

# Per group: number of tokens of its prompt, without the last, and of each of its completions.
Groups = tuple[tuple[int, tuple[int, ...]], ...]
Tensors = tuple[torch.Tensor, ...]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """An attention operator that returns log-sum-exps.

    Attributes:
        name: For people.
        forward: (query, key, value, causal, scaling) -> output and log-sum-exps (B, A, M).
        backward: (gradient, query, key, value, output, log-sum-exps, causal, scaling) -> gradients of the first three.
        takes_fewer_keys: Whether keys may have fewer heads than queries.
    """

    name: str
    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    takes_fewer_keys: bool = False


def _on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float | None
) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=causal, scale=scaling)


def _on_cpu_backward(*tensors_and_causal: Any) -> Tensors:
    *tensors, causal, scaling = tensors_and_causal
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal, scale=scaling)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float | None
) -> Tensors:
    return aten._scaled_dot_product_flash_attention(query, key, value, is_causal=causal, scale=scaling)[:2]


def _flash_backward(*tensors_and_causal: Any) -> Tensors:
    gradient, query, key, value, output, log_sums, causal, scaling = tensors_and_causal
    no_dropout = query.new_empty(0, dtype=torch.long)  # the state of its generator is not read
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, log_sums.contiguous(),  # which the kernel takes for granted
        None, None, query.shape[2], key.shape[2], 0.0, causal, no_dropout, no_dropout, scale=scaling,
    )  # fmt: skip


EFFICIENT_BLOCK = 32  # log-sum-exps come in whole blocks, of which the rest is inf


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float | None
) -> Tensors:
    output, log_sums, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, is_causal=causal, scale=scaling
    )
    return output, log_sums[:, :, : query.shape[2]]


def _efficient_backward(*tensors_and_causal: Any) -> Tensors:
    gradient, query, key, value, output, log_sums, causal, scaling = tensors_and_causal
    no_dropout = query.new_empty(0, dtype=torch.long)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # its stride of queries is taken for granted
    log_sums = pad(log_sums, (0, -log_sums.shape[2] % EFFICIENT_BLOCK), value=torch.inf)
    return aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, None, output, log_sums, no_dropout, no_dropout, 0.0, [True, True, True, False],
        causal, scale=scaling,
    )[:3]  # fmt: skip


CPU = Kernel("PyTorch's flash attention of the CPU", _on_cpu, _on_cpu_backward)
FLASH = Kernel("flash attention", _flash, _flash_backward, takes_fewer_keys=True)
EFFICIENT = Kernel("memory-efficient attention", _efficient, _efficient_backward)


def kernel_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for tensors such as these, by PyTorch's own rules; None where none has the log-sum-exp.

    On CUDA flash attention takes 16 bits, the memory-efficient one float32 too; those of ROCm lay out the
    log-sum-exp differently.
    """
    if query.device.type == "cpu":
        return CPU
    if query.device.type != "cuda" or torch.version.hip is not None:
        return None
    parameters = cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    if query.shape[3] % 8 == 0 and cuda.can_use_flash_attention(parameters):
        return FLASH
    parameters = cuda.SDPAParams(*_by_head_of_keys(query, key, value), None, 0.0, True, False)
    return EFFICIENT if cuda.can_use_efficient_attention(parameters) else None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, scaling: float | None
) -> torch.Tensor:
    """Output (1, A, N, D) for queries of that shape, keys and values (1, H, N, D), all of one number format."""
    kernel = kernel_of(query, key, value)
    if kernel is None:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        return attend_in_turn(query, key, value, groups, scaling)
    if kernel.takes_fewer_keys:
        return GroupAttention.apply(query, key, value, groups, scaling, kernel)
    output = GroupAttention.apply(*_by_head_of_keys(query, key, value), groups, scaling, kernel)
    return output.flatten(0, 1)[None]


def _by_head_of_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Three:
    """Views (H, A / H, N, D): a batch row per head of keys, which all its queries share."""
    query = query[0].unflatten(0, (key.shape[1], -1))
    key, value = (tensor[0][:, None].expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    return query, key, value


def attend_in_turn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, scaling: float | None
) -> torch.Tensor:
    """`attend` for any device, where keys have the heads of queries: a call per prompt and completion, with copies of
    the prompt's keys and values."""
    outputs = []
    for prompt, completions in _slices(groups):
        for own, before in [(prompt, slice(0, 0)), *((completion, prompt) for completion in completions)]:
            keys = torch.cat([key[:, :, before], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, before], value[:, :, own]], dim=2)
            mask = causal_lower_right(own.stop - own.start, keys.shape[2])
            outputs.append(scaled_dot_product_attention(query[:, :, own], keys, values, mask, scale=scaling))
    return torch.cat(outputs, dim=2)


class GroupAttention(torch.autograd.Function):
    """The same output as `attend_in_turn`, without copies of keys and values."""

    @staticmethod
    def forward(ctx: Any, query, key, value, groups: Groups, scaling: float | None, kernel: Kernel) -> torch.Tensor:  # noqa: ANN001
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys, causal in _calls(groups):
            found, found_sums = kernel.forward(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], causal, scaling
            )
            if not causal:  # the completions' attention to themselves is there already
                own, own_sums = output[:, :, queries], log_sums[:, :, queries]
                sums = torch.logaddexp(own_sums, found_sums)
                found = torch.lerp(own.to(sums), found.to(sums), (found_sums - sums).exp()[..., None])
                found_sums = sums
            output[:, :, queries], log_sums[:, :, queries] = found, found_sums
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.scaling, ctx.kernel = groups, scaling, kernel
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for queries, keys, causal in _calls(ctx.groups):
            parts = ctx.kernel.backward(
                gradient[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                output[:, :, queries], log_sums[:, :, queries], causal, ctx.scaling,
            )  # fmt: skip
            for total, part, where in zip(gradients, parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
        return *gradients, None, None, None


def _slices(groups: Groups) -> Iterator[tuple[slice, list[slice]]]:
    """The places of a prompt and of each of its completions in the packed row, per group."""
    start = 0
    for prompt_length, lengths in groups:
        ends = list(accumulate((prompt_length, *lengths), initial=start))
        prompt, *completions = [slice(*pair) for pair in pairwise(ends)]
        yield prompt, completions
        start = ends[-1]


def _calls(groups: Groups) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, their keys, and whether causal: each part with itself, then all completions with the prompt."""
    for prompt, completions in _slices(groups):
        parts = [part for part in (prompt, *completions) if part.stop > part.start]
        yield from ((part, part, True) for part in parts)
        if prompt in parts and len(parts) > 1:
            yield slice(parts[1].start, parts[-1].stop), prompt, False
