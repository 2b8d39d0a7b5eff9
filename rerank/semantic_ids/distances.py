"""Distances between vectors and codes."""

import numpy as np


def nearest(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Index of the nearest row of `codebook` for each vector; the lower index on ties."""
    # ||v - e||² without ||v||², which is the same for every code
    return ((codebook**2).sum(axis=1) - 2 * vectors @ codebook.T).argmin(axis=1)


def squared_distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """||v - e||² for every vector and code."""
    return (vectors**2).sum(axis=1, keepdims=True) + (codebook**2).sum(axis=1) - 2 * vectors @ codebook.T
