"""Training ends cleanly on a signal or after some minutes, and resumes where it ended."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_model import Line
from transformers import Trainer, TrainerCallback, TrainingArguments

from rerank.launch import stopping


class Record(TrainerCallback):
    """The steps that were made; interrupts this process after the step `interrupt_at`."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.steps, self.interrupt_at = [], interrupt_at

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if state.global_step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


def trainer(folder: Path, record: Record) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": torch.tensor([float(x)]), "labels": torch.tensor([2.0 * x])} for x in range(12)]
    return Trainer(Line(), args, train_dataset=rows, callbacks=[record])


def test_an_interrupted_training_leaves_a_checkpoint_and_resumes_after_it(tmp_path):
    before, first, second = signal.getsignal(signal.SIGINT), Record(interrupt_at=3), Record()
    with pytest.raises(KeyboardInterrupt):
        stopping.train(trainer(tmp_path, first))
    assert first.steps == [1, 2, 3]
    assert stopping.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert signal.getsignal(signal.SIGINT) is before
    stopping.train(trainer(tmp_path, second))
    assert second.steps == [4, 5, 6]


def test_a_training_ends_after_its_minutes(tmp_path):
    record = Record()
    stopping.train(trainer(tmp_path, record), max_minutes=0.0)
    assert record.steps == [1]


class Minutes:
    """A clock by which each step takes a minute; it begins at some hour."""

    def __init__(self, record: Record, hours: int = 0) -> None:
        self.record, self.hours = record, hours

    def __call__(self) -> float:
        return 3600.0 * self.hours + 60.0 * len(self.record.steps)


def test_minutes_are_counted_over_resumes(tmp_path):
    """Of four and a half minutes three led to the checkpoint, so that the second step after it is the last."""
    steps = []
    for hours, interrupt_at in enumerate((3, None)):
        record = Record(interrupt_at)
        with pytest.raises(KeyboardInterrupt) if interrupt_at else contextlib.nullcontext():
            stopping.train(trainer(tmp_path, record), 4.5, Minutes(record, hours))
        steps.append(record.steps)
    assert steps == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_training_counts_and_catches_signals_also_where_callbacks_are_restored(tmp_path, restores):
    """midtrain has transformers restore them where it keeps the best recall."""

    def resume(interrupt_at: int | None = None) -> list[int]:
        record = Record(interrupt_at)
        resumed = trainer(tmp_path, record)
        resumed.args.restore_callback_states_from_checkpoint = restores
        with pytest.raises(KeyboardInterrupt) if interrupt_at else contextlib.nullcontext():
            stopping.train(resumed, max_minutes=60.0)
        return record.steps

    assert resume(interrupt_at=2) == [1, 2]
    assert resume(interrupt_at=3) == [3]
    path = tmp_path / "checkpoint-3/trainer_state.json"
    state = json.loads(path.read_text())
    trained = state["stateful_callbacks"]["StopOnSignal"]["attributes"]
    assert 0 < trained["seconds_before"] < 600
    trained["seconds_before"] = 3601.0
    path.write_text(json.dumps(state))
    assert resume() == [4]


def test_a_checkpoint_that_counts_no_minutes_is_resumed_and_counts_from_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopping.train(trainer(tmp_path, Record(interrupt_at=3)))
    path = tmp_path / "checkpoint-3/trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("StopOnSignal")["attributes"]["seconds_before"] > 0
    path.write_text(json.dumps(state))
    record = Record(interrupt_at=4)
    with pytest.raises(KeyboardInterrupt):
        stopping.train(trainer(tmp_path, record), 1.5, Minutes(record))
    last = Record()
    stopping.train(trainer(tmp_path, last), 1.5, Minutes(last))
    assert (record.steps, last.steps) == ([4], [5])


def test_an_incomplete_checkpoint_is_skipped(tmp_path, caplog):
    assert stopping.last_checkpoint(tmp_path) is None
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):  # in order as numbers, not as text
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-15/trainer_state.json").write_text('{"global_st')  # cut off; that of 20 is not there yet
    assert stopping.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    for step in (15, 20):
        assert f"checkpoint-{step} is incomplete and is skipped" in caplog.text
