"""Lengths beyond a model's context are refused in one line, wherever its configuration comes from."""

import gguf
import numpy as np
import pytest
from huggingface_hub import constants
from next_item_run import write_next_item_run
from tiny_model import save_tiny_model, sft_config, tiny_model, tiny_tokenizer
from trl import ModelConfig

from rerank import dapo, midtrain, sft
from rerank.launch import across
from rerank.models import configs, memory

REWARDS = [{"name": "rank_promotion"}]


def in_cache(folder, monkeypatch):
    """The configuration of org/model, of a context of 256, in a cache of Hugging Face."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    repository = folder / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    tiny_model(tiny_tokenizer()).config.save_pretrained(repository / "snapshots/abc")
    return "org/model"


def write_gguf(folder):
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_context_length(48)
    for add, value in ((writer.add_block_count, 1), (writer.add_embedding_length, 32), (writer.add_vocab_size, 4),
                       (writer.add_feed_forward_length, 64), (writer.add_head_count, 2)):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def brought(folder, monkeypatch):
    """A package that brings a model."""
    save_tiny_model(folder / "brought_model/weights")
    (folder / "brought_model/__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    return "package:brought_model"


@pytest.mark.parametrize(("make", "context"), [(in_cache, 256), (brought, 256)])
def test_a_context_is_known_of_a_hub_name_in_the_cache_and_of_a_package(tmp_path, monkeypatch, make, context):
    assert configs.context_length(configs.load_config(make(tmp_path, monkeypatch))) == context


def test_a_context_is_known_of_a_gguf_file_and_not_of_a_model_that_is_not_here(tmp_path):
    assert configs.context_length(configs.load_config(str(write_gguf(tmp_path / "packed")))) == 48
    assert configs.find_config("org/no_such_model") is None


def midtrain_check(folder, name=None, **options):
    args = midtrain.MidtrainArguments(run_dir="run", num_documents=10, context_length=128)
    midtrain.check(args, sft_config(folder, **options), ModelConfig(model_name_or_path=name))


def test_documents_may_be_as_long_as_the_context_and_no_longer(tmp_path, monkeypatch):
    midtrain_check(tmp_path, max_length=128)
    with pytest.raises(ValueError, match="max_length is 129 but the context of the small model is 128; lower max_len"):
        midtrain_check(tmp_path, max_length=129)
    name = in_cache(tmp_path / "cache", monkeypatch)
    midtrain_check(tmp_path, name, max_length=256)
    with pytest.raises(
        ValueError, match="max_length is 257 but the context of org/model is 256; lower max_length, or"
    ):
        midtrain_check(tmp_path, name, max_length=257)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"vllm_max_model_length": 100, "max_completion_length": 500},
            "vllm_max_model_length is 100 but max_completion_length is 500, which leaves no room for a prompt; raise",
        ),
        ({"vllm_max_model_length": 300}, "vllm_max_model_length is 300 but the context of .* is 256; lower vllm_max_"),
        ({"max_completion_length": 256}, "max_completion_length, with a prompt's first token, is 257 but the context"),
    ],
)
def test_rollouts_beyond_the_context_are_refused(tmp_path, limits, message):
    args = dapo.DapoArguments(run_dir=str(tmp_path / "run"), rewards=REWARDS)
    config = dapo.DapoConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **limits)
    start = save_tiny_model(tmp_path / "run/sft/model")
    with pytest.raises(ValueError, match=message):
        dapo.check(args, config, ModelConfig())
    (start / "config.json").unlink()
    if "vllm_max_model_length" not in limits or "max_completion_length" not in limits:
        dapo.check(args, config, ModelConfig())
        small = midtrain.MidtrainArguments(run_dir=str(tmp_path / "run"), num_documents=10, context_length=256)
        stages = {"midtrain": (small, sft_config(tmp_path), ModelConfig()), "dapo": (args, config, ModelConfig())}
        stages["sft"] = (sft.SftArguments(run_dir=str(tmp_path / "run")), sft_config(tmp_path), ModelConfig())
        ordered = {name: stages[name] for name in ("midtrain", "sft", "dapo")}
        with pytest.raises(ValueError, match=message):  # of a model that is still to be made
            across.check_across(ordered, {})
        assert memory.configs(ordered)["dapo"].max_position_embeddings == 256


def test_rows_of_next_items_beyond_the_context_are_refused(tmp_path):
    run = write_next_item_run(tmp_path / "run")
    config = configs.read_config(run / "midtrain/model")
    config.max_position_embeddings = 8
    config.save_pretrained(run / "midtrain/model")
    args = sft.SftArguments(run_dir=str(run), task="next_item", max_items=20)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ValueError, match="rows are longer than the context of .*midtrain/model, 8; lower max_items, or"
    ):
        sft.main(args, sft_config(tmp_path / "out/checkpoints", max_steps=1), ModelConfig(), tmp_path / "out")
