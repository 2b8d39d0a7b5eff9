"""The items in prompts and reports: original id, semantic id, title and category, in item order."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("item_id", "semantic_id", "title", "category")
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


def shared(texts: Sequence[str]) -> list[bool]:
    """Whether another item bears the same text, by item."""
    bearers = Counter(texts)
    return [bearers[text] > 1 for text in texts]


@dataclass
class Catalogue:
    """Four lists of equal length, indexed by the integer `item`."""

    item_ids: list[str]
    semantic_ids: list[str]
    titles: list[str]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.item_ids)

    @classmethod
    def load(cls, folder: str | Path) -> "Catalogue":
        """The catalogue of a model folder (its catalogue.parquet) or of a run (its data and semantic_ids stages)."""
        folder = Path(folder)
        if (folder / "catalogue.parquet").is_file():
            return cls._from_columns(pq.read_table(folder / "catalogue.parquet").to_pydict())
        items_path, ids_path = folder / "data/items.parquet", folder / "semantic_ids/semantic_ids.parquet"
        for path in (items_path, ids_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; give a model folder or a run with finished semantic ids.")
        items = pq.read_table(items_path, columns=["item", "item_id", "title", "category"]).sort_by("item").to_pydict()
        ids = pq.read_table(ids_path, columns=["item", "semantic_id"]).sort_by("item").to_pydict()
        if items["item"] != ids["item"]:
            raise ValueError(
                f"{ids_path} has {len(ids['item'])} items but {items_path} has {len(items['item'])}, or other ones; "
                "run the semantic_ids stage again."
            )
        return cls._from_columns({**items, "semantic_id": ids["semantic_id"]})

    @classmethod
    def _from_columns(cls, columns: dict[str, list[str]]) -> "Catalogue":
        return cls(*(columns[name] for name in COLUMNS))

    def with_texts_of(self, items: Sequence[int]) -> "Catalogue":
        """The same items, item k with title and category of `items[k]`."""
        titles, categories = ([texts[item] for item in items] for texts in (self.titles, self.categories))
        return replace(self, titles=titles, categories=categories)

    def save(self, folder: str | Path) -> None:
        """Write `folder`/catalogue.parquet."""
        columns = (self.item_ids, self.semantic_ids, self.titles, self.categories)
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        pq.write_table(table, Path(folder) / "catalogue.parquet")


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
