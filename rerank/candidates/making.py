"""How the lists of all rows and the features of their candidates are made, a part of the rows at a time.

R rows, N candidates of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from rerank.baselines import fit_edges
from rerank.candidates.counting import CountedRows
from rerank.candidates.model_lists import model_lists
from rerank.candidates.stored_lists import StoredLists
from rerank.launch import run_dir
from rerank.rows import TargetRows
from rerank.rows.lists import read_lists

if TYPE_CHECKING:
    from rerank.candidates import CandidatesArguments

logger = logging.getLogger(__name__)


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
    if args.source == "model":
        for places, most_likely, logps in model_lists(args, rows):
            lists.put("candidates", places, list(most_likely))
            lists.put("scores", places, list(logps))
    return lists


def fill(args: CandidatesArguments, lists: StoredLists, names: Sequence[str], parts: Iterable[CountedRows]) -> None:
    """Store the lists that counts make, where there are no others, and the features of all candidates.

    Args:
        args: Which lists to make.
        lists: Of all rows.
        names: Of the features.
        parts: The rows with their counts.
    """
    rows = lists.rows
    makes_lists = rows.lists is None and not lists.has("candidates")
    for part in parts:
        if makes_lists:
            histories = [rows.histories[place] for place in part.places.tolist()]
            items, scores = part.counts.top_rows(histories, args.num_candidates, part.own, args.exclude_seen)
            lists.put("candidates", part.places, list(items))
            lists.put("scores", part.places, list(scores))
        lists.put("features", part.places, lists.part(part.places).with_features(names, rows, part).features)


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
        edges[name] = fit_edges(values, num_buckets)
        constant += [name] if len(np.unique(values)) == 1 else []
    if constant and lists.rows.lists is not None:
        logger.info("the same for every candidate in training, so that they tell nothing: %s", ", ".join(constant))
    return edges, constant
