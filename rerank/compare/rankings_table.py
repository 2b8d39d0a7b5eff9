"""The tables of runs that rank lists of candidates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from rerank import run_dir as runs
from rerank.evaluate.results import Ranking, Sampling, metrics_per_row
from rerank.evaluate.tables import NO_VALUE

METRICS = ("R@1", "R@5", "N@5")
COMPARED = ("N@5", "R@1")
FAILED = "parse failures"
BASELINES = ("no_op", "random", "oracle", "transitions", "lambdamart")
STAGE_OF = {"midtrained": "midtrain", "sft": "sft", "sft_no_trace": "sft", "dapo": "dapo"}


@dataclass(frozen=True)
class RunRankings:
    """What a run's rankers are worth, rows in one order.

    Attributes:
        row_ids, users: (R,).
        values: Ranker to its metrics and FAILED, each (R,).
        folders: Ranker with a model to the folder of the stage that made it, which runs may share.
        start: The sft stage's ranker that reinforcement learning started from.
    """

    row_ids: list[int]
    users: list[int]
    values: dict[str, dict[str, np.ndarray]]
    folders: dict[str, Path]
    start: str

    @classmethod
    def load(cls, run: Path) -> "RunRankings":
        """Of a run with a finished evaluate stage."""
        folder = runs.stage_dir(run, "evaluate")
        rankings = pq.read_table(folder / "rankings.parquet").to_pylist()
        split = json.loads((folder / "results.json").read_text())["split"]
        lists = pq.read_table(runs.stage_dir(run, "candidates") / f"{split}.parquet", columns=["row_id", "relevance"])
        relevance_of = dict(zip(lists["row_id"].to_pylist(), lists["relevance"].to_pylist(), strict=True))
        first = [line for line in rankings if line["ranker"] == "no_op"]
        relevance = [relevance_of[line["row_id"]] for line in first]
        values = {}
        for name in dict.fromkeys(line["ranker"] for line in rankings):
            orders = [line["order"] for line in rankings if line["ranker"] == name]
            values[name] = metrics_per_row(Ranking(name, orders), relevance)
            values[name][FAILED] = np.array([order is None for order in orders], dtype=float)
        values["random"] = metrics_per_row(Ranking("random", None), relevance)
        folders = {name: runs.stage_dir(run, stage).resolve() for name, stage in STAGE_OF.items()}
        recipe = folders["dapo"] / "recipe.yaml"
        without_trace = recipe.is_file() and yaml.safe_load(recipe.read_text()).get("without_trace")
        start = "sft_no_trace" if without_trace else "sft"
        return cls([line["row_id"] for line in first], [line["user"] for line in first], values, folders, start)


def rows_of(results: dict[str, Any]) -> str:
    """Which rows were evaluated, and how to read the tables."""
    return (
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']}.\n"
        "Intervals: 95 %, paired bootstrap, whole users drawn, of the mean over seeds. A completion that is no "
        "ranking scores zero. The difference to sft is, for dapo, to the model of the sft stage that it started from."
    )


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """What each ranker is worth, baselines once, then the differences; a row's value is its mean over seeds.

    A model that a variant shares with the first one stands there only.

    Raises:
        ValueError: When two runs were evaluated on other rows.
    """
    read = {name: [RunRankings.load(run) for run in folders] for name, folders in runs_of.items()}
    first = next(iter(read))
    reference = read[first][0]
    refuse_other("rows", {name: [rankings.row_ids for rankings in found] for name, found in read.items()})
    rankers = [(first, name) for name in BASELINES if name in reference.values]
    rankers += [
        (variant, name)
        for variant, found in read.items()
        for name in found[0].values
        if name not in BASELINES and (variant == first or not _is_shared(found, read[first], name))
    ]
    return [*_value_lines(read, rankers), "", *_difference_lines(read, rankers, Sampling(reference.users, 2000, 0))]


def _is_shared(found: Sequence[RunRankings], others: Sequence[RunRankings], ranker: str) -> bool:
    """Whether the runs have the others' model under this name, seed by seed, and it was evaluated there."""
    pairs = zip(found, others, strict=True)
    return ranker in others[0].values and all(one.folders[ranker] == other.folders[ranker] for one, other in pairs)


def _value_lines(read: Mapping[str, Sequence[RunRankings]], rankers: Sequence[tuple[str, str]]) -> list[str]:
    lines = [
        f"| variant | ranker | seeds | {' | '.join(METRICS)} | {FAILED} | spread of N@5 |",
        f"|---|---|{'---:|' * (len(METRICS) + 3)}",
    ]
    for variant, ranker in rankers:
        found, is_baseline = read[variant], ranker in BASELINES
        seeds = [rankings.values[ranker]["N@5"].mean() for rankings in found]
        failed = np.mean([rankings.values[ranker][FAILED].mean() for rankings in found]) if not is_baseline else 0.0
        cells = [
            NO_VALUE if is_baseline else variant,
            ranker,
            str(1 if is_baseline else len(found)),
            *(f"{_mean(found, ranker, metric).mean():.4f}" for metric in METRICS),
            NO_VALUE if is_baseline else f"{failed:.1%}",
            NO_VALUE if is_baseline or len(seeds) < 2 else f"{np.std(seeds, ddof=1):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference_lines(
    read: Mapping[str, Sequence[RunRankings]], rankers: Sequence[tuple[str, str]], sampling: Sampling
) -> list[str]:
    """To the no-op, to sft (of dapo: the model it started from), and to the same ranker of the first variant."""
    first = next(iter(read))
    others = ("no-op", "sft", first)
    heads = [f"{metric} − {other}" for metric in COMPARED for other in others]
    lines = [f"| variant | ranker | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    for variant, ranker in rankers[1:]:  # the no-op stands first
        found, is_baseline = read[variant], ranker in BASELINES
        start = found[0].start if ranker == "dapo" else "sft"
        owner = variant if start in found[0].values else first if _is_shared(found, read[first], start) else None
        references = [
            (first, "no_op"),
            (owner, start) if owner and ranker != start and not is_baseline else None,
            (first, ranker) if variant != first and ranker in read[first][0].values else None,
        ]
        cells = [
            NO_VALUE
            if reference is None
            else difference(_mean(found, ranker, metric), _mean(read[reference[0]], reference[1], metric), sampling)
            for metric in COMPARED
            for reference in references
        ]
        lines.append(f"| {NO_VALUE if is_baseline else variant} | {ranker} | {' | '.join(cells)} |")
    return lines


def _mean(found: Sequence[RunRankings], ranker: str, metric: str) -> np.ndarray:
    """(R,) a row's metric, the mean over seeds."""
    return np.mean([rankings.values[ranker][metric] for rankings in found], axis=0)


def refuse_other(what: str, evaluated: Mapping[str, Sequence[list]]) -> None:
    """Refuse runs that were not evaluated on the same.

    Args:
        what: Rows or users, as the message calls them.
        evaluated: Variant to what each of its seeds was evaluated on.

    Raises:
        ValueError: Naming the first variant and seed that differ.
    """
    first = next(iter(evaluated))
    for name, of_seeds in evaluated.items():
        for seed, found in enumerate(of_seeds):
            if found != evaluated[first][0]:
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other {what} than {first}; use one split"
                )


def difference(values: np.ndarray, reference: np.ndarray, sampling: Sampling) -> str:
    """A paired difference and its interval, for a cell."""
    mean, (low, high) = sampling.difference(values, reference)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
