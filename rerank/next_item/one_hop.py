"""Rows whose target counting could have found: it often follows an item of the history directly.

R rows.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines import Counts
from rerank.baselines.pairs import lookup, matrix_of

MOST_SUCCESSORS = 50
SUCCESSORS_AT_ONCE = 2**22  # of the items of the histories of some rows


def is_one_hop(counts: Counts, histories: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Whether each target is among the most frequent direct successors of its history's items, (R,).

    Frequencies are summed over the distinct items of the history; ties go by popularity, then by item.
    """
    lines = np.repeat(np.arange(len(targets)), [len(history) for history in histories])
    items = np.concatenate([*histories, np.empty(0, dtype=np.int64)]).astype(np.int64)
    shape = len(targets), counts.num_items
    own = matrix_of(lines, items, np.ones(len(lines)), shape).astype(bool).astype(np.int64)
    sizes = np.cumsum(own @ np.diff(counts.successors.indptr)) // SUCCESSORS_AT_ONCE
    parts = np.split(np.arange(len(targets)), np.flatnonzero(np.diff(sizes)) + 1)
    ranks = [_successor_ranks(own[part] @ counts.successors, counts.popularity, targets[part]) for part in parts]
    return np.concatenate(ranks) < MOST_SUCCESSORS


def _successor_ranks(followers: csr_array, popularity: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(R,) rank of each target among its row's successors, from 0; inf where it is none.

    Args:
        followers: (R, items) how often each item follows those of the row's history.
        popularity: (items,).
        targets: (R,).
    """
    line = np.repeat(np.arange(len(targets)), np.diff(followers.indptr))
    item, target, times = followers.indices, targets[line], lookup(followers, np.arange(len(targets)), targets)
    ahead = followers.data - times[line]
    liked = popularity[item] - popularity[target]
    is_better = (ahead > 0) | ((ahead == 0) & ((liked > 0) | ((liked == 0) & (item < target))))
    return np.where(times > 0, np.bincount(line[is_better], minlength=len(targets)), np.inf)
