"""Beside a token loss: IIRG, which adds rows that ask for the items related to an item."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rerank import relations
from rerank.losses import Extra

NEEDS = "rows: 2 for each item, with its 5 neighbours under loss; training interactions and the items' embeddings"
COSTS = "the extra rows' tokens, seconds of mining before training"
COLLABORATIVE, SEMANTIC, NEXT_ITEM = "collaborative", "semantic", "next_item"
PROMPTS = {COLLABORATIVE: "Bought together:", SEMANTIC: "Similar items:"}
NEIGHBOURS = ("mined", "random", "next_item")
NUM_MINED = 10  # collaborative neighbours before the first num_neighbours of them are taken, as published


class iirg(Extra):
    """Rows `anchor -> its neighbours, best first`, for neighbours by co-occurrence and by embedding.

    L = L_next + collaborative_weight L_collab + semantic_weight L_sem, all three over one shuffled mixture. With
    `divide_by: task` each L is the mean over the optimizer step's tokens of its task, so that weights mean what they
    say. With `tokens` weighted tokens are divided by the count of all of them, and the real proportion follows token
    counts: the released code does so, with both weights 1, which comes to 1 : 0.4 : 0.4 on Amazon Beauty. Hence the
    weights' default here; the paper's are not known. Sample rows at random: batches grouped by length hold one task
    at a time, and a weight then is that of its steps. Relations are mined from training interactions only; the
    released code still sees the validation item.

    Args:
        window: Positions of a user's sequence within which two items are taken together.
        num_neighbours: In a row's answer.
        collaborative_weight: Of the rows of neighbours by co-occurrence; 0 leaves them out.
        semantic_weight: Of the rows of neighbours by embedding; 0 leaves them out.
        divide_by: `task` or `tokens`.
        neighbours: `mined`; or a control: `random` items in their place, or `next_item`: more rows of next items, as
            many tokens under loss as the relation rows would have.

    Source: arXiv:2606.17276; neighbours as in sec. 3 of its code's description (window 5, 10 kept, 5 used, items with
    fewer borrow from their semantic neighbours).
    """

    tasks = ("next_item",)

    def __init__(
        self,
        window: int = 5,
        num_neighbours: int = 5,
        collaborative_weight: float = 0.4,
        semantic_weight: float = 0.4,
        divide_by: str = "task",
        neighbours: str = "mined",
    ) -> None:
        weights = {COLLABORATIVE: collaborative_weight, SEMANTIC: semantic_weight}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"loss iirg: {name}_weight is {weight} but must not be negative")
        if not any(weights.values()):
            raise ValueError("loss iirg: both weights are 0; set one above 0 or take the loss out")
        for name, value in (("window", window), ("num_neighbours", num_neighbours)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"loss iirg: {name} is {value} but must be a whole number of at least 1")
        for name, value, known in (
            ("divide_by", divide_by, ("task", "tokens")),
            ("neighbours", neighbours, NEIGHBOURS),
        ):
            if value not in known:
                raise ValueError(f"loss iirg: {name} is {value!r}; use one of {', '.join(known)}")
        self.window, self.num_neighbours, self.neighbours = window, num_neighbours, neighbours
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.divides_by_task = divide_by == "task"

    def task_weights(self) -> dict[str, float]:
        return {} if self.neighbours == NEXT_ITEM else self.weights

    def rows(self, maker: Any) -> dict[str, list[dict[str, Any]]]:
        """Rows of the relations, or of the control."""
        if self.neighbours == NEXT_ITEM:
            return {NEXT_ITEM: self._more_next_items(maker)}
        return {name: relation_rows(maker, PROMPTS[name], self._related(maker, name)) for name in self.weights}

    def _related(self, maker: Any, relation: str) -> np.ndarray:
        """(items, num_neighbours) neighbours of each item, best first."""
        num_items = len(maker.catalogue)
        if self.neighbours == "random":
            seed = maker.seed + list(PROMPTS).index(relation)
            return relations.random_neighbours(num_items, self.num_neighbours, seed)
        if relation == SEMANTIC:
            return relations.semantic_neighbours(maker.embeddings(), self.num_neighbours)
        users, items = maker.training_interactions()
        num_mined = max(NUM_MINED, self.num_neighbours)
        mined = relations.co_occurrence_neighbours(users, items, num_items, self.window, num_mined)
        semantic = relations.semantic_neighbours(maker.embeddings(), min(NUM_MINED, num_items - 1))
        found = relations.fill_from(mined, semantic, num_mined)[:, : self.num_neighbours]
        relations.refuse_without_neighbours(found, maker.catalogue.item_ids)
        return found

    def _more_next_items(self, maker: Any) -> list[dict[str, Any]]:
        """Next-item rows, over and over in random order, with as many tokens under loss as relation rows have."""
        random = relations.random_neighbours(len(maker.catalogue), self.num_neighbours, maker.seed)
        wanted = len(self.weights) * _num_labels(relation_rows(maker, PROMPTS[SEMANTIC], random))
        pool, rng = maker.next_item_rows("all"), np.random.default_rng(maker.seed)
        chosen: list[dict[str, Any]] = []
        while wanted > 0:
            for place in rng.permutation(len(pool)):
                chosen.append(pool[place])
                wanted -= _num_labels([pool[place]])
                if wanted <= 0:
                    break
        return chosen


def relation_rows(maker: Any, prompt: str, related: np.ndarray) -> list[dict[str, Any]]:
    """A row for each item that has neighbours: the item given, its neighbours (-1 for none) under loss."""
    neighbours = [[item for item in line if item >= 0] for line in related.tolist()]
    return [maker.row(prompt, [anchor, *line], num_given=1) for anchor, line in enumerate(neighbours) if line]


def _num_labels(rows: Sequence[dict[str, Any]]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])
