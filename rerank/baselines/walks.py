"""Histories that no user had but that the counts of `transitions` make likely: more to read than there are users."""

from __future__ import annotations

import numpy as np

from rerank.baselines.counts import RECENCY, recency_weights
from rerank.baselines.pairs import Sequences, flatten, matrix_of, weighted_pairs

CHUNK = 2048


def walks(sequences: Sequences, num_items: int, num_walks: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """(num_walks, length) items; -1 from where a walk has nowhere new to go.

    A walk starts at an item that someone followed by another. Each next item is drawn with a probability proportional
    to its score in `transitions` after the walk so far, items already on the walk left out.

    Args:
        sequences: User to items, oldest first: those that the counts may see.
        num_items: Size of the catalogue.
        num_walks: How many.
        length: Items of a walk.
        rng: Draws them.

    Raises:
        ValueError: When no sequence has two items.
    """
    owners, items = flatten(sequences)
    starts = items[:-1][owners[:-1] == owners[1:]]
    if not len(starts):
        raise ValueError(
            "no sequence has two items, so there is nothing to walk along; leave walks out of the mixture"
        )
    _, first, second, weight = weighted_pairs(owners, items)
    transitions = matrix_of(first, second, weight, (num_items, num_items))
    found = np.full((num_walks, length), -1)
    for start in range(0, num_walks, CHUNK):
        chunk = found[start : start + CHUNK]
        chunk[:, 0] = starts[rng.integers(len(starts), size=len(chunk))]
        for place in range(1, length):
            recent = chunk[:, max(0, place - len(RECENCY)) : place][:, ::-1]
            scores = (recency_weights(recent, num_items) @ transitions).tocoo()
            rows, columns = scores.coords
            new = ~(chunk[rows, :place] == columns[:, None]).any(axis=1) & (chunk[rows, place - 1] >= 0)
            rows, columns, weights = rows[new], columns[new], scores.data[new]
            # the largest of log(weight) + Gumbel noise is a draw with probabilities proportional to the weights
            order = np.lexsort((-(np.log(weights) + rng.gumbel(size=len(weights))), rows))
            best = order[np.diff(rows[order], prepend=-1) > 0]
            chunk[rows[best], place] = columns[best]
    return found
