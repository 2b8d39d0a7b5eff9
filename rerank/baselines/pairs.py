"""Which item follows which: weighted pairs of a set of sequences, and each row's own share of them.

Every weight is a whole number of sixtieths (1, 1/2, 1/3 forward and 0.3, 0.15, 0.1 backward). Counting in integers
makes sums, ties and the subtraction of a user's own counts exact; with floats a subtracted count leaves a crumb of
1e-17 that decides ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

UNIT = 60
FORWARD = (60, 30, 20)  # 1 / (j - i) in sixtieths, for j - i = 1, 2, 3
BACKWARD = (18, 9, 6)  # 0.3 / (j - i) in sixtieths
NEAR = 10

ROWS_IN_BLOCK = 2**15
MANY_ITEMS, NEIGHBOURS = 50_000, 200  # from MANY_ITEMS items on, NEIGHBOURS entries of each are kept

Sequences = Mapping[int, np.ndarray]  # user -> items, oldest first


def lookup(matrix: csr_array, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """matrix[rows, columns] elementwise, as a dense array of the same shape; 0 where a row is -1."""
    known = rows.ravel() >= 0
    values = np.zeros(rows.size, dtype=matrix.dtype)
    if known.any():
        picked = matrix[rows.ravel()[known], columns.ravel()[known]]
        values[known] = picked.toarray() if hasattr(picked, "toarray") else picked
    return values.reshape(rows.shape)


def flatten(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """(owner, item) of every interaction in order; owner is the place of the user in the mapping."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences.values()]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    items = np.concatenate([*arrays, np.empty(0, dtype=np.int64)])
    return np.repeat(np.arange(len(arrays)), lengths), items


def weighted_pairs(
    owners: np.ndarray, items: np.ndarray, forward: Sequence[int] = FORWARD, backward: Sequence[int] = BACKWARD
) -> tuple[np.ndarray, ...]:
    """(owner, from, to, weight) of every two interactions of one owner, weighted by the distance, both ways.

    Args:
        owners: Of each interaction, those of one owner together and oldest first.
        items: Of each interaction.
        forward: Weights from the earlier to the later one, at distance 1, 2, ...; by default in sixtieths.
        backward: Weights from the later to the earlier one.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for weights, is_forward in ((forward, True), (backward, False)):
        for distance, weight in enumerate(weights, start=1):
            same = owners[:-distance] == owners[distance:]
            pair = items[:-distance][same], items[distance:][same]
            parts.append((owners[:-distance][same], *pair[:: 1 if is_forward else -1], np.full(same.sum(), weight)))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


# (forward, backward) weights of the matrices transitions, successors, near
ALL_WEIGHTS = ((FORWARD, BACKWARD), ((1,), ()), ((1,) * NEAR, (1,) * NEAR))


def matrix_of(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """Sparse int64 matrix with equal places summed."""
    return csr_array((values.astype(np.int64), (rows, columns)), shape=shape)


def neighbours_of(num_items: int, asked: int | None = None) -> int | None:
    """Entries of each item that counts keep: those asked for, else all (None), or NEIGHBOURS of a large catalogue."""
    return NEIGHBOURS if asked is None and num_items >= MANY_ITEMS else asked


def cut(matrix: csr_array, neighbours: int | None) -> csr_array:
    """The largest entries of each row, `neighbours` of them, ties by column; all for None."""
    if neighbours is None:
        return matrix
    kept = np.ones(matrix.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > neighbours).tolist():
        begin, end = matrix.indptr[row : row + 2]
        values = matrix.data[begin:end]
        least = np.partition(values, len(values) - neighbours)[len(values) - neighbours]
        tied = np.flatnonzero(values == least)
        kept[begin:end] = values > least
        kept[begin + tied[: neighbours - (values > least).sum()]] = True
    indptr = np.append(0, np.cumsum(kept))[matrix.indptr]
    data, indices, indptr = map(_narrow, (matrix.data[kept], matrix.indices[kept], indptr))
    return csr_array((data, indices, indptr), shape=matrix.shape)


@dataclass(frozen=True)
class Cut:
    """Counts that were cut to the largest entries of each item.

    Attributes:
        matrix: (I, I).
        least: (I,) the smallest entry of each item of which some may have been cut; 0 of another.
        last: (I,) the last column that has it; I where none was cut.
    """

    matrix: csr_array
    least: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, matrix: csr_array, neighbours: int) -> Cut:
        """Of a matrix that `cut` has made."""
        lengths = np.diff(matrix.indptr)
        least, last = np.zeros(matrix.shape[0], dtype=matrix.dtype), np.full(matrix.shape[0], matrix.shape[1])
        full = np.flatnonzero(lengths >= neighbours)
        for start in range(0, len(full), ROWS_IN_BLOCK):
            rows = full[start : start + ROWS_IN_BLOCK]
            begins = np.cumsum(lengths[rows]) - lengths[rows]
            places = np.arange(lengths[rows].sum()) + np.repeat(matrix.indptr[rows] - begins, lengths[rows])
            values = matrix.data[places]
            least[rows] = np.minimum.reduceat(values, begins)
            columns = np.where(values == np.repeat(least[rows], lengths[rows]), matrix.indices[places], -1)
            last[rows] = np.maximum.reduceat(columns, begins)
        return cls(matrix, least, last)


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same in 32 bits where they fit."""
    return values.astype(np.int32) if values.max(initial=0) <= np.iinfo(np.int32).max else values


