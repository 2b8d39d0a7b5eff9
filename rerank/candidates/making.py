"""How the lists of all rows and the features of their candidates are made, a part of the rows at a time.

R rows, N candidates of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from rerank.baselines import Counts, Ragged, fit_edges, list_features
from rerank.baselines.pairs import Sequences
from rerank.candidates import counting
from rerank.candidates.counting import CountedRows, in_parts
from rerank.candidates.model_lists import model_lists
from rerank.candidates.stored_lists import StoredLists
from rerank.launch import run_dir
from rerank.launch.engines import DuckDB
from rerank.rows import TargetRows
from rerank.rows.lists import read_lists

if TYPE_CHECKING:
    from rerank.candidates import CandidatesArguments

CANDIDATES = 2**20  # in a part at most: some 100 MB of features

logger = logging.getLogger(__name__)

Lists = tuple[Ragged, Ragged]  # candidates and their first-stage scores


def read_item_ids(run: str | Path) -> list[str]:
    """The original id of each item of a run."""
    items = pq.read_table(run_dir.stage_dir(run, "data") / "items.parquet", columns=["item", "item_id"])
    return items.sort_by("item")["item_id"].to_pylist()


def stored_lists(args: CandidatesArguments, rows: TargetRows, folder: Path) -> StoredLists:
    """The lists of the log, of a file or of a model; none yet where counts make them."""
    if rows.lists is not None:
        return StoredLists(folder, rows, np.array([len(items) for items in rows.lists.candidates]))
    every = np.arange(len(rows))
    if args.lists is not None:
        logger.info("own lists: that training lists are out of fold is for %s to ensure", args.lists)
        items, scores = read_lists(args.lists, rows.row_ids, read_item_ids(args.run_dir))
        lists = StoredLists(folder, rows, np.array([len(of_row) for of_row in items]))
        lists.put("candidates", every, items)
        lists.put("scores", every, scores)
        return lists
    lists = StoredLists(folder, rows, np.full(len(rows), args.num_candidates))
    if args.by_model:
        for places, most_likely, logps in model_lists(args, rows):
            lists.put("candidates", places, list(most_likely))
            lists.put("scores", places, list(logps))
    return lists


@dataclass(frozen=True)
class Asked:
    """Rows whose lists or features are to be made, with all that is needed beside the counts.

    Attributes:
        places: (R,) of the rows.
        histories: R arrays of items, oldest first.
        users, sequences: As of `CountedRows`, the latter of these users alone.
        lists: Candidates and their scores, R arrays of N each; None for lists that are to be made.
        columns: Numbers of the candidates that the log brings, by name.
    """

    places: np.ndarray
    histories: Ragged
    users: np.ndarray | None
    sequences: Sequences
    lists: Lists | None
    columns: Mapping[str, Ragged]


@dataclass(frozen=True)
class Made:
    """The features of the candidates of rows, (N, F) each, and their lists where these are made."""

    places: np.ndarray
    lists: Lists | None
    features: Ragged


def make(asked: Asked, counts: Counts, names: Sequence[str], num_candidates: int, exclude_seen: bool) -> Made:
    """The features of these names, and lists where there are none, by counts that may speak about the rows.

    A batch function: an engine calls it on a part of the rows at a time, here or in a process of its own.
    """
    own = None if asked.users is None else counts.own(asked.users, asked.sequences)
    lists = asked.lists
    if lists is None:
        items, scores = counts.top_rows(asked.histories, num_candidates, own, exclude_seen)
        lists = list(items), list(scores)
    features = list_features(names, counts, asked.histories, *lists, own, asked.columns)
    return Made(asked.places, lists if asked.lists is None else None, features)


def asked_parts(lists: StoredLists, counted: CountedRows, makes_lists: bool) -> Iterator[Asked]:
    """Rows that have the same counts, at most PART, and CANDIDATES of them, at a time."""
    longest = int(lists.lengths[counted.places].max(initial=1))
    for chosen in in_parts(np.arange(len(counted.places)), max(1, min(counting.PART, CANDIDATES // longest))):
        places, users, known = counted.places[chosen], None, {}
        if counted.users is not None:
            users = counted.users[chosen]
            known = {user: counted.sequences[user] for user in set(users.tolist()) if user in counted.sequences}
        histories = [lists.rows.histories[place] for place in places.tolist()]
        if makes_lists:
            yield Asked(places, histories, users, known, None, {})
        else:
            part = lists.part(places)
            yield Asked(places, histories, users, known, (part.candidates, part.scores), part.columns)


def fill(
    args: CandidatesArguments,
    engine: DuckDB,
    lists: StoredLists,
    names: Sequence[str],
    counted: Iterable[CountedRows],
) -> None:
    """Store the lists that counts make, where there are no others, and the features of all candidates.

    Args:
        args: Which lists to make.
        engine: Which makes them.
        lists: Of all rows.
        names: Of the features.
        counted: The rows with their counts.
    """
    makes_lists = lists.rows.lists is None and not lists.has("candidates")
    batch_function = partial(
        make, names=list(names), num_candidates=args.num_candidates, exclude_seen=args.exclude_seen
    )
    for rows in counted:
        for made in engine.mapped(batch_function, rows.counts, asked_parts(lists, rows, makes_lists)):
            for name, values in zip(("candidates", "scores"), made.lists or (), strict=False):
                lists.put(name, made.places, values)
            lists.put("features", made.places, made.features)


def edges_of(
    names: Sequence[str], lists: StoredLists, training: np.ndarray, num_buckets: int
) -> tuple[dict[str, list[float]], list[str]]:
    """The bucket edges of each feature, and the features that are the same for all candidates of the training lists.

    Args:
        names: Of the features.
        lists: With them.
        training: Places of the training rows.
        num_buckets: Of a feature.
    """
    edges, constant = {}, []
    for name, values in zip(names, lists.features_of(training), strict=True):
        edges[name] = fit_edges(values, num_buckets, name)
        constant += [name] if len(np.unique(values)) == 1 else []
    if constant and lists.rows.lists is not None:
        logger.info("the same for every candidate in training, so that they tell nothing: %s", ", ".join(constant))
    return edges, constant
