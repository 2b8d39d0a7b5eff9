"""Rows as a dataset for a trainer, which shuffles, shares out and skips their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

Row = Mapping[str, Any]


class RowDataset(Dataset):  # type: ignore[misc]  # datasets has no types
    """A map-style dataset of rows that are made when they are read, in a worker where the loader has some.

    Its table holds the rows' numbers alone. It is a `datasets.Dataset` since TRL takes no other; a transform of such a
    one would be pickled whole for its fingerprint, with tokenizer and catalogue. `select` and the like give a dataset
    of the numbers.

    Attributes:
        rows: Makes or holds the rows.
    """

    rows: Sequence[Row]

    @classmethod
    def of(cls, rows: Sequence[Row], lengths: np.ndarray | None = None) -> "RowDataset":
        """The dataset of some rows; `lengths` of them, about, let the trainer group them without making them."""
        columns = {"number": np.arange(len(rows))} | ({} if lengths is None else {"length": lengths})
        made: RowDataset = cls.from_dict(columns)
        made.rows = rows
        return made

    def __getitem__(self, key: int | str) -> Any:
        return self.rows[int(key)] if isinstance(key, int | np.integer) else self.data.column(key).to_pylist()

    def __getitems__(self, keys: list[int]) -> list[Row]:
        return [self.rows[key] for key in keys]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)
