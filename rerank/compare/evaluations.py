"""Evaluations of finished runs, as `rerank compare` reads them.

A variant is one evaluation for each of its seeds. Seeds of one data and first stage have the same rows; others may
not: then the rows are those of all seeds, and a value is NaN where its seed lacks the row. R rows, S seeds.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from rerank.launch import run_dir as runs
from rerank.metrics import METRICS
from rerank.models import names
from rerank.next_item import held_out_sets, recall
from rerank.next_item.pruning import FILE as PRUNING_FILE
from rerank.next_item.pruning import Pruning
from rerank.results.orders import merged
from rerank.results.rankers import of_task
from rerank.results.rankings import Ranking, Values, metrics_per_row
from rerank.results.tables import metrics_of

logger = logging.getLogger(__name__)

FAILED = "parse failures"
MERGED = "dapo_merged"  # with the rankings of the run whose model it started from, by reciprocal rank fusion
PRUNING = "pruning"  # beside the rankers' metrics: whether beam search prunes each target

RunsOf = Mapping[str, Sequence[Path]]  # variant -> the run of each seed


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run with a finished evaluate stage.

    Attributes:
        rows: (R,) ids with users, and what else is the same for all rankers.
        users: (R,).
        values: Ranker to its metrics.
    """

    rows: list[tuple[object, ...]]
    users: np.ndarray
    values: dict[str, Values]

    def on(self: "E", rows: list[tuple[object, ...]], users: np.ndarray) -> "E":
        """The same on more rows, NaN where it lacks them."""
        if rows == self.rows:
            return self
        place = {row: number for number, row in enumerate(rows)}
        places = [place[row] for row in self.rows]

        def spread_out(values: np.ndarray) -> np.ndarray:
            of_all = np.full((len(rows), *values.shape[1:]), np.nan)
            of_all[places] = values
            return of_all

        values = {
            name: {metric: spread_out(found) for metric, found in of_ranker.items()}
            for name, of_ranker in self.values.items()
        }
        return replace(self, rows=rows, users=users, values=values)


E = TypeVar("E", bound=Evaluation)
Variants = Mapping[str, Sequence[Evaluation]]


@dataclass(frozen=True, eq=False)
class ListEvaluation(Evaluation):
    """A run that ranked lists of candidates.

    Attributes:
        folders: Ranker with a model to the folder of the stage that made it, which runs may share.
        start: The sft stage's ranker that reinforcement learning started from; empty for a model of another run.
    """

    folders: dict[str, Path]
    start: str

    @classmethod
    def load(cls, run: Path, metrics: Sequence[str] = METRICS) -> "ListEvaluation":
        """From rankings.parquet, by the lists' relevance: these metrics."""
        folder, split = runs.stage_dir(run, "evaluate"), read_results(run)["split"]
        path = runs.stage_dir(run, "candidates") / f"{split}.parquet"
        lists = pq.read_table(path, columns=["row_id", "relevance"]).to_pandas().set_index("row_id")
        by_ranker, values = _by_ranker(folder / "rankings.parquet"), {}
        shown = by_ranker["no_op"]
        relevance = lists["relevance"][shown["row_id"]].tolist()
        for name, lines in by_ranker.items():
            values[name] = metrics_per_row(Ranking(name, lines["order"].tolist()), relevance, metrics=metrics)
            values[name][FAILED] = lines["order"].isna().to_numpy(dtype=float)
        values["random"] = metrics_per_row(Ranking("random", None), relevance, metrics=metrics)
        folders = {r.name: runs.stage_dir(run, r.stage).resolve() for r in of_task("rerank") if r.stage}
        recipe = folders["dapo"] / "recipe.yaml"
        keys = yaml.safe_load(recipe.read_text()) if recipe.is_file() else {}
        start = "sft_no_trace" if keys.get("without_trace") else "sft"
        start = "" if keys.get("start_model") else start
        before = _orders_of_start(keys.get("start_model"), shown["row_id"].tolist())
        if before is not None and "dapo" in by_ranker:
            pairs = zip(by_ranker["dapo"]["order"], before, strict=True)
            fused = [merged([None if order is None else list(order) for order in pair]) for pair in pairs]
            values[MERGED] = metrics_per_row(Ranking(MERGED, fused), relevance, metrics=metrics)
            values[MERGED][FAILED] = np.array([float(order is None) for order in fused])
            folders[MERGED] = folders["dapo"]
        rows: list[tuple[object, ...]] = list(zip(shown["row_id"], shown["user"], strict=True))
        return cls(rows, shown["user"].to_numpy(), values, folders, start)


def _orders_of_start(start_model: str | None, row_ids: Sequence[int]) -> list[Any] | None:
    """The rankings of the same rows by the run of a `start_model`, where it is RUN/dapo/model and was evaluated."""
    if start_model is None:
        return None
    folder = Path(names.locate(start_model, "start_model")).absolute()
    if folder.parts[-2:] != ("dapo", "model"):
        return None
    path = folder.parents[1] / "evaluate/rankings.parquet"
    lines = _by_ranker(path).get("dapo") if path.is_file() else None
    return lines["order"].tolist() if lines is not None and lines["row_id"].tolist() == list(row_ids) else None


