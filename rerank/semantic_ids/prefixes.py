"""Which items share the first codes of their ids. Letters of shapes: N items, L levels, C codes per level."""

import numpy as np


def number_prefixes(codes: np.ndarray, depth: int) -> np.ndarray:
    """A number (N,) from 0 on that rows of codes (N, L) share when their first `depth` codes are equal.

    Numbers follow the order of the prefixes.
    """
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level in codes[:, :depth].T:  # level by level: C^L may overflow, N times C does not
        numbers = np.unique(numbers * (level.max(initial=0) + 1) + level, return_inverse=True)[1].ravel()
    return numbers


def members(numbers: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """The rows that bear each wanted number, ascending."""
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], wanted)
    ends = np.searchsorted(numbers[order], wanted, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]
