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
from rerank.metrics import METRICS, compared, has_pairs, judged, mean_random_metrics, ranking_metrics
from rerank.models.ranker import Answer
from rerank.prompts import FAILURES
from rerank.results.intervals import Sampling, holds
from rerank.results.rankers import COMPARISONS, FittedOrders, Orders
from rerank.results.slices import SplitLists, measure
from rerank.rows import RankingRow, choose_rows, read_rows

SAMPLE_SEED = 0  # the same rows in every run, so that they can be compared

Values = dict[str, np.ndarray]  # metric -> its value on each row, (R,)


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows that are ranked: those of a split whose list holds a relevant item and a judged one that is not.

    Attributes:
        split: `test` or `valid`.
        rows: By row_id.
        num_hits: Such rows of the split, of which `rows` may be a sample.
        num_all: Rows of the split.
        num_all_relevant: Those whose judged candidates are all relevant; they are left out, end to end too.
        metrics: Names of the metrics, an N@k and an R@k among them.
    """

    split: str
    rows: list[RankingRow]
    num_hits: int
    num_all: int
    num_all_relevant: int = 0
    metrics: tuple[str, ...] = METRICS

    @classmethod
    def load(
        cls, candidates_dir: Path, split: str, max_rows: int = 0, metrics: Sequence[str] = METRICS
    ) -> "EvaluatedRows":
        """The rows of a folder of the candidates stage, `max_rows` of them drawn at random; all for 0."""
        path = candidates_dir / f"{split}.parquet"
        hits = [row for row in read_rows(path) if has_pairs(row.relevance)]
        grades = [judged(of_row) for of_row in pq.read_table(path, columns=["relevance"])["relevance"].to_pylist()]
        num_all, all_relevant = len(grades), sum(bool(len(of_row) and (of_row > 0).all()) for of_row in grades)
        if not hits:
            raise ValueError(
                f"{path}: none of its {num_all} rows lists both a relevant item and another one that was seen; "
                "use longer lists"
            )
        rows = choose_rows(hits, max_rows, SAMPLE_SEED)
        return cls(split, rows, len(hits), num_all, all_relevant, tuple(metrics))

    @property
    def num_end_to_end(self) -> int:
        """Rows of the split that count end to end."""
        return self.num_all - self.num_all_relevant

    @property
    def hit_share(self) -> float:
        """Share of the hits among the rows that count end to end."""
        return self.num_hits / self.num_end_to_end

    @property
    def list_recall(self) -> float:
        """Share of the rows of the split whose list holds a relevant item."""
        return (self.num_hits + self.num_all_relevant) / self.num_all

    @property
    def compared(self) -> tuple[str, str]:
        """The N@k and the R@k that get intervals."""
        return compared(self.metrics)

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


def metrics_per_row(
    ranking: Ranking,
    relevance: Sequence[Sequence[float]],
    fallback: bool = False,
    metrics: Sequence[str] = METRICS,
) -> Values:
    """Each metric's value on each row.

    Args:
        ranking: One order a row.
        relevance: (R, N) grades in the input order, of each row one above 0; NaN for a candidate that was not seen.
        fallback: Rank a row without an order by the input order, instead of giving it zero in every metric.
        metrics: Names.

    Raises:
        ValueError: When a row has no such metric.
    """
    if ranking.orders is None:
        rows = [mean_random_metrics(grades, metrics) for grades in relevance]
    else:
        rows = [
            _row_metrics(list(range(len(grades))) if order is None and fallback else order, grades, metrics)
            for order, grades in zip(ranking.orders, relevance, strict=True)
        ]
    if None in rows:
        place = rows.index(None)
        raise ValueError(f"row {place} of {len(rows)} has grades {list(relevance[place])}, and not all of "
                         f"{', '.join(metrics)}; leave it out")  # fmt: skip
    return {name: np.array([row[name] for row in rows if row is not None]) for name in metrics}


def _row_metrics(
    order: Sequence[int] | None, grades: Sequence[float], metrics: Sequence[str]
) -> dict[str, float] | None:
    return dict.fromkeys(metrics, 0.0) if order is None else ranking_metrics([grades[p] for p in order], metrics)


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


def values_of(rankings: Sequence[Ranking], evaluated: EvaluatedRows) -> dict[str, Values]:
    """Each ranker's metrics on each row."""
    relevance, metrics = evaluated.relevance, evaluated.metrics
    return {ranking.name: metrics_per_row(ranking, relevance, metrics=metrics) for ranking in rankings}


