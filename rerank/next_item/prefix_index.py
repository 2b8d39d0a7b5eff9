"""The catalogue's token sequences as one flat prefix index: the valid continuations of many prefixes at once.

Nodes are prefixes, numbered breadth first and, within a depth, in the order of their tokens. So the children of node v
are the nodes first_child[v] to first_child[v+1], and a node costs one token and one number; no object stands for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from rerank.next_item.prefix_build import check_items, compact, flatten, padded, smallest

ARRAYS = ("vocabulary", "tokens", "first_child", "items", "item_nodes")


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """Token sequences, sorted; build with `PrefixIndex.build`, open with `PrefixIndex.load`.

    Attributes:
        vocabulary: The tokens in use, sorted.
        tokens: For each node but the root (node v at v - 1), the place of its last token in the vocabulary.
        first_child: For each node above the greatest depth, and one more, its first child.
        items: The items, in the order of their nodes.
        item_nodes: The node at which each of `items` ends, ascending; two items may share one (a collision). Only the
            first when the nodes are consecutive, as they are for unique ids of one length.
    """

    root: ClassVar[int] = 0  # the node of the empty prefix
    vocabulary: np.ndarray
    tokens: np.ndarray
    first_child: np.ndarray
    items: np.ndarray
    item_nodes: np.ndarray

    @classmethod
    def build(
        cls, sequences: np.ndarray | Sequence[Sequence[int]], items: Sequence[int] | np.ndarray | None = None
    ) -> "PrefixIndex":
        """An index of token sequences.

        Args:
            sequences: (n, L), or n sequences of any lengths; one may be the beginning of another.
            items: The item of each sequence; 0 to n-1 by default.

        Raises:
            ValueError: When there is no sequence, one is empty, a token is negative, or items are not one each.
        """
        items = np.arange(len(sequences)) if items is None else np.asarray(items)
        if len(items) != len(sequences) or len(sequences) == 0:
            raise ValueError(f"{len(sequences)} sequences for {len(items)} items; give one each, and at least one")
        check_items(items)
        table, lengths = padded(sequences)
        vocabulary, places = np.unique(table, return_inverse=True)
        places = places.reshape(table.shape)
        if vocabulary[0] < 0:  # the padding; it sorts first, so that a sequence comes before its continuations
            vocabulary, places = vocabulary[1:], places - 1
        order = np.lexsort(places.T[::-1])
        return cls(vocabulary, *flatten(places[order], lengths[order], items[order]))

    def save(self, path: str | Path) -> None:
        """Write one .npy per array into the folder `path`."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(Path(path) / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, path: str | Path) -> "PrefixIndex":
        """The index saved in the folder `path`, memory-mapped; `has` says whether it is of given sequences."""
        files = [Path(path) / f"{name}.npy" for name in ARRAYS]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; save a prefix index there first")
        return cls(*(np.load(file, mmap_mode="r") for file in files))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_nodes(self) -> int:
        """Number of prefixes, the empty one included."""
        return len(self.tokens) + 1

    def child_ranges(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First child of each node, and the end of its children."""
        unknown = nodes[(nodes < 0) | (nodes >= self.num_nodes)]
        if unknown.size:
            raise ValueError(f"node {unknown[0]} is not in the prefix index, which has {self.num_nodes} nodes")
        return self._boundary(nodes), self._boundary(nodes + 1)

    def _boundary(self, nodes: np.ndarray) -> np.ndarray:
        # beyond the stored ones are the nodes at the greatest depth: no children, so every boundary is the end
        return self.first_child[np.minimum(nodes, len(self.first_child) - 1)].astype(np.int64)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The continuations of each node.

        Returns:
            offsets (M + 1), tokens, child nodes: node m's children stand at offsets[m] to offsets[m+1], by token.
        """
        first, end = self.child_ranges(nodes)
        offsets, child_nodes = _concatenated_ranges(first, end)
        return offsets, self.vocabulary[self.tokens[child_nodes - 1]], child_nodes

    def child_table(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The continuations of each node as a table; its cost hardly depends on the size of the index.

        Returns:
            First child of each node, number of children, and their tokens as places in the vocabulary (M, W), by
            token; W is the greatest number of children, and a row means nothing beyond its own number.
        """
        first, end = self.child_ranges(nodes)
        counts = end - first
        width = int(counts.max(initial=0))
        starts, last = first - 1, len(self.tokens) - width
        table = np.lib.stride_tricks.sliding_window_view(self.tokens, width)[np.minimum(starts, last)]
        late = np.flatnonzero((starts > last) & (counts > 0))  # their windows would reach beyond the end
        table[late] = self.tokens[np.minimum(starts[late, None] + np.arange(width), len(self.tokens) - 1)]
        return first, counts, np.asarray(table)

    def places_at(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `items` of the items whose sequence ends at each node.

        Returns:
            offsets (M + 1), places: node m's stand at offsets[m] to offsets[m+1], in the order items were given.
        """
        return _concatenated_ranges(self._first_item(nodes), self._first_item(nodes + 1))

    def num_items_at(self, nodes: np.ndarray) -> np.ndarray:
        """Number of items that end at each node."""
        return self._first_item(nodes + 1) - self._first_item(nodes)

    def _first_item(self, nodes: np.ndarray) -> np.ndarray:
        """Place in `items` of the first that ends at or after each node."""
        if len(self.item_nodes) < len(self.items):
            return np.clip(nodes - int(self.item_nodes[0]), 0, len(self.items))
        return _search(self.item_nodes, nodes)

    def _end_nodes(self, places: np.ndarray) -> np.ndarray:
        """The node at which each of `items[places]` ends."""
        if len(self.item_nodes) < len(self.items):
            return places + int(self.item_nodes[0])
        return self.item_nodes[places].astype(np.int64)

    def find(self, prefix: Sequence[int]) -> int:
        """The node of a prefix.

        Raises:
            KeyError: When no item begins with it.
        """
        node = self.root
        for depth, token in enumerate(prefix):
            _, tokens, child_nodes = self.children(np.array([node]))
            place = int(np.searchsorted(tokens, token))
            if place == len(tokens) or tokens[place] != token:
                raise KeyError(f"no item of the prefix index begins with the tokens {list(prefix[: depth + 1])}")
            node = int(child_nodes[place])
        return node

    def paths(self, items: np.ndarray) -> list[list[int]]:
        """The nodes before each token of each item, the root first; empty for one that the index lacks."""
        places = self.places_of(items)
        table = self._ancestors(np.where(places >= 0, self._end_nodes(np.maximum(places, 0)), self.root))
        starts = (table == self.root).sum(axis=1) - 1
        return [row[start:-1] for row, start in zip(table.tolist(), starts.tolist(), strict=True)]

    def has(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Whether it is the index of these sequences, of the items 0 to n-1."""
        places = self.places_of(np.arange(len(sequences)))
        if len(sequences) != len(self) or (places < 0).any():
            return False
        table = self._ancestors(self._end_nodes(places))
        lengths, tokens = (table != self.root).sum(axis=1), self.vocabulary[self.tokens[table[table != self.root] - 1]]
        is_same_length = np.array_equal(lengths, [len(sequence) for sequence in sequences])
        return is_same_length and np.array_equal(tokens, np.concatenate(sequences))

    def _ancestors(self, nodes: np.ndarray) -> np.ndarray:
        """(M, D) the nodes from the root to each of these; where there are fewer than D, the root stands repeated."""
        levels = [nodes]
        while (levels[-1] != self.root).any():
            levels.append(np.where(levels[-1] == self.root, self.root, self._parents(levels[-1])))
        return np.stack(levels[::-1], axis=1)

    def num_items_below(self, nodes: np.ndarray) -> np.ndarray:
        """Number of items that begin with each node's prefix, those that end there included."""
        first, end, total = nodes, nodes + 1, np.zeros(len(nodes), dtype=np.int64)
        while (first < end).any():  # one round per depth: descendants at one depth are neighbours
            total += self._first_item(end) - self._first_item(first)
            first, end = self._boundary(first), self._boundary(end)
        return total

    def places_of(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """The place of each item in `items`, -1 for one that the index lacks."""
        order, sorted_items = self._by_item
        items = np.asarray(items, dtype=np.int64)
        near = np.minimum(np.searchsorted(sorted_items, items), len(self) - 1)
        return np.where(sorted_items[near] == items, order[near], -1)

    def without(self, rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes that a search in each row for anything but some items need not visit.

        Args:
            rows: Numbers of rows, one for each of `places`.
            places: Places in `items`; row and place together occur once.

        Returns:
            Keys (sorted) row * num_nodes + node: of nodes below which the row has nothing left, and of nodes at which
            items end but none is left in the row.
        """
        table = self._ancestors(self._end_nodes(places))
        keys = rows[:, None] * self.num_nodes + table
        is_first = np.diff(table, axis=1, prepend=-1) > 0  # of the roots one is enough
        touched, counts = np.unique(keys[is_first], return_counts=True)
        ended, end_counts = np.unique(keys[:, -1], return_counts=True)
        return (
            touched[counts == self.num_items_below(touched % self.num_nodes)],
            ended[end_counts == self.num_items_at(ended % self.num_nodes)],
        )

    def only(self, items: Sequence[int] | np.ndarray) -> "PrefixIndex":
        """The index of some of its items, such as those in stock, in one pass over its nodes.

        Args:
            items: Items to keep; those the index lacks are no matter.

        Raises:
            ValueError: When none of them is in the index.
        """
        places = np.unique(self.places_of(items))
        places = places[places >= 0]
        if len(places) == 0:
            raise ValueError(f"none of the {len(items)} allowed items is among the {len(self)} of the prefix index")
        ends = self._end_nodes(places)
        kept = np.zeros(self.num_nodes, dtype=bool)
        kept[ends] = True
        for first, end in reversed(self._levels()[:-1]):  # a node is kept when a child is
            children = self.first_child[first : end + 1].astype(np.int64)
            before = _counts_before(kept[children[0] : children[-1]])
            kept[first:end] |= np.diff(before[children - children[0]]) > 0
        before = _counts_before(kept)
        num_above = len(self.first_child) - 1
        first_child = before[self.first_child[np.flatnonzero(kept[:num_above])]]
        parts = np.append(first_child, before[-1]), self.items[places], compact(before[ends])
        return PrefixIndex(self.vocabulary, self.tokens[kept[1:]], *(smallest(part) for part in parts))

    def _levels(self) -> list[tuple[int, int]]:
        """First node of each depth, and the end of that depth's nodes."""
        levels = [(self.root, self.root + 1)]
        while (below := tuple(self._boundary(np.array(levels[-1])).tolist()))[0] < below[1]:
            levels.append(below)
        return levels

    def _parents(self, nodes: np.ndarray) -> np.ndarray:
        # the last node whose children begin at or before this one; childless nodes before it begin there too
        return _search(self.first_child, nodes + 1) - 1

    @cached_property
    def _by_item(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.items, kind="stable")
        return order, self.items[order].astype(np.int64)


def _search(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    # searchsorted copies the whole array when the types differ
    return np.searchsorted(ascending, values.astype(ascending.dtype))


def _counts_before(counts: np.ndarray) -> np.ndarray:
    """Their sum before each place, and in all; of booleans how many hold."""
    return np.concatenate([[0], np.cumsum(counts)])


def _concatenated_ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (M + 1) of the ranges, and all their numbers one range after another."""
    lengths = end - first
    offsets = _counts_before(lengths)
    return offsets, np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