def with_empty(matrix: csr_array, number: int) -> csr_array:
    """A square matrix with empty rows and columns added at its end."""
    size = matrix.shape[0] + number
    indptr = np.pad(matrix.indptr, (0, number), mode="edge")
    return csr_array((matrix.data, matrix.indices, indptr), shape=(size, size))


@dataclass(frozen=True)
class UserContributions:
    """The contributions of each row's user to the counts, for exact leave-one-user-out.

    A matrix row stands for one (user, item) of `keys`, so that the counts of all users fit into one sparse matrix.
    """

    num_items: int
    owners: np.ndarray  # (R,) the row's user, as a place in the mapping; -1: nothing to subtract
    keys: np.ndarray  # sorted owner * num_items + item
    transitions: csr_array  # (keys, items), sixtieths
    successors: csr_array  # (keys, items)
    near: csr_array  # (keys, items)
    popularity: csr_array  # (users, items)

    @classmethod
    def of(cls, users: Sequence[int] | np.ndarray, sequences: Sequences, num_items: int) -> UserContributions:
        """The own counts of rows.

        Args:
            users: The user of each row.
            sequences: Those that the counts were fitted on. A user not in it has nothing to subtract.
            num_items: Size of the catalogue.
        """
        present = {user: sequences[user] for user in dict.fromkeys(map(int, users)) if user in sequences}
        place = {user: number for number, user in enumerate(present)}
        owners, items = flatten(present)
        keys = np.unique(owners * num_items + items)
        matrices = []
        for weights in ALL_WEIGHTS:
            owner, first, second, weight = weighted_pairs(owners, items, *weights)
            numbers = np.searchsorted(keys, owner * num_items + first)
            matrices.append(matrix_of(numbers, second, weight, (len(keys), num_items)))
        popularity = matrix_of(owners, items, np.ones(len(items)), (len(present), num_items))
        row_owners = np.array([place.get(int(user), -1) for user in users], dtype=np.int64)
        transitions, successors, near = matrices
        return cls(num_items, row_owners, keys, transitions, successors, near, popularity)

    def numbers(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Matrix row of each (row, item), elementwise; -1 where the row's user never had the item."""
        owners = np.broadcast_to(self.owners[rows], items.shape)
        if not len(self.keys):
            return np.full(items.shape, -1)
        wanted = owners * self.num_items + items
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((owners >= 0) & (items >= 0) & (self.keys[found] == wanted), found, -1)

    def within(self, transitions: Cut, successors: Cut, near: Cut) -> UserContributions:
        """The part to subtract from counts that were cut.

        Where these hold nothing it is nothing. Where the user's own part alone lifted a value above what was cut, it
        is all of the value: what is left would tell that this user had both items, as no other pair so rare has one.
        """
        pairs = (self.transitions, transitions), (self.successors, successors), (self.near, near)
        kept = [self._within(*pair) for pair in pairs]
        return replace(self, transitions=kept[0], successors=kept[1], near=kept[2])

    def _within(self, own: csr_array, counts: Cut) -> csr_array:
        items = np.repeat(self.keys % self.num_items, np.diff(own.indptr))
        held, least, last = lookup(counts.matrix, items, own.indices), counts.least, counts.last
        left = held - own.data
        was_lifted = (left < least[items]) | ((left == least[items]) & (own.indices > last[items]))
        values = np.where(held > 0, np.where(was_lifted, held, own.data), 0)
        kept = csr_array((values, own.indices, own.indptr), shape=own.shape)
        kept.eliminate_zeros()
        return kept

    def of_rows(self, rows: np.ndarray) -> UserContributions:
        """The same of some of the rows."""
        return replace(self, owners=self.owners[rows])

    def popularity_of(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Number of times that the row's user had each item, elementwise."""
        return lookup(self.popularity, np.broadcast_to(self.owners[rows], items.shape), items)

    def items_of(self, rows: np.ndarray) -> csr_array:
        """(len(rows), items) number of times that the row's user had each item, nothing where the owner is -1."""
        owned = np.flatnonzero(self.owners[rows] >= 0)
        shape = len(rows), self.popularity.shape[0]
        picks = matrix_of(owned, self.owners[rows][owned], np.ones(len(owned)), shape)
        return csr_array(picks @ self.popularity)


def contenders(matrix: csr_array, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, item, score) of the entries that can be among the n best of their row, all ties included."""
    lengths = np.diff(matrix.indptr)
    width = max(int(lengths.max(initial=0)), n)
    filled = np.arange(width) < lengths[:, None]
    padded = np.zeros(filled.shape, dtype=matrix.dtype)
    padded[filled] = matrix.data
    least = np.partition(padded, width - n, axis=1)[:, width - n]
    kept = filled & (padded >= least[:, None])
    chosen = kept[filled]
    return np.nonzero(kept)[0], matrix.indices[chosen].astype(np.int64), matrix.data[chosen]
