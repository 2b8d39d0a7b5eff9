"""Rows of the task next_item: items as token sequences, their histories before them; and of what losses add to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir
from rerank.catalogue import Catalogue
from rerank.midtrain.documents import NEXT_ITEMS
from rerank.prefix_index import PrefixIndex
from rerank.prompts import render
from rerank.sequences import by_user, training_items, windows

ITEM_TEXTS = ("semantic_id", "title")
NO_NODE = NO_ITEM = -1
SETTINGS = "next_item.json"  # beside a trained model: how it is to be asked


@dataclass(frozen=True)
class ItemRows:
    """Makes rows of items: mappings of equally long lists, and of `sequence` and `num_given` as `row` takes them.

    `input_ids`; `labels`, unshifted, -100 for no loss; `nodes`, of each label that is a token of an item the node of
    the prefix index that it is a child of, else -1; `items`, of each label that is the first token of an item that
    item, else -1.

    Attributes:
        catalogue: All items.
        tokenizer: Of the model.
        item_text: `semantic_id`, or `title` (a line of its own), by which an item is written.
        max_items: Items of a row.
        drops_forced: Whether labels without an alternative in the catalogue are taken out of the loss.
        run: Folder of the run.
        seed: Of whatever is drawn.
        max_length: Tokens of a row; a longer text about an item is cut there, a row of items is not.
    """

    catalogue: Catalogue
    tokenizer: Any
    item_text: str
    max_items: int
    drops_forced: bool = False
    run: str = ""
    seed: int = 0
    max_length: int | None = None
    _prompts: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The token sequence of each item; of two items with one title the same."""
        if self.item_text == "semantic_id":
            texts = self.catalogue.semantic_ids
        else:
            pairs = zip(self.catalogue.titles, self.catalogue.item_ids, strict=True)
            texts = [f"{' '.join(title.split()) or item_id}\n" for title, item_id in pairs]
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    @cached_property
    def index(self) -> PrefixIndex:
        """Of all items' token sequences."""
        return PrefixIndex.build(self.tokens)

    @cached_property
    def paths(self) -> list[list[int]]:
        """Of each item the node before each of its tokens."""
        return self.index.paths(np.arange(len(self.catalogue)))

    @cached_property
    def has_choice(self) -> np.ndarray:
        """Of each node whether it has more than one child."""
        first, end = self.index.child_ranges(np.arange(self.index.num_nodes))
        return end - first > 1

    def prompt(self, text: str) -> list[int]:
        """Tokens of a rendered prompt."""
        if text not in self._prompts:
            self._prompts[text] = self.tokenizer(render(self.tokenizer, text), add_special_tokens=False).input_ids
        return list(self._prompts[text])

    def next_item_prompt(self, history: Sequence[int]) -> list[int]:
        """Tokens after which a model writes the next item."""
        return self.prompt(NEXT_ITEMS) + [token for item in history for token in self.tokens[item]]

    def row(self, prompt: str, items: Sequence[int], num_given: int) -> dict[str, list[int]]:
        """A row of a prompt, items that are given, and the items after them, which are under loss."""
        ids = self.prompt(prompt)
        labels, nodes, firsts = [-100] * len(ids), [NO_NODE] * len(ids), [NO_ITEM] * len(ids)
        for place, item in enumerate(items):
            tokens, path = self.tokens[item], self.paths[item]
            ids += tokens
            if place < num_given:
                labels += [-100] * len(tokens)
                nodes += [NO_NODE] * len(tokens)
                firsts += [NO_ITEM] * len(tokens)
                continue
            dropped = [self.drops_forced and not self.has_choice[node] for node in path]
            labels += [-100 if drop else token for token, drop in zip(tokens, dropped, strict=True)]
            nodes += path
            firsts += [item] + [NO_ITEM] * (len(tokens) - 1)
        row = {"input_ids": ids, "labels": labels, "nodes": nodes, "items": firsts}
        return row | {"sequence": [int(item) for item in items], "num_given": num_given}

    def text_row(self, prompt: str, item: int, answer: str) -> dict[str, list[int]]:
        """A row of a prompt, an item, and a text about it that is under loss."""
        ids = self.prompt(prompt) + self.tokens[item]
        text = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return self.unmarked(ids, text[: None if self.max_length is None else max(0, self.max_length - len(ids))])

    def unmarked(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """A row without any item under loss."""
        absent = [NO_NODE] * (len(prompt) + len(answer))
        labels = [-100] * len(prompt) + answer
        row = {"input_ids": prompt + answer, "labels": labels, "nodes": absent, "items": list(absent)}
        return row | {"sequence": [], "num_given": 0}

    def training_interactions(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of all training interactions, each user's together and oldest first; nothing held out.

        Raises:
            ValueError: When the catalogue lacks an item.
        """
        users, items = training_items(run_dir.stage_dir(self.run, "data"))
        unknown = np.flatnonzero((items < 0) | (items >= len(self.catalogue)))
        if len(unknown):
            raise ValueError(
                f"{self.run}/data/interactions.parquet, user {users[unknown[0]]}: item {items[unknown[0]]} is not in "
                f"the catalogue of {len(self.catalogue)} items; run the data and semantic_ids stages again"
            )
        return users, items

    def embeddings(self) -> np.ndarray:
        """(items, columns) what the text of each item says."""
        return np.load(run_dir.stage_dir(self.run, "semantic_ids") / "embeddings.npy", mmap_mode="r")

    def windows(self) -> list[np.ndarray]:
        """Stretches of every user's training items, of at least two, each overlapping the one before by half."""
        histories = by_user(*self.training_interactions())
        found = [window for history in histories for window in windows(history, self.max_items)]
        return [window for window in found if len(window) > 1]

    def next_item_rows(self, targets: str) -> list[dict[str, Any]]:
        """Rows of the task itself.

        Args:
            targets: `all`: windows of the users' sequences, every item after the first under loss; `last`: the rows
                of the split rerank, their target under loss.

        Raises:
            ValueError: When there is none.
        """
        if targets == "all":
            rows = [self.row(NEXT_ITEMS, window, num_given=1) for window in self.windows()]
        else:
            table = pq.read_table(
                run_dir.stage_dir(self.run, "data") / "rows.parquet", filters=[("split", "==", "rerank")]
            ).to_pydict()
            pairs = zip(table["history"], table["target"], strict=True)
            sequences = [[*history[-(self.max_items - 1) :], target] for history, target in pairs]
            self.refuse_unknown(sequences)
            rows = [self.row(NEXT_ITEMS, sequence, num_given=len(sequence) - 1) for sequence in sequences]
        if not rows:
            raise ValueError(f"{self.run}: no training row has a history and a next item; give longer sequences")
        return rows

    def refuse_unknown(self, sequences: Sequence[Sequence[int]]) -> None:
        """Refuse rows of items that the catalogue lacks.

        Raises:
            ValueError: Naming the row and the item.
        """
        for row, items in enumerate(sequences):
            for item in items:
                if not 0 <= item < len(self.catalogue):
                    raise ValueError(
                        f"{self.run}/data/rows.parquet, row {row} of the split rerank: item {item} is not in the "
                        f"catalogue of {len(self.catalogue)} items; run the data and semantic_ids stages again"
                    )

    def settings(self, masks_first: bool) -> dict[str, Any]:
        """The content of next_item.json."""
        return {"item_text": self.item_text, "max_items": self.max_items, "mask_first": masks_first}
