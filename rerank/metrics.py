"""Ranking metrics: pure functions of numbers, used by rewards and by the evaluation alike.

`gains` always means the relevance of each item of one ranking, best-ranked first. A ranking without a relevant item
has no metric (None): whether it is left out (hit-only) or counts as zero (end-to-end) is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import comb

import numpy as np

METRICS = ("R@1", "R@5", "N@5", "N@10", "MRR")
ZERO_METRICS = dict.fromkeys(METRICS, 0.0)  # what a parse failure earns, and a missed list end to end


def best_first(scores: Sequence[float] | np.ndarray) -> list[int]:
    """Positions by falling score; ties keep their order."""
    order: list[int] = np.argsort(-np.asarray(scores), kind="stable").tolist()
    return order


def judged(order: Sequence[int], grades: Sequence[float]) -> list[int]:
    """A ranking (positions, best first) without the candidates that were not seen.

    Args:
        order: Positions into `grades`.
        grades: Of the candidates, NaN for those not seen.
    """
    return [place for place in order if grades[place] == grades[place]]  # only NaN differs from itself


def _seen(gains: Sequence[float]) -> np.ndarray:
    values = np.asarray(gains, dtype=float)
    return np.asarray(values[~np.isnan(values)])


@cache
def _discounts(num_items: int) -> np.ndarray:
    return 1.0 / np.log2(np.arange(2, num_items + 2))


def ndcg_at_k(gains: Sequence[float], k: int) -> float | None:
    """NDCG@k of one ranking, with gain 2^grade - 1.

    Args:
        gains: Grade of each item, best-ranked first, not negative; NaN for one that was not seen, which is left out.
        k: Cut-off, at least 1.

    Returns:
        A value in [0, 1], or None when nothing is relevant.

    Source: Järvelin & Kekäläinen 2002, with discount log2(rank + 1).
    """
    values = 2.0 ** _seen(gains) - 1
    discounts = _discounts(len(values))[:k]
    ideal = np.sort(values)[::-1][:k] @ discounts
    return float(values[:k] @ discounts / ideal) if ideal > 0 else None


def recall_at_k(gains: Sequence[float], k: int) -> float | None:
    """Share of the relevant items that stand in the first k, or None when nothing is relevant."""
    relevant = _seen(gains) > 0
    return float(relevant[:k].sum() / relevant.sum()) if relevant.any() else None


def reciprocal_rank(gains: Sequence[float]) -> float | None:
    """1 / rank of the first relevant item, or None when nothing is relevant."""
    relevant = _seen(gains) > 0
    return float(1.0 / (relevant.argmax() + 1)) if relevant.any() else None


def auc(gains: Sequence[float]) -> float | None:
    """Share of the (relevant, irrelevant) pairs of one ranking in which the relevant item stands higher.

    Returns:
        A value in [0, 1], or None when nothing or everything is relevant.

    Source: GR2 technical report, arXiv:2606.31984, eq. 5.
    """
    num_irrelevant, wrong_pairs = 0, 0  # plain numbers: a ranking is too short for arrays to be fast
    seen = _seen(gains).tolist()
    for gain in seen:
        num_irrelevant += gain <= 0
        wrong_pairs += num_irrelevant * (gain > 0)
    num_pairs = num_irrelevant * (len(seen) - num_irrelevant)
    return 1 - wrong_pairs / num_pairs if num_pairs else None


def ranking_metrics(gains: Sequence[float]) -> dict[str, float] | None:
    """R@1, R@5, N@5, N@10 and MRR of one ranking, or None when nothing is relevant."""
    if not any(gain > 0 for gain in gains):
        return None
    recalls, ndcg = [recall_at_k(gains, k) for k in (1, 5)], [ndcg_at_k(gains, k) for k in (5, 10)]
    values = (*recalls, *ndcg, reciprocal_rank(gains))
    return {name: value for name, value in zip(METRICS, values, strict=True) if value is not None}


def mean_random_metrics(gains: Sequence[float]) -> dict[str, float] | None:
    """Exact expectation of `ranking_metrics` over all orders of these items, or None when nothing is relevant.

    Each item stands at each rank equally often, so E[DCG@k] is the mean gain times the sum of the discounts and
    E[R@k] = k / n. With m relevant of n items the first stands at rank r with chance C(n - r, m - 1) / C(n, m).
    """
    values = 2.0 ** _seen(gains) - 1
    num_items, num_relevant = len(values), int((values > 0).sum())
    if not num_relevant:
        return None
    discounts, ideal = _discounts(num_items), np.sort(values)[::-1]
    ndcg = [float(values.mean() * discounts[:k].sum() / (ideal[:k] @ discounts[:k])) for k in (5, 10)]
    first = [comb(num_items - rank, num_relevant - 1) / rank for rank in range(1, num_items + 1)]
    recalls = [min(k, num_items) / num_items for k in (1, 5)]
    return dict(zip(METRICS, (*recalls, *ndcg, sum(first) / comb(num_items, num_relevant)), strict=True))


def kendall_tau(order: Sequence[int]) -> float:
    """`kendall_taus` of one ranking."""
    return float(kendall_taus(np.array([order]))[0])


def kendall_taus(orders: np.ndarray) -> np.ndarray:
    """Kendall's tau between each ranking and the input order: 1 for a copy, -1 for the reverse.

    Args:
        orders: (rankings, N) input positions without ties, best-ranked first. Fewer than two items are a copy.
    """
    length = orders.shape[1]
    if length < 2:
        return np.ones(len(orders))
    signs = [np.sign(orders[:, i + 1 :] - orders[:, [i]]).sum(axis=1) for i in range(length - 1)]
    return np.asarray(np.sum(signs, axis=0) / (length * (length - 1) / 2))


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]], constant: int = 60) -> list[int]:
    """One ranking of rankings of the same N items: by the sum of 1 / (constant + rank), ties by number of the item.

    Args:
        rankings: At least one, each of the numbers 0 to N - 1, best-ranked first.
        constant: Lowers the weight of the first ranks.

    Source: Cormack, Clarke & Büttcher 2009, SIGIR, with their constant.
    """
    ranks = np.argsort(np.asarray(rankings), axis=1) + 1  # (rankings, N) rank of each item
    return best_first((1.0 / (constant + ranks)).sum(axis=0).round(12))  # sums of the same terms in any order tie
