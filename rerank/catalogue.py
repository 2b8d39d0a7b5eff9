"""The items in prompts and reports: original id, semantic id, title, category and other texts, in item order."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("item_id", "semantic_id", "title", "category")
NO_TEXTS = ("item", "item_id", "source_row")  # columns of items.parquet that are no text of an item
MAX_LEVELS = len(string.ascii_lowercase)  # of a semantic id: a letter each


def id_token(level: int, code: int) -> str:
    """The token of a code on a level (0 is the first): code 12 is `<s_a_12>` on level 0, `<s_b_12>` on level 1."""
    return f"<s_{string.ascii_lowercase[level]}_{code}>"


def id_tokens(levels: int, codebook_size: int) -> list[str]:
    """All tokens of ids of this shape, level by level, used or not: what a model's vocabulary needs."""
    return [id_token(level, code) for level in range(levels) for code in range(codebook_size)]


def semantic_id_text(codes: Sequence[int]) -> str:
    """An id as prompts show it, such as `<s_a_12><s_b_3><s_c_44>`."""
    return "".join(id_token(level, code) for level, code in enumerate(codes))


def semantic_id_codes(text: str) -> list[int]:
    """The codes of an id that `semantic_id_text` wrote."""
    return [int(code) for code in re.findall(r"_(\d+)>", text)]


def shared(texts: Sequence[str]) -> list[bool]:
    """Whether another item bears the same text, by item."""
    bearers = Counter(texts)
    return [bearers[text] > 1 for text in texts]


@dataclass
class Catalogue:
    """Lists of equal length, indexed by the integer `item`.

    Attributes:
        item_ids: As the user's files have them.
        semantic_ids: Such as `<s_a_12><s_b_3>`; empty texts in a run without them.
        titles: Empty where an item has none.
        categories: Likewise.
        fields: Further texts by name: the other columns of items.parquet, or those that a model's prompts show.
    """

    item_ids: list[str]
    semantic_ids: list[str]
    titles: list[str]
    categories: list[str]
    fields: dict[str, list[str]] = field(default_factory=dict, compare=False)  # a model's folder has some of a run's

    def __len__(self) -> int:
        return len(self.item_ids)

    @classmethod
    def load(cls, folder: str | Path) -> "Catalogue":
        """The catalogue of a model folder (its catalogue.parquet) or of a run (its data and semantic_ids stages)."""
        folder = Path(folder)
        if (folder / "catalogue.parquet").is_file():
            return cls._from_table(pq.read_table(folder / "catalogue.parquet"))
        items_path, ids_path = folder / "data/items.parquet", folder / "semantic_ids/semantic_ids.parquet"
        if not items_path.is_file():
            raise FileNotFoundError(
                f"{items_path} is missing; give a model folder or a run with a finished data stage."
            )
        items = pq.read_table(items_path).sort_by("item")
        if not ids_path.is_file():
            return cls._from_table(items.append_column("semantic_id", pa.array([""] * len(items), pa.string())))
        ids = pq.read_table(ids_path, columns=["item", "semantic_id"]).sort_by("item")
        if items["item"].to_pylist() != ids["item"].to_pylist():
            raise ValueError(
                f"{ids_path} has {len(ids)} items but {items_path} has {len(items)}, or other ones; "
                "run the semantic_ids stage again."
            )
        return cls._from_table(items.append_column("semantic_id", ids["semantic_id"]))

    @classmethod
    def _from_table(cls, table: pa.Table) -> "Catalogue":
        further = [name for name in table.column_names if name not in (*COLUMNS, *NO_TEXTS)]
        fields = {name: _as_texts(table[name]) for name in further if not pa.types.is_nested(table[name].type)}
        item_ids, semantic_ids, titles, categories = (table[name].to_pylist() for name in COLUMNS)
        return cls(item_ids, semantic_ids, titles, categories, fields)

    @property
    def has_ids(self) -> bool:
        """Whether items have semantic ids."""
        return any(self.semantic_ids)

    @cached_property
    def codes(self) -> np.ndarray:
        """(N, L) codes of the semantic ids."""
        return np.array([semantic_id_codes(text) for text in self.semantic_ids])

    @property
    def columns(self) -> list[str]:
        """The names that `texts` knows."""
        return ["title", "category", *self.fields]

    def texts(self, name: str) -> list[str]:
        """The texts of a field, by item."""
        return {"title": self.titles, "category": self.categories, **self.fields}[name]

    def with_texts_of(self, items: Sequence[int]) -> "Catalogue":
        """The same items, item k with the texts of `items[k]`."""

        def moved(texts: Sequence[str]) -> list[str]:
            return [texts[item] for item in items]

        fields = {name: moved(texts) for name, texts in self.fields.items()}
        return replace(self, titles=moved(self.titles), categories=moved(self.categories), fields=fields)

    def extended(self, more: "Catalogue") -> "Catalogue":
        """These items, then those of another catalogue, with the fields of this one."""
        empty = [""] * len(more)
        return Catalogue(
            [*self.item_ids, *more.item_ids],
            [*self.semantic_ids, *more.semantic_ids],
            [*self.titles, *more.titles],
            [*self.categories, *more.categories],
            {name: [*texts, *more.fields.get(name, empty)] for name, texts in self.fields.items()},
        )

    def save(self, folder: str | Path, fields: Sequence[str] = ()) -> None:
        """Write `folder`/catalogue.parquet, with these of the further fields."""
        columns = (self.item_ids, self.semantic_ids, self.titles, self.categories)
        further = {name: self.fields[name] for name in fields if name in self.fields}
        table = pa.table({**dict(zip(COLUMNS, columns, strict=True)), **further})
        pq.write_table(table, Path(folder) / "catalogue.parquet")


def _as_texts(column: pa.ChunkedArray) -> list[str]:
    """A column as texts, empty for null, numbers as short as they are written."""
    values = column.to_pylist()
    return ["" if one is None else f"{one:.15g}" if isinstance(one, float) else str(one) for one in values]


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", semantic_ids: Sequence[str], where: str | Path) -> None:
    """Refuse a model that does not know the catalogue's semantic ids, each id token as one ordinary token.

    Args:
        tokenizer: The model's.
        semantic_ids: Of the catalogue.
        where: The model's folder, for the message.
    """
    vocabulary = tokenizer.get_vocab()
    special = {str(added) for added in tokenizer.added_tokens_decoder.values() if added.special}
    for token in dict.fromkeys(token for text in semantic_ids for token in re.findall("<[^<>]*>", text)):
        problem = None
        if token not in vocabulary:
            problem = "lacks"
        elif token in special:
            problem = "has as a special token, which decoding drops,"
        elif tokenizer.tokenize(token) != [token]:
            problem = "splits"
        if problem is not None:
            raise ValueError(
                f"semantic ids of another catalogue than the model's: {where} {problem} {token}; "
                "run the stages from midtrain on again, or give the model that was trained on these ids."
            )
