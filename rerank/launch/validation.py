"""Held-out rows ranked while a model trains, and the choice of the state that is kept.

Every few steps the model ranks validation rows, greedily and free to write what it likes, as it will when it is
evaluated. The state that is kept has the best mean N@5 of neighbouring checks; the start is a candidate, and what its
own check calls worse than the start is none.

C checks.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from rerank.launch import recipe, run_dir
from rerank.launch.processes import in_shares
from rerank.launch.values import check_choice, check_range, option
from rerank.metrics import ZERO_METRICS, ranking_metrics
from rerank.prompts import parse_completion
from rerank.rows import PromptedRow, RankingRow
from rerank.rows.stored import common_rows, read_some_rows

logger = logging.getLogger(__name__)

METRIC = "eval_N@5"
NUM_CHECKS = 12  # of a run, beside that of the start, where the recipe sets no eval_steps
ROWS_SEED = 0  # the same rows in every run

Complete = Callable[[Sequence[PromptedRow]], Sequence[str]]  # the model's most probable completion of each row
Check = tuple[int, float]  # a step and its METRIC


@dataclass
class ValidatedArguments(recipe.StageArguments):
    """Options of a stage whose model ranks validation rows while it trains."""

    eval_rows: int = option(500, "Validation rows ranked every eval_steps (a twelfth of the run by default); 0: none.")
    keep: str = option("best", "Model to keep: best by N@5 of validation rows, the start among them, or last.")
    patience: int | None = option(None, "End after N checks without a better one; by default never.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("eval_rows", self.eval_rows, least=0)
        check_choice("keep", self.keep, ("best", "last"))
        if self.patience is not None:
            check_range("patience", self.patience, least=1)


def smoothed(values: Sequence[float]) -> list[float]:
    """(C,) the mean of each check and its neighbours."""
    windows = [values[max(place - 1, 0) : place + 2] for place in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]  # exact sums: equal means compare equal


def best(values: Sequence[float]) -> int:
    """The place of the check to keep: best by `smoothed`, of equals by its own value, then the first; none below the
    first check.

    Of two checks alone the means are equal, so that their own values decide.
    """
    means, candidates = smoothed(values), [place for place, value in enumerate(values) if value >= values[0]]
    return max(candidates, key=lambda place: (means[place], values[place]))


def validation_rows(run: str | Path, max_rows: int, needs_features: bool = False) -> list[RankingRow]:
    """`max_rows` validation rows whose list holds a relevant item; none for 0.

    Raises:
        ValueError: When there is none, or one is a training row as well.
    """
    if not max_rows:
        return []
    folder = run_dir.stage_dir(run, "candidates")
    try:
        rows = read_some_rows(folder / "valid.parquet", max_rows, ROWS_SEED, needs_features)
    except ValueError as error:
        raise ValueError(f"{error}; or set eval_rows: 0, and the last model is kept") from None
    for row in common_rows(folder / "valid.parquet", folder / "train.parquet"):
        raise ValueError(
            f"{folder / 'valid.parquet'}: row_id {row.row_id} of user {row.user} is a training row as well, and "
            "says nothing about rows that training has not seen; take it out of one of the two"
        )
    return rows


def measure(asked: Sequence[PromptedRow], completions: Sequence[str]) -> dict[str, float]:
    """N@5 and R@1 without candidates that were not seen, 0 for what is no ranking; the share of such, and of rankings
    the share of copies of the whole list."""
    pairs = zip(completions, asked, strict=True)
    orders = [parse_completion(text, row.labels, row.top_k).order for text, row in pairs]
    values = [
        ZERO_METRICS if order is None else ranking_metrics([row.row.relevance[place] for place in order])
        for order, row in zip(orders, asked, strict=True)
    ]
    copies = [order == sorted(order) for order in orders if order is not None]
    return {
        METRIC: float(np.mean([value["N@5"] for value in values if value is not None])),
        "eval_R@1": float(np.mean([value["R@1"] for value in values if value is not None])),
        "eval_parse_failures": float(np.mean([order is None for order in orders])),
        "eval_copy_rate": float(np.mean(copies)) if copies else float("nan"),
    }


class Validation(TrainerCallback):
    """Ranks validation rows before the first step, every few steps and at the end, and keeps the best state.

    What was measured stands in the trainer's log, and with it in every checkpoint: a resumed run decides as one that
    was not interrupted. The weights of a check that may yet be kept stand in `model-<step>` beside the checkpoints.

    Args:
        args: Options of the stage.
        asked: Rows to rank; without any it does nothing.
        complete: Completes this process's share of them by the present weights.
        trainer: Whose model it is.
    """

    def __init__(self, args: ValidatedArguments, asked: Sequence[PromptedRow], complete: Complete, trainer: Trainer):
        self.keep, self.patience = args.keep, args.patience
        self.asked, self.complete, self.trainer = list(asked), complete, trainer
        self.every = 0  # steps, known once training begins
        trainer.add_callback(self)

    @property
    def checks(self) -> list[Check]:
        """Those of this training so far, resumed ones included."""
        return [(int(entry["step"]), entry[METRIC]) for entry in self.trainer.state.log_history if METRIC in entry]

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Measure the start."""
        # the trainer turns a share of the run into steps
        is_set = self.trainer.args.eval_steps is not None
        self.every = max(1, int(state.eval_steps) if is_set else math.ceil(state.max_steps / NUM_CHECKS))
        if self.asked and not self.checks:
            self._check()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Measure when it is due, and end the training when patience is."""
        if not self.asked or state.global_step % self.every:
            return
        self._check()
        values = [value for _, value in self.checks]
        if self.patience is not None and len(values) - 1 - best(values) >= self.patience:
            logger.info("step %d: no better check in %d; the training ends", state.global_step, self.patience)
            control.should_training_stop = True

    def finish(self) -> Path | None:
        """Measure the end; returns where the weights to keep stand, None for the trainer's own.

        Every process must call it.
        """
        if not self.asked:
            return None
        step = self.trainer.state.global_step
        if self.checks[-1][0] != step:
            self._check()
        kept = self.kept_step
        return None if kept == step else self._folder(kept)

    @property
    def kept_step(self) -> int:
        """The step whose weights are kept."""
        if self.keep == "last" or not self.asked:
            return self.trainer.state.global_step
        return self.checks[best([value for _, value in self.checks])][0]

    def summary(self) -> dict[str, object]:
        """Which step is kept, of how many, and by how much it is better than the start, over how many checks."""
        if not self.asked:
            return {}
        values = dict(self.checks)
        kept, start = values[self.kept_step], self.checks[0][1]
        return {
            "kept": {
                "step": self.kept_step,
                "of_steps": self.trainer.state.global_step,
                "metric": "N@5",
                "rows": len(self.asked),
                "value": kept,
                "minus_start": kept - start,
                "checks": len(values),
            }
        }

    def _check(self) -> None:
        model = self.trainer.model
        assert model is not None
        was_training, began = model.training, time.perf_counter()
        model.eval()  # a trainer logs what it has gathered of its steps only while its model is training
        metrics = measure(self.asked, in_shares(self.complete, self.asked))
        metrics["eval_seconds"] = time.perf_counter() - began
        is_step_logged = self.trainer.control.should_log
        self.trainer.log(metrics)
        self.trainer.control.should_log = is_step_logged  # a log takes the step's own for done
        model.train(was_training)
        logger.info("step %d: validation N@5 %.4f", self.trainer.state.global_step, metrics[METRIC])
        if self.keep == "best":
            self.trainer.save_model(str(self._folder(self.trainer.state.global_step)))
            if self.trainer.accelerator.is_main_process:
                self._prune()

    def _folder(self, step: int) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"model-{step}"

    def _prune(self) -> None:
        """Delete weights that neither this run nor one that resumes from a checkpoint can keep."""
        folder = Path(str(self.trainer.args.output_dir))
        ends = [math.inf, *(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))]
        needed = set[int]()
        for end in ends:
            known = [(step, value) for step, value in self.checks if step <= end]
            needed |= {known[-1][0], known[best([value for _, value in known])][0]} if known else set()
        for path in folder.glob("model-*"):
            if int(path.name.rpartition("-")[2]) not in needed:
                shutil.rmtree(path)
