"""The table of runs that rank the whole catalogue."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.compare.rankings_table import refuse_other
from rerank.compare.values_table import MODELS, SEARCH, group_lines, pair_lines
from rerank.evaluate.full_catalogue import GROUPS, LIST_LENGTH, METRICS, filled, metrics_of_lists
from rerank.evaluate.pruning import FILE as PRUNING_FILE
from rerank.evaluate.pruning import Pruning
from rerank.evaluate.tables import NO_VALUE
from rerank.metrics import paired_interval, paired_rate_interval

logger = logging.getLogger(__name__)

COMPARED = ("R@10", "N@10")
PRUNING_HEADS = ("pruned, points", "violation, points")


@dataclass(frozen=True)
class RunLists:
    """What a run's rankers found, rows in one order.

    Attributes:
        row_ids, users: (R,).
        one_hop: (R,) whether counting could have found the target.
        values: Ranker to its metrics, each (R,).
        pruning: What beam search prunes; None where it was not measured.
    """

    row_ids: np.ndarray
    users: np.ndarray
    one_hop: np.ndarray
    values: dict[str, dict[str, np.ndarray]]
    pruning: Pruning | None

    @classmethod
    def load(cls, run: Path) -> "RunLists":
        """Of a run with a finished evaluate stage."""
        folder = runs.stage_dir(run, "evaluate")
        table = pq.read_table(folder / "lists.parquet").to_pandas()
        values = {}
        for name, lines in table.groupby("ranker", sort=False):
            lists = filled(lines["items"].tolist(), LIST_LENGTH)
            values[name] = metrics_of_lists(lists, lines["target"].to_numpy())
        first = table[table["ranker"] == table["ranker"].iloc[0]]
        row_ids, users, one_hop = (first[name].to_numpy() for name in ("row_id", "user", "one_hop"))
        file = folder / PRUNING_FILE
        if not file.is_file():
            logger.info("%s: what beam search prunes was not measured; evaluate.pruning=true does it", folder)
        return cls(row_ids, users, one_hop, values, Pruning.read(file, row_ids) if file.is_file() else None)


def rows_of(results: Mapping[str, Any]) -> str:
    """Which rows were evaluated, and how to read the table."""
    return (
        f"{results['n']['all']} {results['split']} rows, all items ranked, {results['num_beams']} beams.\n"
        "Intervals: 95 %, paired bootstrap, whole users drawn, of the mean over seeds. One hop: the target is among "
        "the 50 most frequent direct training successors of the history's items."
    )


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """A table for each group of rows, with differences to the first variant; what is pruned; each pair's differences.

    Raises:
        ValueError: When two runs were evaluated on other rows.
    """
    read = {name: [RunLists.load(run) for run in folders] for name, folders in runs_of.items()}
    refuse_other("rows", {name: [lists.row_ids.tolist() for lists in found] for name, found in read.items()})
    reference = next(iter(read.values()))[0]
    variants = {name: [lists.values for lists in found] for name, found in read.items()}
    groups = {"all": np.ones(len(reference.users), dtype=bool), "one_hop": reference.one_hop}
    groups["rest"] = ~reference.one_hop
    lines: list[str] = []
    for group, chosen in groups.items():
        if chosen.any():
            table = group_lines(variants, reference.users, METRICS, COMPARED, chosen)
            lines += ["", f"{GROUPS[group]}, {int(chosen.sum())} rows:", "", *table]
    measured = {
        name: [lists.pruning for lists in found]
        for name, found in read.items()
        if all(lists.pruning is not None for lists in found)
    }
    lines += _pruning_lines(measured)
    for ranker in MODELS:
        with_pruning = ranker == SEARCH and len(measured) > 1  # it is of the search by beams
        heads = PRUNING_HEADS if with_pruning else ()
        more = functools.partial(_pruning_differences, measured if with_pruning else {}, reference.users)
        lines += pair_lines(variants, reference.users, COMPARED, ranker, heads, more)
    return lines[1:]


def _pruning_lines(measured: Mapping[str, Sequence[Pruning]]) -> list[str]:
    """What beam search prunes, over all seeds, of the variants where it was measured."""
    if not measured:
        return []
    steps = max(each[0].violates.shape[1] for each in measured.values())
    heads = ["n", "targets in the top", "pruned of them", "spread", "violation"]
    heads += [f"step {step + 1}" for step in range(steps)]
    lines = [
        "",
        "Pruning. In the top: the target's whole sequence is among as many most probable items as there are beams, "
        "mean over seeds; pruned: the share of those of all seeds that beam search does not find. Violation: a token "
        "of the target has as many legal tokens above it, anywhere or at a step, mean over seeds:",
        "",
        f"| variant | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for name, each in measured.items():
        pruned, top = _over_seeds(each, "is_pruned"), _over_seeds(each, "is_top")
        rates = [of_seed.summary()["pruning_rate"] for of_seed in each]
        violates = np.mean([of_seed.violates for of_seed in each], axis=0)  # (R, L)
        cells = [str(len(top)), f"{top.sum() / len(each):.1f}"]
        cells.append(f"{pruned.sum() / top.sum():.1%}" if top.any() else NO_VALUE)
        cells.append(f"{np.std(rates, ddof=1):.1%}" if len(rates) > 1 and None not in rates else NO_VALUE)
        cells += [f"{_violated(each).mean():.1%}", *(f"{share:.1%}" for share in violates.mean(axis=0))]
        cells += [NO_VALUE] * (steps - violates.shape[1])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _pruning_differences(
    measured: Mapping[str, Sequence[Pruning]], users: np.ndarray, name: str, other: str
) -> list[str]:
    """Of the pruned share and of the share of violated targets, with intervals; nothing where not measured in both."""
    if name not in measured or other not in measured:
        return []
    each, others = measured[name], measured[other]
    counts = [_over_seeds(of, share) for of in (each, others) for share in ("is_pruned", "is_top")]
    pairs = paired_rate_interval(*counts, users), paired_interval(_violated(each), _violated(others), users)
    return [NO_VALUE if np.isnan(pair).any() else _points(*pair) for pair in pairs]


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _over_seeds(each: Sequence[Pruning], name: str) -> np.ndarray:
    """(R,) in how many of the seeds it is so."""
    return np.sum([getattr(of_seed, name) for of_seed in each], axis=0)


def _violated(each: Sequence[Pruning]) -> np.ndarray:
    """(R,) share of the seeds in which a token of a row's target is violated."""
    return np.mean([of_seed.violates.any(axis=1) for of_seed in each], axis=0)
