"""`bar.json` of `rerank compare`: every difference of two rankers, of whichever variants, over users and seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rerank.compare import evaluations
from rerank.compare.evaluations import PRUNING, RunsOf, Variants, by_seed
from rerank.compare.tables import Line
from rerank.next_item import held_out_sets, recall
from rerank.results import bar
from rerank.results.intervals import Sampling
from rerank.results.rankers import of_task
from rerank.results.tables import NO_VALUE

SUFFIX = f".{bar.FILE}"  # of the file beside the results


def write(runs_of: RunsOf, task: str, path: Path) -> None:
    """Write the differences of runs of a task of the evaluate stage; a ranker of no variant has no `variant`."""
    read, metrics = READ[task](runs_of)
    of_first = next(iter(read.values()))
    values: dict[bar.Line, dict[str, np.ndarray]] = {}
    for variant, (seeds, ranker) in _rankers(read, task):
        line = (ranker,) if variant == NO_VALUE else (variant, ranker)
        values[line] = {metric: by_seed(seeds, ranker, metric) for metric in metrics}
    split = evaluations.read_results(next(iter(runs_of.values()))[0])["split"]
    bar.write(path, values, metrics, Sampling(of_first[0].users), split, len(of_first))


def _rankers(read: Variants, task: str) -> list[tuple[str, Line]]:
    """The baselines of a task once, then each variant's rankers."""
    baselines, of_first = [ranker.name for ranker in of_task(task) if ranker.is_baseline], next(iter(read.values()))
    found: list[tuple[str, Line]] = [(NO_VALUE, (of_first, name)) for name in baselines if name in of_first[0].values]
    left_out = {*baselines, PRUNING}
    return found + [
        (variant, (seeds, name)) for variant, seeds in read.items() for name in seeds[0].values if name not in left_out
    ]


def _lists(runs_of: RunsOf) -> tuple[Variants, Sequence[str]]:
    return evaluations.load_lists(runs_of), evaluations.list_metrics(runs_of)


def _next_items(runs_of: RunsOf) -> tuple[Variants, Sequence[str]]:
    return evaluations.load_all(evaluations.NextItemEvaluation.load, runs_of, "rows"), recall.METRICS


def _sets(runs_of: RunsOf) -> tuple[Variants, Sequence[str]]:
    return evaluations.load_all(evaluations.load_sets, runs_of, "users or items"), held_out_sets.METRICS


READ: dict[str, Callable[[RunsOf], tuple[Variants, Sequence[str]]]] = {  # the variants and their metrics, by task
    "rerank": _lists,
    "next_item": _next_items,
    "held_out_sets": _sets,
}
