"""Counts of training events, and which of them may speak about a row.

A held-out row may know all training events. A training row must not know its own label. Where rows are made of single
interactions its user's own counts are subtracted exactly. Where rows are requests the events of a fold of users are
left out, its own user among them, or, with a split by time, everything from the beginning of its window on: an exact
subtraction would print the label, since an item that the user chose would show one choice less than the same item in
another user's list.

R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.baselines import Counts, ItemFacts, UserContributions
from rerank.baselines.lambdamart import user_folds
from rerank.launch import run_dir
from rerank.rows import TargetRows
from rerank.rows.histories import TRAINING, by_user

ITEM_NUMBER = "item_"  # before the name of an item's number among features, which has names of its own
NUM_FOLDS = 10  # of the users of training requests


@dataclass(frozen=True)
class Events:
    """Training interactions and training lists.

    Attributes:
        users, items, times: (interactions,) each user's together and oldest first.
        requests: The training requests; None where there are none.
        request_times: Of these, nan where unknown.
        num_items: Size of the catalogue.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    requests: TargetRows | None
    request_times: np.ndarray
    num_items: int

    @classmethod
    def load(cls, run: str | Path, rows: TargetRows) -> "Events":
        """Those of a run; `rows` are all of its rows."""
        data_dir = run_dir.stage_dir(run, "data")
        table = pq.read_table(data_dir / "interactions.parquet")
        table = table.filter(pc.field("split").isin(TRAINING)).sort_by(
            [("user", "ascending"), ("position", "ascending")]
        )
        users, items = table["user"].to_numpy(), table["item"].to_numpy()
        known = "time" in table.column_names
        times = table["time"].to_numpy().astype(float) if known else np.full(len(table), np.nan)
        training = np.flatnonzero(rows.splits == "rerank")
        requests = rows.take(training) if rows.lists is not None else None
        request_times = times_of(requests) if requests is not None else np.empty(0)
        num_items = pq.read_metadata(data_dir / "items.parquet").num_rows
        return cls(users, items, times, requests, request_times, num_items)

    def part(self, before: float | None = None, without_users: np.ndarray | None = None) -> "Events":
        """Those before a moment, or without some users."""
        kept, rows = np.ones(len(self.users), dtype=bool), np.ones(len(self.request_times), dtype=bool)
        if before is not None:
            kept, rows = self.times < before, self.request_times < before
        if without_users is not None:
            kept &= ~np.isin(self.users, without_users)
            rows &= ~np.isin(self.requests.users, without_users) if self.requests is not None else True
        requests = None if self.requests is None else self.requests.take(np.flatnonzero(rows))
        events = self.users[kept], self.items[kept], self.times[kept]
        return Events(*events, requests, self.request_times[rows], self.num_items)

    def sequences(self) -> dict[int, np.ndarray]:
        """User to items, oldest first."""
        return dict(zip(np.unique(self.users).tolist(), by_user(self.users, self.items), strict=True))

    def feedback(self) -> np.ndarray | None:
        """(2, items) lists whose user judged the item, and those in which it was relevant; None without lists."""
        if self.requests is None or self.requests.lists is None:
            return None
        lists = self.requests.lists
        items = np.concatenate([*lists.candidates, np.empty(0, dtype=np.int64)])
        grades = np.concatenate([*lists.relevance, np.empty(0)])
        chosen = (items[~np.isnan(grades)], items[grades > 0])
        return np.stack([np.bincount(part, minlength=self.num_items) for part in chosen])

    def counts(self, facts: ItemFacts) -> Counts:
        """Counts of all of them."""
        times = np.concatenate([self.times, self.request_times])
        until = float(np.nanmax(times)) if np.isfinite(times).any() else None
        return Counts.fit(self.sequences(), self.num_items, facts, self.feedback(), until)


@dataclass(frozen=True)
class CountedRows:
    """Rows and the counts that may speak about them.

    Attributes:
        places: (R,) of the rows.
        counts: For these rows.
        own: To be subtracted from them, by place of the row among all; None for nothing.
    """

    places: np.ndarray
    counts: Counts
    own: UserContributions | None


def times_of(rows: TargetRows) -> np.ndarray:
    """(R,) times of requests, nan where unknown."""
    assert rows.lists is not None
    return np.asarray(rows.lists.details["time"].to_numpy(zero_copy_only=False), dtype=float)


def is_by_time(run: str | Path) -> bool:
    """Whether the data stage of a run split its rows by time."""
    return run_dir.read_record(run, "data").given.get("split") == "by_time"


def check_numbers(run: str | Path, names: Sequence[str]) -> None:
    """Refuse `item_numbers` that items.parquet lacks or that are no numbers."""
    path = run_dir.stage_dir(run, "data") / "items.parquet"
    items = pq.read_table(path) if names else None
    for name in names:
        _numbers(items, name, path)


def item_facts(run: str | Path, numbers: Sequence[str]) -> ItemFacts:
    """Texts' embeddings (where the semantic_ids stage made them), categories, titles, brands and `numbers` of items.

    Raises:
        ValueError: Naming a column that is not there, or the first item whose entry is no number.
    """
    path = run_dir.stage_dir(run, "data") / "items.parquet"
    items = pq.read_table(path).sort_by("item")
    embeddings_path = run_dir.stage_dir(run, "semantic_ids") / "embeddings.npy"
    embeddings = np.load(embeddings_path, mmap_mode="r") if embeddings_path.is_file() else None
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
    """The rows in parts, each with its counts.

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
        own = all_counts.own(np.where(rows.splits == "rerank", rows.users, -1), events.sequences())
        yield CountedRows(np.arange(len(rows)), all_counts, own)
        return
    yield CountedRows(np.flatnonzero(rows.splits != "rerank"), all_counts, None)
    training = np.flatnonzero(rows.splits == "rerank")
    by_time = is_by_time(run)
    if by_time:
        labels = np.floor(times_of(rows)[training] / window) * window  # of windows that later events do not move
    else:
        labels = user_folds(rows.users[training].tolist(), NUM_FOLDS, seed).astype(float)
    for label in np.unique(labels).tolist():
        places = training[labels == label]
        part = events.part(before=label) if by_time else events.part(without_users=rows.users[places])
        yield CountedRows(places, part.counts(all_counts.facts), None)
