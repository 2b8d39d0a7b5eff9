"""Auxiliary loss: IIRG, which adds rows that ask for the items related to an item."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rerank.launch import run_dir
from rerank.launch.values import check_choice, check_range
from rerank.losses import AuxiliaryLoss, LossInfo, Row
from rerank.losses import _relations as relations
from rerank.losses._inputs import check_count
from rerank.losses._similar import stored_neighbours
from rerank.rows.on_read import MadeOnRead

if TYPE_CHECKING:
    from rerank.next_item.encoder import NextItemEncoder

INFO = LossInfo(
    tasks=("next_item",),
    needs="rows: 2 for each item, with its 5 neighbours under loss; training interactions and the items' embeddings",
    costs="the extra rows' tokens, seconds of mining before training",
)
COLLABORATIVE, SEMANTIC, NEXT_ITEM = "collaborative", "semantic", "next_item"
PROMPTS = {COLLABORATIVE: "Bought together:", SEMANTIC: "Similar items:"}
NEIGHBOURS = ("mined", "random", "next_item")
NUM_MINED, NUM_NEIGHBOURS = 10, 5  # collaborative neighbours mined, and of them those in a row's answer, as published


class iirg(AuxiliaryLoss):
    """Rows `anchor -> its neighbours, best first`, for neighbours by co-occurrence and by embedding.

    L = L_next + collaborative_weight L_collab + semantic_weight L_sem, all three over one shuffled mixture, each the
    mean over the optimizer step's tokens of its task. The released code instead divides all tokens by their common
    count with both weights 1, so that the proportion follows token counts; that comes to 1 : 0.4 : 0.4 on Amazon
    Beauty. Hence the weights' default here; the paper's are not known. Sample rows at random: batches grouped by
    length hold one task at a time, and a weight then is that of its steps. Relations are mined from training
    interactions only; the released code still sees the validation item.

    Args:
        window: Positions of a user's sequence within which two items are taken together.
        collaborative_weight: Of the rows of neighbours by co-occurrence; 0 leaves them out.
        semantic_weight: Of the rows of neighbours by embedding; 0 leaves them out.
        neighbours: `mined`; or a control: `random` items in their place, or `next_item`: more rows of next items, with
            the same number of tokens under loss as the relation rows would have.

    Source: arXiv:2606.17276; neighbours as in sec. 3 of its code's description (window 5, 10 kept, 5 used, items with
    fewer borrow from their semantic neighbours).
    """

    def __init__(
        self,
        window: int = 5,
        collaborative_weight: float = 0.4,
        semantic_weight: float = 0.4,
        neighbours: str = "mined",
    ) -> None:
        weights = {COLLABORATIVE: collaborative_weight, SEMANTIC: semantic_weight}
        for name, weight in weights.items():
            check_range(f"{name}_weight", weight, least=0)
        if not any(weights.values()):
            raise ValueError("both weights are 0; set one above 0 or take the loss out")
        check_count("window", window)
        check_choice("neighbours", neighbours, NEIGHBOURS)
        self.window, self.neighbours = window, neighbours
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def task_weights(self) -> dict[str, float]:
        return {} if self.neighbours == NEXT_ITEM else self.weights

    def rows(self, encoder: "NextItemEncoder") -> dict[str, Sequence[Row]]:
        """Rows of the relations, or of the control."""
        if self.neighbours == NEXT_ITEM:
            return {NEXT_ITEM: self._more_next_items(encoder)}
        return {name: relation_rows(encoder, PROMPTS[name], self._related(encoder, name)) for name in self.weights}

    def _related(self, encoder: "NextItemEncoder", relation: str) -> np.ndarray:
        """(items, NUM_NEIGHBOURS) neighbours of each item, best first."""
        num_items = len(encoder.catalogue)
        if self.neighbours == "random":
            seed = encoder.seed + list(PROMPTS).index(relation)
            return relations.random_neighbours(num_items, NUM_NEIGHBOURS, seed)
        if relation == SEMANTIC:
            relations.check_number(num_items, NUM_NEIGHBOURS)
            return self._semantic(encoder)[:, :NUM_NEIGHBOURS]
        users, items = encoder.training_interactions()
        mined = relations.co_occurrence_neighbours(users, items, num_items, self.window, NUM_MINED)
        found = relations.fill_from(mined, self._semantic(encoder), NUM_MINED)[:, :NUM_NEIGHBOURS]
        relations.refuse_without_neighbours(found, encoder.catalogue.item_ids)
        return found

    def _semantic(self, encoder: "NextItemEncoder") -> np.ndarray:
        """(items, NUM_MINED, or all others where there are fewer) items of the most similar texts, best first."""
        folder = run_dir.stage_dir(encoder.run, "semantic_ids")
        return stored_neighbours(folder, min(NUM_MINED, len(encoder.catalogue) - 1))

    def _more_next_items(self, encoder: "NextItemEncoder") -> Sequence[Row]:
        """Next-item rows, repeated in random order until they have the relation rows' number of tokens under loss."""
        random = relations.random_neighbours(len(encoder.catalogue), NUM_NEIGHBOURS, encoder.seed)
        wanted = len(self.weights) * _num_labels(relation_rows(encoder, PROMPTS[SEMANTIC], random))
        pool, rng = encoder.next_item_rows("all"), np.random.default_rng(encoder.seed)
        chosen: list[int] = []
        while wanted > 0:
            for place in rng.permutation(len(pool)).tolist():
                chosen.append(place)
                wanted -= _num_labels([pool[place]])
                if wanted <= 0:
                    break
        return MadeOnRead(len(chosen), lambda place: pool[chosen[place]])


def relation_rows(encoder: "NextItemEncoder", prompt: str, related: np.ndarray) -> Sequence[Row]:
    """A row for each item that has neighbours, made when it is read: the item given, its neighbours (-1 for none)
    under loss."""
    anchors = np.flatnonzero((related >= 0).any(axis=1))

    def row(place: int) -> Row:
        line = related[anchors[place]]
        return encoder.row(prompt, [int(anchors[place]), *line[line >= 0].tolist()], num_given=1)

    return MadeOnRead(len(anchors), row)


def _num_labels(rows: Iterable[Row]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])