@dataclass(frozen=True, eq=False)
class NextItemEvaluation(Evaluation):
    """A run that ranked the catalogue for the next item.

    Attributes:
        pruning: Of its beam search on its own rows; None where it was not measured.
    """

    pruning: Pruning | None

    @property
    def one_hop(self) -> np.ndarray:
        """(R,) whether counting could have found the target."""
        return np.array([row[-1] for row in self.rows], dtype=bool)

    @classmethod
    def load(cls, run: Path) -> "NextItemEvaluation":
        """From lists.parquet and, where it is there, pruning.parquet."""
        folder = runs.stage_dir(run, "evaluate")
        by_ranker, file = _by_ranker(folder / "lists.parquet"), folder / PRUNING_FILE
        values = {
            name: recall.metrics_of_lists(_items(lines, recall.LIST_LENGTH), lines["target"].to_numpy())
            for name, lines in by_ranker.items()
        }
        first = next(iter(by_ranker.values()))
        row_ids = first["row_id"].to_numpy()
        if not file.is_file():
            logger.info("%s: pruning by beam search was not measured; set evaluate.pruning=true", file.parent)
        measured = Pruning.read(file, row_ids) if file.is_file() else None
        if measured is not None:
            columns = measured.is_top, measured.is_pruned, measured.violates.any(axis=1)
            values[PRUNING] = dict(zip(("top", "pruned", "violated"), map(np.asarray, columns), strict=True))
        rows = [tuple(row) for row in first[["row_id", "user", "target", "one_hop"]].to_numpy().tolist()]
        return cls(rows, first["user"].to_numpy(), values, measured)


def load_sets(run: Path) -> Evaluation:
    """A run that ranked all that is held out of a user at once."""
    file = runs.stage_dir(run, "evaluate") / "lists.parquet"
    by_ranker = {name: lines.sort_values("user") for name, lines in _by_ranker(file).items()}
    values = {
        name: held_out_sets.metrics_of_sets(_items(lines, held_out_sets.LIST_LENGTH), lines["targets"].tolist())
        for name, lines in by_ranker.items()
    }
    first = next(iter(by_ranker.values()))
    rows: list[tuple[object, ...]] = list(zip(first["user"], map(tuple, first["targets"]), strict=True))
    return Evaluation(rows, first["user"].to_numpy(), values)


def _by_ranker(path: Path) -> dict[str, pd.DataFrame]:
    """The records of each ranker."""
    return dict(iter(pq.read_table(path).to_pandas().groupby("ranker", sort=False)))


def _items(lines: pd.DataFrame, length: int) -> np.ndarray:
    """(R, length) items of each list, -1 where it is shorter."""
    return recall.filled(lines["items"].tolist(), length)


def load_all(load: Callable[[Path], E], runs_of: RunsOf, what: str) -> dict[str, list[E]]:
    """Every run of every variant, on the rows of all seeds.

    Raises:
        ValueError: When a variant was evaluated on other rows, which `what` names, than the first with the same seed.
    """
    read = {name: [load(run) for run in folders] for name, folders in runs_of.items()}
    first, of_first = next(iter(read.items()))
    for name, seeds in read.items():
        for seed, (found, wanted) in enumerate(zip(seeds, of_first, strict=True)):
            if found.rows != wanted.rows:
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other {what} than {first}; use one split"
                )
    user_of = {row: user for found in of_first for row, user in zip(found.rows, found.users, strict=True)}
    rows, users = list(user_of), np.array(list(user_of.values()))
    return {name: [found.on(rows, users) for found in seeds] for name, seeds in read.items()}


def read_results(run: Path) -> dict[str, Any]:
    """results.json of a run."""
    found: dict[str, Any] = json.loads((runs.stage_dir(run, "evaluate") / "results.json").read_text())
    return found


def list_metrics(runs_of: RunsOf) -> tuple[str, ...]:
    """The metrics of runs that rank lists: those of the first one."""
    return metrics_of(read_results(next(iter(runs_of.values()))[0]))


def load_lists(runs_of: RunsOf) -> dict[str, list[ListEvaluation]]:
    """Every run that ranks lists, by `list_metrics`."""
    return load_all(partial(ListEvaluation.load, metrics=list_metrics(runs_of)), runs_of, "rows")


def by_seed(seeds: Sequence[Evaluation], ranker: str, metric: str) -> np.ndarray:
    """(S, R) a metric of each seed's ranking of each row."""
    return np.array([seed.values[ranker][metric] for seed in seeds], dtype=float)


def mean(seeds: Sequence[Evaluation], ranker: str, metric: str, chosen: np.ndarray | slice = slice(None)) -> float:
    """The mean of a metric over the chosen rows of all seeds."""
    return float(np.nanmean(by_seed(seeds, ranker, metric)[:, chosen]))


def count_seeds(seeds: Sequence[Evaluation], ranker: str, metric: str) -> int:
    """Number of seeds that a baseline's values rest on: 1 where they are the same with all."""
    values = by_seed(seeds, ranker, metric)
    return 1 if all(np.array_equal(values[0], other, equal_nan=True) for other in values) else len(seeds)
