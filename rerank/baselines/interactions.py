"""Interactions in an engine, and what is counted on them out of core: sequences in a file, pairs in sparse matrices.

U users, I items.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.dataset as dataset
from ibis.expr.types import Table
from scipy.sparse import csr_array

from rerank.baselines import pair_query
from rerank.baselines.pairs import ALL_WEIGHTS, NEAR, cut, matrix_of
from rerank.launch import engines
from rerank.launch.engines import DuckDB

MEMORY = 4 * 2**30  # bytes that the engine may take before it spills, at most a quarter of the machine's
PAIRS_IN_PASS = 2**25  # that are brought into sparse matrices at once: 32 bytes each
INTERACTIONS_IN_BLOCK = 2**20


def engine(backend: str = "duckdb") -> AbstractContextManager[DuckDB]:
    """The engine that counts; a DuckDB leaves room beside it for the matrices."""
    return engines.engine(backend, on_disk=True, most=MEMORY, part=4)


@dataclass(frozen=True, eq=False)
class StoredSequences(Mapping[int, np.ndarray]):
    """User to items, oldest first, in one memory-mapped array.

    Attributes:
        users: (U,) ascending.
        ends: (U,) where each user's items end.
        flat: (interactions,) int32, each user's together and oldest first.
    """

    users: np.ndarray
    ends: np.ndarray
    flat: np.ndarray

    def __getitem__(self, user: int) -> np.ndarray:
        place = int(np.searchsorted(self.users, user))
        if place == len(self.users) or self.users[place] != user:
            raise KeyError(user)
        return self._between(place, place + 1).astype(np.int64)

    def __contains__(self, user: object) -> bool:
        place = int(np.searchsorted(self.users, user))  # type: ignore[call-overload]
        return bool(place < len(self.users) and self.users[place] == user)

    def __iter__(self) -> Iterator[int]:
        return iter(self.users.tolist())

    def __len__(self) -> int:
        return len(self.users)

    def _between(self, first: int, last: int) -> np.ndarray:
        return self.flat[self.ends[first - 1] if first else 0 : self.ends[last - 1]]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(owner, item) of the interactions of some users at a time, owners from 0 in each block."""
        first = 0
        while first < len(self.users):
            begin = self.ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(self.ends, begin + INTERACTIONS_IN_BLOCK, side="right")))
            lengths = np.diff(self.ends[first:last], prepend=begin)
            yield np.repeat(np.arange(last - first), lengths), self._between(first, last).astype(np.int64)
            first = last


