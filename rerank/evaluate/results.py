"""From rankings to `results.json`: means, failures, paired intervals, end-to-end values. Pure functions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.evaluate.generation import Answer
from rerank.metrics import METRICS, ZERO_METRICS, mean_random_metrics, paired_interval, ranking_metrics
from rerank.prompts import FAILURES

# Every ranker a table can hold, in its order.
RANKERS: dict[str, str] = {
    "no_op": "input order, as the first stage gave it",
    "random": "expected value over all orders",
    "oracle": "relevant items first: what no ranker can exceed",
    "transitions": "counts of who follows whom in the training sequences",
    "lambdamart": "boosted trees over the same evidence",
    "midtrained": "likelihood of each candidate under the mid-trained model",
    "sft": "fine-tuned on accepted traces",
    "sft_no_trace": "fine-tuned on the same rows and steps without a trace",
    "dapo": "fine-tuned, then reinforced",
}
LANGUAGE_MODELS = ("midtrained", "sft", "sft_no_trace", "dapo")
COMPARISONS = (("dapo", "sft"), ("sft", "sft_no_trace"), ("dapo", "lambdamart"))
INTERVAL_METRICS = ("N@5", "R@1")


@dataclass(frozen=True)
class Ranking:
    """What one ranker did with every row: an order (positions into the candidates, best first) or None."""

    name: str
    orders: list[list[int] | None] | None  # None for the random ranker, which is an expectation
    answers: list[Answer] | None = None  # of a model that writes its ranking
    seconds: float | None = None

    @classmethod
    def of_answers(cls, name: str, answers: list[Answer], seconds: float) -> "Ranking":
        """The ranking that completions state."""
        return cls(name, [answer.order for answer in answers], answers, seconds)


@dataclass(frozen=True)
class Sampling:
    """How intervals are drawn."""

    users: Sequence[int]
    num_samples: int
    seed: int

    def difference(self, values: np.ndarray, baseline: np.ndarray) -> tuple[float, list[float]]:
        """Mean paired difference and its 95 % interval."""
        mean, low, high = paired_interval(values, baseline, self.users, self.num_samples, self.seed)
        return mean, [low, high]


def metrics_per_row(ranking: Ranking, relevance: Sequence[Sequence[float]], fallback: bool = False) -> dict:
    """Each metric's value on each row, (rows,).

    Args:
        ranking: One order a row.
        relevance: Of each row's candidates in the input order, at least one of them relevant.
        fallback: Rank a row without an order by the input order, instead of giving it zero in every metric.
    """
    if ranking.orders is None:
        rows = [mean_random_metrics(gains) for gains in relevance]
    else:
        rows = [
            _row_metrics(list(range(len(gains))) if order is None and fallback else order, gains)
            for order, gains in zip(ranking.orders, relevance, strict=True)
        ]
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


def _row_metrics(order: Sequence[int] | None, gains: Sequence[float]) -> Mapping[str, float]:
    return ZERO_METRICS if order is None else ranking_metrics([gains[position] for position in order])


def copy_rate(ranking: Ranking) -> float | None:
    """Share of the orders that are the input order; None without any."""
    orders = [order for order in ranking.orders or [] if order is not None]
    return float(np.mean([order == sorted(order) for order in orders])) if orders else None


def failure_counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Parse failures: how many, their share, and both by kind."""
    kinds = Counter(answer.failure for answer in answers if answer.failure is not None)
    return {
        "parse_failures": kinds.total(),
        "parse_failure_share": kinds.total() / len(answers),
        "parse_failure_kinds": {
            kind: {"count": kinds[kind], "share": kinds[kind] / len(answers)} for kind in FAILURES if kinds[kind]
        },
        "truncated": sum(answer.truncated for answer in answers),
        "tokens_per_row": float(np.mean([answer.num_tokens for answer in answers])),
    }


def summarize(
    ranking: Ranking, relevance: Sequence[Sequence[float]], no_op: dict, hit_share: float, sampling: Sampling
) -> dict[str, Any]:
    """One row of the results; a value that does not apply to a ranker is None."""
    values = metrics_per_row(ranking, relevance)
    row: dict[str, Any] = {name: float(values[name].mean()) for name in METRICS}
    for name in INTERVAL_METRICS:
        row[f"{name}_minus_no_op"], row[f"{name}_interval"] = sampling.difference(values[name], no_op[name])
    absent = ("parse_failures", "parse_failure_share", "parse_failure_kinds", "truncated", "tokens_per_row")
    return row | {
        "N@5_fallback": float(metrics_per_row(ranking, relevance, fallback=True)["N@5"].mean()),
        "copy_rate": copy_rate(ranking),
        **(dict.fromkeys(absent) if ranking.answers is None else failure_counts(ranking.answers)),
        "seconds_per_row": None if ranking.seconds is None else ranking.seconds / len(relevance),
        "end_to_end": {name: row[name] * hit_share for name in METRICS},
    }


def compare(first: dict, second: dict, sampling: Sampling) -> dict[str, Any]:
    """Paired differences of two rankers' values per row."""
    found = {}
    for name in INTERVAL_METRICS:
        difference, interval = sampling.difference(first[name], second[name])
        found[name] = {"difference": difference, "interval": interval}
    return found


def make_results(
    rankings: Sequence[Ranking],
    relevance: Sequence[Sequence[float]],
    split: str,
    hit_share: float,
    num_all: int,
    sampling: Sampling,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        rankings: The rankers, `no_op` among them.
        relevance: Of the rows' candidates, in the input order.
        split: Which rows these are.
        hit_share: Share of all rows of the split whose list holds a relevant item.
        num_all: All rows of the split.
        sampling: How intervals are drawn.
    """
    values = {ranking.name: metrics_per_row(ranking, relevance) for ranking in rankings}
    rows = {r.name: summarize(r, relevance, values["no_op"], hit_share, sampling) for r in rankings}
    pairs = [(first, second) for first, second in COMPARISONS if first in values and second in values]
    return {
        "split": split,
        "n": len(relevance),
        "n_all": num_all,
        "hit_share": hit_share,
        "intervals": "95 %, paired bootstrap of the difference to no_op, whole users drawn",
        "rows": {name: rows[name] for name in RANKERS if name in rows},
        "comparisons": {
            f"{first}_vs_{second}": compare(values[first], values[second], sampling) for first, second in pairs
        },
    }
