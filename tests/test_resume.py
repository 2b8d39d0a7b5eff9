"""Killed at any moment, the same command resumes from the last checkpoint; nothing of a killed run stays behind."""

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from toy_recipe import TOY, copy_stages, environment, run_words
from transformers import AutoModelForCausalLM

from rerank import cli
from rerank.launch import run_dir, stopping
from rerank.rollouts import store as rollouts

PATIENCE = 300  # seconds for a launch, which takes 15 on a quiet machine
BATCH = 8
# stage: the one before it, its steps, steps between checkpoints
STAGES = {"midtrain": ("semantic_ids", 160, 20), "dapo": ("sft", 14, 2)}


class Launched:
    """A `rerank run` of one stage in the background, its output in a file."""

    def __init__(self, run, stage, words, log):
        self.run, self.stage, self.log = run, stage, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                run_words(run, "--only", stage, *words),
                env=environment(), stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
            )  # fmt: skip

    def wait_for(self, is_so):
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert self.process.poll() is None, f"ended too early: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def last_step(self):
        checkpoint = stopping.last_checkpoint(run_dir.partial_dir(self.run, self.stage) / "checkpoints")
        return 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])

    def trainer(self):
        return int((run_dir.partial_dir(self.run, self.stage) / "holder.pid").read_text())

    def processes(self):
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def end(self):
        return self.process.wait(PATIENCE)


def assert_gone(processes, seconds=20):
    deadline = time.monotonic() + seconds
    while alive := [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def kill_launcher(launched):
    """kill -9 of `rerank run`; everything below it ends by itself."""
    processes = launched.processes()
    assert len(processes) >= 3  # rerank run, accelerate launch, the stage
    launched.process.kill()
    launched.process.wait()
    assert_gone(processes)


def kill_trainer(launched):
    """kill -9 of the stage's own process; the launcher says so and ends."""
    processes = launched.processes()
    os.kill(launched.trainer(), signal.SIGKILL)
    assert launched.end() == 1
    assert_gone(processes)
    assert f"[1/1] {launched.stage} failed with exit code 1; the same command continues" in launched.log.read_text()


@pytest.fixture
def launch(tmp_path):
    """Start runs; whatever is left of them at the end is killed."""
    started = []

    def start(run, stage, *words):
        log = tmp_path / f"log-{len(started)}"
        started.append(Launched(run, stage, words, log))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            for process in launched.processes():
                process.kill()


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_resumes_from_its_last_checkpoint(toy_run, tmp_path, launch, stage):
    before, steps, save_steps = STAGES[stage]
    run = copy_stages(toy_run.run, tmp_path / "run", before)
    words = (f"{stage}.max_steps={steps}", f"{stage}.save_steps={save_steps}")

    first = launch(run, stage, *words)
    first.wait_for(lambda: first.last_step() >= save_steps)
    kill_launcher(first)
    after_launcher = first.last_step()

    second = launch(run, stage, *words)
    second.wait_for(lambda: second.last_step() >= after_launcher + save_steps)
    kill_trainer(second)
    after_trainer = second.last_step()
    assert save_steps <= after_launcher < after_trainer < steps

    kept = {name: at for name, at in parts(run / "dapo.partial").items() if int(name.split("-")[1]) < after_trainer}
    third = launch(run, stage, *words)
    assert third.end() == 0, third.log.read_text()[-3000:]

    history = json.loads((run / stage / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, steps + 1))
    assert third.log.read_text().count("'loss':") == steps - after_trainer  # no finished step is made again
    assert run_dir.read_metrics(run, stage)["steps"] == steps
    assert AutoModelForCausalLM.from_pretrained(run / stage / "model").num_parameters() > 0
    assert not list(run.glob("*.partial"))
    if stage == "dapo":
        stored = rollouts.read_rollouts(run).to_pylist()
        assert [row["step"] for row in stored] == [step for step in range(steps) for _ in range(BATCH)]
        assert kept and kept.items() <= parts(run / "dapo").items()


def parts(folder):
    """Name -> time of writing of each part of the rollouts."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "rollouts").glob("part-*.parquet")}


def test_a_second_run_names_the_first_and_ctrl_c_leaves_a_checkpoint(toy_run, tmp_path, launch, capsys):
    run = copy_stages(toy_run.run, tmp_path / "run", "semantic_ids")
    words = ("midtrain.max_steps=1000000", "midtrain.save_steps=1000000")
    first = launch(run, "midtrain", *words)
    first.wait_for(lambda: "'loss':" in first.log.read_text())

    assert cli.main(["run", str(TOY), "--out", str(run), "--only", "midtrain", *words]) == 2
    line = f"rerank: {run}/midtrain.partial is in use by process {first.trainer()}; wait for it, or stop it with"
    assert capsys.readouterr().err.startswith(line)

    processes = first.processes()
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130
    assert_gone(processes)
    assert first.last_step() > 0
    assert "[1/1] midtrain was stopped; the same command continues from here" in first.log.read_text()
