"""How often a beam search drops the item that the model itself ranks among its best.

Letters of shapes: R rows, L tokens of the longest item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.next_items import NextItemModel


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
    model: NextItemModel, histories: Sequence[np.ndarray], targets: np.ndarray, num_beams: int, batch_size: int = 16
) -> Pruning:
    """PruningRate@K and the violations of its necessary condition, items of the history left out of all lists.

    Args:
        model: Of next items.
        histories: Of each row, oldest first.
        targets: (R,).
        num_beams: K.
        batch_size: Rows searched at once, each with as many beams as the catalogue has items.

    Source: arXiv:2601.22925 sec. 3 (eq. 3.1 and its relaxation).
    """
    num_items = len(model.rows.index)
    exact = model.by_beams(histories, num_beams, num_items, batch_size).items
    beams = model.by_beams(histories, num_beams, num_beams).items
    is_top = np.array([target in items for target, items in zip(targets.tolist(), exact, strict=True)])
    is_found = np.array([target in items for target, items in zip(targets.tolist(), beams, strict=True)])
    return Pruning(is_top, is_found, violations(model, histories, targets, num_beams))


def violations(
    model: NextItemModel, histories: Sequence[np.ndarray], targets: np.ndarray, num_beams: int, batch_size: int = 64
) -> np.ndarray:
    """(R, L) whether at a target's token, after its own tokens before, `num_beams` legal tokens are more probable."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens, paths = model.rows.tokens, model.rows.paths
    found = np.zeros((len(targets), max(map(len, tokens))), dtype=bool)
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
                    scores = logits[place, begin + step - 1]
                    found[row, step] = int((scores[legal] > scores[token]).sum()) >= num_beams
    return found
