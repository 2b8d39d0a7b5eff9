"""Models loaded, made and saved, and the id tokens that are added to them."""

import pytest
import torch
from tiny_model import ID_TOKENS, save_tiny_model, tiny_model, tiny_tokenizer
from toy_run import finish
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rerank.launch import model_card
from rerank.launch.files import write_json
from rerank.models import base as base_model
from rerank.models import ranker
from rerank.prompts import render


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_id_tokens_are_ordinary_tokens_that_decoding_keeps(tokenizer):
    ids = base_model.add_tokens(tiny_model(tokenizer), tokenizer, ID_TOKENS, seed=0)
    text = "a drama<s_a_1><s_b_0>"
    encoded = tokenizer(text, add_special_tokens=False).input_ids
    assert encoded[-2:] == [ids[1], ids[2]]
    assert tokenizer.decode([*encoded, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_among_the_old_ones_and_old_rows_stay(tokenizer, tied):
    model = tiny_model(tokenizer, tied)
    layers = (model.get_input_embeddings, model.get_output_embeddings)
    before = [layer().weight.detach().clone() for layer in layers]
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    for old, layer in zip(before, layers, strict=True):
        assert torch.equal(layer().weight[: len(old)], old)
        new = layer().weight[ids].detach()
        # 4 x 32 draws around the mean of the old rows: their mean is off by about std / sqrt(128), 9 % of std
        assert (new.mean() - old.mean()).abs() < 0.4 * old.std()
        assert 0.2 * old.std() < new.std() < 3 * old.std()
        assert len({tuple(row.tolist()) for row in new}) == len(ids)
    assert (layers[0]().weight is layers[1]().weight) == tied


def test_the_same_seed_draws_the_same_rows():
    rows = []
    for seed in (1, 1, 2):
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer)
        rows.append(model.get_input_embeddings().weight[base_model.add_tokens(model, tokenizer, ID_TOKENS, seed)])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_an_id_token_that_is_special_already_is_refused(tokenizer):
    model = tiny_model(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s_a_0>"]})
    with pytest.raises(ValueError, match="<s_a_0> is a special token of .*, where it must be an ordinary t"):
        base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)


def test_words_of_a_small_tokenizer_are_one_token_each_with_and_without_a_space():
    tokenizer = base_model.train_tokenizer(["nothing of the kind"] * 5, 400, ["next:7", "pop:0"])
    for word in ("next:7", " next:7", "pop:0", " pop:0"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_a_number_is_the_same_token_on_a_line_in_a_trace_and_in_a_ranking():
    tokenizer = base_model.train_tokenizer(["\n 3. next:7\n 10. pop:0 3 fair 10 poor 10 3"] * 5, 400, ["3", "10"])
    (three,), (ten,) = (tokenizer(text, add_special_tokens=False).input_ids for text in (" 3", " 10"))
    ids = tokenizer("\n 3. next:7\n 10. pop:0 3 fair 10 poor 10 3", add_special_tokens=False).input_ids
    assert (ids.count(three), ids.count(ten)) == (3, 3)


def test_any_text_survives_a_small_tokenizer(tokenizer):
    text = "Amélie (2001)\n  tab\there — 漢字 🙂 <s_a_0>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_chat_template_marks_the_turns(tokenizer):
    assert render(tokenizer, "Rank:") == "<|user|>Rank:<|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>a<|assistant|>b<|end|>"


def test_a_small_model_has_the_shape_of_its_recipe(tokenizer):
    model = tiny_model(tokenizer)
    assert (model.config.model_type, model.config.hidden_size, model.config.num_hidden_layers) == ("qwen3", 32, 2)
    # a layer: q, k, v, o of 32x32, three matrices of 32x96, two norms of 32 and two (of q and k) of 32;
    # beside two layers the embedding, which is also the head, and the last norm
    layer = 4 * 32 * 32 + 3 * 32 * 96 + 4 * 32
    assert sum(p.numel() for p in model.parameters()) == 2 * layer + 32 * model.config.vocab_size + 32


def test_a_shape_whose_parts_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size 100, num_heads 3 and num_kv_heads 2 must divide one another"):
        base_model.SmallModelArguments(hidden_size=100, num_heads=3, num_kv_heads=2)


def test_a_folder_is_loaded_as_it_was_saved_or_as_the_recipe_says(tmp_path):
    folder = str(save_tiny_model(tmp_path / "model"))
    model, tokenizer = base_model.load_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32 and tokenizer.convert_tokens_to_ids("<s_b_1>") == len(tokenizer) - 3
    other, _ = base_model.load_pretrained(folder, ModelConfig(dtype="bfloat16", attn_implementation="eager"))
    assert (other.dtype, other.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(ValueError, match=r"load_in_4bit is not supported, as later stages need plain weights"):
        base_model.load_pretrained(folder, ModelConfig(load_in_4bit=True))


def test_two_packed_files_in_one_folder_are_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"has 2 .gguf files; leave one"):
        base_model.load_pretrained(str(tmp_path))


def test_a_card_says_so_when_the_terms_are_not_stated(tmp_path):
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data/metrics.json", {"items": 3, "users": 2, "interactions": 9, "terms": ""})
    finish(tmp_path / "sft")
    model_card.write(tmp_path, tmp_path, "dapo", model_card.ranker(10, 10, trace=True), base="Qwen/Qwen3-8B")
    card = (tmp_path / "README.md").read_text()
    assert "Base model: Qwen/Qwen3-8B\n- Stages of training: sft, dapo\n" in card
    assert "The recipe states none" in card and "history and 10 candidates" in card
    finish(tmp_path / "midtrain")
    model_card.write(tmp_path, tmp_path, "dapo", model_card.ranker(2, 24, trace=False), base=None)
    card = (tmp_path / "README.md").read_text()
    assert "midtrain, sft, dapo\n" in card and "history and 2 to 24 candidates" in card


def test_the_bytes_of_keys_and_values_bound_the_rows_completed_at_once(monkeypatch, tokenizer):
    model, length = tiny_model(tokenizer), 30
    assert ranker.rows_at_once(model, length) == ranker.MOST_ROWS_AT_ONCE
    cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
    row = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    monkeypatch.setattr(ranker, "CACHE_BYTES", int(3.5 * row))
    assert ranker.rows_at_once(model, length) == 3
    assert ranker.rows_at_once(model, 100 * length) == 1, "one row is always completed"
