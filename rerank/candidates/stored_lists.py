"""Lists of all rows of a run in memory-mapped files, so that a stage holds the rows of one part at a time.

R rows, N candidates of a row (another number in each), C candidates of all rows, F features of a candidate.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from rerank.baselines import Ragged
from rerank.candidates.row_lists import RowLists
from rerank.rows import TargetRows
from rerank.rows.mapped import Column, mapped


class StoredLists:
    """One list of each row, and the features of its candidates.

    Attributes:
        rows: The R rows.
        lengths: (R,) candidates of each.
    """

    def __init__(self, folder: Path, rows: TargetRows, lengths: np.ndarray) -> None:
        """No lists yet, but those of the log where the rows have them.

        Args:
            folder: On the disk of the files, which have no name and are gone when nobody reads them.
            rows: Of a run.
            lengths: (R,).
        """
        self.rows, self.lengths, self._folder = rows, lengths, folder
        self._ends = np.cumsum(lengths)
        self._columns: dict[str, np.ndarray] = {}

    def has(self, name: str) -> bool:
        """Whether a column of the candidates was put."""
        return name in self._columns

    def put(self, name: str, places: np.ndarray, values: Ragged) -> None:
        """Store a column of the candidates: candidates, scores, features, or tree_scores, which order lists anew.

        Args:
            name: Of the column.
            places: Of the rows.
            values: An array of N entries, or (N, F), for each of them.
        """
        if not len(places):
            return
        if name not in self._columns:
            self._columns[name] = self._empty(values[0])
        column = self.by_row(name)
        for place, of_row in zip(places.tolist(), values, strict=True):
            column[place][:] = of_row

    def by_row(self, name: str) -> Column:
        """A column as a sequence of the rows' entries, which stay in the file."""
        return Column(self._columns[name], self._ends, self.lengths)

    def _empty(self, example: np.ndarray) -> np.ndarray:
        return mapped(self._folder, (int(self._ends[-1]), *example.shape[1:]), example.dtype)

    def _copies(self, name: str, places: np.ndarray) -> list[np.ndarray]:
        column = self.by_row(name)
        return [np.array(column[place]) for place in places.tolist()]

    def part(self, places: np.ndarray) -> RowLists:
        """The lists of the rows at these places, with the features that they have so far."""
        chosen = self.rows.take(places)
        if self.rows.lists is not None:
            lists = RowLists.of_log(chosen)
        else:
            lists = RowLists.of_first_stage(chosen, self._copies("candidates", places), self._copies("scores", places))
        if self.has("tree_scores"):
            lists = lists.reordered(self._copies("tree_scores", places))
        return replace(lists, features=self._copies("features", places)) if self.has("features") else lists

    def features_of(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """The values of each feature among the rows at these places, one feature after the other."""
        column, chosen = self._columns["features"], np.zeros(len(self.lengths), dtype=bool)
        chosen[places] = True
        of_candidate = np.repeat(chosen, self.lengths)
        for number in range(column.shape[1]):
            yield column[:, number][of_candidate]
