"""DAPO in two processes, plain and with DeepSpeed ZeRO, samples and trains as one process does."""

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import ALONE, DDP, HALF_BATCH, LORA, ZERO2, ZERO3, assert_same_logs, logged
from toy_recipe import copy_stages, launch

from rerank.launch import run_dir
from rerank.rollouts import store as rollouts

ZERO2_TOO = pytest.param(ZERO2, marks=pytest.mark.matrix)  # of `make matrix` alone


@pytest.mark.parametrize("accelerate", [ZERO2_TOO, ZERO3])  # without DeepSpeed: a test below, which samples too
def test_dapo_in_two_processes_has_the_losses_of_one(toy_run, tmp_path, accelerate, monkeypatch):
    monkeypatch.setenv("TOY_ROLLOUTS", str(toy_run.run))
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    launch(accelerate, "tests.replay_dapo", "dapo", run, HALF_BATCH)
    assert_same_logs("dapo", toy_run.run, run, "loss", "grad_norm", "reward")
    assert min(abs(loss) for loss in logged(run, "dapo", "loss")) > 0.005  # lengths differ, so it does not vanish
    assert run_dir.read_metrics(run, "dapo")["max_logp_gap"] < 0.02
    assert_same_rollouts(toy_run.run, run)


def assert_same_rollouts(one, two):
    """The same completions, scored alike, by step and group."""
    places = [("step", "ascending"), ("group", "ascending")]
    theirs, ours = (rollouts.read_rollouts(folder).sort_by(places).to_pylist() for folder in (one, two))
    assert len(ours) == len(theirs)
    for first, second in zip(theirs, ours, strict=True):
        same = ("step", "round", "group", "row_id", "completion_ids", "reward_components", "kept")
        assert [first[name] for name in same] == [second[name] for name in same]
        assert first["advantage"] == pytest.approx(second["advantage"], abs=1e-5)


def test_dapo_samples_and_trains_alike_in_one_process_and_in_two(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    launch(DDP, "rerank.dapo", "dapo", run, HALF_BATCH)
    assert_same_logs("dapo", toy_run.run, run, "loss", "grad_norm", "reward", "groups/prompts_drawn")
    assert_same_rollouts(toy_run.run, run)


@pytest.mark.matrix  # alone
def test_two_runs_of_dapo_with_lora_are_the_same(toy_run, tmp_path):
    runs = [copy_stages(toy_run.run, tmp_path / name, "sft") for name in ("one", "two")]
    for run in runs:
        launch(ALONE, "rerank.dapo", "dapo", run, *LORA, "--max_steps=2")
    assert logged(runs[0], "dapo", "loss") == logged(runs[1], "dapo", "loss")
    models = [load_file(run / "dapo/model/model.safetensors") for run in runs]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    start = load_file(toy_run.run / "sft/model/model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in models[0].items())
