import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank.next_item.prefix_index import ARRAYS, PrefixIndex

# Three tokens each; items 2 and 3 collide.
SEQUENCES = [[7, 20, 31], [5, 20, 30], [5, 21, 30], [5, 21, 30]]


def below(index: PrefixIndex, prefix: list[int]) -> list[int]:
    _, tokens, _ = index.children(np.array([index.find(prefix)]))
    return tokens.tolist()


def items_of(index: PrefixIndex, sequence: list[int]) -> list[int]:
    return index.items[index.places_at(np.array([index.find(sequence)]))[1]].tolist()


def without(index: PrefixIndex, items: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`index.without` of a single row, number 0, whose keys are nodes."""
    places = index.places_of(np.array(items, dtype=np.int64))
    places = places[places >= 0]
    return index.without(np.zeros(len(places), dtype=np.int64), places)


def test_nodes_are_numbered_breadth_first_in_token_order():
    index = PrefixIndex.build(np.array(SEQUENCES))
    # depth 1: 5, 7; depth 2: 5-20, 5-21, 7-20; depth 3: 5-20-30, 5-21-30, 7-20-31
    assert [index.find(p) for p in ([], [5], [7], [5, 20], [5, 21], [7, 20])] == [0, 1, 2, 3, 4, 5]
    assert index.vocabulary[index.tokens].tolist() == [5, 7, 20, 21, 20, 30, 30, 31]
    assert index.num_nodes == 9 and index.root == 0


def test_children_of_a_batch_of_nodes_stand_one_after_another():
    index = PrefixIndex.build(SEQUENCES)
    offsets, tokens, nodes = index.children(np.array([1, 8, 0]))  # the prefix 5, a leaf, the root
    assert offsets.tolist() == [0, 2, 2, 4]
    assert tokens.tolist() == [20, 21, 5, 7]
    assert nodes.tolist() == [3, 4, 1, 2]


def test_a_leaf_holds_all_items_of_its_sequence():
    index = PrefixIndex.build(SEQUENCES, items=[40, 10, 20, 30])
    assert items_of(index, [5, 21, 30]) == [20, 30]
    assert items_of(index, [7, 20, 31]) == [40]
    assert items_of(index, [5]) == []


def test_sequences_of_unequal_length_may_begin_one_another():
    index = PrefixIndex.build([[1, 2, 3], [1], [2, 9], [1, 2]])
    assert [items_of(index, s) for s in ([1], [1, 2], [1, 2, 3], [2, 9])] == [[1], [3], [0], [2]]
    assert below(index, [1]) == [2] and below(index, [2]) == [9] and below(index, [2, 9]) == []
    assert index.num_items_below(np.array([0, index.find([1]), index.find([1, 2])])).tolist() == [4, 3, 2]


def test_what_is_left_without_some_items():
    index = PrefixIndex.build([[1, 2, 3], [1], [2, 9], [1, 2]])
    closed, ended = without(index, [1, 2, 77])  # no item 77: no matter
    # [2] and [2, 9] lead nowhere else; at [1] and [2, 9] no item is left, but [1] still leads on
    assert closed.tolist() == [index.find([2]), index.find([2, 9])]
    assert ended.tolist() == [index.find([1]), index.find([2, 9])]
    assert without(PrefixIndex.build(SEQUENCES), [2])[0].tolist() == []  # item 3 has the same id


def test_an_unknown_item_number_below_an_excluded_one_changes_nothing():
    index = PrefixIndex.build(SEQUENCES, items=[40, 10, 20, 30])
    for found, expected in zip(without(index, [19, 20]), without(index, [20]), strict=True):
        assert found.tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=30),
    st.sets(st.integers(0, 29)),
)
def test_the_index_agrees_with_a_search_through_all_sequences(sequences, excluded):
    index = PrefixIndex.build(sequences)
    prefixes = sorted({tuple(s[:k]) for s in sequences for k in range(len(s) + 1)})
    nodes = np.array([index.find(p) for p in prefixes])
    assert sorted(nodes.tolist()) == list(range(index.num_nodes))
    closed, ended = (set(part.tolist()) for part in without(index, sorted(excluded)))
    for prefix, node in zip(prefixes, nodes.tolist(), strict=True):
        k = len(prefix)
        below_it = [i for i, s in enumerate(sequences) if tuple(s[:k]) == prefix]
        at_it = [i for i in below_it if len(sequences[i]) == k]
        assert below(index, prefix) == sorted({sequences[i][k] for i in below_it if len(sequences[i]) > k})
        assert items_of(index, prefix) == at_it
        assert index.num_items_below(np.array([node])) == [len(below_it)]
        assert (node in closed) == (set(below_it) <= excluded)
        assert (node in ended) == (bool(at_it) and set(at_it) <= excluded)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=30),
    st.sets(st.integers(0, 40), min_size=1),
    st.sets(st.integers(0, 40), min_size=1),
)
def test_the_index_of_some_items_is_the_one_built_from_their_sequences(sequences, first, second):
    index = PrefixIndex.build(sequences)
    for chosen in (first, second):  # an index of some items has one of some of these
        kept = [item for item in index.items.tolist() if item in chosen]
        if not kept:
            with pytest.raises(ValueError, match=f"none of the {len(chosen)} allowed items is among"):
                index.only(sorted(chosen))
            return
        kept.sort()
        index, built = index.only(sorted(chosen)), PrefixIndex.build([sequences[item] for item in kept], kept)
        assert len(index) == len(built) and index.num_nodes == built.num_nodes
        nodes = np.arange(built.num_nodes)
        for own, other in (
            *zip(index.children(nodes)[::2], built.children(nodes)[::2], strict=True),
            (index.children(nodes)[1], built.children(nodes)[1]),
            (index.places_at(nodes)[0], built.places_at(nodes)[0]),
            (index.items[index.places_at(nodes)[1]], built.items[built.places_at(nodes)[1]]),
        ):
            assert own.tolist() == other.tolist()
        assert index.num_items_below(nodes).tolist() == built.num_items_below(nodes).tolist()
        gone = sorted(chosen)[::2]
        for own, other in zip(without(index, gone), without(built, gone), strict=True):
            assert own.tolist() == other.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=30), st.data())
def test_the_table_of_children_holds_what_their_list_does(sequences, data):
    index = PrefixIndex.build(sequences)
    nodes = np.array(data.draw(st.lists(st.integers(0, index.num_nodes - 1), min_size=1, max_size=9)))
    offsets, tokens, child_nodes = index.children(nodes)
    first, counts, table = index.child_table(nodes)
    assert counts.tolist() == np.diff(offsets).tolist() and table.shape == (len(nodes), counts.max())
    for row, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        assert index.vocabulary[table[row, : counts[row]]].tolist() == tokens[start:end].tolist()
        assert np.arange(first[row], first[row] + counts[row]).tolist() == child_nodes[start:end].tolist()


def test_what_is_left_is_told_for_each_row():
    index = PrefixIndex.build([[1, 2, 3], [1], [2, 9], [1, 2]])
    lists = [[2], [], [0, 1, 3], [1, 2]]
    rows = np.repeat(np.arange(4), [len(items) for items in lists])
    closed, ended = index.without(rows, index.places_of(np.concatenate(lists).astype(int)))
    for row, items in enumerate(lists):
        for keys, expected in zip((closed, ended), without(index, items), strict=True):
            assert keys[keys // index.num_nodes == row].tolist() == (row * index.num_nodes + expected).tolist()


def test_an_index_survives_saving(tmp_path):
    index = PrefixIndex.build(SEQUENCES)
    index.save(tmp_path / "index")
    loaded = PrefixIndex.load(tmp_path / "index")
    assert isinstance(loaded.tokens, np.memmap)
    assert loaded.find([5, 21, 30]) == index.find([5, 21, 30])
    assert items_of(loaded, [5, 21, 30]) == [2, 3]
    assert without(loaded, [0])[0].tolist() == without(index, [0])[0].tolist()


def test_an_index_knows_its_own_sequences():
    unequal = [[1, 2, 3], [1], [2, 9], [1, 2], [1, 2]]
    for sequences in (SEQUENCES, unequal):
        index = PrefixIndex.build(sequences)
        assert index.has(sequences)
        assert not index.has(sequences[:-1]) and not index.has([*sequences, [7]])
        assert not index.has(sequences[::-1]) and not index.has([[99], *sequences[1:]])
        assert not PrefixIndex.build(sequences, range(1, len(sequences) + 1)).has(sequences)
    assert not PrefixIndex.build(unequal).has(
        [[1, 2], [3, 1], [2, 9], [1, 2], [1, 2]]
    )  # the same tokens, cut otherwise


def test_four_levels_cost_at_most_16_bytes_an_item():
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (200_000, 4)), axis=0) + 151_000 + 256 * np.arange(4)
    index = PrefixIndex.build(codes)
    assert sum(getattr(index, name).nbytes for name in ARRAYS) / len(index) <= 16
    assert items_of(index, codes[777].tolist()) == [777]


def test_an_unknown_prefix_raises():
    index = PrefixIndex.build(SEQUENCES)
    with pytest.raises(KeyError, match=r"no item of the prefix index begins with the tokens \[5, 99\]"):
        index.find([5, 99, 30])
    with pytest.raises(ValueError, match="node 9 is not in the prefix index, which has 9 nodes"):
        index.children(np.array([0, 9]))


@pytest.mark.parametrize(
    ("sequences", "items", "message"),
    [
        ([], None, "give one each, and at least one"),
        ([[1], [2]], [0], "2 sequences for 1 items"),
        ([[1], []], None, "sequence 1 is empty"),
        ([[1, 2], [3, -4]], None, r"sequence 1 holds a negative token: \[3, -4\]"),
        ([[1], [2], [3]], [4, 5, 4], "item 4 has 2 sequences"),
    ],
)
def test_bad_sequences_are_refused(sequences, items, message):
    with pytest.raises(ValueError, match=message):
        PrefixIndex.build(sequences, items)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.npy does not exist"):
        PrefixIndex.load(tmp_path)
