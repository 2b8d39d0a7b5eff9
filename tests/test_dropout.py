"""Dropout of embeddings and branches: in training only, and gone afterwards."""

import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from rerank.models.dropout import residual_dropout

TEXT = torch.arange(12)[None] + 3


@pytest.fixture
def model():
    return tiny_model(tiny_tokenizer())


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


def test_it_changes_training_alone_and_nothing_afterwards(model):
    before = logits(model.eval())
    with residual_dropout(model, 0.0):
        assert torch.equal(logits(model.train()), before)
    with residual_dropout(model, 0.3):
        assert torch.equal(logits(model.eval()), before)
        assert not torch.allclose(logits(model.train()), before)
    assert torch.allclose(logits(model.train()), before)


def test_embedding_and_both_branches_of_each_layer_lose_the_share(model):
    layer, seen = model.model.layers[0], {}
    parts = {"embedding": model.get_input_embeddings(), "attention": layer.self_attn, "mlp": layer.mlp}
    with residual_dropout(model, 0.4):
        for name, part in parts.items():
            part.register_forward_hook(lambda _module, _given, out, name=name: seen.update({name: out}))
        torch.manual_seed(0)
        logits(model.train())
    for name, value in seen.items():
        value = value[0] if isinstance(value, tuple) else value
        assert (value == 0).float().mean().item() == pytest.approx(0.4, abs=0.15), name
    assert set(seen) == {"embedding", "attention", "mlp"}


def test_a_model_of_other_parts_is_refused():
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    with pytest.raises(ValueError, match="set dropout to 0"), residual_dropout(other, 0.1):
        pass
