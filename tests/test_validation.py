"""Validation rows ranked while a small model trains: when, what is kept, and that a resumed run decides the same."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import Line
from toy_run import finish
from transformers import Trainer, TrainerCallback, TrainingArguments

from rerank.launch import stopping
from rerank.launch.validation import METRIC, ValidatedArguments, Validation, best, measure, smoothed, validation_rows
from rerank.prompts import completion
from rerank.rows import PromptedRow, RankingRow

LABELS = ["1", "2", "3", "4"]
ASKED = [
    PromptedRow(RankingRow(i, (0,), (1, 2, 3, 4), tuple(float(place == i) for place in range(4))), "", LABELS, 9)
    for i in range(4)
]


class Interrupt(TrainerCallback):
    """Interrupts this process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class StopAt(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def ranking_of(target: int, place: int) -> str:
    """An answer to a row that puts its target at a place."""
    others = [candidate for candidate in range(4) if candidate != target]
    return completion("why", [*others[:place], target, *others[place:]], LABELS)


def start(folder: Path, hits, max_steps=24, every=None, callbacks=(), logging_steps=1000, **options):
    """A trainer of `Line` with its checks: at step s the first hits(s) of the four rows have their target first."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=2, save_steps=4, save_total_limit=2,
        eval_steps=every, use_cpu=True, report_to="none", disable_tqdm=True, seed=0,
        logging_steps=logging_steps,
    )  # fmt: skip
    rows = [{"x": torch.tensor([float(x)]), "labels": torch.tensor([2.0 * x])} for x in range(12)]
    trainer = Trainer(Line(), args, train_dataset=rows, callbacks=[*callbacks])

    def complete(asked):
        number = hits(trainer.state.global_step)
        return [ranking_of(row.row.target, 0 if i < number else 3) for i, row in enumerate(asked)]

    own = ValidatedArguments(run_dir="run", **options)
    return trainer, Validation(own, ASKED, complete, trainer)


def weight(folder: Path) -> float:
    return load_file(folder / "model.safetensors")["weight"].item()


def test_a_check_is_smoothed_with_its_neighbours():
    assert smoothed([1.0, 2.0, 6.0, 0.0]) == [1.5, 3.0, pytest.approx(8 / 3), 3.0]
    assert smoothed([0.5]) == [0.5]


def test_checks_are_due_after_a_share_of_the_run_where_the_recipe_gives_one(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 1, max_steps=24, every=0.25)
    stopping.train(trainer)
    assert [step for step, _ in checks.checks] == [0, 6, 12, 18, 24]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([0.5], 0),
        ([0.1, 0.6], 1),  # of two checks the means are the same: their own values decide
        ([0.6, 0.6], 0),
        ([0.5, 0.6, 0.6, 0.6], 2),  # the last two have the same mean; the first of equals
        ([0.5, 0.5, 0.5], 0),
        ([0.1, 0.9, 0.1, 0.6, 0.6, 0.6], 4),  # a lucky check alone is not kept
        ([0.5, 0.4, 0.9, 0.4, 0.4], 2),
        ([0.5, 0.3, 0.9, 0.49, 0.9, 0.5], 5),  # the fourth has the best mean, but its own check is below the start
    ],
)
def test_the_best_check_is_that_of_the_best_mean_and_not_below_the_start(values, place):
    assert best(values) == place


def test_what_is_kept_is_never_below_the_start_and_the_first_of_the_best():
    rng = np.random.default_rng(0)
    for values in rng.integers(0, 6, (200, 9)) / 10:
        kept, means = best(values), smoothed(values)
        eligible = [place for place in range(9) if values[place] >= values[0]]
        assert values[kept] >= values[0]
        order = [(mean, value) for mean, value in zip(means, values, strict=True)]
        assert all(order[kept] > order[place] for place in eligible if place < kept)
        assert all(order[kept] >= order[place] for place in eligible)


def test_the_measures_are_those_of_an_evaluation():
    answers = [ranking_of(0, 0), ranking_of(1, 2), "junk", ranking_of(3, 3)]
    found = measure(ASKED, answers)
    assert found["eval_R@1"] == 1 / 4
    assert found[METRIC] == pytest.approx((1 + 1 / 2 + 0 + 1 / np.log2(5)) / 4)
    assert found["eval_parse_failures"] == 1 / 4
    assert found["eval_copy_rate"] == pytest.approx(2 / 3)  # the first and the last show their target where it was
    assert np.isnan(measure(ASKED[:1], ["junk"])["eval_copy_rate"])


def test_a_step_with_a_check_logs_its_training_too(tmp_path):
    trainer, _ = start(tmp_path, lambda step: 1, max_steps=6, every=2, logging_steps=1)
    stopping.train(trainer)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [*range(1, 7)]


def test_rows_are_ranked_a_dozen_times_and_the_best_state_is_kept(tmp_path):
    hits = {0: 1, 2: 1, 4: 2, 6: 3, 8: 4, 10: 3, 12: 2}
    trainer, checks = start(tmp_path, lambda step: hits.get(step, 1))
    stopping.train(trainer)
    kept = checks.finish()
    assert [step for step, _ in checks.checks] == list(range(0, 25, 2))
    assert kept == tmp_path / "model-8"
    summary = checks.summary()["kept"]
    assert summary["step"] == 8 and summary["of_steps"] == 24 and summary["checks"] == 13 and summary["rows"] == 4
    assert summary["value"] == 1.0 and summary["minus_start"] == pytest.approx(1 - checks.checks[0][1])
    other, same = start(tmp_path / "short", lambda step: 1, max_steps=24)
    other.add_callback(StopAt(8))
    stopping.train(other)
    same.finish()
    assert weight(kept) == other.model.weight.item() != trainer.model.weight.item()
    logged = [entry for entry in trainer.state.log_history if METRIC in entry]
    assert all({"eval_R@1", "eval_parse_failures", "eval_copy_rate", "eval_seconds", "step"} <= set(e) for e in logged)


def test_a_training_that_only_gets_worse_hands_back_its_start(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 3 if step == 0 else 1)
    stopping.train(trainer)
    kept = checks.finish()
    assert weight(kept) == 0.0 and checks.kept_step == 0 and checks.summary()["kept"]["minus_start"] == 0


def test_checks_change_nothing_that_is_trained(tmp_path):
    plain, _ = start(tmp_path / "plain", lambda step: 1, eval_rows=0)
    plain.callback_handler.remove_callback(Validation)
    checked, _ = start(tmp_path / "checked", lambda step: 1)
    for trainer in (plain, checked):
        stopping.train(trainer)
    assert plain.model.weight.item() == checked.model.weight.item()


def test_the_last_model_is_kept_where_the_recipe_says_so(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 4 if step < 3 else 1, keep="last")
    stopping.train(trainer)
    assert checks.finish() is None and checks.summary()["kept"]["step"] == 24
    assert not list(tmp_path.glob("model-*"))


def test_patience_ends_a_training(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 3 if step in (4, 6) else 2, every=2, patience=3)
    stopping.train(trainer)
    assert checks.finish() == tmp_path / "model-4"
    assert trainer.state.global_step == 10  # of 4 and 6, which are as good, the first; then 8 and 10


def test_the_end_is_measured_wherever_it_falls(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 1 + (step == 5), every=2)
    trainer.add_callback(StopAt(5))
    stopping.train(trainer)
    assert checks.finish() is None  # the trainer's own weights
    assert [step for step, _ in checks.checks] == [0, 2, 4, 5] and checks.kept_step == 5


def test_weights_that_nobody_can_keep_any_more_are_deleted(tmp_path):
    trainer, checks = start(tmp_path, lambda step: 4 if step == 8 else 2 if step in (6, 10) else 1, every=2)
    stopping.train(trainer)
    assert {path.name for path in tmp_path.glob("model-*")} == {f"model-{step}" for step in (8, 16, 20, 24)}
    # the last check of a run that resumes from checkpoint-16 or checkpoint-20, which were there at step 24


@pytest.mark.parametrize("interrupted", [5, 8, 13])
def test_a_resumed_run_decides_as_one_that_was_not_interrupted(tmp_path, interrupted):
    hits = {0: 1, 2: 2, 4: 2, 6: 3, 8: 3, 10: 3, 12: 2}

    def of_step(step):
        return hits.get(step, 1)

    trainer, checks = start(tmp_path / "whole", of_step)
    stopping.train(trainer)
    kept = checks.finish()
    first, _ = start(tmp_path / "parts", of_step, callbacks=[Interrupt(interrupted)])
    with pytest.raises(KeyboardInterrupt):
        stopping.train(first)
    second, resumed = start(tmp_path / "parts", of_step)
    stopping.train(second)
    again = resumed.finish()
    assert resumed.checks == checks.checks and again.name == kept.name == "model-8"
    assert weight(again) == weight(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0 but must be at least 1"),
        ({"keep": "first"}, "keep is 'first' but must be one of best, last"),
        ({"eval_rows": -1}, "eval_rows is -1 but must be at least 0"),
    ],
)
def test_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        ValidatedArguments(run_dir="run", **options)


def table(*rows):
    """A candidates table of rows (user, history, hit)."""
    return pa.Table.from_pylist(
        [
            {"row_id": i, "user": user, "history": history, "candidates": [3, 4], "relevance": [float(hit), 0.0]}
            for i, (user, history, hit) in enumerate(rows)
        ]
    )


def test_validation_rows_are_rows_of_hits_in_a_seeded_choice(tmp_path):
    train = table((0, [1], True))
    finish(tmp_path / "candidates", train=train, valid=table(*((user, [2], user % 3 > 0) for user in range(30))))
    everything = validation_rows(tmp_path, 500)
    assert [row.row_id for row in everything] == [user for user in range(30) if user % 3]
    few = validation_rows(tmp_path, 7)
    assert few == validation_rows(tmp_path, 7) and len(few) == 7
    assert validation_rows(tmp_path, 0) == []


def test_bad_validation_rows_are_refused(tmp_path):
    train = table((0, [1], True), (5, [1, 2], True))
    finish(tmp_path / "none/candidates", train=train, valid=table((0, [1], False)))
    with pytest.raises(ValueError, match="none of its 1 rows lists a relevant item.*or set eval_rows: 0"):
        validation_rows(tmp_path / "none", 500)
    finish(tmp_path / "same/candidates", train=train, valid=table((5, [1], True), (5, [1, 2], True)))
    with pytest.raises(ValueError, match="valid.parquet: row_id 1 of user 5 is a training row as well"):
        validation_rows(tmp_path / "same", 500)
