"""Which items are related: co-occurrence, back-fill, cosine similarity, and the random control."""

from collections import Counter

import numpy as np
import pytest

from rerank.losses import _relations as relations
from rerank.losses._relations import (
    co_occurrence_neighbours,
    fill_from,
    random_neighbours,
    refuse_without_neighbours,
    semantic_neighbours,
)


def test_neighbours_of_twelve_interactions_are_those_counted_by_hand():
    sequences = [[0, 1, 2, 0], [1, 2, 4], [4, 1, 0, 2, 3]]
    users = np.repeat([7, 3, 5], [4, 3, 5])
    # times at most 2 apart, by user 7 + 3 + 5:
    # 0-1: 2 + 0 + 1 = 3    0-2: 2 + 0 + 1 = 3    1-2: 1 + 1 + 1 = 3    1-4: 0 + 1 + 1 = 2
    # 0-3: 0 + 0 + 1 = 1    0-4: 0 + 0 + 1 = 1    2-3: 0 + 0 + 1 = 1    2-4: 0 + 1 + 0 = 1
    # interactions: 0, 1 and 2 have three, 4 has two, 3 has one, 5 has none; so 4 comes before 3, and 0 before 1
    found = co_occurrence_neighbours(users, np.concatenate(sequences), num_items=6, window=2, num_neighbours=4)
    assert found.dtype == np.int64
    assert found.tolist() == [
        [1, 2, 4, 3],
        [0, 2, 4, -1],
        [0, 1, 4, 3],
        [0, 2, -1, -1],
        [1, 0, 2, -1],
        [-1, -1, -1, -1],
    ]


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
    ranked = [
        sorted(count, key=lambda other, count=count: (-count[other], -popularity[other], other)) for count in counts
    ]
    return [(own + [-1] * num_neighbours)[:num_neighbours] for own in ranked]


@pytest.mark.parametrize("at_once", [None, (3, 1), (7, 40)])
@pytest.mark.parametrize("window", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_those_of_the_loop(seed, window, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(relations, "ROWS_AT_ONCE", at_once[0])
        monkeypatch.setattr(relations, "PAIRS_AT_ONCE", at_once[1])
    rng = np.random.default_rng(seed)
    users = np.repeat(rng.permutation(40), rng.integers(1, 12, 40))
    items = rng.geometric(0.15, len(users)).clip(max=24) - 1  # few items: repeats and ties are many
    wanted = neighbours_by_loop(users, items, 25, window, 6)
    assert co_occurrence_neighbours(users, items, 25, window, 6).tolist() == wanted
    assert co_occurrence_neighbours(users.astype(np.int32), items.astype(np.int32), 25, window, 6).tolist() == wanted


def test_without_pairs_there_are_no_neighbours():
    none = np.empty(0, dtype=np.int64)
    assert co_occurrence_neighbours(none, none, 2, num_neighbours=1).tolist() == [[-1], [-1]]
    alone, itself = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 1])
    assert co_occurrence_neighbours(alone, itself, 2, num_neighbours=1).tolist() == [[-1], [-1]]


def test_back_fill_is_the_one_walked_by_hand():
    neighbours = np.array([[1, 2, -1], [0, -1, -1], [0, 3, 4], [-1, -1, -1], [-1, -1, -1]])
    semantic = np.array([[2, 1], [3, 2], [1, 0], [1, 4], [0, 1]])
    assert fill_from(neighbours, semantic, 3).tolist() == [
        [1, 2, 3],  # of 2: not itself, then 3; full before 4
        [0, 3, 4],  # 3 has none to lend; of 2: 0 is there already, then 3 and 4
        [0, 3, 4],  # was full
        [0, -1, -1],  # of 1: 0; of 4: nothing, although 4 borrows some itself
        [1, 2, 0],  # of 0: 1 and 2, not 3 which is borrowed; of 1: 0
    ]


def fill_by_loop(neighbours, semantic, num_neighbours):
    """The definition, item by item."""
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


def test_semantic_neighbours_are_those_of_the_cosines_by_hand():
    # of length one: (1, 0), (0.6, 0.8), (0, 1), (1, 0), (-1, 0); 0 and 3 point the same way
    embeddings = np.array([[1, 0], [3, 4], [0, 2], [2, 0], [-1, 0]], dtype=np.float32)
    assert semantic_neighbours(embeddings, 3).tolist() == [
        [3, 1, 2],  # 1, 0.6, 0
        [2, 0, 3],  # 0.8, 0.6, 0.6
        [1, 0, 3],  # 0.8, 0, 0 (and 0 for 4)
        [0, 1, 2],  # 1, 0.6, 0
        [2, 1, 0],  # 0, -0.6, -1 (and -1 for 3)
    ]


@pytest.mark.parametrize("at_once", [1, 500, 2**22])
@pytest.mark.parametrize("seed", range(3))
def test_semantic_neighbours_are_those_of_the_full_matrix(seed, at_once, monkeypatch):
    monkeypatch.setattr(relations, "SIMILARITIES_AT_ONCE", at_once)
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((70, 19)).astype(np.float32)
    embeddings[rng.integers(0, 70, 30)] = embeddings[rng.integers(0, 5, 30)]  # up to seven or so of one kind
    rows = [(row / np.linalg.norm(row)).tolist() for row in embeddings.astype(np.float64)]
    cosines = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    for number in (1, 9, 69):
        wanted = [
            sorted((other for other in range(70) if other != item), key=lambda other, own=own: (-own[other], other))
            for item, own in enumerate(cosines)
        ]
        assert semantic_neighbours(embeddings, number).tolist() == [row[:number] for row in wanted]


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_an_embedding_without_a_direction_is_refused(value):
    embeddings = np.ones((4, 3), dtype=np.float32)
    embeddings[2] = value
    with pytest.raises(ValueError, match="the embedding in row 2 is zero or not finite; embed that item again"):
        semantic_neighbours(embeddings, 2)


def test_more_neighbours_than_other_items_are_refused():
    with pytest.raises(ValueError, match="num_neighbours is 4 but must be below the 4 items; use fewer"):
        semantic_neighbours(np.ones((4, 3)), 4)
    with pytest.raises(ValueError, match="num_neighbours is 4 but must be below the 4 items; use fewer"):
        random_neighbours(4, 4, seed=0)


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
    message = (
        "2 of 3 items have no neighbour, the first is B02; "
        "use more data or a larger window, or set that relation's weight to 0"
    )
    with pytest.raises(ValueError, match=message):
        refuse_without_neighbours(np.array([[1, -1], [-1, -1], [-1, -1]]), ["B01", "B02", "B03"])
    refuse_without_neighbours(np.array([[1, -1], [0, 2], [1, -1]]), ["B01", "B02", "B03"])
