"""Pruning rate of beam search: the share of targets among the model's most probable items that it does not find.

Letters of shapes: R rows, L tokens of the longest item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.next_item.model import NextItemModel
from rerank.results.tables import NO_VALUE, Results, number, percent

FILE = "pruning.parquet"
FIRST_WIDTH, WIDENING = 8, 4  # beams per item of an exact list at first, and the factor by which they grow
BATCH_BEAMS = 2048  # of all rows searched at once
MARGIN = 1.0  # one sequence's log-probability differs from batch to batch by far less; in bfloat16 by some tenths


@dataclass(frozen=True)
class Pruning:
    """Whether a beam search with K beams loses each row's target.

    Attributes:
        is_top: (R,) whether its whole sequence is among the K most probable items of the catalogue.
        is_found: (R,) whether a beam search with K beams returns it.
        violates: (R, L) at each of its tokens, whether K valid tokens or more are more probable.
    """

    is_top: np.ndarray
    is_found: np.ndarray
    violates: np.ndarray

    @property
    def is_pruned(self) -> np.ndarray:
        """(R,) whether it is among the most probable items and yet not found."""
        return self.is_top & ~self.is_found

    def write(self, path: Path, row_ids: np.ndarray) -> None:
        """One line a row: row_id and the attributes."""
        violates = pa.array(self.violates.tolist(), pa.list_(pa.bool_()))
        columns = {"row_id": row_ids, "is_top": self.is_top, "is_found": self.is_found, "violates": violates}
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path, row_ids: np.ndarray) -> "Pruning":
        """The file that `write` made of these rows."""
        columns = pq.read_table(path).to_pydict()
        if not np.array_equal(columns["row_id"], row_ids):
            raise ValueError(f"{path} is of other rows than the lists beside it; run the evaluate stage again")
        return cls(*(np.array(columns[name], dtype=bool) for name in ("is_top", "is_found", "violates")))

    def summary(self) -> Results:
        """PruningRate@K, None where no target is among the top K; violations by step, and where the first one is."""
        violated = self.violates.any(axis=1)
        firsts = np.bincount(self.violates.argmax(axis=1)[violated], minlength=self.violates.shape[1])
        return {
            "n": len(self.is_top),
            "in_top": int(self.is_top.sum()),
            "pruning_rate": float(1 - self.is_found[self.is_top].mean()) if self.is_top.any() else None,
            "violation_rate": float(violated.mean()),
            "violations_by_step": self.violates.mean(axis=0).tolist(),
            "first_violations_by_step": (firsts / len(violated)).tolist(),
        }


def measure_pruning(
    model: NextItemModel, histories: Sequence[np.ndarray], targets: np.ndarray, num_beams: int
) -> Pruning:
    """PruningRate@K and the violations of its necessary condition, items of the history left out of all lists.

    Args:
        model: Of next items.
        histories: Of each row, oldest first.
        targets: (R,).
        num_beams: K.

    Source: arXiv:2601.22925 sec. 3 (eq. 3.1 and its relaxation).
    """
    beams = model.by_beams(histories, num_beams, num_beams)
    is_found = np.array([target in items for target, items in zip(targets.tolist(), beams.items, strict=True)])
    scores = model.token_scores(histories, targets[:, None].tolist())
    logps = np.array([of_row.sum() for of_row, _ in scores])
    violates = np.array([better[0] >= num_beams for _, better in scores])
    # K items more probable than the target settle that it is not among the best; few rows are left
    last = np.array([of_row[-1] if len(of_row) == num_beams else -np.inf for of_row in beams.logps])
    unsettled = np.flatnonzero(~(last > logps + MARGIN))
    is_top = np.zeros(len(targets), dtype=bool)
    exact = most_probable(model, [histories[row] for row in unsettled], num_beams)
    is_top[unsettled] = [target in items for target, items in zip(targets[unsettled].tolist(), exact, strict=True)]
    return Pruning(is_top, is_found, violates)


def most_probable(model: NextItemModel, histories: Sequence[np.ndarray], num_items: int) -> list[list[int]]:
    """The items of greatest probability after each history, best first, exactly; those of the history left out.

    A search that dropped nothing as probable as its last item has lost none of them; the others are searched again
    with more beams, in the end with one for each item.
    """
    found: list[list[int]] = [[] for _ in histories]
    rows, most = list(range(len(histories))), len(model.encoder.index)
    width = min(FIRST_WIDTH * num_items, most)
    while rows:
        of_width = model.by_beams([histories[row] for row in rows], num_items, width, max(1, BATCH_BEAMS // width))
        again = []
        for row, items, logps, dropped in zip(
            rows, of_width.items, of_width.logps, of_width.best_dropped, strict=True
        ):
            found[row] = items
            if dropped > -np.inf and not (len(items) == num_items and dropped < logps[-1]):
                again.append(row)
        rows, width = again, min(width * WIDENING, most)
    return found


def markdown(summary: Results, num_beams: int) -> str:
    """A summary as a paragraph."""
    rate = NO_VALUE if summary["pruning_rate"] is None else percent(summary["pruning_rate"])
    steps = " | ".join(number(value) for value in summary["violations_by_step"])
    return (
        f"\nPruning, {summary['n']} rows, {num_beams} beams: of the {summary['in_top']} targets among the "
        f"{num_beams} most probable items, beam search misses {rate}. A token of the target is outside of the "
        f"{num_beams} most probable valid ones in {percent(summary['violation_rate'])} of the rows; "
        f"by step: {steps}.\n"
    )
