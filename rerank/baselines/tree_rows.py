"""The candidates of rows as LightGBM reads them: a batch at a time, so that no matrix of all is made."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import lightgbm
import numpy as np


class Candidates(lightgbm.Sequence):
    """The judged candidates of rows, one after the other, as lines of F float64 features."""

    batch_size = 2**16

    def __init__(self, features: Sequence[np.ndarray], rows: Sequence[int], judged: Sequence[np.ndarray]) -> None:
        """Of some rows.

        Args:
            features: (N, F) of each row.
            rows: Places of those that are meant.
            judged: Places of the judged ones among the candidates of each of these.
        """
        self._features, self._rows, self._judged = features, rows, judged
        self._ends: list[int] = np.cumsum([len(places) for places in judged]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice | list[int]) -> np.ndarray:
        if isinstance(index, slice):
            return self._between(*index.indices(len(self))[:2])
        if isinstance(index, list):
            return np.stack([self._line(one) for one in index])
        return self._line(int(index))

    def _line(self, index: int) -> np.ndarray:
        row = bisect.bisect_right(self._ends, index)
        begin = self._ends[row - 1] if row else 0
        line = self._features[self._rows[row]][self._judged[row][index - begin]]
        return np.asarray(line, dtype=np.float64)

    def _between(self, begin: int, end: int) -> np.ndarray:
        first, last = bisect.bisect_right(self._ends, begin), bisect.bisect_left(self._ends, end)
        lines = np.concatenate([self._features[self._rows[row]][self._judged[row]] for row in range(first, last + 1)])
        before = self._ends[first - 1] if first else 0
        return np.asarray(lines[begin - before : end - before], dtype=np.float64)
