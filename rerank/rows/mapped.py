"""Arrays in memory-mapped files, and the entries of rows in them.

R rows, N candidates of a row (another number in each), C candidates of all rows.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def mapped(folder: Path | None, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """An array in a file without a name, which is gone when nobody reads it; its room on the disk is taken at once.

    Args:
        folder: On whose disk the file is; None for that of temporary files.
        shape, kind: Of the array, which is 0 at first.

    Raises:
        OSError: When the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        # otherwise a disk that fills later ends the process without a word
        os.posix_fallocate(file.fileno(), 0, max(1, math.prod(shape) * np.dtype(kind).itemsize))
        return np.memmap(file, dtype=kind, mode="r+", shape=shape)


@dataclass(frozen=True)
class Column(Sequence[np.ndarray]):
    """Entries of the candidates of rows, one array a row.

    Attributes:
        values: (C, ...) of all candidates.
        ends: (R,) where each row's end.
        lengths: (R,) how many they are.
    """

    values: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: Any) -> Any:
        return self.values[self.ends[place] - self.lengths[place] : self.ends[place]]
