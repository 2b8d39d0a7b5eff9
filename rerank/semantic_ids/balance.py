"""Codes of the last levels spread evenly over the items of a prefix, by Sinkhorn's algorithm.

Letters of shapes: N items, n items under one prefix, L levels, C codes per level.
"""

import numpy as np
from scipy.special import logsumexp

from rerank.semantic_ids.distances import squared_distances
from rerank.semantic_ids.prefixes import members, number_prefixes
from rerank.semantic_ids.tokenizer import Latents, quantize, residuals

TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # in units of the typical gap between an item's two nearest codes
SWEEPS = 30  # at each temperature


def balance(codes: np.ndarray, latents: np.ndarray | Latents, codebooks: np.ndarray, num_levels: int) -> np.ndarray:
    """Codes (N, L) of which, on each of the last `num_levels`, a prefix gives none to more than ceil(n / C) items.

    On the last level this mostly means an id of one's own. Items that nobody crowds keep their nearest codes. Equal
    latents stay together: no deterministic rule can part them.

    Source: the uniform semantic mapping of LC-Rec (arXiv:2311.09049) section 3.1, which demands equal use of all
    codes on the last level. Chosen here: at most ceil(n / C) instead of equal use, which few items cannot give to 256
    codes and which costs reconstruction; all items of a prefix at once instead of a training batch.
    """
    codes, (levels, size) = codes.copy(), codebooks.shape[:2]
    for level in range(levels - num_levels, levels):
        for items in _crowded(codes, level, size):
            rest = residuals(latents, codes, codebooks, items, level)
            chosen = sinkhorn(squared_distances(rest, codebooks[level]), -(-len(items) // size))
            moved = chosen != codes[items, level]
            codes[items, level] = chosen
            rest = rest[moved] - codebooks[level][chosen[moved]]
            codes[items[moved], level + 1 :] = quantize(rest, codebooks[level + 1 :])
    return codes


def _crowded(codes: np.ndarray, level: int, size: int) -> list[np.ndarray]:
    """The items under each prefix above `level` that has a code with more than ceil(n / C) of its n items."""
    parents, prefixes = number_prefixes(codes, level), number_prefixes(codes, level + 1)
    room = -(-np.bincount(parents) // size)
    crowded = np.bincount(prefixes)[prefixes] > room[parents]
    return members(parents, np.unique(parents[crowded]))


def sinkhorn(costs: np.ndarray, room: int) -> np.ndarray:
    """A code (n,) for each item, cheap in all by costs (n, C), and none for more than `room` items of unequal costs.

    Entropic optimal transport in the logarithmic domain (Cuturi, arXiv:1306.0895) with rows that sum to one and
    columns that sum to at most `room`: crowded codes get a price, each item takes what is cheapest with it.
    """
    nearest_two = np.partition(costs, 1, axis=1)[:, :2]
    gap = max(float((nearest_two[:, 1] - nearest_two[:, 0]).mean()), 1e-12)
    prices = np.zeros(costs.shape[1])
    chosen = costs.argmin(axis=1)
    for temperature in gap * np.array(TEMPERATURES):
        for _ in range(SWEEPS):
            if np.bincount(chosen).max() <= room:
                return chosen
            scores = -(costs + prices) / temperature
            shares = scores - logsumexp(scores, axis=1, keepdims=True)
            prices = np.maximum(prices + temperature * (logsumexp(shares, axis=0) - np.log(room)), 0)
            chosen = (costs + prices).argmin(axis=1)
    return chosen
