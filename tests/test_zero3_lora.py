"""ZeRO-3 on two CPU processes trains added tokens and an adapter, and merges it, as one process does."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quirks
import torch
from safetensors.torch import load_file
from toy_recipe import launch
from toy_run import ID_TOKENS, NUM_ITEMS, finish, toy_sequences, write_run, write_traces
from transformers import AutoTokenizer

from rerank.baselines import Counts
from rerank.launch.files import write_json
from rerank.models import base as base_model
from rerank.prompts import THINK, THINK_END

pytestmark = pytest.mark.matrix  # two processes and an extension to compile

ALONE, ZERO3 = "recipes/accelerate/cpu.yaml", "tests/toy/zero3_cpu.yaml"
LORA = ("--use_peft=true", "--lora_target_modules=[q_proj, v_proj]", "--lora_r=4", "--lora_dropout=0")
LORA += ("--lora_modules_to_save=[embed_tokens, lm_head]", "--max_steps=2")
HALF, TWICE = "--per_device_train_batch_size=4", "--gradient_accumulation_steps=2"


def assert_merged_alike(stage, runs, known):
    """Both runs have one plain model with rows for the tags, whose table of tokens and attention have moved alike."""
    one, two = (load_file(run / stage / "model/model.safetensors") for run in runs)
    assert one.keys() == two.keys() and not any("lora" in name for name in one)
    assert not any((run / stage / "model/adapter_config.json").exists() for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(runs[1] / stage / "model")
    tags = tokenizer.convert_tokens_to_ids([THINK, THINK_END])
    rows = one["model.embed_tokens.weight"]
    assert not torch.equal(*rows[tags]) and rows[tags].abs().sum() > 0
    before = known["model.embed_tokens.weight"][: min(tags)]
    assert (rows[: min(tags)] - before).abs().max() > 1e-6
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (one[name] - known[name]).abs().max() > 1e-6


def write_whole_run(folder, upto):
    """The stages up to `upto`, with all that training stages read."""
    write_run(folder, upto)
    metrics = {"data": {"items": NUM_ITEMS, "users": 30, "interactions": 240}}
    metrics["semantic_ids"] = {"levels": 2, "codebook_size": 4}
    for stage, values in metrics.items():
        path = folder / stage / "metrics.json"
        write_json(path, json.loads(path.read_text()) | values)
    return folder


def test_midtrain_of_a_padded_vocabulary(tmp_path):
    base = quirks.save_pretrained("qwen3_padded_untied", tmp_path / "base")
    runs = [write_whole_run(tmp_path / name, "semantic_ids") for name in ("one", "two")]
    words = (f"--model_name_or_path={base}", "--token_learning_rate=0.01", HALF, *LORA)
    launch(ALONE, "rerank.midtrain", "midtrain", runs[0], *words, TWICE)
    launch(ZERO3, "rerank.midtrain", "midtrain", runs[1], *words)
    assert_merged_alike("midtrain", runs, load_file(base / "model.safetensors"))


def write_traced_run(folder):
    """The stages that sft reads."""
    run = write_whole_run(folder, "candidates")
    Counts.fit(toy_sequences(), NUM_ITEMS).save(run / "candidates/evidence.npz")
    rows = [row for row in pq.read_table(run / "candidates/train.parquet").to_pylist() if row["hit"]]
    write_traces(run / "traces", {row["row_id"]: "sft" for row in rows})
    accepted = [{"row_id": row["row_id"], "trace": "it fits", "order": [1, 0, 2, 3]} for row in rows]
    pq.write_table(pa.Table.from_pylist(accepted), run / "traces/accepted.parquet")
    finish(run / "traces")
    return run


@pytest.mark.parametrize("name", ["qwen3_padded_untied", "llama3"])
def test_sft_of_a_pretrained_model_that_lacks_the_tags(tmp_path, name):
    base = quirks.save_pretrained(name, tmp_path / "base")
    model, tokenizer = base_model.load_pretrained(str(base))
    base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    runs = [write_traced_run(tmp_path / number) for number in ("one", "two")]
    words = (f"--model_name_or_path={base}", "--no_trace_control=false", HALF, *LORA)
    launch(ALONE, "rerank.sft", "sft", runs[0], *words, TWICE)
    launch(ZERO3, "rerank.sft", "sft", runs[1], *words)
    assert_merged_alike("sft", runs, load_file(base / "model.safetensors"))
