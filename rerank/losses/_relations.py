"""Related items, mined from training sequences; those by embeddings are in `_similar.py`.

Source: IIRG (arXiv:2606.17276), whose code is not used: its licence forbids it.
Letters of shapes: N items, I interactions, K neighbours, S semantic neighbours.
Neighbours of an item are item numbers, best first; -1, after them, stands for none.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array


def co_occurrence_neighbours(
    users: np.ndarray, items: np.ndarray, num_items: int, window: int = 5, num_neighbours: int = 10
) -> np.ndarray:
    """Items that each item is most often taken together with, (N, K) int64; ties by popularity, then by lower item.

    Two interactions of one user at most `window` apart count one for each other, however near; an item is no
    neighbour of itself.

    Args:
        users: User of each training interaction, (I,), each user's together.
        items: Item of each training interaction, (I,), oldest first within a user; below `num_items`.
        num_items: Size of the catalogue.
        window: Places that two interactions may be apart, at least 1.
        num_neighbours: K, at least 1.
    """
    # an item is its popularity rank from here on, so that a smaller number wins a tie
    by_rank = np.argsort(-np.bincount(items, minlength=num_items), kind="stable")
    ranks = np.argsort(by_rank)[items].astype(np.int32)
    counts = csr_array((num_items, num_items), dtype=np.int32)
    for distance in range(1, window + 1):  # added up one by one, so that few pairs are held at a time
        first, second = ranks[:-distance], ranks[distance:]
        together = (users[:-distance] == users[distance:]) & (first != second)
        pairs = first[together], second[together]
        counts = counts + csr_array((np.ones(len(pairs[0]), dtype=np.int32), pairs), shape=counts.shape)
    counts = csr_array(counts + counts.T)
    # count and rank in one number, within which a row is sorted
    packed = (counts.data.max(initial=0) - counts.data).astype(np.int64) * num_items + counts.indices
    found = np.full((num_items, num_neighbours), -1, dtype=np.int64)
    for row, item in enumerate(by_rank):
        best = np.sort(packed[counts.indptr[row] : counts.indptr[row + 1]])[:num_neighbours] % num_items
        found[item, : len(best)] = by_rank[best]
    return found


def fill_from(neighbours: np.ndarray, semantic: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Neighbours (N, num_neighbours) from neighbours (N, K); an item with too few borrows from those of others.

    It walks its semantic neighbours (N, S) in order and takes what each was given, in order, without itself and what
    it has already. Nothing borrowed is lent on. -1 stays where there is nothing to borrow.
    """
    filled = np.full((len(neighbours), num_neighbours), -1, dtype=np.int64)
    filled[:, : neighbours.shape[1]] = neighbours[:, :num_neighbours]
    sizes = (filled >= 0).sum(axis=1)
    for lender in semantic.T:  # (N,)
        short = np.flatnonzero((sizes < num_neighbours) & (lender >= 0))
        for borrowed in neighbours[lender[short]].T:
            new = (borrowed >= 0) & (borrowed != short) & (sizes[short] < num_neighbours)
            new[new] = (filled[short[new]] != borrowed[new, None]).all(axis=1)
            filled[short[new], sizes[short[new]]] = borrowed[new]
            sizes[short[new]] += 1
    return filled


def check_number(num_items: int, num_neighbours: int) -> None:
    """Raise a ValueError where an item has fewer others than are asked for."""
    if num_neighbours >= num_items:
        raise ValueError(f"num_neighbours is {num_neighbours} but must be below the {num_items} items; use fewer.")


def random_neighbours(num_items: int, num_neighbours: int, seed: int) -> np.ndarray:
    """Different random other items for every item, (N, K) int64, the same for the same seed: a control.

    Source: Floyd's sampling without replacement (Bentley & Floyd 1987), for all items at once.
    """
    check_number(num_items, num_neighbours)
    rng = np.random.default_rng(seed)
    drawn = np.full((num_items, num_neighbours), -1, dtype=np.int64)
    for place, largest in enumerate(range(num_items - 1 - num_neighbours, num_items - 1)):
        number = rng.integers(largest + 1, size=num_items)
        drawn[:, place] = np.where((drawn == number[:, None]).any(axis=1), largest, number)
    drawn += drawn >= np.arange(num_items)[:, None]  # until here numbers count the others only
    return rng.permuted(drawn, axis=1)


def refuse_without_neighbours(neighbours: np.ndarray, item_ids: Sequence[str]) -> None:
    """Raise a ValueError with the first item's id when rows of neighbours (N, K) are empty."""
    alone = np.flatnonzero((neighbours < 0).all(axis=1))
    if len(alone):
        raise ValueError(
            f"{len(alone)} of {len(neighbours)} items have no neighbour, the first is {item_ids[alone[0]]}; "
            "use more data or a larger window, or set that relation's weight to 0."
        )
