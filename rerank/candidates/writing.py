"""The tables of the stage, written a part of the rows at a time, and what is said of the lists in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.baselines import Counts
from rerank.candidates.augmentation import further_lists, shuffled_lists
from rerank.candidates.counting import Events, in_parts
from rerank.candidates.row_lists import RowLists, as_table, is_hit
from rerank.candidates.stored_lists import StoredLists

if TYPE_CHECKING:
    from rerank.candidates import CandidatesArguments

logger = logging.getLogger(__name__)


def write_split(
    path: Path, lists: StoredLists, split: str, further: Iterable[pa.Table]
) -> tuple[dict[str, float], int]:
    """Write the rows of a split with their lists; returns counts and recall of these, and the number of further lists.

    Args:
        path: The Parquet file.
        lists: Of all rows.
        split: Name of the split.
        further: Tables of further lists, for the training rows alone.
    """
    chosen, found, num_further = np.flatnonzero(lists.rows.splits == split), Found(), 0
    writer: pq.ParquetWriter | None = None
    try:
        for table in _tables(lists, chosen, found):
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
        assert writer is not None  # the data stage refuses a split without rows
        for table in further if split == "rerank" else ():
            writer.write_table(table.cast(writer.schema))
            num_further += len(table)
    finally:
        if writer is not None:
            writer.close()
    summary = found.summary()
    logger.info("%s: %s of %s lists hold the target", path.stem, summary["hits"], summary["rows"])
    return summary, num_further


def _tables(lists: StoredLists, chosen: np.ndarray, found: Found) -> Iterator[pa.Table]:
    for places in in_parts(chosen):
        part = lists.part(places)
        found.add(part)
        yield as_table(lists.rows.take(places), part)


def further_tables(
    args: CandidatesArguments, lists: StoredLists, counts: Counts, events: Events
) -> Iterator[pa.Table]:
    """The further lists of the training rows, with row ids of their own above those of all rows.

    Args:
        args: Which lists to draw.
        lists: Of all rows.
        counts: With which first stages rank.
        events: That they rest on.
    """
    rows, training = lists.rows, np.flatnonzero(lists.rows.splits == "rerank")
    first_id = int(rows.row_ids.max()) + 1
    for number in range(1, args.lists_per_row):
        if rows.lists is not None:
            rng = np.random.default_rng([args.seed, number])
            for places in in_parts(training):
                chosen, drawn = rows.take(places), shuffled_lists(lists.part(places), rng)
                yield as_table(replace(chosen, row_ids=chosen.row_ids + number * first_id), drawn, number)
            continue
        sequences, of_split = events.interactions.sequences, rows.take(training)
        for found in further_lists(args, args.num_candidates, of_split, counts, sequences, number):
            chosen = replace(of_split.take(found.rows), histories=found.histories)
            chosen = replace(chosen, row_ids=chosen.row_ids + number * first_id)
            if len(chosen):
                yield as_table(chosen, found.lists(of_split), number)


class Found:
    """Counts and recall of the lists of a split, gathered part by part."""

    def __init__(self) -> None:
        self._best: list[int] = []  # place of the first positive of each list, -1 without any
        self._hits, self._longest = 0, 0

    def add(self, lists: RowLists) -> None:
        """Take in the lists of a part."""
        self._best += [int(np.argmax(grades > 0)) if (grades > 0).any() else -1 for grades in lists.relevance]
        self._hits += sum(map(is_hit, lists.relevance))
        self._longest = max(self._longest, *(len(items) for items in lists.candidates))

    def summary(self) -> dict[str, float]:
        """Counts and recall of the lists."""
        best, cuts = np.array(self._best), sorted({1, min(5, self._longest), self._longest})
        recall = {f"recall@{cut}": float(np.mean((best >= 0) & (best < cut))) for cut in cuts}
        return {"rows": len(best), "hits": self._hits, "missed": int((best < 0).sum()), **recall}
