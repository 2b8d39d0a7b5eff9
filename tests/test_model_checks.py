"""Models that cannot be trained are refused in one line from the files of their folder; no weights load."""

import json
import re

import gguf
import numpy as np
import pytest
import quirks
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from trl import ModelConfig

from rerank.models import base as base_model
from rerank.models.checks import check_pretrained
from rerank.prompts import render


def refused(folder, message, **settings):
    with pytest.raises(ValueError, match=message) as caught:
        check_pretrained(str(folder), ModelConfig(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_can_be_trained_passes(folder, monkeypatch):
    monkeypatch.setattr(base_model, "load_pretrained", lambda *_: pytest.fail("weights load"))
    check_pretrained(str(folder), ModelConfig())
    check_pretrained("Qwen/Qwen3-8B", ModelConfig())  # a name on the hub is not asked


def test_a_tokenizer_without_a_template_is_named_with_one_that_does(folder):
    (folder / "chat_template.jinja").unlink()
    message = refused(folder, "the tokenizer of .*model has no chat template; save one as chat_template.jinja")
    template = message.partition("such as ")[2]
    (folder / "chat_template.jinja").write_text(template)
    check_pretrained(str(folder), ModelConfig())
    assert render(base_model.load_tokenizer(str(folder)), "drama") == "drama\n\n"


def test_a_tokenizer_without_an_end_is_refused_and_one_without_padding_pads_by_it(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quirks.without_pad(tokenizer).save_pretrained(folder)
    assert base_model.load_tokenizer(str(folder)).pad_token == "<|end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    refused(folder, "the tokenizer of .*model has no eos_token, so no answer would end; name one in its tokenizer_con")


@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_other_rows_than_the_configuration_says_are_refused(tmp_path, tied):
    folder = save_tiny_model(tmp_path / "model", tied)
    rows = len(AutoTokenizer.from_pretrained(folder))
    change_config(folder, vocab_size=rows + 5)
    table = "model.embed_tokens.weight" if tied else "lm_head.weight"
    refused(folder, rf"model: {table} has {rows} rows but config.json says vocab_size {rows + 5}; set .* to {rows} th")
    change_config(folder, vocab_size=rows)
    check_pretrained(str(folder), ModelConfig())


def test_quantized_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "fp8"})
    refused(folder, "model/config.json has a quantization_config, but training needs plain weights; give the model th")
    refused(folder, "load_in_8bit is not supported", load_in_8bit=True)


def test_the_folder_of_an_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_model(tiny_tokenizer()), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    refused(
        tmp_path / "adapter", "model_name_or_path .*adapter is the folder of an adapter; merge it into its base mo"
    )


def write_gguf(folder, architecture, kind):
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 292), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_a_gguf_that_cannot_be_trained_is_refused(tmp_path):
    types = gguf.GGMLQuantizationType
    unknown = write_gguf(tmp_path / "unknown", "no_such", types.Q8_K)
    refused(unknown, "unknown/m.gguf cannot be read as a model: .*no_such is not supported yet.*; give the folder of")
    packed = write_gguf(tmp_path / "packed", "llama", types.Q8_K)
    refused(packed, "packed/m.gguf: token_embd.weight is of type Q8_K, which cannot be turned into plain weights to t")
    (packed / "m.gguf").write_text("no model")
    refused(packed, "packed/m.gguf cannot be read as a model: ")


def test_an_architecture_that_is_not_known_is_refused(folder):
    change_config(folder, model_type="no_such")
    message = refused(folder, "model/config.json cannot be read as a model: .*no_such")
    assert len(re.findall("no_such", message)) < 4


def test_attention_that_is_capped_is_computed_so(tmp_path):
    folder = quirks.save_pretrained("gemma2", tmp_path / "gemma2")
    refused(
        folder,
        "attn_implementation is sdpa, which leaves out the soft-capping of .*gemma2; set",
        attn_implementation="sdpa",
    )
    check_pretrained(str(folder), ModelConfig())
    model, _ = base_model.load_pretrained(str(folder))
    ids = torch.arange(20, 40)[None]
    exact = model(input_ids=ids).logits
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert (model(input_ids=ids).logits - exact).abs().max() > 0.01  # transformers' fault, which this is about
