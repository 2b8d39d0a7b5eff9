"""The table of runs that rank all that is held out of a user at once: the protocol of CLLM4Rec."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
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


def load(run: Path) -> tuple[np.ndarray, Values]:
    """Users (U,) and what each ranker is worth for them, of a run with a finished evaluate stage."""
    table = pq.read_table(runs.stage_dir(run, "evaluate") / "lists.parquet").to_pandas()
    of_rankers = {name: lines.sort_values("user") for name, lines in table.groupby("ranker", sort=False)}
    values = {
        name: metrics_of_sets(filled(lines["items"].tolist(), LIST_LENGTH), lines["targets"].tolist())
        for name, lines in of_rankers.items()
    }
    return next(iter(of_rankers.values()))["user"].to_numpy(), values


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """Every ranker with differences to transitions and to the first variant; then each pair's differences.

    Raises:
        ValueError: When two runs were evaluated on other users.
    """
    read = {name: [load(run) for run in folders] for name, folders in runs_of.items()}
    first = next(iter(read))
    users = read[first][0][0]
    for name, found in read.items():
        for seed, (others, _) in enumerate(found):
            if not np.array_equal(others, users):
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other users than {first}; use one split"
                )
    variants = {name: [values for _, values in found] for name, found in read.items()}
    lines = group_lines(variants, users, METRICS, METRICS, np.ones(len(users), dtype=bool))
    for ranker in MODELS:
        lines += pair_lines(variants, users, METRICS, ranker)
    return lines
