"""Co-engagement of items: pairs, vectors and partners. Letters of shapes: N items, P pairs, E columns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines.pairs import matrix_of, weighted_pairs
from rerank.launch import run_dir
from rerank.rows import training_items

COLUMNS = 128
TINY = 1e-6


def co_engaged_pairs(data_dir: Path) -> np.ndarray:
    """Pairs (P, 2) of different items that follow each other in a user's training sequence, one per occurrence.

    Held-out interactions are left out: ids must not know them. GR2's definition of co-engaged items is UNKNOWN.
    """
    users, items = _known_items(data_dir)
    follows = (users[1:] == users[:-1]) & (items[1:] != items[:-1])
    return np.stack([items[:-1], items[1:]], axis=1)[follows]


def _known_items(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every interaction that ids may know, in order."""
    return training_items(data_dir, run_dir.midtrain_splits(data_dir.parent))


def co_engagement_vectors(data_dir: Path, num_items: int, seed: int) -> np.ndarray:
    """Co-engagement of each item, (N, E) float32, E at most COLUMNS: rows of length one, zeros where unknown.

    Positive pointwise mutual information of items at most three places apart in training sequences (near ones count
    more, as in `transitions`), factorized, each side with the root of the singular values: Levy and Goldberg 2014,
    "Neural word embedding as implicit matrix factorization", sections 3.3 and 4.
    """
    from sklearn.utils.extmath import randomized_svd

    _, first, second, weight = weighted_pairs(*_known_items(data_dir))
    pairs = matrix_of(first, second, weight, (num_items, num_items))
    together = (pairs + pairs.T).tocoo()
    sums = np.asarray(together.sum(axis=1), dtype=np.float64).ravel()
    rows, columns = together.coords
    information = np.log(together.data * sums.sum() / (sums[rows] * sums[columns]))
    positive = information > 0
    if not positive.any():
        raise ValueError("no two items are taken together in training sequences; set co_engagement_weight to 0")
    matrix = csr_array((information[positive], (rows[positive], columns[positive])), shape=pairs.shape)
    left, singular, _ = randomized_svd(matrix, min(COLUMNS, num_items - 1), random_state=seed)
    vectors = left * np.sqrt(singular)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(lengths > TINY, vectors / np.maximum(lengths, TINY), 0).astype(np.float32)


@dataclass(frozen=True)
class Partners:
    """The items co-engaged with each item, those of item k at starts[k] to starts[k + 1]."""

    starts: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, pairs: np.ndarray, num_items: int) -> "Partners":
        """From pairs (P, 2), in both directions; a pair that occurs twice counts twice."""
        both = np.concatenate([pairs, pairs[:, ::-1]])
        order = np.argsort(both[:, 0], kind="stable")
        return cls(np.searchsorted(both[order, 0], np.arange(num_items + 1)), both[order, 1])

    def draw(self, items: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The mask of items that have a partner, and a random partner of each of those."""
        counts = self.starts[items + 1] - self.starts[items]
        has_partner = counts > 0
        return has_partner, self.items[self.starts[items[has_partner]] + rng.integers(counts[has_partner])]
