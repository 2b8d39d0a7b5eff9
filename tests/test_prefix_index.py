import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank.next_item.prefix_index import ARRAYS, PrefixIndex

# Three tokens each; items 2 and 3 collide.
SEQUENCES = [[7, 20, 31], [5, 20, 30], [5, 21, 30], [5, 21, 30]]
DRAWN = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=30)
few_examples = settings(max_examples=60, deadline=None)


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


@few_examples
@given(DRAWN, st.sets(st.integers(0, 89)))
def test_the_index_agrees_with_a_search_through_all_sequences(sequences, excluded):
    items = [3 * number for number in range(len(sequences))][::-1]  # between them are numbers of no item
    index = PrefixIndex.build(sequences, items)
    prefixes = sorted({tuple(s[:k]) for s in sequences for k in range(len(s) + 1)})
    nodes = np.array([index.find(p) for p in prefixes])
    assert sorted(nodes.tolist()) == list(range(index.num_nodes))
    closed, ended = (set(part.tolist()) for part in without(index, sorted(excluded)))
    for prefix, node in zip(prefixes, nodes.tolist(), strict=True):
        k = len(prefix)
        pairs = [(item, s) for item, s in zip(items, sequences, strict=True) if tuple(s[:k]) == prefix]
        below_it, at_it = [item for item, _ in pairs], [item for item, s in pairs if len(s) == k]
        assert below(index, prefix) == sorted({s[k] for _, s in pairs if len(s) > k})
        assert items_of(index, prefix) == at_it
        assert index.num_items_below(np.array([node])) == [len(below_it)]
        assert (node in closed) == (set(below_it) <= excluded)
        assert (node in ended) == (bool(at_it) and set(at_it) <= excluded)


@few_examples
@given(DRAWN, st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1))
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
        nodes, gone = np.arange(built.num_nodes), sorted(chosen)[::2]
        own, other = (
            [*of.children(nodes), *of.places_at(nodes), of.items, of.num_items_below(nodes), *without(of, gone)]
            for of in (index, built)
        )
        assert all(np.array_equal(*pair) for pair in zip(own, other, strict=True))


@few_examples
@given(DRAWN, st.data())
def test_the_table_of_children_holds_what_their_list_does(sequences, data):
    index = PrefixIndex.build(sequences)
    nodes = np.array(data.draw(st.lists(st.integers(0, index.num_nodes - 1), min_size=1, max_size=9)))
    offsets, tokens, child_nodes = index.children(nodes)
    first, counts, table = index.child_table(nodes)
    assert counts.tolist() == np.diff(offsets).tolist() and table.shape == (len(nodes), counts.max())
    for row, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        assert tokens[start:end].tolist() == index.children(nodes[[row]])[1].tolist()
        assert index.vocabulary[table[row, : counts[row]]].tolist() == tokens[start:end].tolist()
        assert np.arange(first[row], first[row] + counts[row]).tolist() == child_nodes[start:end].tolist()


def test_an_index_survives_saving(tmp_path):
    index = PrefixIndex.build(SEQUENCES)
    index.save(tmp_path / "index")
    loaded = PrefixIndex.load(tmp_path / "index")
    assert isinstance(loaded.tokens, np.memmap)
    assert all(np.array_equal(getattr(loaded, name), getattr(index, name)) for name in ARRAYS)


def test_an_index_knows_its_own_sequences():
    unequal = [[1, 2, 3], [1], [2, 9], [1, 2], [1, 2]]
    for sequences in (SEQUENCES, unequal):
        index = PrefixIndex.build(sequences)
        assert index.has(sequences)
        assert not index.has(sequences[:-1]) and not index.has([*sequences, [7]])
        assert not index.has(sequences[::-1]) and not index.has([[99], *sequences[1:]])
        assert not PrefixIndex.build(sequences, range(1, len(sequences) + 1)).has(sequences)
    cut_otherwise = [[1, 2], [3, 1], [2, 9], [1, 2], [1, 2]]  # the same tokens
    assert not PrefixIndex.build(unequal).has(cut_otherwise)


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
