"""Slices of `rerank compare`: the rankers of all variants on cold and popular targets and short histories.

A line of a table is a variant, its seeds and a ranker; those of the first line hold the reference too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rerank.compare.evaluations import Evaluation, by_seed, read_results
from rerank.metrics import compared
from rerank.next_item import recall
from rerank.next_item.slices import METRIC
from rerank.results import tables
from rerank.results.slices import Slices, SplitLists, measure
from rerank.rows import TargetRows

Lines = Sequence[tuple[str, Sequence[Evaluation], str]]


def list_lines(run: Path, lines: Lines) -> list[str]:
    """List recall, first-stage ranks and slices of runs that rank the same lists, of which `run` is one."""
    results = read_results(run)
    lists = SplitLists.load(run, results["split"], list(results.get("slices", {}).get("columns", {})))
    summary, members = lists.summary(), lists.members(_row_ids(lines))
    slices = tables.slice_table(summary["slices"], {name: int(of.sum()) for name, of in members.items()})
    metric = compared(tables.metrics_of(results))[0]
    by_slice = _by_slice(lines, "no_op", metric, members, lists.slices.columns)
    found = [tables.rank_table(summary, len(lists.row_ids)), slices, *by_slice]
    return [line for table in found for line in table.lines()]


def next_item_lines(run: Path, lines: Lines) -> list[str]:
    """Slices of runs that rank the catalogue after the same rows, of which `run` is one."""
    rows = TargetRows.load(run).of_split(read_results(run)["split"])
    slices = Slices.of_rows(run, rows).taken(np.searchsorted(rows.row_ids, _row_ids(lines)))
    found = [tables.slice_table(slices.counts()), *_by_slice(lines, recall.REFERENCE, METRIC, slices.members, {})]
    return [line for table in found for line in table.lines()]


def _by_slice(
    lines: Lines,
    reference: str,
    metric: str,
    members: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[str]],
) -> list[tables.Table]:
    """The tables of a metric on the slices."""
    seeds = lines[0][1]
    values: dict[tuple[str, ...], np.ndarray] = {
        (variant, ranker): by_seed(of_variant, ranker, metric) for variant, of_variant, ranker in lines
    }
    found = measure(values, by_seed(seeds, reference, metric), members, seeds[0].users)
    n = {name: int(of.sum()) for name, of in members.items()}
    return tables.by_slice_tables(found, n, columns, metric, reference, ("variant", "ranker"))


def _row_ids(lines: Lines) -> np.ndarray:
    return np.array([row_id for row_id, *_ in lines[0][1][0].rows])