def summarize(
    ranking: Ranking, evaluated: EvaluatedRows, values: Values, no_op: Values, sampling: Sampling
) -> dict[str, Any]:
    """One row of the results; a value that does not apply to a ranker is None."""
    metrics, main = evaluated.metrics, evaluated.compared[0]
    row: dict[str, Any] = {name: float(values[name].mean()) for name in metrics}
    for name in evaluated.compared:
        row[f"{name}_minus_no_op"], row[f"{name}_interval"] = sampling.difference(values[name], no_op[name])
    absent = ("parse_failures", "parse_failure_share", "parse_failure_kinds", "truncated", "tokens_per_row")
    with_fallback = metrics_per_row(ranking, evaluated.relevance, fallback=True, metrics=[main])
    return row | {
        f"{main}_fallback": float(with_fallback[main].mean()),
        "copy_rate": copy_rate(ranking),
        **(dict.fromkeys(absent) if ranking.answers is None else failure_counts(ranking.answers)),
        "seconds_per_row": None if ranking.seconds is None else ranking.seconds / len(evaluated.rows),
        "end_to_end": {name: row[name] * evaluated.hit_share for name in metrics},
    }


def compare(first: Values, second: Values, metrics: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    """Paired differences of two rankers' values."""
    pairs = {name: sampling.difference(first[name], second[name]) for name in metrics}
    return {name: {"difference": pair[0], "interval": pair[1]} for name, pair in pairs.items()}


def make_results(rankings: Sequence[Ranking], evaluated: EvaluatedRows, num_bootstrap: int) -> dict[str, Any]:
    """The content of results.json.

    Args:
        rankings: In the order of the table, `no_op` among them.
        evaluated: The rows.
        num_bootstrap: Samples of an interval.
    """
    sampling, values = Sampling(evaluated.users, num_bootstrap), values_of(rankings, evaluated)
    return {
        "split": evaluated.split,
        "metrics": list(evaluated.metrics),
        "n": len(evaluated.rows),
        "n_all": evaluated.num_all,
        "n_all_relevant": evaluated.num_all_relevant,
        "n_without_relevant": evaluated.num_end_to_end - evaluated.num_hits,
        "hit_share": evaluated.hit_share,
        "list_recall": evaluated.list_recall,
        "intervals": holds(1),
        "rows": {
            ranking.name: summarize(ranking, evaluated, values[ranking.name], values["no_op"], sampling)
            for ranking in rankings
        },
        "comparisons": {
            f"{first}_vs_{second}": compare(values[first], values[second], evaluated.compared, sampling)
            for first, second in COMPARISONS
            if first in values and second in values
        },
        "fits": {ranking.name: spread_of_fits(ranking, evaluated) for ranking in rankings if ranking.of_fits},
    }


def spread_of_fits(ranking: Ranking, evaluated: EvaluatedRows) -> dict[str, Any]:
    """Number of the fits whose mean scores rank, and the standard deviation of the first N@k among them."""
    main, alone = evaluated.compared[0], []
    for orders in ranking.of_fits:
        of_fit = metrics_per_row(Ranking(ranking.name, orders), evaluated.relevance, metrics=[main])
        alone.append(of_fit[main].mean())
    return {"num": len(alone), f"{main}_spread": float(np.std(alone, ddof=1))}


def difficulty(
    rankings: Sequence[Ranking], evaluated: EvaluatedRows, lists: SplitLists, num_bootstrap: int
) -> dict[str, Any]:
    """Further content of results.json: `lists`, the first stage's, and `slices`, each ranker's first N@k on them.

    Args:
        rankings: `no_op` among them.
        evaluated: The rows.
        lists: Of all rows of the split.
        num_bootstrap: Samples of an interval.
    """
    metric = evaluated.compared[0]
    relevance = evaluated.relevance
    values = {one.name: metrics_per_row(one, relevance, metrics=[metric])[metric] for one in rankings}
    members = lists.members([row.row_id for row in evaluated.rows])
    slices = {"metric": metric, "reference": "no_op", "n": {name: int(of.sum()) for name, of in members.items()}}
    slices |= {"columns": lists.slices.columns} if lists.slices.columns else {}
    found = measure(values, values["no_op"], members, evaluated.users, num_bootstrap)
    return {"lists": lists.summary(), "slices": {**slices, "rankers": found}}


def shared_ids(catalogue: Catalogue, rows: Sequence[RankingRow]) -> dict[str, int]:
    """Items of the catalogue that share their semantic id, and rows whose list shows two items of one id."""
    ids = catalogue.semantic_ids
    colliding = [any(shared([ids[item] for item in row.candidates])) for row in rows]
    return {"items": sum(shared(ids)), "rows": sum(colliding)}
