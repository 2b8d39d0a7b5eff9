"""Histories of rows, each a stretch of one flat array: of all users' sequences, or of the rows' own histories.

A row that was made of an interaction has a place in its user's sequence: it holds `position` and `history_length`, and
its history is the `history_length` items before that position. The sequences are in the folder of the data stage. A
request has a column `history` of its own. Both are read here, and no other code asks which.

R rows, U users, I interactions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib.format import write_array_header_1_0

from rerank.launch.files import write_whole

SEQUENCES, STARTS = "sequences.npy", "sequence_starts.npy"
HISTORY = "history"  # column of a row's own history
PLACE = ("position", "history_length")  # columns of a row that has a place in its user's sequence


@dataclass(frozen=True)
class Histories(Sequence[np.ndarray]):
    """The histories of R rows, oldest item first; an index gives the items of one row, a new (length,) int64 array.

    Attributes:
        items: Flat items that the histories are stretches of, such as int32 (I,) in a memory-mapped file.
        starts, ends: (R,) of each row.
        positions: (R,) of each row in its user's sequence; None where the rows have histories of their own.
    """

    items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    positions: np.ndarray | None = None

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> "Histories":
        """Histories of a column of lists; null is an empty one."""
        ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), dtype=np.int64)
        return cls(pc.list_flatten(column).to_numpy(), np.concatenate(([0], ends))[:-1], ends)

    @property
    def lengths(self) -> np.ndarray:
        """(R,) items of each history."""
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def take(self, rows: Sequence[int] | np.ndarray) -> "Histories":
        """The histories of these rows."""
        chosen = np.asarray(rows, dtype=np.int64)
        positions = None if self.positions is None else self.positions[chosen]
        return Histories(self.items, self.starts[chosen], self.ends[chosen], positions)

    def last(self, lengths: Sequence[int] | np.ndarray) -> "Histories":
        """The last `lengths` (R,) items of each history."""
        return replace(self, starts=self.ends - np.asarray(lengths, dtype=np.int64))

    def columns(self) -> dict[str, pa.Array]:
        """The columns of a table that `read_histories` reads them from: PLACE or HISTORY."""
        if self.positions is not None:
            return dict(zip(PLACE, (pa.array(self.positions), pa.array(self.lengths)), strict=True))
        starts = np.concatenate(([0], np.cumsum(self.lengths)))
        items = np.concatenate([*self, np.zeros(0, dtype=np.int64)])
        return {HISTORY: pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(items))}

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, row: slice) -> "Histories": ...

    def __getitem__(self, row: int | slice) -> "np.ndarray | Histories":
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        return np.array(self.items[self.starts[row] : self.ends[row]], dtype=np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self.ends)


def history_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Those of a table's columns that tell its rows' histories; none where it has none."""
    if HISTORY in names:
        return (HISTORY,)
    return PLACE if {*PLACE, "user"} <= {*names} else ()


def read_histories(table: pa.Table, data_dir: Path, source: Path) -> Histories:
    """The histories of a table's rows.

    Args:
        table: With `user`, and HISTORY or PLACE.
        data_dir: The folder of the data stage, with the sequences.
        source: Of the table, for messages.

    Raises:
        FileNotFoundError: When the sequences are not there.
        ValueError: When the table has no histories, or others than those of the sequences.
    """
    found = history_columns(table.column_names)
    if not found:
        raise ValueError(
            f"{source} has neither a column history nor the columns user, position and history_length; it has "
            f"{', '.join(table.column_names)}; run the stage that made it again"
        )
    if found == (HISTORY,):
        return Histories.of_column(table[HISTORY])
    for name in (SEQUENCES, STARTS):
        if not (data_dir / name).is_file():
            cure = f"keep the file in its run, or run the data stage again (`rerank run --force {data_dir.name}`)"
            raise FileNotFoundError(f"{data_dir / name} is not there, which the histories of {source} are in; {cure}")
    items, starts = (np.load(data_dir / name, mmap_mode="r") for name in (SEQUENCES, STARTS))
    users, positions, lengths = (table[name].to_numpy() for name in ("user", *PLACE))
    known = np.minimum(users, len(starts) - 2)
    ends = starts[known] + positions
    is_there = (users == known) & (lengths <= positions) & (ends < starts[known + 1])
    if not is_there.all():
        row = int(np.argmin(is_there))
        raise ValueError(
            f"{source}, row {row}: user {users[row]} has no position {positions[row]} in {data_dir / SEQUENCES}; "
            "run the stage that made it again, as it was made from another data folder"
        )
    return Histories(items, ends - lengths, ends, positions)


def write_sequences(data_dir: Path, interactions: Path, num_users: int) -> None:
    """Write all users' sequences, int32 (I,) by user and position, and where each begins, int64 (U + 1,).

    Args:
        data_dir: Folder to write into.
        interactions: Parquet with `user` and `item`, sorted by user and position; it is read in parts.
        num_users: U.
    """
    counts = np.zeros(num_users + 1, dtype=np.int64)

    def write(path: Path) -> None:
        file = pq.ParquetFile(interactions)
        with open(path, "wb") as target:  # no memory-mapped file: a full disk would end the process
            header = {"descr": "<i4", "fortran_order": False, "shape": (file.metadata.num_rows,)}
            write_array_header_1_0(target, header)  # type: ignore[no-untyped-call]
            for batch in file.iter_batches(columns=["user", "item"]):
                target.write(batch["item"].to_numpy().astype("<i4").tobytes())
                users, sizes = np.unique(batch["user"].to_numpy(), return_counts=True)
                counts[users + 1] += sizes

    write_whole(data_dir / SEQUENCES, write)
    np.save(data_dir / STARTS, np.cumsum(counts))
