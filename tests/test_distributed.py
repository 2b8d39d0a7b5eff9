"""Two processes, plain and with DeepSpeed ZeRO, train as one process does: real engines, real gradients.

The one process is that of the toy run; its rows and its stored rollouts are what the two train on.
"""

import functools
import json

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from toy_recipe import copy_stages, launch

from rerank.launch import run_dir

ALONE = "recipes/accelerate/cpu.yaml"
DDP, ZERO2, ZERO3 = "recipes/accelerate/cpu_2proc.yaml", "tests/toy/zero2_cpu.yaml", "tests/toy/zero3_cpu.yaml"
# Of `make matrix` alone: another test has the same stage, or the same accelerate file, in two processes.
DDP_TOO, ZERO3_TOO = (pytest.param(accelerate, marks=pytest.mark.matrix) for accelerate in (DDP, ZERO3))
STEPS = 3
HALF_BATCH = "--per_device_train_batch_size=4"  # of the recipes' 8, so that the two processes together see as many


def logged(run, stage, name):
    history = json.loads((run / stage / "log_history.json").read_text())
    return [entry[name] for entry in history if name in entry][:STEPS]


def assert_same_logs(stage, one, two, *names, by=1e-4, steps=STEPS):
    for name in names:
        expected = pytest.approx(logged(one, stage, name)[:steps], abs=by)
        assert logged(two, stage, name)[:steps] == expected, name


@pytest.fixture(scope="module")
def midtrained_alone(toy_run, tmp_path_factory):
    """A run whose midtrain, of both phases, ran in one process, and the words that made it so."""
    folder = tmp_path_factory.mktemp("midtrained")
    base = save_tiny_model(folder / "base", tied=False, id_tokens=False)
    words = (f"--model_name_or_path={base}", "--token_learning_rate=0.01", "--max_steps=2", HALF_BATCH)
    one = copy_stages(toy_run.run, folder / "one", "semantic_ids")
    launch(ALONE, "rerank.midtrain", "midtrain", one, *words, "--gradient_accumulation_steps=2")
    return one, words


@pytest.mark.parametrize("accelerate", [DDP_TOO, ZERO3_TOO])
def test_both_phases_of_midtrain_in_two_processes_train_as_in_one(toy_run, midtrained_alone, tmp_path, accelerate):
    one, words = midtrained_alone
    two = copy_stages(toy_run.run, tmp_path / "two", "semantic_ids")
    launch(accelerate, "rerank.midtrain", "midtrain", two, *words)
    assert_same_logs("midtrain", one, two, "loss", "grad_norm", "loss_sequence", "tokens_sequence")
    rows = [load_file(run / "midtrain/new_rows.safetensors") for run in (one, two)]
    assert rows[0].keys() == rows[1].keys() == {"rows", "head_rows"}
    assert all(torch.allclose(rows[0][name], rows[1][name], atol=1e-4) for name in rows[0])


@pytest.mark.parametrize("accelerate", [DDP_TOO, ZERO3])
def test_sft_in_two_processes_has_the_losses_of_one(toy_run, tmp_path, accelerate):
    run = copy_stages(toy_run.run, tmp_path / "run", "traces")
    launch(accelerate, "rerank.sft", "sft", run, f"--max_steps={STEPS}", HALF_BATCH)
    # accelerate fills a short last batch with rows of the first, so that the processes have equally many
    whole_batches = parquet.read_metadata(run / "traces/accepted.parquet").num_rows // 8
    assert whole_batches >= 2
    assert_same_logs("sft", toy_run.run, run, "loss", "grad_norm", steps=whole_batches)
    # 3 nats for a token of a model that knows nothing: log(500) = 6.2 at the most
    assert min(logged(run, "sft", "loss")) > 0.1


NEXT_ITEM = (
    "--task=next_item", "--no_trace_control=false", f"--max_steps={STEPS}", HALF_BATCH,
    "--losses=[{name: bear}, {name: iirg}, {name: cllm4rec}]",
)  # fmt: skip
LORA = ("--use_peft=true", "--lora_target_modules=[all-linear]", "--lora_r=4", "--lora_dropout=0")


@pytest.fixture(scope="module")
def tuned_alone(toy_run, tmp_path_factory):
    """By the words beside NEXT_ITEM, a run whose sft ran with them in one process; each is made once."""

    @functools.cache
    def tune(words):
        one = copy_stages(toy_run.run, tmp_path_factory.mktemp("tuned") / "one", "midtrain")
        launch(ALONE, "rerank.sft", "sft", one, *NEXT_ITEM, *words, "--gradient_accumulation_steps=2")
        return one

    return tune


@pytest.mark.parametrize(
    ("accelerate", "words"),
    [*(pytest.param(accelerate, (), marks=pytest.mark.matrix) for accelerate in (DDP, ZERO2)), (ZERO2, LORA)],
    ids=["ddp", "zero2", "lora"],
)
def test_all_losses_in_two_processes_are_those_of_one(toy_run, tuned_alone, tmp_path, accelerate, words):
    one, two = tuned_alone(words), copy_stages(toy_run.run, tmp_path / "two", "midtrain")
    launch(accelerate, "rerank.sft", "sft", two, *NEXT_ITEM, *words)
    parts = ("next_item", "semantic", "collaborative", "content", "item_head", "mutual_regularisation")
    assert_same_logs("sft", one, two, "loss", "grad_norm", *(f"loss_{part}" for part in parts), by=2e-4)
    heads = [load_file(run / "sft/model/item_head.safetensors")["own"] for run in (one, two)]
    assert torch.allclose(*heads, atol=1e-3) and heads[0].abs().max() > 0
    models = [load_file(run / "sft/model/model.safetensors") for run in (one, two)]
    models[1].pop("lm_head.weight", None)  # DeepSpeed writes the tied head too
    assert models[0].keys() == models[1].keys() and not any("loss_parameters" in name for name in models[0])


def test_a_stage_of_one_process_does_not_wait_for_the_others(toy_run, tmp_path):
    launch(ZERO2, "rerank.data", "data", tmp_path / "run")
    assert run_dir.is_finished(tmp_path / "run", "data")
