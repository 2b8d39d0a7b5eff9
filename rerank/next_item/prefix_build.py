"""From token sequences to the flat arrays of a prefix index."""

from collections.abc import Sequence

import numpy as np


def check_items(items: np.ndarray) -> None:
    """Refuse an item that is given twice."""
    values, counts = np.unique(items, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"item {values[counts > 1][0]} has {counts[counts > 1][0]} sequences; give each item one")


def padded(sequences: np.ndarray | Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as one table filled up with -1, and their lengths."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 2:
        table, lengths = sequences, np.full(len(sequences), sequences.shape[1])
    else:
        lengths = np.array([len(sequence) for sequence in sequences])
        table = np.full((len(lengths), lengths.max()), -1, dtype=np.int64)
        table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(s) for s in sequences])
    if lengths.min() == 0:
        raise ValueError(f"sequence {int(lengths.argmin())} is empty; every item needs at least one token")
    negative = (table < 0) & (np.arange(table.shape[1]) < lengths[:, None])
    if negative.any():
        row = int(negative.any(axis=1).argmax())
        raise ValueError(f"sequence {row} holds a negative token: {list(sequences[row])}")
    return table, lengths


def flatten(table: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
    """tokens, first_child, items and item_nodes of sorted sequences."""
    num_rows, depth = table.shape
    is_new = np.zeros(num_rows, dtype=bool)  # where a prefix differs from the row before
    parent_rows = np.zeros(1, dtype=np.int64)  # first row of each node of the depth above; the root's is 0
    row_nodes = np.zeros(num_rows, dtype=np.int64)  # deepest node so far of each row
    num_nodes, tokens, first_child = 1, [], []
    for level in range(depth):
        is_new[0] = True
        is_new[1:] |= table[1:, level] != table[:-1, level]
        starts = is_new & (lengths > level)
        before = np.cumsum(starts)
        first_child.append(num_nodes + before[parent_rows] - starts[parent_rows])
        row_nodes = np.where(lengths > level, num_nodes + before - 1, row_nodes)
        parent_rows = np.flatnonzero(starts)
        tokens.append(table[parent_rows, level])
        num_nodes += len(parent_rows)
    first_child.append(np.array([num_nodes]))
    order = np.argsort(row_nodes, kind="stable")  # sequences that end early stand before all longer ones
    parts = (np.concatenate(tokens), np.concatenate(first_child), items[order], compact(row_nodes[order]))
    return tuple(smallest(part) for part in parts)


def compact(item_nodes: np.ndarray) -> np.ndarray:
    """The first alone when the others follow from it."""
    return item_nodes[:1] if (np.diff(item_nodes) == 1).all() else item_nodes


def smallest(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest unsigned type that holds them and the one after the greatest."""
    dtype = np.min_scalar_type(int(values.max(initial=0)) + 1)
    return values.astype(np.int64 if values.min(initial=0) < 0 or dtype == np.uint64 else dtype)
