"""Ranking metrics: pure functions of numbers, used by rewards and by the evaluation alike.

`grades` always means the relevance of each item of one ranking, best-ranked first: 0 for what is not relevant, then 1,
2 ... A NaN is an item that nobody has judged (a candidate that was not seen): every function leaves it out before it
computes anything, so that the items behind it move up (condensed lists; Sakai 2007, SIGIR). A ranking without a
relevant item has no metric (None): whether it is left out (hit-only) or counts as zero (end-to-end) is for the caller
to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from math import comb

import numpy as np

METRICS = ("R@1", "R@5", "N@5", "N@10", "MRR")  # by default
ZERO_METRICS = dict.fromkeys(METRICS, 0.0)  # what a parse failure earns, and a missed list end to end
_NAME = re.compile(r"(?P<kind>[RN])@(?P<cut>[1-9]\d*)|MRR|AUC")

Grades = Sequence[float] | np.ndarray


@cache
def parse_metric(name: str) -> tuple[str, int]:
    """Kind of a metric (R, N, MRR or AUC) and its cut-off, 0 for one without.

    Raises:
        ValueError: For another name than R@k, N@k (k from 1), MRR and AUC.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no metric; write R@k (recall), N@k (NDCG), such as N@10, MRR or AUC")
    return found["kind"] or name, int(found["cut"] or 0)


def first_of(kind: str, names: Sequence[str]) -> str:
    """The first metric of a kind.

    Raises:
        ValueError: When there is none.
    """
    found = next((name for name in names if parse_metric(name)[0] == kind), None)
    if found is None:
        raise ValueError(f"metrics is {', '.join(names) or 'empty'}, without any {kind}@k; add one, such as {kind}@5")
    return found


def compared(names: Sequence[str]) -> tuple[str, str]:
    """The metrics that get intervals and comparisons: the first N@k, which slices and orders use too, and R@k.

    Raises:
        ValueError: When there is none, when a name is no metric, or stands twice.
    """
    found = first_of("N", names), first_of("R", names)
    for place, name in enumerate(names):
        parse_metric(name)
        if name in names[:place]:
            raise ValueError(f"metrics is {', '.join(names)}, with {name} twice; leave one out")
    return found


def best_first(scores: Grades) -> list[int]:
    """Positions by falling score; ties keep their order, NaN come last."""
    order: list[int] = np.argsort(-np.asarray(scores, dtype=float), kind="stable").tolist()
    return order


def judged(grades: Grades) -> np.ndarray:
    """The grades without NaN."""
    values = np.asarray(grades, dtype=float)
    return values[~np.isnan(values)]


def judged_order(order: Sequence[int], grades: Grades) -> list[int]:
    """A ranking (positions, best first) without the candidates that nobody has judged.

    Args:
        order: Positions into `grades`.
        grades: Of the candidates, in the order shown.
    """
    return [place for place in order if grades[place] == grades[place]]  # only NaN differs from itself


def has_pairs(grades: Grades) -> bool:
    """Whether an item is relevant and another, judged one is not, so that rankings differ in every metric."""
    values = judged(grades)
    return bool((values > 0).any() and (values <= 0).any())


def gains_of(grades: Grades) -> np.ndarray:
    """The gain 2^g - 1 of each grade g; NaN stays.

    Source: Burges et al. 2005, ICML; the NDCG of GR2's technical report, arXiv:2606.31984.
    """
    return np.asarray(np.exp2(np.asarray(grades, dtype=float)) - 1)


@cache
def _discounts(num_items: int) -> np.ndarray:
    return 1.0 / np.log2(np.arange(2, num_items + 2))


def ndcg_at_k(grades: Grades, k: int) -> float | None:
    """NDCG@k of one ranking, with gain `gains_of` and discount log2(rank + 1).

    Args:
        grades: Grade of each item, best-ranked first, not negative.
        k: Cut-off, at least 1.

    Returns:
        A value in [0, 1], or None when nothing is relevant.

    Source: Järvelin & Kekäläinen 2002.
    """
    gains = gains_of(judged(grades))
    discounts = _discounts(len(gains))[:k]
    ideal = np.sort(gains)[::-1][:k] @ discounts
    return float(gains[:k] @ discounts / ideal) if ideal > 0 else None


def recall_at_k(grades: Grades, k: int) -> float | None:
    """Share of the relevant items that stand in the first k, or None when nothing is relevant."""
    relevant = judged(grades) > 0
    return float(relevant[:k].sum() / relevant.sum()) if relevant.any() else None


def reciprocal_rank(grades: Grades) -> float | None:
    """1 / rank of the first relevant item, or None when nothing is relevant."""
    relevant = judged(grades) > 0
    return float(1.0 / (relevant.argmax() + 1)) if relevant.any() else None


def auc(grades: Grades) -> float | None:
    """Share of the (relevant, irrelevant) pairs of one ranking in which the relevant item stands higher.

    Returns:
        A value in [0, 1], or None when nothing or everything is relevant.

    Source: GR2 technical report, arXiv:2606.31984, eq. 5.
    """
    num_relevant, num_irrelevant, wrong_pairs = 0, 0, 0  # plain numbers: a ranking is too short for arrays to be fast
    for grade in grades:
        if grade > 0:
            num_relevant += 1
            wrong_pairs += num_irrelevant
        elif not math.isnan(grade):
            num_irrelevant += 1
    num_pairs = num_irrelevant * num_relevant
    return 1 - wrong_pairs / num_pairs if num_pairs else None


def metric_value(name: str, grades: Grades) -> float | None:
    """The metric of this name of one ranking, None where it has none."""
    kind, cut = parse_metric(name)
    if kind in ("R", "N"):
        return (recall_at_k if kind == "R" else ndcg_at_k)(grades, cut)
    return (reciprocal_rank if kind == "MRR" else auc)(grades)


def ranking_metrics(grades: Grades, names: Sequence[str] = METRICS) -> dict[str, float] | None:
    """Metrics of one ranking by name, or None when nothing is relevant; for AUC also when everything is."""
    values = judged(grades)
    found = {name: value for name in names if (value := metric_value(name, values)) is not None}
    return found if len(found) == len(names) else None


def mean_random_metrics(grades: Grades, names: Sequence[str] = METRICS) -> dict[str, float] | None:
    """Exact expectation of `ranking_metrics` over all orders of these items, None where that is None.

    Each item stands at each rank equally often, so E[DCG@k] is the mean gain times the sum of the discounts and
    E[R@k] = k / n; each of two items stands higher equally often, so E[AUC] = 1/2. With m relevant of n items the
    first stands at rank r with chance C(n - r, m - 1) / C(n, m).
    """
    values = judged(grades)
    if ranking_metrics(values, names) is None:
        return None
    return {name: _mean_random(*parse_metric(name), values) for name in names}


def _mean_random(kind: str, cut: int, grades: np.ndarray) -> float:
    num_items, num_relevant = len(grades), int((grades > 0).sum())
    if kind == "R":
        return min(cut, num_items) / num_items
    if kind == "AUC":
        return 0.5
    if kind == "MRR":
        first = [comb(num_items - rank, num_relevant - 1) / rank for rank in range(1, num_items + 1)]
        return sum(first) / comb(num_items, num_relevant)
    gains, discounts = gains_of(grades), _discounts(num_items)[:cut]
    return float(gains.mean() * discounts.sum() / (np.sort(gains)[::-1][:cut] @ discounts))


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
