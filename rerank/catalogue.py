"""The items as prompts and reports show them: original id, semantic id, title, category, in item order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("item_id", "semantic_id", "title", "category")


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

    def save(self, path: str | Path) -> None:
        """Write catalogue.parquet; `path` is the file or the folder for it."""
        path = Path(path) / "catalogue.parquet" if Path(path).is_dir() else Path(path)
        columns = (self.item_ids, self.semantic_ids, self.titles, self.categories)
        pq.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), path)


def check_vocabulary(tokenizer: Any, semantic_ids: Sequence[str], where: str | Path) -> None:
    """Refuse a model that does not know the catalogue's semantic ids, each id token as one ordinary token.

    Args:
        tokenizer: The model's.
        semantic_ids: Of the catalogue.
        where: What to call the model in the message.

    Raises:
        ValueError: Naming the first id token that is missing, special or split.
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
