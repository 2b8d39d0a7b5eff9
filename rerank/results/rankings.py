"""From rankings to `results.json`: means, failures, paired intervals, end-to-end values.

R evaluated rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank.catalogue import Catalogue, shared
from rerank.metrics import METRICS, ZERO_METRICS, mean_random_metrics, ranking_metrics
from rerank.models.ranker import Answer
from rerank.prompts import FAILURES
from rerank.results.intervals import LEAVES_SEEDS_OUT, Sampling
from rerank.results.rankers import COMPARISONS, FittedOrders, Orders
from rerank.results.slices import SplitLists, measure
from rerank.rows import RankingRow, choose_rows, read_rows

SAMPLE_SEED = 0  # the same rows in every run, so that they can be compared
INTERVAL_METRICS = ("N@5", "R@1")
SLICED = "N@5"

Values = dict[str, np.ndarray]  # metric -> its value on each row, (R,)


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows that are ranked: those of a split whose list holds a relevant item.

    Attributes:
        split: `test` or `valid`.
        rows: By row_id.
        hit_share: Of all rows of the split, those whose list holds a relevant item.
        num_all: Rows of the split.
    """

    split: str
    rows: list[RankingRow]
    hit_share: float
    num_all: int

    @classmethod
    def load(cls, candidates_dir: Path, split: str, max_rows: int = 0) -> "EvaluatedRows":
        """The rows of a folder of the candidates stage, `max_rows` of them drawn at random; all for 0."""
        path = candidates_dir / f"{split}.parquet"
        hits, num_all = read_rows(path), pq.read_metadata(path).num_rows
        return cls(split, choose_rows(hits, max_rows, SAMPLE_SEED), len(hits) / num_all, num_all)

    @property
    def relevance(self) -> list[tuple[float, ...]]:
        """(R, N) grades in the input order."""
        return [row.relevance for row in self.rows]

    @property
    def users(self) -> np.ndarray:
        """(R,)."""
        return np.array([row.user for row in self.rows])


@dataclass(frozen=True)
class Ranking:
    """The orders of one ranker.

    Attributes:
        name: Of the ranker.
        orders: Positions into each row's candidates, best first, or None; None for an expectation over all orders.
        answers: Of a model that writes its ranking.
        seconds: That all rows took.
        of_fits: The orders of each fit alone, where `orders` are by the mean scores of several.
    """

    name: str
    orders: Sequence[list[int] | None] | None
    answers: list[Answer] | None = None
    seconds: float | None = None
    of_fits: Sequence[list[list[int]]] = ()

    @classmethod
    def of_baseline(cls, name: str, found: Orders | FittedOrders | None) -> "Ranking":
        """The ranking of a baseline."""
        if isinstance(found, FittedOrders):
            return cls(name, found.orders, of_fits=found.of_fits)
        return cls(name, found)

    @classmethod
    def of_answers(cls, name: str, answers: list[Answer], seconds: float) -> "Ranking":
        """The ranking that completions state."""
        return cls(name, [answer.order for answer in answers], answers, seconds)


def metrics_per_row(ranking: Ranking, relevance: Sequence[Sequence[float]], fallback: bool = False) -> Values:
    """Each metric's value on each row.

    Args:
        ranking: One order a row.
        relevance: (R, N) grades in the input order, at least one of each row above 0.
        fallback: Rank a row without an order by the input order, instead of giving it zero in every metric.
    """
    if ranking.orders is None:
        rows = [mean_random_metrics(gains) for gains in relevance]
    else:
        rows = [
            _row_metrics(list(range(len(gains))) if order is None and fallback else order, gains)
            for order, gains in zip(ranking.orders, relevance, strict=True)
        ]
    return {name: np.array([(row or ZERO_METRICS)[name] for row in rows]) for name in METRICS}


def _row_metrics(order: Sequence[int] | None, gains: Sequence[float]) -> dict[str, float] | None:
    return None if order is None else ranking_metrics([gains[position] for position in order])


def copy_rate(ranking: Ranking) -> float | None:
    """Share of the orders that are the input order; None without any."""
    orders = [order for order in ranking.orders or [] if order is not None]
    return float(np.mean([order == sorted(order) for order in orders])) if orders else None


