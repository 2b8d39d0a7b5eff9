"""Users' training items in order, as the data stage left them: one reader for all that learn or count from them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

TRAINING = ("train", "rerank")  # splits of which nothing is held out


def training_items(data_dir: Path, splits: Sequence[str] = TRAINING) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every interaction of these splits, each user's together and oldest first."""
    table = pq.read_table(data_dir / "interactions.parquet", columns=["user", "item", "position", "split"])
    table = table.filter(pc.field("split").isin(splits)).sort_by([("user", "ascending"), ("position", "ascending")])
    return table["user"].to_numpy(), table["item"].to_numpy()


def by_user(users: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
    """Each user's items, from `training_items`."""
    return np.split(items, np.flatnonzero(np.diff(users)) + 1) if len(items) else []


def windows(history: np.ndarray, max_items: int) -> Iterator[np.ndarray]:
    """Stretches of a history, each overlapping the one before by half, so that every item has a past."""
    step = max(1, max_items // 2)
    for start in range(0, max(1, len(history) - max_items // 2), step):
        yield history[start : start + max_items]
