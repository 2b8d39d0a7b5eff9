"""Models that cannot be trained are refused in one line from the files of their folder; no weights load."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import quirks
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from trl import ModelConfig

from rerank.models import base as base_model
from rerank.models.checks import check_pretrained, unknown_of
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


def test_a_template_beside_a_gguf_file_is_taken(tmp_path):
    packed = write_gguf(tmp_path / "packed", "llama", gguf.GGMLQuantizationType.Q8_0, ["<end>", "d", "r", "dr", "rd"])
    message = refused(packed, "the tokenizer of .*packed has no chat template; save one as chat_template.jinja")
    (packed / "chat_template.jinja").write_text(message.partition("such as ")[2])
    check_pretrained(str(packed), ModelConfig())
    assert render(base_model.load_tokenizer(str(packed)), "dr") == "dr\n\n"


def test_gemma_in_a_gguf_file_splits_texts_by_its_merges_and_writes_its_first_token(tmp_path):
    tokens = ["<bos>", "<eos>", "<unk>", "▁", "d", "r", "▁d", "▁dr"]
    scores = [-1000.0] * 3 + [-5.0, -4.0, -2.0, -1.0, -10.0]  # as unigrams "▁d" and "r" weigh less than "▁dr"
    packed = write_gguf(tmp_path / "packed", "gemma3", gguf.GGMLQuantizationType.Q8_0, tokens, scores)
    read = AutoTokenizer.from_pretrained(packed, gguf_file="m.gguf")
    assert read.tokenize(" dr") == ["▁d", "r"] and read("").input_ids == []
    tokenizer = base_model.load_tokenizer(str(packed))
    assert tokenizer(" dr").tokens() == ["<bos>", "▁dr"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(" dr").tokens() == ["<bos>", "▁dr"]


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


def write_gguf(folder, architecture, kind, tokens=(), scores=()):
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture)
    writer.add_block_count(1)
    if tokens:
        writer.add_tokenizer_model("llama" if scores else "gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
        if scores:
            writer.add_token_scores(scores)
        else:
            writer.add_token_merges(["d r", "r d"])
        writer.add_add_bos_token(bool(scores))
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(int(bool(scores)))
    row = np.zeros(gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8)
    writer.add_tensor("token_embd.weight", np.stack([row] * 4), raw_dtype=kind)
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


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_git_left_out_is_named(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / name).write_text(pointer)
    refused(folder, f"model/{name} is a pointer of Git LFS, not the file itself; run `git lfs pull` in that folder")


def test_weights_that_are_not_there_are_named(folder):
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    refused(folder, "model has no weights, neither model.safetensors nor model.safetensors.index.json with its shards")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "whole.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    refused(
        folder, "model/model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names; copy"
    )
    index.write_text("[]")
    refused(folder, "model.safetensors.index.json is no index of weights; download it again")
    index.write_text(json.dumps({"weight_map": {"a": "whole.safetensors"}}))
    check_pretrained(str(folder), ModelConfig())
    (folder / "whole.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:500])
    refused(folder, "model/whole.safetensors cannot be read: .*; download it again")


def test_a_tokenizer_that_is_not_there_or_cannot_be_read_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "the tokenizer of .*model cannot be read: .*; copy the model's tokenizer files again")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert (folder / "chat_template.jinja").is_file()
    refused(folder, "model has no tokenizer.json and no other vocabulary; copy the model's tokenizer files into it")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "can only concatenate str"),
    ],
)
def test_a_chat_template_that_writes_no_prompt_is_named(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    message = rf"the chat template of .*model cannot write a user message: .*{reason}.*; correct chat_template.ji"
    refused(folder, message)


def test_a_tag_that_is_a_special_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "<think> is a special token of the tokenizer of .*, where it must be an ordinary token; change")


def test_of_a_name_on_the_hub_what_the_cache_holds_is_checked(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--model/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--org--model/refs").mkdir()
    (tmp_path / "models--org--model/refs/main").write_text("abc")
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the tokenizer of .*abc has no chat template"):
        check_pretrained("org/model", ModelConfig())
    assert unknown_of("org/model") == ""
    for path in snapshot.glob("tokenizer*"):
        path.unlink()
    check_pretrained("org/model", ModelConfig())
    assert unknown_of("org/model") == "chat template and tokenizer"
    assert unknown_of("org/other") == "memory, chat template and tokenizer"


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
