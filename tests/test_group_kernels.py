"""Attention by log-sum-exps: each kernel's call against copies of the prompt, and CUDA's own rules of shapes."""

import pytest
import torch
from kernel_stand_ins import stand_ins

from rerank.models import group_kernels
from rerank.models.group_kernels import CPU, EFFICIENT, FLASH, attend, attend_in_turn, kernel_of

KERNELS = pytest.mark.parametrize("kernel", [CPU, FLASH, EFFICIENT], ids=["cpu", "flash", "efficient"])
# an empty prompt, one completion, one without tokens, more queries than a block of log-sum-exps
GROUPS = ((5, (3, 1, 4)), (0, (2, 2)), (3, (6,)), (2, (0,)), (40, (35, 1)))
LENGTH = 5 + 8 + 4 + 9 + 2 + 76


@pytest.fixture
def cuda_operators():
    with stand_ins() as found:
        yield found


class OnCuda(torch.Tensor):
    """A tensor that says so."""

    device = torch.device("cuda")


def random_inputs(dtype, heads=(4, 2), size=8):
    """Queries, keys and values as a model has them: a token's heads lie together."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, LENGTH, count, size) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def values_and_gradients(function, inputs):
    output = function(*inputs, GROUPS, 0.4)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


def in_turn(query, key, value, groups, scaling):
    wide = [tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value)]
    return attend_in_turn(query, *wide, groups, scaling)


@KERNELS
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_each_kernel_has_the_values_and_gradients_of_plain_attention(
    kernel, heads, dtype, tolerance, cuda_operators, monkeypatch
):
    monkeypatch.setattr(group_kernels, "kernel_of", lambda *tensors: kernel)
    inputs = random_inputs(dtype, heads)
    for ours, plain in zip(*(values_and_gradients(one, inputs) for one in (attend, in_turn)), strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, atol=tolerance * plain.abs().max().item(), rtol=0)


@KERNELS
def test_no_kernel_is_given_a_copy_of_keys_or_values_and_none_is_kept(kernel, cuda_operators, monkeypatch):
    monkeypatch.setattr(group_kernels, "kernel_of", lambda *tensors: kernel)
    inputs, saved = random_inputs(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        output = attend(*inputs, GROUPS, None)
    output.sum().backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, output)}
    assert cuda_operators.keys <= own and bool(cuda_operators.keys) == (kernel is not CPU)
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert [tensor.numel() for tensor in others] == [4 * LENGTH]  # the log-sum-exps


@pytest.mark.parametrize(
    ("dtype", "size", "flash", "efficient", "expected"),
    [
        (torch.bfloat16, 128, True, True, FLASH),
        (torch.bfloat16, 100, True, True, EFFICIENT),  # flash attention would need padding
        (torch.float32, 128, False, True, EFFICIENT),
        (torch.float32, 128, False, False, None),
    ],
)
def test_on_cuda_the_kernel_follows_from_pytorchs_own_rules(monkeypatch, dtype, size, flash, efficient, expected):
    asked = {}

    def rule(name, answer):
        monkeypatch.setattr(torch.backends.cuda, name, lambda parameters: asked.update({name: parameters}) or answer)

    rule("can_use_flash_attention", flash)
    rule("can_use_efficient_attention", efficient)
    query, key = (torch.empty(1, heads, 6, size, dtype=dtype) for heads in (4, 2))
    tensors = [tensor.as_subclass(OnCuda) for tensor in (query, key, key)]
    assert kernel_of(*tensors) is expected
    assert (
        kernel_of(query, key, key) is CPU and kernel_of(*[tensor.to("meta") for tensor in (query, key, key)]) is None
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernel_of(*tensors) is None
    if size % 8 == 0:
        assert asked["can_use_flash_attention"].enable_gqa and asked["can_use_flash_attention"].key.shape[1] == 2
    if expected is not FLASH:
        parameters = asked["can_use_efficient_attention"]
        assert not parameters.enable_gqa and parameters.query.shape == parameters.key.shape == (2, 2, 6, size)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(FLASH, torch.bfloat16), (EFFICIENT, torch.float32)], ids=["flash", "efficient"]
)
def test_the_operators_of_cuda_take_the_calls_by_their_own_schemas_and_shapes(kernel, dtype, monkeypatch):
    """PyTorch's own functions of shapes, on tensors without memory."""
    monkeypatch.setattr(group_kernels, "kernel_of", lambda *tensors: kernel)
    inputs = [
        torch.empty(1, LENGTH, heads, 64, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]
    output = attend(*inputs, GROUPS, None)
    assert (output.shape, output.dtype, output.device.type) == (inputs[0].shape, dtype, "meta")
    found = torch.autograd.grad(output.sum(), inputs)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in inputs]
