"""Which items are related: co-occurrence, back-fill, and the random control."""

from collections import Counter

import numpy as np
import pytest

from rerank.losses import _relations as relations
from rerank.losses._relations import co_occurrence_neighbours, fill_from, random_neighbours
from rerank.losses._similar import semantic_neighbours


def neighbours_by_loop(users, items, num_items, window, num_neighbours):
    """The definition, pair by pair."""
    sequences = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        sequences.setdefault(user, []).append(item)
    popularity, counts = Counter(items.tolist()), [Counter() for _ in range(num_items)]
    for sequence in sequences.values():
        for place, item in enumerate(sequence):
            for other_place, other in enumerate(sequence):
                if abs(place - other_place) <= window and item != other:
                    counts[item][other] += 1
    ranked = [sorted(count, key=lambda i, count=count: (-count[i], -popularity[i], i)) for count in counts]
    return [(own + [-1] * num_neighbours)[:num_neighbours] for own in ranked]


@pytest.mark.parametrize("window", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_those_of_the_loop(seed, window):
    rng = np.random.default_rng(seed)
    users = np.repeat(rng.permutation(40), rng.integers(1, 12, 40))
    items = rng.geometric(0.15, len(users)).clip(max=24) - 1  # few items: repeats and ties are many
    wanted = neighbours_by_loop(users, items, 25, window, 6)
    for dtype in (np.int64, np.int32):
        found = co_occurrence_neighbours(users.astype(dtype), items.astype(dtype), 25, window, 6)
        assert found.dtype == np.int64 and found.tolist() == wanted


def test_without_pairs_there_are_no_neighbours():
    for users, items in (([], []), ([0, 1, 2, 2], [0, 1, 1, 1])):  # users alone, and an item with itself
        found = co_occurrence_neighbours(np.array(users, int), np.array(items, int), 2, num_neighbours=1)
        assert found.tolist() == [[-1], [-1]]


def fill_by_loop(neighbours, semantic, num_neighbours):
    """The definition, item by item: what was borrowed is not lent on."""
    filled = []
    for item, (own, lenders) in enumerate(zip(neighbours.tolist(), semantic.tolist(), strict=True)):
        row = [other for other in own if other >= 0]
        for lender in lenders:
            borrowed = neighbours[lender].tolist() if lender >= 0 else []
            row += [other for other in borrowed if other >= 0 and other != item and other not in row]
        filled.append((row + [-1] * num_neighbours)[:num_neighbours])
    return filled


@pytest.mark.parametrize("num_neighbours", [2, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_back_fill_is_that_of_the_loop(seed, num_neighbours):
    rng = np.random.default_rng(seed)
    neighbours = random_neighbours(30, 4, seed)
    neighbours[np.arange(4) >= rng.integers(0, 5, 30)[:, None]] = -1
    semantic = rng.integers(-1, 30, (30, 3))
    given = neighbours.copy()
    wanted = fill_by_loop(neighbours, semantic, num_neighbours)
    assert fill_from(neighbours, semantic, num_neighbours).tolist() == wanted
    assert (neighbours == given).all()


@pytest.mark.parametrize("find", [lambda: semantic_neighbours(np.ones((4, 3)), 4), lambda: random_neighbours(4, 4, 0)])
def test_more_neighbours_than_other_items_are_refused(find):
    with pytest.raises(ValueError, match="num_neighbours is 4 but must be below the 4 items; use fewer"):
        find()


@pytest.mark.parametrize(("num_items", "num_neighbours"), [(2, 1), (6, 5), (300, 10)])
def test_random_neighbours_are_different_others(num_items, num_neighbours):
    found = random_neighbours(num_items, num_neighbours, seed=1)
    assert found.shape == (num_items, num_neighbours)
    for item, row in enumerate(found.tolist()):
        assert len(set(row)) == num_neighbours
        assert set(row) <= set(range(num_items)) - {item}
    assert (random_neighbours(num_items, num_neighbours, seed=1) == found).all()


def test_random_neighbours_are_equally_likely_at_every_place():
    draws = np.stack([random_neighbours(6, 3, seed) for seed in range(2000)])  # (2000, 6, 3)
    for item in range(6):
        for place in range(3):
            # one of five others: 400 of 2000, with a standard deviation of sqrt(2000 * 0.2 * 0.8) = 18
            times = np.delete(np.bincount(draws[:, item, place], minlength=6), item)
            assert np.abs(times - 400).max() < 90


def test_items_without_any_neighbour_are_refused_by_name():
    cure = "use more data or a larger window, or set that relation's weight to 0"
    with pytest.raises(ValueError, match=f"2 of 3 items have no neighbour, the first is B02; {cure}"):
        relations.refuse_without_neighbours(np.array([[1, -1], [-1, -1], [-1, -1]]), ["B01", "B02", "B03"])
