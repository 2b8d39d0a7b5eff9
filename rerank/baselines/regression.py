"""A linear model of which items go together: every item is predicted from all other items of the same user.

With X the users' items as 0/1 and P = (X'X + RIDGE I)^-1 the weight of item a in the prediction of item b is
-P[a, b] / P[b, b] (EASE, Steck 2019). The score of b after a history is the sum over the history's items. Without a
user x, P becomes P + (P x)(P x)' / (1 - x' P x) (Sherman and Morrison 1950), so leaving a user out needs no new fit.
The weight of an item in its own prediction is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines.pairs import MANY_ITEMS

RIDGE = 300
MAX_ITEMS = 3000  # the inverse takes items^2 numbers: rarer items of a larger catalogue have no weights
FADING = 10  # places: an item so far back counts 1 / e in the recent score


@dataclass(frozen=True)
class ItemRegression:
    """The inverse, and which items it is of."""

    inverse: np.ndarray  # (M, M)
    places: np.ndarray  # (items,) row of the inverse, -1: none

    @classmethod
    def fit(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray]], popularity: np.ndarray) -> ItemRegression:
        """The model of interactions.

        Args:
            blocks: (owner, item) of the interactions of some users at a time, owners from 0 in each block.
            popularity: (items,) number of interactions of each.
        """
        kept = np.sort(np.argsort(-popularity, kind="stable")[:MAX_ITEMS])
        places = np.full(len(popularity), -1, dtype=np.int64)
        places[kept] = np.arange(len(kept))
        together = RIDGE * np.eye(len(kept))
        for owners, items in blocks:
            known = places[items] >= 0
            shape = owners.max(initial=-1) + 1, len(kept)
            chosen = csr_array((np.ones(known.sum()), (owners[known], places[items[known]])), shape=shape)
            chosen = chosen.astype(bool).astype(float)  # an item taken twice is one item
            together += (chosen.T @ chosen).toarray()
        return cls(np.linalg.inv(together), places)

    @property
    def num_unknown(self) -> int:
        """Items that have no weights."""
        return int((self.places < 0).sum())

    def scores(
        self, histories: Sequence[np.ndarray], candidates: np.ndarray, own: csr_array | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores after the whole history, and with items fading by their age, (R, N) each.

        An item without weights has none (nan) in a catalogue of MANY_ITEMS or more; in a smaller one it has 0, as in
        the results of this project's recipes.

        Args:
            histories: Items, oldest first.
            candidates: (R, N) items.
            own: (R, items) what each row's user put into the model, to be left out.
        """
        places = self.places[candidates]
        ages = np.concatenate([np.arange(len(history))[::-1] for history in histories])
        weights = (self._matrix(histories, np.ones(len(ages))), self._matrix(histories, np.exp(-ages / FADING)))
        sums = [np.take_along_axis(weight @ self.inverse, places, axis=1) for weight in weights]
        diagonal = self.inverse.diagonal()[places]
        if own is not None:
            mine = own.sorted_indices().astype(bool).astype(float)[:, np.flatnonzero(self.places >= 0)]
            moved = mine @ self.inverse  # P x of every row
            rest = 1 - mine.multiply(moved).sum(axis=1)[:, None]
            wanted = np.take_along_axis(moved, places, axis=1)
            sums = [
                total + weight.multiply(moved).sum(axis=1)[:, None] * wanted / rest
                for total, weight in zip(sums, weights, strict=True)
            ]
            diagonal = diagonal + wanted**2 / rest
        # -P[b, b] / P[b, b] = -1 is what an item of the history adds to its own score
        unknown = np.nan if len(self.places) >= MANY_ITEMS else 0.0
        itself = (np.take_along_axis(weight.toarray(), places, axis=1) for weight in weights)
        whole, recent = (
            np.where(places >= 0, added - total / diagonal, unknown) for total, added in zip(sums, itself, strict=True)
        )
        return whole, recent

    def _matrix(self, histories: Sequence[np.ndarray], values: np.ndarray) -> csr_array:
        """(R, M) the values, one for each item of the histories."""
        lines = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        places = self.places[np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])]
        known = places >= 0
        shape = (len(histories), len(self.inverse))
        return csr_array((values[known], (lines[known], places[known])), shape=shape)
