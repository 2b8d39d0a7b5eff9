"""How often a beam search drops the item that the model itself ranks among its best.

Letters of shapes: R rows, L tokens of the longest item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.next_items import NextItemModel

FILE = "pruning.parquet"
FIRST_WIDTH, WIDENING = 8, 4  # beams for each item of an exact list, at first; then so many times as many
BATCH_BEAMS = 2048  # of all rows searched at once
MARGIN = 1.0  # one sequence's log-probability differs from batch to batch by far less; in bfloat16 by some tenths


@dataclass(frozen=True)
class Pruning:
    """Of each row's target.

    Attributes:
        is_top: (R,) whether its whole sequence is among the K most probable items of the catalogue.
        is_found: (R,) whether a beam search with K beams returns it.
        violates: (R, L) at each of its tokens, whether K legal tokens or more are more probable.
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
        """What `write` wrote of these rows.

        Raises:
            ValueError: When the file is of other rows.
        """
        columns = pq.read_table(path).to_pydict()
        if not np.array_equal(columns["row_id"], row_ids):
            raise ValueError(f"{path} is of other rows than the lists beside it; run the evaluate stage again")
        return cls(*(np.array(columns[name], dtype=bool) for name in ("is_top", "is_found", "violates")))

    def summary(self) -> dict[str, Any]:
        """PruningRate@K, None where no target is among the top K; violations by step, and where the first one is."""
        violated = self.violates.any(axis=1)
        first = self.violates.argmax(axis=1)[violated]
        return {
            "n": len(self.is_top),
            "in_top": int(self.is_top.sum()),
            "pruning_rate": float(1 - self.is_found[self.is_top].mean()) if self.is_top.any() else None,
            "violation_rate": float(violated.mean()),
            "violations_by_step": self.violates.mean(axis=0).tolist(),
            "first_violations_by_step": (
                np.bincount(first, minlength=self.violates.shape[1]) / len(violated)
            ).tolist(),
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
    logps, violates = score_targets(model, histories, targets, num_beams)
    # as many items more probable than the target settle that it is not among the best; few rows are left
    last = np.array([of_row[-1] if len(of_row) == num_beams else -np.inf for of_row in beams.logps])
    unsettled = np.flatnonzero(~(last > logps + MARGIN))
    is_top = np.zeros(len(targets), dtype=bool)
    exact = most_probable(model, [histories[row] for row in unsettled], num_beams)
    is_top[unsettled] = [target in items for target, items in zip(targets[unsettled].tolist(), exact, strict=True)]
    return Pruning(is_top, is_found, violates)


def most_probable(model: NextItemModel, histories: Sequence[np.ndarray], num_items: int) -> list[list[int]]:
    """The items of greatest probability after each history, best first, exactly; those of the history left out.

    A search that dropped nothing as probable as its last item has lost none of them; the others are searched again
    with more beams, in the end with as many as there are items.
    """
    found: list[list[int]] = [[] for _ in histories]
    rows, most = list(range(len(histories))), len(model.rows.index)
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


def score_targets(
    model: NextItemModel, histories: Sequence[np.ndarray], targets: np.ndarray, num_beams: int, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each target's sequence, (R,), and (R, L) whether at a token of it, after its own tokens
    before, `num_beams` legal tokens are more probable.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens, paths = model.rows.tokens, model.rows.paths
    violates = np.zeros((len(targets), max(map(len, tokens))), dtype=bool)
    logps = np.zeros(len(targets))
    prompts = model.prompts(histories)
    with torch.inference_mode():
        for start in range(0, len(targets), batch_size):
            part = range(start, min(start + batch_size, len(targets)))
            rows = [torch.tensor(prompts[row] + tokens[targets[row]]) for row in part]
            lengths = torch.tensor([len(row) for row in rows])
            ids = pad_sequence(rows, batch_first=True)
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            logits = model.model(ids.to(model.model.device), attention_mask=mask.long().to(model.model.device)).logits
            for place, row in enumerate(part):
                target, begin = targets[row], len(prompts[row])
                for step, (token, node) in enumerate(zip(tokens[target], paths[target], strict=True)):
                    legal = torch.from_numpy(model.rows.index.children(np.array([node]))[1].astype(np.int64))
                    scores = logits[place, begin + step - 1].float()
                    competing = scores[legal] if model.mask_first else scores
                    logps[row] += float(scores[token] - competing.logsumexp(0))
                    violates[row, step] = int((scores[legal] > scores[token]).sum()) >= num_beams
    return logps, violates
