"""Trainings and rollouts in an experiment tracker: trackio itself, with its files in a folder of the test."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_dapo import SIZE, first_drawn
from toy_recipe import copy_stages, environment, launch
from trl.experimental.async_grpo import async_rollout_worker

from rerank.dapo.tracking import OWN_KEYS
from rerank.launch import recipe
from rerank.launch.stages import STAGES, load_stage
from rerank.rollouts.store import read_rollouts

TESTS = Path(__file__).parent
CPU = "recipes/accelerate/cpu.yaml"
RECIPES = [
    (path, stage)
    for stage in STAGES
    if load_stage(stage).trains
    for path in sorted([*Path("recipes").glob(f"*/?_{stage}*.yaml"), *Path("tests/toy").glob(f"?_{stage}.yaml")])
]
TRAIN = """
import sys
from pathlib import Path

import numpy as np
import trackio
from scripted_dapo import first_drawn, useful_for
from scripted_trainer import make_trainer
from trl.experimental.async_grpo.async_grpo_trainer import log_rollout_traces
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

make_trainer(
    Path(sys.argv[1]), useful_for(first_drawn(8, 8)[1:3]), rounds=3, max_steps=2,
    report_to=["trackio"], run_name="toy/dapo", project="rerank",
).train()

trackio.init(project="rerank", name="trl")
texts = [[{"role": role, "content": role}] for role in ("user", "assistant")]
numbers = [np.ones(3, dtype=kind) for kind in (np.int64, np.int64, np.float32)]
log_rollout_traces([RolloutSample(*texts, *numbers, 0.5, 0, 0, {})], step=0, report_to=["trackio"])
trackio.finish()
"""
READ = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage as storage

runs = [run.name for run in trackio.Api().runs("rerank")]
found = {run: {"logs": storage.get_logs("rerank", run), "traces": storage.get_traces("rerank", run)} for run in runs}
print(json.dumps(found))
"""


def run_script(script, *words):
    line = [sys.executable, "-c", script, *map(str, words)]
    paths = os.pathsep.join([str(TESTS), *sys.path])  # of this process
    done = subprocess.run(line, env={**environment(), "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def tracked():
    """What trackio has of each run of the project."""
    return json.loads(run_script(READ).splitlines()[-1])


@pytest.fixture
def trackio_dir(tmp_path, monkeypatch):
    """The folder of trackio's files, for the processes that a test starts."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def test_one_kept_and_one_discarded_group_a_step_are_traces_with_trls_keys_and_ours(tmp_path, trackio_dir):
    run_script(TRAIN, tmp_path)
    found = tracked()
    traces, stored = found["toy/dapo"]["traces"], read_rollouts(tmp_path).to_pylist(maps_as_pydicts="strict")
    groups = {(of["metadata"]["model_version"], of["metadata"]["kept"], of["metadata"]["row_id"]) for of in traces}
    order = first_drawn(8, 8)
    first = {(0, True, order[1]), (0, False, order[0])}
    assert first < groups and len(groups) == 4 and {step for step, _, _ in groups} == {0, 1}
    assert len(traces) == 4 * SIZE and {of["step"] for of in traces} == {0, 1}
    for trace in traces:
        told, (prompt, answer) = trace["metadata"], trace["messages"]
        of_group = [of for of in stored if (of["step"], of["group"]) == (told["model_version"], told["group_id"])]
        (of,) = [of for of in of_group if of["completion"] == answer["content"]]
        assert (prompt["role"], answer["role"], prompt["content"]) == ("user", "assistant", of["prompt"])
        assert {name: told[name] for name in OWN_KEYS} == {name: of[name] for name in OWN_KEYS}
        assert told["reward"] == pytest.approx(of["reward"]) and told["advantage"] == of["advantage"]
        rewards = {name.removeprefix("rewards/"): told[name] for name in told if name.startswith("rewards/")}
        assert rewards == of["reward_components"] and told["completion_tokens"] == len(of["completion_ids"])
        mean = sum(member["reward"] for member in of_group) / SIZE
        spread = sum((member["reward"] - mean) ** 2 for member in of_group) / SIZE
        assert told["reward_std"] == pytest.approx(spread**0.5, abs=1e-6)
    (theirs,) = found["trl"]["traces"]
    assert theirs["metadata"].keys() < traces[0]["metadata"].keys()
    assert all(name in inspect.getsource(async_rollout_worker) for name in ('"reward"', '"reward_std"', 'f"rewards/{'))


@pytest.mark.parametrize(("path", "stage"), RECIPES, ids=str)
def test_report_to_passes_through_every_recipe_of_a_training(path, stage):
    given = {"run_dir": "runs/mine", "use_cpu": True, "bf16": False, "report_to": "trackio"}
    settings = recipe.resolve(stage, recipe.load(path) | given, path.name)[1]
    assert (settings.report_to, settings.run_name, settings.project) == (["trackio"], f"mine/{stage}", "rerank")
    named = recipe.resolve(stage, recipe.load(path) | given | {"run_name": "a", "project": "b"}, path.name)[1]
    assert (named.run_name, named.project) == ("a", "b")


def test_a_stage_that_trains_twice_has_two_runs_with_all_that_was_logged(toy_run, tmp_path, trackio_dir):
    run = copy_stages(toy_run.run, tmp_path / "mine", "traces")
    launch(CPU, "rerank.sft", "sft", run, "--report_to=trackio")
    found = tracked()
    assert found.keys() == {"mine/sft", "mine/sft_no_trace"}
    for name, of in found.items():
        suffix = name.removeprefix("mine/sft")
        log = json.loads((run / f"sft/log_history{suffix}.json").read_text())
        for theirs, ours in (("eval/N@5", "eval_N@5"), ("train/loss", "loss")):
            wanted = [entry[ours] for entry in log if ours in entry]
            assert wanted and [entry[theirs] for entry in of["logs"] if theirs in entry] == pytest.approx(wanted)
