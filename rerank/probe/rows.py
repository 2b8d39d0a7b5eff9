"""The rows that the dapo stage of a recipe trains on, asked without a model, and the columns that its rewards get."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from rerank import rows
from rerank.launch import run_dir
from rerank.prompts import PromptSettings
from rerank.rows import PromptedRow, Prompter

NEEDED = ("data", "semantic_ids", "candidates")
SEED = 42  # of the dapo stage where its recipe has none: TrainingArguments' default
NO_LIMIT = 1 << 20  # tokens of a completion, where neither recipe nor sft stage sets a limit
_TOKEN = re.compile(r"<[^<>]*>|\w+|[^\w\s]")


@dataclass(frozen=True)
class ProbeRow(PromptedRow):
    """A training row as it is asked, and how often users took each of its candidates in training."""

    popularity: Sequence[int]


def read_rows(keys: Mapping[str, Any], num_rows: int) -> tuple[list[ProbeRow], str]:
    """Rows of the run that a dapo recipe names, and in a few words which rows they are.

    Where the traces stage has not run, it has not yet said which rows are whose and what a label is: then these are
    all rows whose list holds a relevant item, ranked by semantic id.

    Args:
        keys: The recipe's: run_dir, rows, shuffle_candidates, seed, max_completion_length, without_trace.
        num_rows: Their number, drawn at random; 0 for all.

    Raises:
        FileNotFoundError: When a stage is missing, naming it and the command that runs it.
    """
    run = keys["run_dir"]
    for stage in NEEDED:
        if not run_dir.is_finished(run, stage):
            raise FileNotFoundError(
                f"the probe needs {run_dir.stage_dir(run, stage)}, which is not there; "
                f"run the stage {stage} first (`rerank run RECIPE_DIR --out {run} --to candidates`)"
            )
    if run_dir.is_finished(run, "traces"):
        prompter, use = Prompter.of_run(run), keys.get("rows", "dapo")
        if use not in ("dapo", "all"):
            raise ValueError(f"rows is {use!r}; choose dapo or all")
        found, what = rows.training_rows(run, use, prompter.needs_features), "training rows of dapo"
    else:
        prompter, what = Prompter.of_run(run, settings=PromptSettings()), "rows (no traces yet)"
        found = rows.read_rows(run_dir.stage_dir(run, "candidates") / "train.parquet")
    chosen = rows.choose_rows(found, num_rows, seed=0)
    if keys.get("shuffle_candidates"):
        chosen = [rows.shuffle(row, keys.get("seed", SEED), epoch=0) for row in chosen]
    taken = np.bincount(rows.training_items(run_dir.stage_dir(run, "data"))[1], minlength=len(prompter.catalogue))
    limit = _max_completion_tokens(keys)
    asked = (prompter.ask(row, limit) for row in chosen)
    return [ProbeRow(**vars(row), popularity=taken[list(row.row.candidates)].tolist()) for row in asked], what


def _max_completion_tokens(keys: Mapping[str, Any]) -> int:
    """The token limit of a completion in the dapo stage, as far as it is known before that stage."""
    if keys.get("max_completion_length"):
        return int(keys["max_completion_length"])
    model = "model_no_trace" if keys.get("without_trace") else "model"
    path = run_dir.stage_dir(keys["run_dir"], "sft") / model / "generation.json"
    return int(json.loads(path.read_text())["max_completion_tokens"]) if path.is_file() else NO_LIMIT


def reward_columns(asked: Sequence[ProbeRow], completions: Sequence[str]) -> dict[str, Any]:
    """All that a reward gets for one completion of each row; what only a trainer has is plausible, not real."""
    return {
        **rows.reward_columns(asked),
        "completion_ids": [_token_ids(text) for text in completions],
        "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }


def _token_ids(text: str) -> list[int]:
    """One id for each word, sign or tag, the same for the same word, and one for the end."""
    return [*(zlib.crc32(token.encode(errors="replace")) % 30000 for token in _TOKEN.findall(text)), 0]