def failure_counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Number and share of parse failures, in all and by kind."""
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


def summarize(ranking: Ranking, evaluated: EvaluatedRows, no_op: Values, sampling: Sampling) -> dict[str, Any]:
    """One row of the results; a value that does not apply to a ranker is None."""
    values = metrics_per_row(ranking, evaluated.relevance)
    row: dict[str, Any] = {name: float(values[name].mean()) for name in METRICS}
    for name in INTERVAL_METRICS:
        row[f"{name}_minus_no_op"], row[f"{name}_interval"] = sampling.difference(values[name], no_op[name])
    absent = ("parse_failures", "parse_failure_share", "parse_failure_kinds", "truncated", "tokens_per_row")
    return row | {
        "N@5_fallback": float(metrics_per_row(ranking, evaluated.relevance, fallback=True)["N@5"].mean()),
        "copy_rate": copy_rate(ranking),
        **(dict.fromkeys(absent) if ranking.answers is None else failure_counts(ranking.answers)),
        "seconds_per_row": None if ranking.seconds is None else ranking.seconds / len(evaluated.rows),
        "end_to_end": {name: row[name] * evaluated.hit_share for name in METRICS},
    }


def compare(first: Values, second: Values, sampling: Sampling) -> dict[str, Any]:
    """Paired differences of two rankers' values."""
    pairs = {name: sampling.difference(first[name], second[name]) for name in INTERVAL_METRICS}
    return {name: {"difference": pair[0], "interval": pair[1]} for name, pair in pairs.items()}


def make_results(rankings: Sequence[Ranking], evaluated: EvaluatedRows, num_bootstrap: int) -> dict[str, Any]:
    """The content of results.json.

    Args:
        rankings: In the order of the table, `no_op` among them.
        evaluated: The rows.
        num_bootstrap: Samples of an interval.
    """
    sampling = Sampling(evaluated.users, num_bootstrap)
    values = {ranking.name: metrics_per_row(ranking, evaluated.relevance) for ranking in rankings}
    return {
        "split": evaluated.split,
        "n": len(evaluated.rows),
        "n_all": evaluated.num_all,
        "hit_share": evaluated.hit_share,
        "intervals": f"95 %, {LEAVES_SEEDS_OUT}",
        "rows": {ranking.name: summarize(ranking, evaluated, values["no_op"], sampling) for ranking in rankings},
        "comparisons": {
            f"{first}_vs_{second}": compare(values[first], values[second], sampling)
            for first, second in COMPARISONS
            if first in values and second in values
        },
        "fits": {
            ranking.name: spread_of_fits(ranking, evaluated.relevance) for ranking in rankings if ranking.of_fits
        },
    }


def spread_of_fits(ranking: Ranking, relevance: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Number of the fits whose mean scores rank, and the standard deviation of N@5 among them."""
    alone = [metrics_per_row(Ranking(ranking.name, orders), relevance)["N@5"].mean() for orders in ranking.of_fits]
    return {"num": len(alone), "N@5_spread": float(np.std(alone, ddof=1))}


def difficulty(
    rankings: Sequence[Ranking], evaluated: EvaluatedRows, lists: SplitLists, num_bootstrap: int
) -> dict[str, Any]:
    """Further content of results.json: `lists`, the first stage's, and `slices`, each ranker's SLICED on them.

    Args:
        rankings: `no_op` among them.
        evaluated: The rows.
        lists: Of all rows of the split.
        num_bootstrap: Samples of an interval.
    """
    values = {ranking.name: metrics_per_row(ranking, evaluated.relevance)[SLICED] for ranking in rankings}
    members = lists.members([row.row_id for row in evaluated.rows])
    slices = {"metric": SLICED, "reference": "no_op", "n": {name: int(of.sum()) for name, of in members.items()}}
    found = measure(values, values["no_op"], members, evaluated.users, num_bootstrap)
    return {"lists": lists.summary(), "slices": {**slices, "rankers": found}}


def shared_ids(catalogue: Catalogue, rows: Sequence[RankingRow]) -> dict[str, int]:
    """Items of the catalogue that share their semantic id, and rows whose list shows two items of one id."""
    ids = catalogue.semantic_ids
    colliding = [any(shared([ids[item] for item in row.candidates])) for row in rows]
    return {"items": sum(shared(ids)), "rows": sum(colliding)}
