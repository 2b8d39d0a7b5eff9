"""The table of runs that rank lists of candidates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.evaluate.results import Ranking, Sampling, metrics_per_row

METRICS = ("R@1", "R@5", "N@5")
FAILED = "parse failures"


def rows_of(results: dict[str, Any]) -> str:
    """Which rows were evaluated, and how to read the table."""
    return (
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']}.\n"
        "Intervals: 95 %, paired bootstrap, whole users drawn. A completion that is no ranking scores zero."
    )


def row_metrics(run: Path) -> tuple[list[int], dict[str, dict[str, np.ndarray]], list[int]]:
    """Of a finished run: its row ids, each ranker's metrics per row, and the rows' users."""
    rankings = pq.read_table(runs.stage_dir(run, "evaluate") / "rankings.parquet").to_pylist()
    split = json.loads((runs.stage_dir(run, "evaluate") / "results.json").read_text())["split"]
    candidates = pq.read_table(runs.stage_dir(run, "candidates") / f"{split}.parquet", columns=["row_id", "relevance"])
    relevance_of = dict(zip(candidates["row_id"].to_pylist(), candidates["relevance"].to_pylist(), strict=True))
    row_ids = [line["row_id"] for line in rankings if line["ranker"] == "no_op"]
    users = [line["user"] for line in rankings if line["ranker"] == "no_op"]
    relevance = [relevance_of[row_id] for row_id in row_ids]
    values = {}
    for name in dict.fromkeys(line["ranker"] for line in rankings):
        orders = [line["order"] for line in rankings if line["ranker"] == name]
        values[name] = metrics_per_row(Ranking(name, orders), relevance)
        values[name][FAILED] = np.array([order is None for order in orders], dtype=float)
    values["random"] = metrics_per_row(Ranking("random", None), relevance)
    return row_ids, values, users


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """The Markdown table: baselines once, then each variant's models, averaged over seeds.

    Differences are to the no-op and, for the same ranker, to the first variant; a row's value is its mean over seeds.
    """
    read = {name: [row_metrics(run) for run in folders] for name, folders in runs_of.items()}
    first = next(iter(read))
    row_ids, _, users = read[first][0]
    for name, found in read.items():
        for seed, (ids, _, _) in enumerate(found):
            if ids != row_ids:
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other rows than {first}; use one split"
                )
    sampling = Sampling(users, 2000, 0)
    no_op = read[first][0][1]["no_op"]["N@5"]
    lines = [
        f"| variant | ranker | seeds | R@1 | R@5 | N@5 | {FAILED} | spread | N@5 − no-op | N@5 − first variant |",
        f"|---|---|{'---:|' * 8}",
    ]
    baselines = ("no_op", "random", "oracle", "transitions", "lambdamart")
    for name, found in read.items():
        for ranker in found[0][1]:
            if (ranker in baselines) != (name == first) and ranker in baselines:
                continue
            values = [np.mean([run[1][ranker][metric] for run in found], axis=0) for metric in METRICS]
            seeds = [run[1][ranker]["N@5"].mean() for run in found]
            reference = (
                np.mean([run[1][ranker]["N@5"] for run in read[first]], axis=0)
                if ranker in read[first][0][1]
                else None
            )
            is_baseline = ranker in baselines
            cells = [
                "–" if is_baseline else name,
                ranker,
                str(1 if is_baseline else len(found)),
                *(f"{value.mean():.4f}" for value in values),
                "–" if is_baseline else f"{np.mean([run[1][ranker][FAILED] for run in found]):.1%}",
                "–" if is_baseline or len(seeds) < 2 else f"{np.std(seeds, ddof=1):.4f}",
                "–" if ranker == "no_op" else difference(values[2], no_op, sampling),
                "–" if name == first or reference is None else difference(values[2], reference, sampling),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference(values: np.ndarray, reference: np.ndarray, sampling: Sampling) -> str:
    """A paired difference and its interval, for a cell."""
    mean, (low, high) = sampling.difference(values, reference)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
