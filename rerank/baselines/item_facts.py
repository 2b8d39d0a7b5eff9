"""Facts about the items of a catalogue beside who chose them."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

CATEGORY, WORD, BRAND = r"[^,;|>]+", r"\w+", r"(?s).+"  # parts of a text of categories, of a title, of a brand
BLOCK = 65_536  # items whose vectors are worked on together


@dataclass(frozen=True)
class ItemFacts:
    """Facts about items beside who chose them."""

    embeddings: np.ndarray  # (items, d) float16, L2-normalised; a zero row says nothing is known
    categories: csr_array  # (items, categories) 0/1
    words: csr_array  # (items, title words) 0/1
    brands: np.ndarray  # (items,) number of the brand, -1: none
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)  # feature -> (items,), nan where unknown
    _found: dict[str, tuple[csr_array, dict[str, int]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        num_items: int,
        embeddings: np.ndarray | None = None,
        categories: Sequence[str] | None = None,
        titles: Sequence[str] | None = None,
        brands: Sequence[str] | None = None,
        numbers: Mapping[str, np.ndarray] | None = None,
    ) -> ItemFacts:
        """Facts of a catalogue; what is not given is unknown for every item.

        Args:
            num_items: Size of the catalogue.
            embeddings: One row an item.
            categories: One text an item, its categories parted by `,`, `;`, `|` or `>`.
            titles: One text an item.
            brands: One text an item, empty where there is none.
            numbers: Further features by name, one number an item.
        """
        blank = [""] * num_items
        names = {name: number for number, name in enumerate(sorted(set(brands or ()) - {""}))}
        return cls(
            embeddings=_of_length_one(np.zeros((num_items, 1)) if embeddings is None else embeddings),
            categories=_memberships(categories or blank, CATEGORY)[0],
            words=_memberships(titles or blank, WORD)[0],
            brands=np.array([names.get(brand, -1) for brand in brands or blank], dtype=np.int64),
            numbers=dict(numbers or {}),
        )

    def extended(
        self,
        categories: Sequence[str],
        titles: Sequence[str],
        brands: Sequence[str] | None,
        embeddings: np.ndarray | None = None,
        numbers: Mapping[str, np.ndarray] | None = None,
    ) -> ItemFacts:
        """These facts, then those of more items; the vectors and numbers of these are left as they are.

        Args:
            categories, titles, brands: Of all items, as `of` takes them.
            embeddings: One row for each further item; None where nothing is known.
            numbers: One number for each further item, nan where unknown.
        """
        added = len(titles) - len(self.brands)
        more = ItemFacts.of(added, embeddings).embeddings
        if embeddings is None:
            more = np.zeros((added, self.embeddings.shape[1]), dtype=np.float16)
        if more.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"embeddings of new items have {more.shape[1]} columns but those of the known ones "
                f"{self.embeddings.shape[1]}; use the encoder of these"
            )
        unknown = np.full(added, np.nan)
        every = {name: np.append(values, (numbers or {}).get(name, unknown)) for name, values in self.numbers.items()}
        members = self._grown("categories", categories, CATEGORY), self._grown("words", titles, WORD)
        named = self._grown("brands", brands or [""] * len(titles), BRAND)
        numbers_of_brands = np.full(len(titles), -1, dtype=np.int64)
        numbers_of_brands[np.diff(named.indptr) > 0] = named.indices  # an item has one brand
        return ItemFacts(np.concatenate([self.embeddings, more]), *members, numbers_of_brands, every)

    def _grown(self, name: str, texts: Sequence[str], pattern: str) -> csr_array:
        """The memberships of all items; those of these are found once, however often they are extended."""
        known = len(self.brands)
        if name not in self._found:
            self._found[name] = _memberships(texts[:known], pattern)
        return _with_rows(*self._found[name], texts[known:], pattern)

    @property
    def has_embeddings(self) -> bool:
        """Whether the text of any item is known as a vector."""
        return bool(self.embeddings.any())

    def with_texts_of(self, items: np.ndarray) -> ItemFacts:
        """The facts of a catalogue whose item k has the text, category and brand of `items[k]`."""
        texts = self.embeddings[items], self.categories[items], self.words[items], self.brands[items]
        return ItemFacts(*texts, self.numbers)


def _of_length_one(vectors: np.ndarray) -> np.ndarray:
    """(items, d) float16 rows of length one, or of zeros."""
    found = np.empty(vectors.shape, dtype=np.float16)
    for start in range(0, len(vectors), BLOCK):
        part = np.asarray(vectors[start : start + BLOCK], dtype=np.float32)
        length = np.linalg.norm(part, axis=1, keepdims=True)
        found[start : start + BLOCK] = part / np.where(length > 0, length, 1)
    return found


def _memberships(texts: Sequence[str], pattern: str) -> tuple[csr_array, dict[str, int]]:
    """0/1 matrix of which parts each text has, and the column of each part."""
    numbers: dict[str, int] = {}  # in the order in which they come
    lengths, found = array("q"), array("q")
    for text in texts:
        parts = _parts(text, pattern)
        lengths.append(len(parts))
        found.extend(numbers.setdefault(part, len(numbers)) for part in parts)
    columns = {part: number for number, part in enumerate(sorted(numbers))}
    of_number = np.array([columns[part] for part in numbers], dtype=np.int64)
    places = of_number[np.array(found, dtype=np.int64)]
    rows = np.repeat(np.arange(len(texts)), np.array(lengths, dtype=np.int64))
    shape = (len(texts), max(len(columns), 1))
    return csr_array((np.ones(len(places), dtype=np.int64), (rows, places)), shape=shape), columns


def _parts(text: str, pattern: str) -> list[str]:
    return sorted({part.strip() for part in re.findall(pattern, text.lower() if pattern == WORD else text)} - {""})


def _with_rows(matrix: csr_array, columns: Mapping[str, int], texts: Sequence[str], pattern: str) -> csr_array:
    """A matrix of `_memberships` with the rows of further texts, whose new parts have columns behind the others."""
    every, parts = dict(columns), [_parts(text, pattern) for text in texts]
    places = [every.setdefault(part, len(every)) for found in parts for part in found]
    indptr = np.append(matrix.indptr, matrix.indptr[-1] + np.cumsum([len(found) for found in parts], dtype=np.int64))
    data = np.append(matrix.data, np.ones(len(places), dtype=matrix.dtype))
    shape = (matrix.shape[0] + len(texts), max(len(every), 1))
    return csr_array((data, np.append(matrix.indices, places).astype(np.int64), indptr), shape=shape)
