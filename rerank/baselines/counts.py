"""The counting baseline `transitions`, and the store of counts that all evidence rests on.

T[a -> b] sums, over all training sequences, 1 / (j - i) for b at most three places after a and 0.3 / (j - i) for b
before it. The score of item b after a history h_1 .. h_n is the sum over m = 1 .. 5 of T[h_(n+1-m) -> b] / m. A row
that was itself counted has its user's own counts subtracted first, exactly: its list is as hard as an unseen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines.features import ItemFacts, feature_rows, recent_items
from rerank.baselines.pairs import ALL_PAIRS, UNIT, OwnCounts, Sequences, flatten, matrix_of
from rerank.baselines.regression import ItemRegression

RECENCY = (60, 30, 20, 15, 12)  # 1 / m in sixtieths
SCORE_UNIT = UNIT * 60
CHUNK = 1024
MATRICES = ("transitions", "successors", "near")
FACT_MATRICES = ("categories", "words")


@dataclass(frozen=True)
class Counts:
    """Counts of training sequences, and what is known about the items."""

    transitions: csr_array  # (items, items), sixtieths
    successors: csr_array  # (items, items)
    near: csr_array  # (items, items)
    popularity: np.ndarray  # (items,)
    regression: ItemRegression
    facts: ItemFacts

    @classmethod
    def fit(cls, sequences: Sequences, num_items: int, facts: ItemFacts | None = None) -> Counts:
        """Counts of the given sequences.

        Args:
            sequences: User to items, oldest first.
            num_items: Size of the catalogue.
            facts: What is known about the items beside the sequences.
        """
        owners, items = flatten(sequences)
        matrices = []
        for pairs in ALL_PAIRS:
            _, first, second, weight = pairs(owners, items)
            matrices.append(matrix_of(first, second, weight, (num_items, num_items)))
        popularity, regression = np.bincount(items, minlength=num_items), ItemRegression.fit(owners, items, num_items)
        return cls(*matrices, popularity, regression, facts or ItemFacts.of(num_items))

    @property
    def num_items(self) -> int:
        return len(self.popularity)

    def save(self, path: str | Path) -> None:
        """Write everything to one npz file."""
        arrays = {"popularity": self.popularity, "embeddings": self.facts.embeddings, "brands": self.facts.brands}
        arrays |= {"inverse": self.regression.inverse, "places": self.regression.places}
        matrices = {name: getattr(self, name) for name in MATRICES}
        matrices |= {name: getattr(self.facts, name) for name in FACT_MATRICES}
        for name, matrix in matrices.items():
            arrays |= {f"{name}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}
            arrays[f"{name}_shape"] = np.array(matrix.shape)
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """Counts written by `save`."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; run the candidates stage first.")
        with np.load(path) as arrays:
            matrices = {}
            for name in (*MATRICES, *FACT_MATRICES):
                parts = tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
                matrices[name] = csr_array(parts, shape=tuple(arrays[f"{name}_shape"]))
            facts = {name: matrices.pop(name) for name in FACT_MATRICES}
            item_facts = ItemFacts(embeddings=arrays["embeddings"], brands=arrays["brands"], **facts)
            regression = ItemRegression(arrays["inverse"], arrays["places"])
            return cls(**matrices, popularity=arrays["popularity"], regression=regression, facts=item_facts)

    def own(self, users: Sequence[int], sequences: Sequences) -> OwnCounts:
        """What the user of each row put into these counts, for `top_rows` and `feature_rows`."""
        return OwnCounts.of(users, sequences, self.num_items)

    def _own_of_one(self, own_sequence: Sequence[int] | None) -> OwnCounts | None:
        return None if own_sequence is None else self.own([0], {0: np.asarray(own_sequence)})

    def _score_matrix(self, histories: Sequence[np.ndarray], rows: np.ndarray, own: OwnCounts | None) -> csr_array:
        """Scores of the rows in 1/3600, (len(rows), items), nothing where the history has the item."""
        chunk = [np.asarray(histories[row], dtype=np.int64) for row in rows]
        recent = recent_items(chunk, len(RECENCY))
        scores = _recency_weights(recent, self.num_items) @ self.transitions
        if own is not None:
            numbers = own.numbers(rows[:, None], recent)
            scores = scores - _recency_weights(numbers, len(own.keys)) @ own.transitions
        lines = np.repeat(np.arange(len(chunk)), [len(history) for history in chunk])
        seen = matrix_of(lines, np.concatenate(chunk), np.ones(len(lines)), scores.shape).astype(bool)
        scores = csr_array(scores - scores.multiply(seen))
        scores.eliminate_zeros()
        scores.sort_indices()
        return scores

    def transition_scores(self, history: Sequence[int], own_sequence: Sequence[int] | None = None) -> np.ndarray:
        """Score of every item after a history, (items,); -inf for the items of the history.

        Args:
            history: Items, oldest first.
            own_sequence: This user's part of the fitted sequences, to be subtracted.
        """
        own = self._own_of_one(own_sequence)
        scores = self._score_matrix([np.asarray(history)], np.array([0]), own).toarray()[0] / SCORE_UNIT
        scores[np.asarray(history, dtype=np.int64)] = -np.inf
        return scores

    def top(
        self, history: Sequence[int], n: int, own_sequence: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The n best items after a history with their scores; ties by popularity, then by item."""
        items, scores = self.top_rows([np.asarray(history)], n, self._own_of_one(own_sequence))
        return items[0], scores[0]

    def top_rows(
        self, histories: Sequence[np.ndarray], n: int, own: OwnCounts | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`top` of many rows at once: (R, n) items and (R, n) scores.

        Raises:
            ValueError: When a row has fewer than n items that it has not seen.
        """
        items = np.zeros((len(histories), n), dtype=np.int64)
        scores = np.zeros((len(histories), n), dtype=np.int64)
        for start in range(0, len(histories), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(histories)))
            matrix = self._score_matrix(histories, rows, own)
            line, item, score = _contenders(matrix, n)
            popularity = self._popularity(rows[line], item, own)
            order = np.lexsort((item, -popularity, -score, line))
            line, item, score = line[order], item[order], score[order]
            place = np.arange(len(line)) - np.searchsorted(line, line)
            kept = place < n
            items[rows[line[kept]], place[kept]] = item[kept]
            scores[rows[line[kept]], place[kept]] = score[kept]
            found = np.bincount(line[kept], minlength=len(rows))
            for row, number in zip(rows[found < n], found[found < n], strict=True):
                items[row, number:] = self._popular(row, histories[row], items[row, :number], n - number, own)
        return items, scores / SCORE_UNIT

    def _popularity(self, rows: np.ndarray, items: np.ndarray, own: OwnCounts | None) -> np.ndarray:
        return self.popularity[items] - (own.popularity_of(rows, items) if own is not None else 0)

    def _popular(self, row: int, history: np.ndarray, found: np.ndarray, n: int, own: OwnCounts | None) -> np.ndarray:
        """The n most popular items that are neither in the history nor found already: all have score 0."""
        free = np.ones(self.num_items, dtype=bool)
        free[np.asarray(history, dtype=np.int64)] = free[found] = False
        items = np.flatnonzero(free)
        if len(items) < n:
            raise ValueError(
                f"row {row} has seen all but {len(items) + len(found)} of {self.num_items} items, "
                f"fewer than the {n + len(found)} of a list; use a smaller num_candidates."
            )
        popularity = self._popularity(np.full(len(items), row), items, own)
        return items[np.lexsort((items, -popularity))[:n]]

    def feature_rows(
        self,
        histories: Sequence[np.ndarray],
        candidates: np.ndarray,
        scores: np.ndarray,
        own: OwnCounts | None = None,
    ) -> np.ndarray:
        """`features` of many rows at once, (R, N, F) float32."""
        return feature_rows(self, histories, candidates, scores, own)

    def features(
        self,
        history: Sequence[int],
        candidates: Sequence[int],
        scores: Sequence[float],
        own_sequence: Sequence[int] | None = None,
    ) -> np.ndarray:
        """What is known about each candidate, (N, F) float32, columns as in FEATURES.

        Args:
            history: Items, oldest first.
            candidates: Items in first-stage order.
            scores: Their first-stage scores.
            own_sequence: This user's part of the fitted sequences, to be subtracted.
        """
        own = self._own_of_one(own_sequence)
        return feature_rows(self, [np.asarray(history)], np.array([candidates]), np.array([scores]), own)[0]


def _recency_weights(columns: np.ndarray, width: int) -> csr_array:
    """(R, width) matrix with 1/m, in sixtieths, at each row's m-th column; -1 stands for none."""
    lines, steps = np.nonzero(columns >= 0)
    return matrix_of(lines, columns[lines, steps], np.array(RECENCY)[steps], (len(columns), width))


def _contenders(matrix: csr_array, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, item, score) of the entries that can be among the n best of their row, all ties included."""
    lengths = np.diff(matrix.indptr)
    width = max(int(lengths.max(initial=0)), n)
    filled = np.arange(width) < lengths[:, None]
    padded = np.zeros(filled.shape, dtype=matrix.dtype)
    padded[filled] = matrix.data
    least = np.partition(padded, width - n, axis=1)[:, width - n]
    kept = filled & (padded >= least[:, None])
    chosen = kept[filled]
    return np.nonzero(kept)[0], matrix.indices[chosen].astype(np.int64), matrix.data[chosen]