@dataclass(frozen=True)
class Interactions:
    """Interactions in an engine.

    Attributes:
        engine: Which holds them.
        table: user, item, position and, where it is known, time.
        num_items: I.
    """

    engine: DuckDB
    table: Table
    num_items: int

    @classmethod
    def of_file(cls, engine: DuckDB, path: str | Path, num_items: int, splits: tuple[str, ...]) -> Interactions:
        """Those of some splits of a table of the data stage, one file or a folder of parts."""
        table = engine.con.read_parquet(f"{path}/*.parquet" if Path(path).is_dir() else str(path))
        table = table.filter(table.split.isin(splits))
        names = [*pair_query.COLUMNS, *(name for name in ("time",) if name in table.columns)]
        return cls(engine, table.select(names), num_items)

    def part(self, until: float | None = None, without_users: np.ndarray | None = None) -> Interactions:
        """Those before a moment, or without some users."""
        return replace(self, table=pair_query.part_of(self.table, until, without_users))

    @cached_property
    def is_in_order_of_time(self) -> bool:
        """Whether no user's order puts an interaction before an earlier one."""
        return "time" in self.table.columns and self._number(pair_query.disorder(self.table)) == 0

    def latest(self) -> float:
        """The time of the latest one, nan where none is known."""
        if "time" not in self.table.columns:
            return math.nan
        found = self.engine.fetched(self.table.aggregate(latest=self.table.time.cast("float64").max()))
        latest = found["latest"][0].as_py()
        return math.nan if latest is None else float(latest)

    @cached_property
    def sequences(self) -> StoredSequences:
        """The items of each user, oldest first, in a file that is gone when they are."""
        ordered = self.table.order_by("user", "position").select("user", "item")
        found = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
            self.engine.write(ordered, Path(folder) / "ordered.parquet")
            for batch in dataset.dataset(folder).to_batches():
                file.write(batch.column("item").to_numpy().astype(np.int32).tobytes())
                found.append(np.unique(batch.column("user").to_numpy(), return_counts=True))
            file.flush()
            size = sum(int(lengths.sum()) for _, lengths in found)
            flat = np.memmap(file, dtype=np.int32, mode="r") if size else np.empty(0, dtype=np.int32)
        users, lengths = (np.concatenate(one) for one in zip(*found, strict=True))
        last = np.flatnonzero(np.diff(users, append=-1))  # a user may be in two batches
        return StoredSequences(users[last], np.cumsum(lengths)[last], flat)

    def matrices(self, neighbours: int | None = None) -> list[csr_array]:
        """The (I, I) matrices of ALL_WEIGHTS: transitions, successors, near.

        They are counted in passes over ranges of the first item, each of about PAIRS_IN_PASS pairs; an engine that is
        not in this process sums the pairs itself, all at once.

        Args:
            neighbours: Entries of each item that are kept, those of the largest values, ties by item; None for all.
        """
        sizes = self.popularity * 2 * NEAR
        ranges = passes(sizes) if self.engine.is_local else [(0, self.num_items)]
        around = pair_query.surroundings(self.table)
        around = around.order_by("item") if len(ranges) > 1 else around  # so that a pass reads its part
        around = self.engine.stored(around)
        parts = [self._of_range(around, first, last, sizes, neighbours) for first, last in ranges]
        self.engine.keep_only(self.table)
        return [stacked(blocks, self.num_items) for blocks in zip(*parts, strict=True)]

    @cached_property
    def popularity(self) -> np.ndarray:
        """(I,) number of interactions of each item."""
        found = self.engine.fetched(self.table.group_by("item").aggregate(number=self.table.count()))
        number = np.zeros(self.num_items, dtype=np.int64)
        number[found["item"].to_numpy()] = found["number"].to_numpy()
        return number

    def matrices_since(self, since: float) -> list[csr_array]:
        """The addition of interactions from a moment on to the `matrices` of those before it; see `around_moment`."""
        near, before = (replace(self, table=table).matrices() for table in pair_query.around_moment(self.table, since))
        return [csr_array(one - other) for one, other in zip(near, before, strict=True)]

    def _of_range(
        self, around: Table, first: int, last: int, sizes: np.ndarray, neighbours: int | None
    ) -> list[csr_array]:
        """The rows of the matrices from item `first` to before item `last`."""
        around = around.filter((around.item >= first) & (around.item < last))
        if not self.engine.is_local or sizes[first:last].sum() > PAIRS_IN_PASS:  # the latter of one very popular item
            found = [self._summed(around, *weights, neighbours) for weights in ALL_WEIGHTS]
        else:
            lines = self.engine.fetched(around)
            columns = {name: lines[name].to_numpy() for name in lines.column_names}
            found = [pairs_around(columns, *weights) for weights in ALL_WEIGHTS]
        shape = last - first, self.num_items
        return [cut(matrix_of(rows - first, items, weights, shape), neighbours) for rows, items, weights in found]

    def _summed(
        self, around: Table, forward: tuple[int, ...], backward: tuple[int, ...], neighbours: int | None
    ) -> list[np.ndarray]:
        """(first, second, weight) as the engine sums them, those that `cut` keeps."""
        pairs = pair_query.summed(pair_query.weighted_pairs(around, forward, backward))
        found = self.engine.fetched(pairs if neighbours is None else pair_query.largest(pairs, neighbours))
        return [found[name].to_numpy() for name in ("first", "second", "weight")]

    def _number(self, table: Table) -> int:
        return int(self.engine.fetched(table.aggregate(number=table.count()))["number"][0].as_py())


def pairs_around(
    around: Mapping[str, np.ndarray], forward: tuple[int, ...], backward: tuple[int, ...]
) -> list[np.ndarray]:
    """(first, second, weight) of the pairs of `pair_query.weighted_pairs`, of lines in memory."""
    parts: list[tuple[np.ndarray, ...]] = []
    for name, weights in (("next", forward), ("previous", backward)):
        for step, weight in enumerate(weights, start=1):
            known = around[f"{name}_{step}"] >= 0
            first, second = (around[column][known] for column in ("item", f"{name}_{step}"))
            parts.append((first, second, np.full(len(first), weight)))
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def passes(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of items, from the first to before the last, of at most PAIRS_IN_PASS pairs or of one item.

    Args:
        sizes: (I,) pairs whose first item it is, at most.
    """
    ends, begin = np.cumsum(sizes), 0
    bounds = [0]
    while bounds[-1] < len(sizes):
        last = int(np.searchsorted(ends, begin + PAIRS_IN_PASS, side="right"))
        bounds.append(max(last, bounds[-1] + 1))
        begin = int(ends[bounds[-1] - 1])
    return list(itertools.pairwise(bounds))


def stacked(blocks: Sequence[csr_array], num_columns: int) -> csr_array:
    """Rows of matrices, one under the other."""
    if len(blocks) == 1:
        return blocks[0]
    ends = np.cumsum([0, *(block.nnz for block in blocks)])
    index = np.int32 if ends[-1] <= np.iinfo(np.int32).max else np.int64
    indptr = [block.indptr[1:].astype(index) + begin.astype(index) for block, begin in zip(blocks, ends, strict=False)]
    data, indices = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("data", "indices"))
    matrix = csr_array((data, indices.astype(index, copy=False), np.concatenate([np.zeros(1, index), *indptr])),
                       shape=(sum(block.shape[0] for block in blocks), num_columns))  # fmt: skip
    return matrix
