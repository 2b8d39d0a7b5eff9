"""Which items users take one after the other. Letters of shapes: N items, P pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


def co_engaged_pairs(data_dir: str | Path) -> np.ndarray:
    """Pairs (P, 2) of different items that follow each other in a user's training sequence, one per occurrence.

    Held-out interactions are left out: ids must not know them. GR2's definition of co-engaged items is UNKNOWN.
    """
    table = pq.read_table(Path(data_dir) / "interactions.parquet", columns=["user", "item", "position", "split"])
    table = table.filter(pc.field("split") == "train").sort_by([("user", "ascending"), ("position", "ascending")])
    users, items = table["user"].to_numpy(), table["item"].to_numpy()
    follows = (users[1:] == users[:-1]) & (items[1:] != items[:-1])
    return np.stack([items[:-1], items[1:]], axis=1)[follows]


@dataclass(frozen=True)
class Partners:
    """For each item the items co-engaged with it, those of item k at starts[k] to starts[k + 1]."""

    starts: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, pairs: np.ndarray, num_items: int) -> "Partners":
        """From pairs (P, 2), in both directions; an item has a partner as often as they meet."""
        both = np.concatenate([pairs, pairs[:, ::-1]])
        order = np.argsort(both[:, 0], kind="stable")
        return cls(np.searchsorted(both[order, 0], np.arange(num_items + 1)), both[order, 1])

    def draw(self, items: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which of the items have a partner (mask), and one drawn partner of each of those."""
        counts = self.starts[items + 1] - self.starts[items]
        has_partner = counts > 0
        return has_partner, self.items[self.starts[items[has_partner]] + rng.integers(counts[has_partner])]
