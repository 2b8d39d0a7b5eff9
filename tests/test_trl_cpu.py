"""Leaving out tokens without a label, in TRL's loss on CPU: the same loss and gradients, fewer tokens scored."""

import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from rerank import trl_cpu

OUTPUTS = ("log_probs", "entropy", "is_top1")


@pytest.fixture
def patch(monkeypatch):
    """A call that applies the patch, which ends with the test."""
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    return trl_cpu.score_labelled_tokens_only


def fused_loss(labels):
    """Loss, per-token outputs, the embedding's gradient and the number of tokens that were scored."""
    model = tiny_model(tiny_tokenizer())
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    scored = []
    tile = chunked_logprob._forward_tile
    chunked_logprob._forward_tile = lambda *args, **kwargs: (scored.append(len(args[0])), tile(*args, **kwargs))[1]
    try:
        out = model(input_ids=torch.arange(24).view(2, 12), labels=labels, fused_lm_head=True)
        out.loss.backward()
    finally:
        chunked_logprob._forward_tile = tile
    return out, model.get_input_embeddings().weight.grad, sum(scored)


@pytest.mark.parametrize("labelled", [slice(8, 12), slice(0, 12), slice(12, 12)], ids=["answer", "all", "none"])
def test_loss_and_gradients_are_those_of_trl_and_only_labelled_tokens_are_scored(labelled, patch):
    labels = torch.full((2, 12), -100)
    labels[:, labelled] = torch.arange(24).view(2, 12)[:, labelled]
    slow, slow_grad, all_tokens = fused_loss(labels)
    patch()
    fast, fast_grad, some_tokens = fused_loss(labels)
    assert torch.allclose(slow.loss, fast.loss) and torch.allclose(slow_grad, fast_grad, atol=1e-7)
    for name in OUTPUTS:
        assert torch.allclose(getattr(slow, name).float(), getattr(fast, name).float(), atol=1e-6)
    assert (all_tokens, some_tokens) == (22, int((labels[:, 1:] != -100).sum()))


def test_other_devices_are_left_to_trl(patch, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: device.type == "cuda")
    patch()
    assert [utils._use_triton(torch.device(name)) for name in ("cpu", "cuda", "meta")] == [True, True, False]


def test_a_trl_without_the_function_is_refused(monkeypatch):
    monkeypatch.delattr(utils, "_use_triton")
    with pytest.raises(RuntimeError, match=r"trl.trainer.utils has no _use_triton; install the TRL version"):
        trl_cpu.score_labelled_tokens_only()
