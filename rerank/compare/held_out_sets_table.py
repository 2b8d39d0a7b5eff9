"""The table of runs that rank all that is held out of a user at once: the protocol of CLLM4Rec."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.compare.rankings_table import refuse_other
from rerank.compare.values_table import MODELS, Values, group_lines, pair_lines
from rerank.evaluate.full_catalogue import filled
from rerank.evaluate.held_out_sets import LIST_LENGTH, METRICS, metrics_of_sets


def rows_of(results: Mapping[str, Any]) -> str:
    """Which users were evaluated, and how to read the table."""
    return (
        f"{results['n']} users, {results['split']}: all that is held out of a user, found from the training items.\n"
        "Recall@k is hits over min(k, number of held-out items). Intervals: 95 %, paired bootstrap, users drawn, of "
        "the mean over seeds."
    )


def load(run: Path) -> tuple[list[tuple[int, list[int]]], Values]:
    """The users, each with what was held out, and what each ranker is worth for them; evaluate must be finished."""
    table = pq.read_table(runs.stage_dir(run, "evaluate") / "lists.parquet").to_pandas()
    of_rankers = {name: lines.sort_values("user") for name, lines in table.groupby("ranker", sort=False)}
    values = {
        name: metrics_of_sets(filled(lines["items"].tolist(), LIST_LENGTH), lines["targets"].tolist())
        for name, lines in of_rankers.items()
    }
    first = next(iter(of_rankers.values()))
    return [(user, targets.tolist()) for user, targets in zip(first["user"], first["targets"], strict=True)], values


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """Every ranker with differences to transitions and to the first variant; then each pair's differences.

    Raises:
        ValueError: When two runs were evaluated on other users or other items of theirs.
    """
    read = {name: [load(run) for run in folders] for name, folders in runs_of.items()}
    refuse_other("users or items", {name: [held_out for held_out, _ in found] for name, found in read.items()})
    users = np.array([user for user, _ in next(iter(read.values()))[0][0]])
    variants = {name: [values for _, values in found] for name, found in read.items()}
    lines = group_lines(variants, users, METRICS, METRICS, np.ones(len(users), dtype=bool))
    for ranker in MODELS:
        lines += pair_lines(variants, users, METRICS, ranker)
    return lines
