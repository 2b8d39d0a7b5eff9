"""Evaluations of finished runs, as `rerank compare` reads them.

A variant is one evaluation for each of its seeds. R rows of an evaluation: users where it ranks held-out sets.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from rerank.launch import run_dir as runs
from rerank.next_item import held_out_sets, recall
from rerank.next_item.pruning import FILE as PRUNING_FILE
from rerank.next_item.pruning import Pruning
from rerank.results.rankers import of_task
from rerank.results.rankings import Ranking, Values, metrics_per_row

logger = logging.getLogger(__name__)

FAILED = "parse failures"

RunsOf = Mapping[str, Sequence[Path]]  # variant -> the run of each seed


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run with a finished evaluate stage.

    Attributes:
        rows: (R,) ids; users with their items where it ranks held-out sets.
        users: (R,).
        values: Ranker to its metrics.
    """

    rows: list[object]
    users: np.ndarray
    values: dict[str, Values]


E = TypeVar("E", bound=Evaluation)
Variants = Mapping[str, Sequence[Evaluation]]


@dataclass(frozen=True, eq=False)
class ListEvaluation(Evaluation):
    """A run that ranked lists of candidates.

    Attributes:
        folders: Ranker with a model to the folder of the stage that made it, which runs may share.
        start: The sft stage's ranker that reinforcement learning started from.
    """

    folders: dict[str, Path]
    start: str

    @classmethod
    def load(cls, run: Path) -> "ListEvaluation":
        """From rankings.parquet, by the lists' relevance."""
        folder = runs.stage_dir(run, "evaluate")
        split = json.loads((folder / "results.json").read_text())["split"]
        path = runs.stage_dir(run, "candidates") / f"{split}.parquet"
        lists = pq.read_table(path, columns=["row_id", "relevance"]).to_pandas().set_index("row_id")
        by_ranker, values = _by_ranker(folder / "rankings.parquet"), {}
        shown = by_ranker["no_op"]
        relevance = lists["relevance"][shown["row_id"]].tolist()
        for name, lines in by_ranker.items():
            values[name] = metrics_per_row(Ranking(name, lines["order"].tolist()), relevance)
            values[name][FAILED] = lines["order"].isna().to_numpy(dtype=float)
        values["random"] = metrics_per_row(Ranking("random", None), relevance)
        folders = {r.name: runs.stage_dir(run, r.stage).resolve() for r in of_task("rerank") if r.stage}
        recipe = folders["dapo"] / "recipe.yaml"
        without_trace = recipe.is_file() and yaml.safe_load(recipe.read_text()).get("without_trace")
        start = "sft_no_trace" if without_trace else "sft"
        return cls(shown["row_id"].tolist(), shown["user"].to_numpy(), values, folders, start)


@dataclass(frozen=True, eq=False)
class NextItemEvaluation(Evaluation):
    """A run that ranked the catalogue for the next item.

    Attributes:
        one_hop: (R,) whether counting could have found the target.
        pruning: Of its beam search; None where it was not measured.
    """

    one_hop: np.ndarray
    pruning: Pruning | None

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
        row_ids, users, one_hop = (first[name].to_numpy() for name in ("row_id", "user", "one_hop"))
        if not file.is_file():
            logger.info("%s: pruning by beam search was not measured; set evaluate.pruning=true", file.parent)
        measured = Pruning.read(file, row_ids) if file.is_file() else None
        return cls(row_ids.tolist(), users, values, one_hop, measured)


def load_sets(run: Path) -> Evaluation:
    """A run that ranked all that is held out of a user at once."""
    file = runs.stage_dir(run, "evaluate") / "lists.parquet"
    by_ranker = {name: lines.sort_values("user") for name, lines in _by_ranker(file).items()}
    values = {
        name: held_out_sets.metrics_of_sets(_items(lines, held_out_sets.LIST_LENGTH), lines["targets"].tolist())
        for name, lines in by_ranker.items()
    }
    first = next(iter(by_ranker.values()))
    rows: list[object] = list(zip(first["user"], map(tuple, first["targets"]), strict=True))
    return Evaluation(rows, first["user"].to_numpy(), values)


def _by_ranker(path: Path) -> dict[str, pd.DataFrame]:
    """The records of each ranker."""
    return dict(iter(pq.read_table(path).to_pandas().groupby("ranker", sort=False)))


def _items(lines: pd.DataFrame, length: int) -> np.ndarray:
    """(R, length) items of each list, -1 where it is shorter."""
    return recall.filled(lines["items"].tolist(), length)


def load_all(load: Callable[[Path], E], runs_of: RunsOf, what: str) -> dict[str, list[E]]:
    """Every run of every variant; refuses one that was evaluated on other rows, which `what` names, than the first."""
    read = {name: [load(run) for run in folders] for name, folders in runs_of.items()}
    first = next(iter(read))
    for name, seeds in read.items():
        for seed, found in enumerate(seeds):
            if found.rows != read[first][0].rows:
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other {what} than {first}; use one split"
                )
    return read


def mean(seeds: Sequence[Evaluation], ranker: str, metric: str) -> np.ndarray:
    """(R,) a metric of each row, the mean over seeds."""
    return np.asarray(np.mean([seed.values[ranker][metric] for seed in seeds], axis=0))
