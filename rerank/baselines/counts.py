"""The counting baseline `transitions`, and the store of counts that all evidence rests on.

T[a -> b] sums, over all training sequences, 1 / (j - i) for b at most three places after a and 0.3 / (j - i) for b
before it. The score of item b after a history h_1 .. h_n is the sum over m = 1 .. 5 of T[h_(n+1-m) -> b] / m. A row
that was itself counted has its user's own counts subtracted first, exactly: its list is as hard as an unseen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines.features import recent_items
from rerank.baselines.item_facts import ItemFacts
from rerank.baselines.pairs import (
    ALL_WEIGHTS,
    UNIT,
    Cut,
    Sequences,
    UserContributions,
    contenders,
    cut,
    flatten,
    matrix_of,
    weighted_pairs,
    with_empty,
)
from rerank.baselines.regression import ItemRegression
from rerank.baselines.times import in_seconds
from rerank.launch.files import write_whole

if TYPE_CHECKING:
    from rerank.baselines.interactions import Interactions

RECENCY = (60, 30, 20, 15, 12)  # 1 / m in sixtieths
SCORE_UNIT = UNIT * 60
CHUNK = 1024
MATRICES = ("transitions", "successors", "near")
FACT_MATRICES = ("categories", "words")
PARTS = ("data", "indices", "indptr")  # of a sparse matrix
NUMBER = "number:"  # before the name of an item's number in the file


@dataclass(frozen=True)
class Counts:
    """Counts of training sequences, and facts about the items."""

    transitions: csr_array  # (items, items), sixtieths
    successors: csr_array  # (items, items)
    near: csr_array  # (items, items)
    popularity: np.ndarray  # (items,)
    regression: ItemRegression
    facts: ItemFacts
    feedback: np.ndarray | None = None  # (2, items) lists that showed the item, and in which it was relevant
    until: float | None = None  # the time of the latest event in the log's unit, None where no time is known
    neighbours: int | None = None  # entries of each item in the three matrices, the largest ones; None: all

    @classmethod
    def fit(
        cls,
        sequences: Sequences,
        num_items: int,
        facts: ItemFacts | None = None,
        feedback: np.ndarray | None = None,
        until: float | None = None,
        neighbours: int | None = None,
    ) -> Counts:
        """Counts of sequences in memory.

        Args:
            sequences: User to items, oldest first.
            num_items: Size of the catalogue.
            facts: About the items, beside the sequences.
            feedback: (2, items) number of lists that showed each item, and of those in which it was relevant.
            until: The time of the latest event.
            neighbours: As of `of`.
        """
        owners, items = flatten(sequences)
        matrices = []
        for weights in ALL_WEIGHTS:
            _, first, second, weight = weighted_pairs(owners, items, *weights)
            matrices.append(cut(matrix_of(first, second, weight, (num_items, num_items)), neighbours))
        popularity = np.bincount(items, minlength=num_items)
        regression = ItemRegression.fit([(owners, items)], popularity)
        transitions, successors, near = matrices
        facts = facts or ItemFacts.of(num_items)
        return cls(transitions, successors, near, popularity, regression, facts, feedback, until, neighbours)

    @classmethod
    def of(
        cls,
        interactions: Interactions,
        facts: ItemFacts | None = None,
        feedback: np.ndarray | None = None,
        until: float | None = None,
        neighbours: int | None = None,
        earlier: Counts | None = None,
        since: float | None = None,
    ) -> Counts:
        """Counts of interactions in an engine, out of core: those of `fit` to the last digit.

        Args:
            interactions: In order; all that the counts rest on.
            facts, feedback, until: As of `fit`.
            neighbours: Entries of each item that a matrix keeps. A kept value is exact, one that was cut is taken for
                0. With a user left out it is also 0 where the others' part of it would have been cut. None keeps all.
            earlier: Counts of those before `since`, to which the pairs of the later ones are added: the result is that
                of counting all. Needs users' interactions in the order of time, and counts of all neighbours.
            since: The moment.
        """
        if earlier is None or since is None:
            matrices = interactions.matrices(neighbours)
        elif earlier.neighbours is not None:
            raise ValueError(f"counts of {earlier.neighbours} neighbours cannot be added to; count all interactions")
        else:
            added = zip(MATRICES, interactions.matrices_since(since), strict=True)
            matrices = [cut(csr_array(getattr(earlier, name) + matrix), neighbours) for name, matrix in added]
        popularity = interactions.popularity
        regression = ItemRegression.fit(interactions.sequences.blocks(), popularity)
        transitions, successors, near = matrices
        facts = facts or ItemFacts.of(interactions.num_items)
        return cls(transitions, successors, near, popularity, regression, facts, feedback, until, neighbours)

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.popularity)

    @property
    def latest(self) -> str:
        """The day of the latest event (UTC), or that it is unknown."""
        if self.until is None:
            return "unknown date"
        try:
            return f"{datetime.fromtimestamp(float(in_seconds(self.until)), UTC):%Y-%m-%d}"
        except (ValueError, OverflowError):  # in another unit
            return f"time {self.until:.0f}"

    def save(self, path: str | Path) -> None:
        """Write everything to one npz file, whole or not at all."""
        arrays = {"popularity": self.popularity, "embeddings": self.facts.embeddings, "brands": self.facts.brands}
        arrays |= {"inverse": self.regression.inverse, "places": self.regression.places}
        arrays |= {} if self.feedback is None else {"feedback": self.feedback}
        arrays |= {} if self.until is None else {"until": np.array(self.until)}
        arrays |= {} if self.neighbours is None else {"neighbours": np.array(self.neighbours)}
        arrays |= {f"{NUMBER}{name}": values for name, values in self.facts.numbers.items()}
        matrices = {name: getattr(self, name) for name in MATRICES}
        matrices |= {name: getattr(self.facts, name) for name in FACT_MATRICES}
        for name, matrix in matrices.items():
            arrays |= {f"{name}_{part}": getattr(matrix, part) for part in PARTS}
            arrays[f"{name}_shape"] = np.array(matrix.shape)
        write_whole(path, lambda temporary: _write_npz(temporary, arrays))

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """Counts written by `save`."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; run the candidates stage first.")
        with np.load(path) as arrays:

            def matrix(name: str) -> csr_array:
                parts = tuple(arrays[f"{name}_{part}"] for part in PARTS)
                return csr_array(parts, shape=tuple(arrays[f"{name}_shape"]))

            categories, words = map(matrix, FACT_MATRICES)
            numbers = {name.removeprefix(NUMBER): arrays[name] for name in arrays.files if name.startswith(NUMBER)}
            facts = ItemFacts(arrays["embeddings"], categories, words, arrays["brands"], numbers)
            feedback = arrays["feedback"] if "feedback" in arrays.files else None
            regression = ItemRegression(arrays["inverse"], arrays["places"])
            transitions, successors, near = map(matrix, MATRICES)
            until = float(arrays["until"]) if "until" in arrays.files else None
            neighbours = int(arrays["neighbours"]) if "neighbours" in arrays.files else None
            popularity = arrays["popularity"]
            return cls(transitions, successors, near, popularity, regression, facts, feedback, until, neighbours)

    def with_items(self, facts: ItemFacts) -> Counts:
        """The same counts of a catalogue with more items behind these, none of which was chosen yet.

        Args:
            facts: About all items.
        """
        added = len(facts.brands) - self.num_items
        transitions, successors, near = (with_empty(getattr(self, name), added) for name in MATRICES)
        popularity = np.pad(self.popularity, (0, added))
        regression = replace(self.regression, places=np.pad(self.regression.places, (0, added), constant_values=-1))
        feedback = None if self.feedback is None else np.pad(self.feedback, ((0, 0), (0, added)))
        counted = transitions, successors, near, popularity, regression
        return Counts(*counted, facts, feedback, self.until, self.neighbours)

    def own(self, users: Sequence[int] | np.ndarray, sequences: Sequences) -> UserContributions:
        """The contributions of each row's user to these counts, for `top_rows` and `feature_rows`."""
        own = UserContributions.of(users, sequences, self.num_items)
        return own if self.neighbours is None else own.within(*self._cut)

    @cached_property
    def _cut(self) -> list[Cut]:
        assert self.neighbours is not None
        return [Cut.of(getattr(self, name), self.neighbours) for name in MATRICES]

    @cached_property
    def _most_popular(self) -> np.ndarray:
        """(items,) the most popular item first, ties by item."""
        return np.argsort(-self.popularity, kind="stable")

    def _score_matrix(
        self, histories: Sequence[np.ndarray], rows: np.ndarray, own: UserContributions | None, exclude_seen: bool
    ) -> csr_array:
        """Scores of the rows in 1/3600, (len(rows), items), with `exclude_seen` nothing for items of the history."""
        chunk = [np.asarray(histories[row], dtype=np.int64) for row in rows]
        recent = recent_items(chunk, len(RECENCY))
        scores = _recency_weights(recent, self.num_items) @ self.transitions
        if own is not None:
            numbers = own.numbers(rows[:, None], recent)
            scores = scores - _recency_weights(numbers, len(own.keys)) @ own.transitions
        if exclude_seen:
            lines = np.repeat(np.arange(len(chunk)), [len(history) for history in chunk])
            seen = matrix_of(lines, np.concatenate(chunk), np.ones(len(lines)), scores.shape).astype(bool)
            scores = csr_array(scores - scores.multiply(seen))
        scores.eliminate_zeros()
        scores.sort_indices()
        return scores

    def top_rows(
        self,
        histories: Sequence[np.ndarray],
        n: int,
        own: UserContributions | None = None,
        exclude_seen: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The n best items after each history with their scores, (R, n) each; ties by popularity, then by item.

        Args:
            histories: R lists of items, oldest first.
            n: Length of a list; no row may have fewer items that it has not seen.
            own: To be subtracted from the counts; None for rows that were not counted.
            exclude_seen: Whether the items of a history are left out.
        """
        items = np.zeros((len(histories), n), dtype=np.int64)
        scores = np.zeros((len(histories), n), dtype=np.int64)
        for start in range(0, len(histories), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(histories)))
            matrix = self._score_matrix(histories, rows, own, exclude_seen)
            line, item, score = contenders(matrix, n)
            popularity = self._popularity(rows[line], item, own)
            order = np.lexsort((item, -popularity, -score, line))
            line, item, score = line[order], item[order], score[order]
            place = np.arange(len(line)) - np.searchsorted(line, line)
            kept = place < n
            items[rows[line[kept]], place[kept]] = item[kept]
            scores[rows[line[kept]], place[kept]] = score[kept]
            found = np.bincount(line[kept], minlength=len(rows))
            for row, number in zip(rows[found < n], found[found < n], strict=True):
                seen = histories[row] if exclude_seen else ()
                items[row, number:] = self._popular(row, seen, items[row, :number], n - number, own)
        return items, scores / SCORE_UNIT

    def _popularity(self, rows: np.ndarray, items: np.ndarray, own: UserContributions | None) -> np.ndarray:
        return self.popularity[items] - (own.popularity_of(rows, items) if own is not None else 0)

    def _popular(
        self, row: int, seen: Sequence[int] | np.ndarray, found: np.ndarray, n: int, own: UserContributions | None
    ) -> np.ndarray:
        """The n most popular items that are neither excluded nor found already: all have score 0."""
        left_out = np.concatenate([np.asarray(seen, dtype=np.int64), found])
        user = -1 if own is None else int(own.owners[row])
        number_of_own = 0 if own is None or user < 0 else int(np.diff(own.popularity.indptr)[user])
        # without the user's own part only items of the user lose a place
        items = self._most_popular[: n + len(left_out) + number_of_own]
        items = items[~np.isin(items, left_out)]
        if len(items) < n:
            raise ValueError(
                f"row {row} has seen all but {len(items) + len(found)} of {self.num_items} items, "
                f"fewer than the {n + len(found)} of a list; use a smaller num_candidates."
            )
        popularity = self._popularity(np.full(len(items), row), items, own)
        return items[np.lexsort((items, -popularity))[:n]]


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _recency_weights(columns: np.ndarray, width: int) -> csr_array:
    """(R, width) matrix with 1/m, in sixtieths, at each row's m-th column; -1 stands for none."""
    lines, steps = np.nonzero(columns >= 0)
    return matrix_of(lines, columns[lines, steps], np.array(RECENCY)[steps], (len(columns), width))
