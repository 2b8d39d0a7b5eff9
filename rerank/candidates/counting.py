"""Counts of training events, and which of them may speak about a row.

A held-out row may know all training events. A training row must not know its own label. Where rows are made of single
interactions its user's own counts are subtracted exactly. Where rows are requests the events of a fold of users are
left out, its own user among them, or, with a split by time, everything from the beginning of its window on: an exact
subtraction would print the label, since an item that the user chose would show one choice less than the same item in
another user's list. With a split by time no held-out row knows more than was known before the first of them.

R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.baselines import Counts, ItemFacts
from rerank.baselines.interactions import Interactions
from rerank.baselines.lambdamart import user_folds
from rerank.baselines.pairs import Sequences
from rerank.candidates.shown_lists import ShownLists
from rerank.launch import run_dir
from rerank.launch.engines import DuckDB
from rerank.rows import TargetRows
from rerank.rows.histories import TRAINING

ITEM_NUMBER = "item_"  # before the name of an item's number among features, which has names of its own
NUM_FOLDS = 10  # of the users of training requests
PART = 8192  # rows that are worked on together


def in_parts(places: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    """The places, at most `size` at a time, by default PART."""
    size = size or PART
    for start in range(0, len(places), size):
        yield places[start : start + size]


@dataclass(frozen=True)
class Events:
    """Training interactions and training lists.

    Attributes:
        interactions: In an engine.
        lists: Of the training requests; None where there are none.
    """

    interactions: Interactions
    lists: ShownLists | None

    @classmethod
    def load(cls, engine: DuckDB, run: str | Path, rows: TargetRows) -> "Events":
        """Those of a run, read by an engine; `rows` are all of its rows.

        Of requests that are split by time, those that were known before the first held-out one.
        """
        data_dir = run_dir.stage_dir(run, "data")
        num_items = pq.read_metadata(data_dir / "items.parquet").num_rows
        interactions = Interactions.of_file(engine, data_dir / "interactions.parquet", num_items, TRAINING)
        if rows.lists is None:
            return cls(interactions, None)
        events = cls(interactions, ShownLists.of(rows.take(np.flatnonzero(rows.splits == "rerank"))))
        return events.part(until=first_held_out(rows)) if is_by_time(run) else events

    def part(self, until: float | None = None, without_users: np.ndarray | None = None) -> "Events":
        """Those that were known before a moment, or without some users."""
        lists = None if self.lists is None else self.lists.part(until, without_users)
        return Events(self.interactions.part(until, without_users), lists)

    def counts(
        self,
        facts: ItemFacts,
        neighbours: int | None = None,
        earlier: Counts | None = None,
        since: float | None = None,
    ) -> Counts:
        """Counts of all of them; arguments as of `Counts.of`."""
        shown = np.empty(0) if self.lists is None else self.lists.times
        times = np.append(shown, self.interactions.latest())
        until = float(np.nanmax(times)) if np.isfinite(times).any() else None
        feedback = None if self.lists is None else self.lists.feedback(self.interactions.num_items)
        return Counts.of(self.interactions, facts, feedback, until, neighbours, earlier, since)


@dataclass(frozen=True)
class CountedRows:
    """Rows and the counts that may speak about them.

    Attributes:
        places: (R,) of the rows.
        counts: For these rows.
        users: (R,) whose part in the counts is to be subtracted, -1 for nobody's; None for nothing.
        sequences: Of users, which the counts rest on.
    """

    places: np.ndarray
    counts: Counts
    users: np.ndarray | None = None
    sequences: Sequences = field(default_factory=dict)


def times_of(rows: TargetRows) -> np.ndarray:
    """(R,) times of requests, nan where unknown."""
    assert rows.lists is not None
    return rows.lists.times


def first_held_out(rows: TargetRows) -> float:
    """The time of the first request that is not for training."""
    return float(times_of(rows)[rows.splits != "rerank"].min())


def is_by_time(run: str | Path) -> bool:
    """Whether the data stage of a run split its rows by time."""
    return run_dir.read_record(run, "data").given.get("split") == "by_time"


def check_numbers(run: str | Path, names: Sequence[str]) -> None:
    """Refuse `item_numbers` that items.parquet lacks or that are no numbers."""
    path = run_dir.stage_dir(run, "data") / "items.parquet"
    items = pq.read_table(path) if names else None
    for name in names:
        _numbers(items, name, path)


def item_facts(run: str | Path, numbers: Sequence[str], embeddings: np.ndarray | None) -> ItemFacts:
    """Categories, titles, brands and `numbers` of items, with their texts' embeddings, where there are any.

    Raises:
        ValueError: Naming a column that is not there, or the first item whose entry is no number.
    """
    path = run_dir.stage_dir(run, "data") / "items.parquet"
    items = pq.read_table(path).sort_by("item")
    brands = items["brand"].to_pylist() if "brand" in items.column_names else None
    known = {f"{ITEM_NUMBER}{name}": _numbers(items, name, path) for name in numbers}
    return ItemFacts.of(
        len(items), embeddings, items["category"].to_pylist(), items["title"].to_pylist(), brands, known
    )


def _numbers(items: pa.Table, name: str, path: Path) -> np.ndarray:
    """(items,) a column of texts as numbers, nan where it is empty."""
    if name not in items.column_names:
        cure = "name it in item_columns of the data stage, or leave it out"
        raise ValueError(f"item_numbers holds {name!r} but {path} has {', '.join(items.column_names)}; {cure}")
    values = np.full(len(items), np.nan)
    for place, text in enumerate(items[name].to_pylist()):
        try:
            values[place] = float(text) if text else np.nan
        except ValueError:
            problem = f"{name} of item {items['item_id'][place].as_py()!r} is {text!r}, no number"
            raise ValueError(f"{path}: {problem}; correct it, or take {name} out of item_numbers") from None
    return values


def counted_rows(
    run: str | Path, rows: TargetRows, all_counts: Counts, events: Events, window: float, seed: int
) -> Iterator[CountedRows]:
    """The rows, those that have the same counts together.

    Args:
        run: Folder of the run.
        rows: All of its rows.
        all_counts: Of all training events.
        events: The training events.
        window: Seconds of a window, of a split by time.
        seed: Of the folds of users.
    """
    if rows.lists is None:
        # only training rows were counted: -1, no user, subtracts nothing
        users = np.where(rows.splits == "rerank", rows.users, -1)
        yield CountedRows(np.arange(len(rows)), all_counts, users, events.interactions.sequences)
        return
    yield CountedRows(np.flatnonzero(rows.splits != "rerank"), all_counts)
    training = np.flatnonzero(rows.splits == "rerank")
    if is_by_time(run):
        labels = np.floor(times_of(rows)[training] / window) * window  # of windows that later events do not move
        counted = counts_before(events, np.unique(labels).tolist(), all_counts)
    else:
        labels = user_folds(rows.users[training].tolist(), NUM_FOLDS, seed).astype(float)
        counted = counts_without(
            events, [rows.users[training[labels == fold]] for fold in np.unique(labels)], all_counts
        )
    for label, counts in zip(np.unique(labels).tolist(), counted, strict=True):
        yield CountedRows(training[labels == label], counts)


def counts_without(events: Events, users: Sequence[np.ndarray], like: Counts) -> Iterator[Counts]:
    """Counts of the events without each of these sets of users, with the facts and neighbours of others."""
    for left_out in users:
        yield events.part(without_users=left_out).counts(like.facts, like.neighbours)


def counts_before(events: Events, moments: Sequence[float], like: Counts) -> Iterator[Counts]:
    """Counts of the events before each of these moments, in ascending order, with the facts and neighbours of others.

    Where users' interactions are in the order of time and no entry is cut, those of a moment are added to those of the
    moment before; the result is the same.
    """
    grows = like.neighbours is None and events.interactions.is_in_order_of_time
    earlier: Counts | None = None
    since: float | None = None
    for moment in moments:
        counts = events.part(until=moment).counts(like.facts, like.neighbours, earlier, since)
        earlier, since = counts if grows else None, moment
        yield counts
