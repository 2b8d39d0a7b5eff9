"""The rows that the dapo stage of a recipe trains on, read without a model, and the columns that its rewards get."""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings, candidate_labels, rerank_prompt
from rerank.sequences import training_items
from rerank.traces.rows import choose, read_feature_names, read_hit_rows

NEEDED = ("data", "semantic_ids", "candidates")
PER_CANDIDATE = ("candidates", "relevance", "features", "first_stage_ranks")
_TOKEN = re.compile(r"<[^<>]*>|\w+|[^\w\s]")


@dataclass(frozen=True)
class ProbeRow:
    """One training row: what policies may use, and the columns of the dapo stage's dataset but the prompt."""

    columns: dict[str, Any]
    prompt: str
    popularity: list[float]  # of each candidate: how often users took it in training
    foreign_label: str  # a label of no candidate

    @property
    def labels(self) -> list[str]:
        return self.columns["candidate_labels"]

    @property
    def relevance(self) -> list[float]:
        return self.columns["relevance"]

    @property
    def target_rank(self) -> int:
        return self.columns["target_rank"]


def read_rows(keys: Mapping[str, Any], num_rows: int) -> tuple[list[ProbeRow], str]:
    """Rows of the run that a dapo recipe names, and in a few words which rows they are.

    Where the traces stage has not run, it has not yet said which rows are whose and what a label is: then these are
    all rows whose list holds a relevant item, ranked by semantic id.

    Args:
        keys: The recipe's: run_dir, rows, shuffle_candidates.
        num_rows: How many, drawn at random; 0 for all.

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
    traces, candidates = run_dir.stage_dir(run, "traces"), run_dir.stage_dir(run, "candidates")
    settings = PromptSettings.load(traces) if run_dir.is_finished(run, "traces") else PromptSettings()
    rows, what = read_hit_rows(candidates / "train.parquet", settings.evidence != "none"), "rows (no traces yet)"
    if run_dir.is_finished(run, "traces"):
        rows, what = _of_dapo(rows, traces, keys.get("rows", "dapo")), "training rows of dapo"
    catalogue, (names, edges) = Catalogue.load(run), read_feature_names(candidates)
    counts = np.bincount(training_items(run_dir.stage_dir(run, "data"))[1], minlength=len(catalogue))
    chosen = []
    for row in choose(rows, num_rows, seed=0):
        row = _ranked(row, shuffled=bool(keys.get("shuffle_candidates")))
        prompt = rerank_prompt(row, catalogue, settings, edges, names)
        labels = candidate_labels(row, catalogue, settings)
        popularity = counts[row["candidates"]].tolist()
        chosen.append(ProbeRow(_columns(row, labels), prompt, popularity, _foreign_label(labels)))
    return chosen, what


def _of_dapo(rows: Sequence[dict[str, Any]], traces: Path, which: str) -> list[dict[str, Any]]:
    """The rows that the dapo stage takes: its own, or `all`."""
    if which not in ("dapo", "all"):
        raise ValueError(f"rows is {which!r}; choose dapo or all")
    split = pq.read_table(traces / "row_split.parquet").to_pydict()
    used_for = dict(zip(split["row_id"], split["used_for"], strict=True))
    chosen = [row for row in rows if which == "all" or used_for[row["row_id"]] == "dapo"]
    if not chosen:
        raise ValueError(
            "no training rows are left for dapo; lower rows_for_sft of the traces stage, or set rows: all"
        )
    return chosen


def _ranked(row: dict[str, Any], shuffled: bool) -> dict[str, Any]:
    """The row with its first-stage ranks, its candidates in an order that depends on the row alone if `shuffled`."""
    row = {**row, "first_stage_ranks": list(range(1, len(row["candidates"]) + 1))}
    if not shuffled:
        return row
    order = random.Random(row["row_id"]).sample(range(len(row["candidates"])), len(row["candidates"]))
    return {
        name: [value[position] for position in order] if name in PER_CANDIDATE else value
        for name, value in row.items()
    }


def _columns(row: Mapping[str, Any], labels: list[str]) -> dict[str, Any]:
    """What the dapo stage's dataset holds of a row."""
    ranked = zip(row["first_stage_ranks"], row["relevance"], strict=True)
    return {
        **{name: row[name] for name in ("row_id", "user", "history", "candidates", "relevance")},
        "candidate_labels": labels,
        "first_stage_ranks": row["first_stage_ranks"],
        "target_rank": min(rank for rank, gain in ranked if gain == max(row["relevance"])),
    }


def _foreign_label(labels: Sequence[str]) -> str:
    """A label of the right form that no candidate has."""
    return str(len(labels) + 1) if labels[0].isdecimal() else re.sub("[0-9]+", "999999", labels[0])


def reward_columns(rows: Sequence[ProbeRow], completions: Sequence[str]) -> dict[str, Any]:
    """All that a reward gets for one completion of each row; what only a trainer has is plausible, not real."""
    return {
        **{name: [row.columns[name] for row in rows] for name in rows[0].columns},
        "prompts": [row.prompt for row in rows],
        "completion_ids": [_token_ids(text) for text in completions],
        "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }


def _token_ids(text: str) -> list[int]:
    """One id a word, sign or tag, the same for the same word, and one for the end."""
    return [*(zlib.crc32(token.encode(errors="replace")) % 30000 for token in _TOKEN.findall(text)), 0]
