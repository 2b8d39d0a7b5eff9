"""Quirks of real tokenizers and models, made small: padded vocabularies, BOS, normalizers, dates, opened tags."""

import shutil

import pytest
import torch
from quirks import that_opens, that_prepends, with_bos, with_date
from tiny_model import ID_TOKENS, SHAPE, save_tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, Qwen3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from rerank import prompts
from rerank.catalogue import Catalogue
from rerank.midtrain.documents import Document
from rerank.midtrain.encoding import encode
from rerank.models import base as base_model
from rerank.next_item.encoder import NextItemEncoder
from rerank.next_item.item_head import ItemHead
from rerank.prompts import PromptSettings, prompt_ids, render
from rerank.rows import Prompter, RankingRow

CATALOGUE = Catalogue(["a", "b"], ["<s_a_0><s_b_0>", "<s_a_1><s_b_1>"], ["drama", "title"], ["", ""])


def padded_model(tokenizer, padding, tied):
    """A model with unused rows of zeros behind those of the tokenizer."""
    config = base_model.make_small_model(SHAPE, tokenizer, 0).config
    config.vocab_size, config.tie_word_embeddings = len(tokenizer) + padding, tied
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[len(tokenizer) :] = 0
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [2, 200])
def test_new_tokens_within_a_padded_vocabulary_have_rows_of_their_own(padding, tied):
    tokenizer = tiny_tokenizer()
    model = padded_model(tokenizer, padding, tied)
    old = model.get_input_embeddings().weight[: len(tokenizer)].detach().clone()
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = layer.weight[ids].detach()
        assert len(torch.unique(rows, dim=0)) == len(ids)
        assert 0.5 * old.std() < rows.std() < 2 * old.std()  # drawn around the known tokens, not the padding
    assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)


def test_an_id_stays_whole_behind_a_word_where_a_normalizer_prepends():
    tokenizer = that_prepends(tiny_tokenizer())
    model = base_model.make_small_model(SHAPE, tokenizer, 0)
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    for text in ("drama{}", "drama {}", "{} drama", "{}{}"):
        found = tokenizer(text.replace("{}", ID_TOKENS[0]), add_special_tokens=False).input_ids
        assert found.count(ids[0]) == text.count("{}")


def test_a_sequence_begins_alike_in_every_stage():
    tokenizer = with_bos(tiny_tokenizer())
    tokenizer.add_tokens(ID_TOKENS)
    bos = tokenizer.bos_token_id
    text = render(tokenizer, "drama")
    assert tokenizer(text).input_ids == prompt_ids(tokenizer, [text])[0]
    settings = PromptSettings(task="short", item_fields=["title"], ranking="number")
    row = RankingRow(0, (0,), (0, 1), (1.0, 0.0))
    example = Prompter(CATALOGUE, settings, tokenizer=tokenizer).example(row, None, [0, 1])["input_ids"]
    begun = [
        encode(Document("text", "", "drama"), tokenizer)["input_ids"],
        encode(Document("lists", "Rank:", "drama"), tokenizer)["input_ids"],
        NextItemEncoder(CATALOGUE, tokenizer, "semantic_id", 5).next_item_prompt([0]),
        example,
    ]
    for ids in begun:
        assert ids[0] == bos and ids.count(bos) == 1


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    with_bos(AutoTokenizer.from_pretrained(folder), eos=True).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model writes <\|end\|> behind every text"):
        base_model.load_tokenizer(str(folder))


def test_the_date_of_a_template_is_fixed_and_saved(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with_date(tokenizer)
    tokenizer.save_pretrained(folder)
    loaded = base_model.load_tokenizer(str(folder))
    assert "Day 26 Jul 2024." in render(loaded, "drama")
    loaded.save_pretrained(shutil.copytree(folder, tmp_path / "saved"))
    assert render(AutoTokenizer.from_pretrained(tmp_path / "saved"), "drama") == render(loaded, "drama")
    assert base_model.load_tokenizer(str(tmp_path / "saved")).chat_template == loaded.chat_template


def test_a_template_that_opens_the_tag_ends_before_it():
    tokenizer = tiny_tokenizer()
    plain = render(tokenizer, "drama")
    assert render(that_opens(tokenizer), "drama") == plain


def test_special_tokens_within_a_completion_reach_the_parser():
    tokenizer = tiny_tokenizer()
    end, user, pad = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|pad|>"])
    tokens = tokenizer("<think>a</think> 2 1", add_special_tokens=False).input_ids
    text = prompts.completion_text(tokenizer, [*tokens[:-1], user, pad, tokens[-1], end, pad, pad])
    assert text == "<think>a</think> 2 <|user|><|pad|>1"  # the space is a token
    assert prompts.parse_completion(text, ["1", "2"]).failure == "junk"
    assert prompts.completion_text(tokenizer, [*tokens, end]) == "<think>a</think> 2 1"


def test_all_that_a_tokenizer_writes_before_a_text_begins_every_sequence():
    tokenizer = tiny_tokenizer()  # as of GLM
    tokenizer.add_special_tokens({"extra_special_tokens": ["[gMASK]", "<sop>"]})
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[gMASK]", "<sop>")]
    post = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=specials)
    tokenizer._tokenizer.post_processor = post
    tokenizer.chat_template = "[gMASK]<sop>" + tokenizer.chat_template
    text = render(tokenizer, "drama")
    assert tokenizer(text).input_ids == prompt_ids(tokenizer, [text])[0]
    assert prompt_ids(tokenizer, [text])[0][:2] == [ids for _, ids in specials]
    assert text.count("<sop>") == 0


def test_a_model_that_scales_its_embeddings_reads_an_items_own_vector_scaled_alike():
    embedding = Gemma3TextScaledWordEmbedding(6, 4, padding_idx=0, embed_scale=2.0)
    head = ItemHead([[1, 2], [3, 4]], 4, is_read=True)
    torch.nn.init.normal_(head.own)
    head.add_to(embedding)
    read = embedding(torch.tensor([[1, 2, 5]]))[0]
    assert torch.allclose(read[1], 2.0 * (embedding.weight[2] + head.own[0]))  # as one token with such an embedding
    assert torch.equal(read[[0, 2]], 2.0 * embedding.weight[[1, 5]])
