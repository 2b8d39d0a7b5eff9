"""Items as token sequences and histories as prompts: the rows and the settings of a model of next items.

Losses add rows of their own with the same encoder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.next_item.prefix_index import PrefixIndex
from rerank.prompts import clean, prompt_ids, render
from rerank.rows import TargetRows, training_items
from rerank.rows.histories import window_places
from rerank.rows.on_read import MadeOnRead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEXT_ITEMS = "Next items:"  # the prompt of a sequence of items
ITEM_TEXTS = ("semantic_id", "title")
NO_NODE = NO_ITEM = -1
SETTINGS, INDEX = "next_item.json", "prefix_index"  # beside a trained model: how it is asked, and the catalogue's ids

ItemRow = dict[str, Any]


def written_items(catalogue: Catalogue, item_text: str) -> list[str]:
    """The text by which each item is written: its semantic id, or its title on a line of its own."""
    if item_text == "semantic_id":
        return catalogue.semantic_ids
    pairs = zip(catalogue.titles, catalogue.item_ids, strict=True)
    return [f"{clean(title) or clean(item_id)}\n" for title, item_id in pairs]


@dataclass(frozen=True)
class NextItemEncoder:
    """Makes rows of items: mappings of equally long lists, and of `sequence` and `num_given` as `row` takes them.

    `input_ids`; `labels`, unshifted, -100 for no loss; `nodes`, for a label that is a token of an item the node of
    the prefix index that it is a child of, else -1; `items`, for a label that is the first token of an item that
    item, else -1.

    Attributes:
        catalogue: All items.
        tokenizer: Of the model.
        item_text: `semantic_id`, or `title` (a line of its own), by which an item is written.
        max_items: Items of a row.
        constrained: Softmax over the catalogue's valid continuations; labels without an alternative bear no loss.
        run: Folder of the run.
        seed: Of random choices.
        max_length: Tokens of a row; a longer text about an item is cut there, a row of items is not.
        folder: Of the saved model, where there is one; its prefix index is memory-mapped when it is of these items.
    """

    catalogue: Catalogue
    tokenizer: "PreTrainedTokenizerBase"
    item_text: str
    max_items: int
    constrained: bool = False
    run: str = ""
    seed: int = 0
    max_length: int | None = None
    folder: Path | None = None
    _prompts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "NextItemEncoder":
        """The encoder of a model folder, as `save` left it."""
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} has no {SETTINGS}; give a model of the sft stage with task next_item")
        settings = json.loads((folder / SETTINGS).read_text())
        constrained = settings.get("constrained", settings.get("mask_first"))  # its name in older folders
        item_text, max_items = settings["item_text"], settings["max_items"]
        return cls(Catalogue.load(folder), load_tokenizer(folder), item_text, max_items, constrained, folder=folder)

    def save(self, folder: Path) -> None:
        """Write the catalogue, the settings and the prefix index beside a model."""
        self.catalogue.save(folder)
        settings = {"item_text": self.item_text, "max_items": self.max_items, "constrained": self.constrained}
        write_json(folder / SETTINGS, settings)
        self.index.save(folder / INDEX)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The token sequence of each item; of two items with one title the same."""
        return self._token_ids(written_items(self.catalogue, self.item_text))

    def _token_ids(self, text: str | list[str]) -> list[Any]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def index(self) -> PrefixIndex:
        """The prefix index of all items' token sequences."""
        if self.folder is not None and (self.folder / INDEX).is_dir():
            saved = PrefixIndex.load(self.folder / INDEX)
            if saved.has(self.tokens):
                return saved
        return PrefixIndex.build(self.tokens)

    @cached_property
    def paths(self) -> list[list[int]]:
        """The nodes before the tokens of each item."""
        return self.index.paths(np.arange(len(self.catalogue)))

    @cached_property
    def has_choice(self) -> np.ndarray:
        """(nodes,) whether a node has more than one child."""
        first, end = self.index.child_ranges(np.arange(self.index.num_nodes))
        return end - first > 1

    def prompt(self, text: str) -> list[int]:
        """Tokens of a rendered prompt."""
        if text not in self._prompts:
            (self._prompts[text],) = prompt_ids(self.tokenizer, [render(self.tokenizer, text)])
        return list(self._prompts[text])

    def next_item_prompt(self, history: Sequence[int]) -> list[int]:
        """Tokens after which a model writes the next item."""
        return self.prompt(NEXT_ITEMS) + [token for item in history for token in self.tokens[item]]

    def row(self, prompt: str, items: Sequence[int] | np.ndarray, num_given: int) -> ItemRow:
        """A row of a prompt, items that are given, and the items after them, which are under loss."""
        ids = self.prompt(prompt)
        labels, nodes, firsts = [-100] * len(ids), [NO_NODE] * len(ids), [NO_ITEM] * len(ids)
        sequence = [int(item) for item in items]
        for place, item in enumerate(sequence):
            tokens, path, is_given = self.tokens[item], self.paths[item], place < num_given
            dropped = [is_given or (self.constrained and not self.has_choice[node]) for node in path]
            ids += tokens
            labels += [-100 if drop else token for token, drop in zip(tokens, dropped, strict=True)]
            nodes += [NO_NODE] * len(tokens) if is_given else path
            firsts += [NO_ITEM if is_given else item] + [NO_ITEM] * (len(tokens) - 1)
        row = {"input_ids": ids, "labels": labels, "nodes": nodes, "items": firsts}
        return row | {"sequence": sequence, "num_given": num_given}

    def text_row(self, prompt: str, item: int, answer: str) -> ItemRow:
        """A row of a prompt, an item, and a text about it that is under loss."""
        ids = self.prompt(prompt) + self.tokens[item]
        text = [*self._token_ids(answer), self.tokenizer.eos_token_id]
        return self.unmarked(ids, text[: None if self.max_length is None else max(0, self.max_length - len(ids))])

    def unmarked(self, prompt: list[int], answer: list[int]) -> ItemRow:
        """A row without any item under loss."""
        absent = [NO_NODE] * (len(prompt) + len(answer))
        labels = [-100] * len(prompt) + answer
        row = {"input_ids": prompt + answer, "labels": labels, "nodes": absent, "items": list(absent)}
        return row | {"sequence": [], "num_given": 0}

    def training_interactions(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of all training interactions, each user's together and oldest first; nothing held out."""
        users, items = training_items(run_dir.stage_dir(self.run, "data"))
        self._refuse_unknown(items, users, "interactions.parquet, user {}")
        return users, items

    def windows(self) -> Sequence[np.ndarray]:
        """Stretches of every user's training items, of at least two, each overlapping the one before by half."""
        users, items = self.training_interactions()
        starts, ends = window_places(users, self.max_items)
        return MadeOnRead(len(starts), lambda place: items[starts[place] : ends[place]])

    def next_item_rows(self, targets: str) -> Sequence[ItemRow]:
        """Rows of the task itself, made when they are read; at least one.

        Args:
            targets: `all`: windows of the users' sequences, every item after the first under loss; `last`: the rows
                of the split rerank, their target under loss.
        """
        sequences = self.windows() if targets == "all" else self._last_items()
        if not len(sequences):
            raise ValueError(f"{self.run}: no training row has a history and a next item; give longer sequences")

        def row(place: int) -> ItemRow:
            items = sequences[place]
            return self.row(NEXT_ITEMS, items, num_given=1 if targets == "all" else len(items) - 1)

        return MadeOnRead(len(sequences), row)

    def _last_items(self) -> Sequence[np.ndarray]:
        """The last items of each history of the split rerank, with its target."""
        given = TargetRows.load(self.run).of_split("rerank")
        pairs = zip(given.histories, given.targets, strict=True)
        sequences = [np.append(history[-(self.max_items - 1) :], target) for history, target in pairs]
        if sequences:
            owners = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
            self._refuse_unknown(np.concatenate(sequences), owners, "rows.parquet, row {} of the split rerank")
        return sequences

    def _refuse_unknown(self, items: np.ndarray, owners: np.ndarray, where: str) -> None:
        unknown = np.flatnonzero((items < 0) | (items >= len(self.catalogue)))
        if len(unknown):
            raise ValueError(
                f"{self.run}/data/{where.format(owners[unknown[0]])}: item {items[unknown[0]]} is not in the "
                f"catalogue of {len(self.catalogue)} items; run the data and semantic_ids stages again"
            )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
