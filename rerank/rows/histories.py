"""Histories as the data stage left them: one reader for training, counting and search.

R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.rows.row import choose_rows

TRAINING = ("train", "rerank")  # splits of which nothing is held out


def training_items(data_dir: Path, splits: Sequence[str] = TRAINING) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every interaction of these splits, each user's together and oldest first."""
    table = pq.read_table(data_dir / "interactions.parquet", columns=["user", "item", "position", "split"])
    table = table.filter(pc.field("split").isin(splits)).sort_by([("user", "ascending"), ("position", "ascending")])
    return table["user"].to_numpy(), table["item"].to_numpy()


def by_user(users: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
    """Each user's items, from `training_items`."""
    return np.split(items, np.flatnonzero(np.diff(users)) + 1) if len(items) else []


def training_sequences(data_dir: Path, splits: Sequence[str] = TRAINING) -> dict[int, np.ndarray]:
    """User to items of these splits, oldest first; by default all before validation, which counts may know."""
    users, items = training_items(data_dir, splits)
    return dict(zip(np.unique(users).tolist(), by_user(users, items), strict=True))


def windows(history: np.ndarray, max_items: int) -> Iterator[np.ndarray]:
    """Stretches of a history, each overlapping the one before by half, so that every item has a past."""
    step = max(1, max_items // 2)
    for start in range(0, max(1, len(history) - max_items // 2), step):
        yield history[start : start + max_items]


@dataclass(frozen=True)
class TargetRows:
    """The rows of data/rows.parquet, which have no list yet: histories and the items that follow.

    Attributes:
        row_ids, users, targets, splits: (R,).
        histories: R arrays of items, oldest first.
    """

    row_ids: np.ndarray
    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray
    splits: np.ndarray

    @classmethod
    def load(cls, run: str | Path) -> "TargetRows":
        """The rows of a run's data stage."""
        path = run_dir.stage_dir(run, "data") / "rows.parquet"
        table = pq.read_table(path, columns=["row_id", "user", "split", "history", "target"]).combine_chunks()
        history = pc.list_flatten(table["history"]).to_numpy()
        ends = np.cumsum(pc.list_value_length(table["history"]).to_numpy())
        row_ids, users, targets, splits = (table[name].to_numpy() for name in ("row_id", "user", "target", "split"))
        return cls(row_ids, users, np.split(history, ends[:-1]), targets, splits)

    def of_split(self, split: str, max_rows: int = 0, seed: int = 0) -> "TargetRows":
        """The rows of a split, `max_rows` of them drawn at random; all for 0."""
        return self.take(choose_rows(np.flatnonzero(self.splits == split).tolist(), max_rows, seed))

    def take(self, chosen: Sequence[int] | np.ndarray) -> "TargetRows":
        """The rows at these places."""
        row_ids, users, histories = self.row_ids[chosen], self.users[chosen], [self.histories[row] for row in chosen]
        return TargetRows(row_ids, users, histories, self.targets[chosen], self.splits[chosen])

    def __len__(self) -> int:
        return len(self.row_ids)
