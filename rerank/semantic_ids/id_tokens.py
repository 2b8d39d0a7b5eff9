"""Semantic ids as text and as tokens: code 12 is `<s_a_12>` on the first level, `<s_b_12>` on the next.

Letters of shapes: N items, L levels, C codes per level.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_LEVELS = len(string.ascii_lowercase)
FILE = "semantic_ids.parquet"


def token(level: int, code: int) -> str:
    """The token of a code on a level (0 is the first)."""
    return f"<s_{string.ascii_lowercase[level]}_{code}>"


def tokens(levels: int, codebook_size: int) -> list[str]:
    """All id tokens, level by level: what a model's vocabulary needs."""
    return [token(level, code) for level in range(levels) for code in range(codebook_size)]


def semantic_id_text(codes: Sequence[int]) -> str:
    """An id as prompts show it, such as `<s_a_12><s_b_3><s_c_44>`."""
    return "".join(token(level, code) for level, code in enumerate(codes))


@dataclass(frozen=True)
class SemanticIds:
    """The ids of a catalogue: row k of `codes` (N, L) belongs to item k."""

    codes: np.ndarray
    codebook_size: int

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    @property
    def texts(self) -> list[str]:
        """The id of each item as text."""
        return [semantic_id_text(codes) for codes in self.codes.tolist()]

    @property
    def tokens(self) -> list[str]:
        """All tokens the ids can use, also those that no item of today uses."""
        return tokens(self.levels, self.codebook_size)

    def save(self, folder: str | Path) -> None:
        """Write semantic_ids.parquet, which carries its levels and codebook size."""
        table = pa.table(
            {
                "item": pa.array(range(len(self)), pa.int64()),
                "codes": pa.array(self.codes.tolist(), pa.list_(pa.int64())),
                "semantic_id": pa.array(self.texts, pa.string()),
            }
        )
        about = {"levels": str(self.levels), "codebook_size": str(self.codebook_size)}
        pq.write_table(table.replace_schema_metadata(about), Path(folder) / FILE)


def load_semantic_ids(folder: str | Path) -> SemanticIds:
    """The ids in a finished semantic_ids folder.

    Raises:
        FileNotFoundError: When the folder holds none.
        ValueError: When items are missing, repeated or out of order.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the semantic_ids stage first")
    table = pq.read_table(path)
    items = table["item"].to_numpy()
    if not np.array_equal(items, np.arange(len(items))):
        row = int(np.flatnonzero(items != np.arange(len(items)))[0])
        raise ValueError(f"{path} row {row} holds item {items[row]}, not {row}; run the semantic_ids stage again")
    codes = np.array(table["codes"].to_pylist(), dtype=np.int64)
    return SemanticIds(codes, int(table.schema.metadata[b"codebook_size"]))


def token_ids(tokenizer: Any, levels: int, codebook_size: int) -> np.ndarray:
    """The vocabulary number (L, C) of each id token in a Hugging Face tokenizer.

    Raises:
        ValueError: When a token is missing, split or special; special tokens vanish when completions are decoded.
    """
    names = tokens(levels, codebook_size)
    special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    numbers = []
    for name in names:
        pieces = tokenizer.encode(name, add_special_tokens=False)
        if len(pieces) != 1 or tokenizer.convert_ids_to_tokens(pieces[0]) != name:
            raise ValueError(
                f"the tokenizer splits {name} into {tokenizer.convert_ids_to_tokens(pieces)}; "
                "use a model that the midtrain stage made with these semantic ids"
            )
        if pieces[0] in special:
            raise ValueError(
                f"{name} is a special token of the tokenizer; add id tokens as ordinary ones (add_tokens)"
            )
        numbers.append(pieces[0])
    return np.array(numbers, dtype=np.int64).reshape(levels, codebook_size)


def token_sequences(tokenizer: Any, ids: SemanticIds) -> np.ndarray:
    """Each item's id as vocabulary numbers (N, L): what a prefix index is built from."""
    return token_ids(tokenizer, ids.levels, ids.codebook_size)[np.arange(ids.levels), ids.codes]
