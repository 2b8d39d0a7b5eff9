"""Rows that are made when they are read, by their number, so that memory does not grow with them.

Where there are at most CHECKED_ROWS, all are made once, checked and kept; of more a seeded sample is checked before
training, and every other row when it is read. R rows.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch.files import write_whole

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
CHECKED_ROWS, SAMPLED_ROWS = 25_000, 2_000
SAMPLE_SEED = 0
CHUNK = 1000  # rows of a part of a file
BUFFER = 2**20  # bytes of a column that are read at once


class MadeOnRead(Sequence[T]):
    """A sequence whose entries are made each time that they are read.

    Args:
        size: Its length.
        make: From a place to the entry there.
    """

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.make(one) for one in range(self.size)[place]]
        return self.make(range(self.size)[place])


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The entries of several sequences, one sequence after the other."""
    ends = np.cumsum([len(part) for part in parts])

    def make(place: int) -> T:
        number = int(np.searchsorted(ends, place, side="right"))
        return parts[number][place - int(ends[number])]  # from its end

    return MadeOnRead(int(ends[-1]), make)


def places_to_check(num_rows: int) -> list[int]:
    """The places of the rows that are made before training: all up to CHECKED_ROWS, else a seeded sample."""
    return list(range(num_rows)) if num_rows <= CHECKED_ROWS else seeded_sample(num_rows, SAMPLED_ROWS)


def seeded_sample(num_rows: int, size: int) -> list[int]:
    """Places of `size` rows drawn at random, always the same, ascending."""
    return sorted(np.random.default_rng(SAMPLE_SEED).choice(num_rows, size, replace=False).tolist())


def read_parts(path: str | Path, columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
    """The rows of a Parquet file in parts of CHUNK, in memory that does not grow with the file."""
    with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
        yield from file.iter_batches(CHUNK, columns=list(columns))


def store(path: Path, schema: pa.Schema, parts: Iterable[pa.RecordBatch]) -> "Dataset":
    """Rows in an Arrow file that is memory-mapped: written by the main process, read by number in all of them.

    Args:
        path: Of the file; one that is there is replaced.
        schema: Of the parts.
        parts: Of the table; the main process alone goes through them.
    """
    from accelerate import PartialState
    from datasets import Dataset

    processes = PartialState()
    with processes.main_process_first():
        if processes.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, partial(_write, schema, parts))
        return Dataset.from_file(str(path))


def _write(schema: pa.Schema, parts: Iterable[pa.RecordBatch], path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for part in parts:
            writer.write_batch(part)


def column(table: "Dataset", name: str) -> np.ndarray:
    """(R,) a column of numbers of a stored table."""
    values: np.ndarray = table.data.column(name).to_numpy()
    return values
