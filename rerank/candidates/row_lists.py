"""Lists of a run's rows with facts about each candidate, and the table that holds them.

R rows, N candidates of a row (another number in each), F features of a candidate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from rerank.baselines import Ragged
from rerank.metrics import best_first
from rerank.rows import RankingRow, TargetRows
from rerank.rows.histories import DETAILS


@dataclass(frozen=True)
class RowLists:
    """One list of each row, in the order shown.

    Attributes:
        candidates, scores: (R,) arrays of N items and of their first-stage scores.
        relevance: (R,) arrays of N grades, nan for a candidate that was not seen.
        ranks: (R,) arrays of N first-stage ranks, from 1.
        features: (R,) arrays (N, F); empty until they are made.
        columns: Numbers of the candidates that the log brings, by name.
    """

    candidates: Ragged
    scores: Ragged
    relevance: Ragged
    ranks: Ragged
    features: Ragged = ()
    columns: Mapping[str, Ragged] = field(default_factory=dict)

    @classmethod
    def of_first_stage(cls, rows: TargetRows, candidates: Ragged, scores: Ragged) -> "RowLists":
        """Lists in first-stage order of rows with a target."""
        relevance = [(items == target).astype(float) for items, target in zip(candidates, rows.targets, strict=True)]
        return cls(candidates, scores, relevance, _ranks(candidates))

    @classmethod
    def of_log(cls, rows: TargetRows) -> "RowLists":
        """The lists of requests."""
        assert rows.lists is not None
        own = rows.lists
        return cls(own.candidates, own.scores, own.relevance, _ranks(own.candidates), columns=own.columns)

    def reordered(self, scores: Ragged) -> "RowLists":
        """The same candidates in the order of other scores, ties as they were, as the first stage of the lists."""
        orders = [best_first(of_row) for of_row in scores]
        moved = self.shown_as(orders)
        best = [np.asarray(of_row)[order] for of_row, order in zip(scores, orders, strict=True)]
        return replace(moved, scores=best, ranks=_ranks(self.candidates), features=())

    def shown_as(self, orders: Sequence[Sequence[int]]) -> "RowLists":
        """The same lists shown in other orders: positions of each row's candidates."""

        def moved(values: Ragged) -> list[np.ndarray]:
            return [of_row[list(order)] for of_row, order in zip(values, orders, strict=True)]

        return self._each(moved)

    def _each(self, change: Callable[[Ragged], Ragged]) -> "RowLists":
        """The same change of everything."""
        return RowLists(
            change(self.candidates),
            change(self.scores),
            change(self.relevance),
            change(self.ranks),
            change(self.features) if len(self.features) else (),
            {name: change(values) for name, values in self.columns.items()},
        )


def _ranks(candidates: Ragged) -> list[np.ndarray]:
    return [np.arange(1, len(items) + 1) for items in candidates]


def is_hit(relevance: np.ndarray) -> bool:
    """`RankingRow.is_hit` of a list."""
    return RankingRow(0, (), tuple(range(len(relevance))), tuple(relevance.tolist())).is_hit


def as_table(rows: TargetRows, lists: RowLists, number: int = 0) -> pa.Table:
    """Rows with their lists, and the number of the list among those of the row."""
    columns = {
        "row_id": rows.row_ids,
        "list_number": pa.array([number] * len(rows), pa.int64()),
        "user": rows.users,
        **rows.histories.columns(),
        "candidates": _nested(lists.candidates, pa.int64()),
        "relevance": _nested(lists.relevance, pa.float64()),
        "first_stage_scores": _nested(lists.scores, pa.from_numpy_dtype(np.asarray(lists.scores[0]).dtype)),
        "first_stage_ranks": _nested(lists.ranks, pa.int64()),
        "target": pa.array([None if target < 0 else target for target in rows.targets.tolist()], pa.int64()),
        "hit": [is_hit(of_row) for of_row in lists.relevance],
        "features": _nested(lists.features, pa.float32()),
    }
    if rows.lists is not None:
        columns |= {name: rows.lists.details[name] for name in DETAILS}
    return pa.table(columns)


def _nested(values: Ragged, kind: pa.DataType) -> pa.Array:
    """Arrays a row, of one or two dimensions, as an Arrow column of lists; nan is null but among features."""
    flat = np.concatenate([of_row.reshape(-1) for of_row in values])
    column = pa.array(flat, kind, from_pandas=kind == pa.float64())
    if values[0].ndim == 2:
        width = values[0].shape[1]
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, width, dtype=np.int32)), column)
    ends = np.cumsum([0, *(len(of_row) for of_row in values)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), column)
