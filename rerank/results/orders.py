"""Order robustness: the same rows ranked again with their candidates shown in other orders.

A candidate keeps its facts when it moves, its place in the first stage's list among them, so that a ranker which
reads the candidates ranks alike. K orders of S rows.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rerank.metrics import METRICS, compared, reciprocal_rank_fusion
from rerank.results.intervals import Sampling
from rerank.results.rankings import Ranking, metrics_per_row
from rerank.rollouts.metrics import agreement
from rerank.rows import RankingRow, choose_rows, shuffle

MAX_ROWS = 500  # of the evaluated rows: four orders of them cost about as much as two evaluations of 1,000 rows
SEED = 0  # the same rows and orders for every ranker and run
TABLE = pa.schema(
    [("row_id", pa.int64()), ("user", pa.int64()), ("ranker", pa.string()), ("number", pa.int64())]
    # positions into the row's candidates: as shown, and as ranked, best first, null for no ranking
    + [("shown", pa.list_(pa.int64())), ("order", pa.list_(pa.int64()))]
)

Order = list[int] | None  # positions into a row's candidates, best first; None for no ranking


@dataclass(frozen=True)
class ShuffledRows:
    """Rows, and the same rows with their candidates in other orders.

    Attributes:
        places: (S,) of the rows among those evaluated.
        rows: (S,) as given.
        shown: K lists of the S rows, each with other orders.
    """

    places: list[int]
    rows: list[RankingRow]
    shown: list[list[RankingRow]]

    @classmethod
    def of(cls, rows: Sequence[RankingRow], num_orders: int) -> "ShuffledRows":
        """At most MAX_ROWS of the rows, drawn at random, in `num_orders` random orders."""
        places = choose_rows(range(len(rows)), MAX_ROWS, SEED)
        chosen = [rows[place] for place in places]
        orders = range(1, num_orders + 1)
        return cls(places, chosen, [[shuffle(row, SEED, number) for row in chosen] for number in orders])

    @property
    def all_shown(self) -> list[RankingRow]:
        """The K * S rows to rank, order by order."""
        return [row for rows in self.shown for row in rows]

    def as_given(self, orders: Sequence[Order]) -> list[list[Order]]:
        """Rankings of `all_shown` as K lists of S, with positions into the candidates of the rows as given."""
        size, found = len(self.rows), []
        for number, shown in enumerate(self.shown):
            of_order = orders[number * size : (number + 1) * size]
            found.append([self._placed(*one) for one in zip(self.rows, shown, of_order, strict=True)])
        return found

    @staticmethod
    def _placed(row: RankingRow, shown: RankingRow, order: Order) -> Order:
        if order is None:
            return None
        place_of = {rank: place for place, rank in enumerate(row.ranks)}
        return [place_of[shown.ranks[place]] for place in order]

    def records(self, ranker: str, orders: Sequence[Sequence[Order]]) -> list[dict[str, Any]]:
        """Lines of TABLE: every ranking of a ranker."""
        identity = list(range(max(len(row.candidates) for row in self.rows)))
        return [
            {"row_id": row.row_id, "user": row.user, "ranker": ranker, "number": number, "order": order}
            | {"shown": self._placed(row, shown, identity[: len(row.candidates)])}
            for number, (rows, of_order) in enumerate(zip(self.shown, orders, strict=True), start=1)
            for row, shown, order in zip(self.rows, rows, of_order, strict=True)
        ]


def merged(orders: Sequence[Order]) -> Order:
    """One ranking of a row's rankings, by reciprocal rank fusion; None where none is a ranking."""
    found = [order for order in orders if order is not None]
    return reciprocal_rank_fusion(found) if found else None


def between(orders: Sequence[Sequence[Order]]) -> dict[str, float | None]:
    """Agreement between K rankings of each row: the mean over all pairs of orders; None where no pair is ranked."""
    pairs = list(itertools.combinations(orders, 2))
    first, second = ([order for pair in pairs for order in pair[side]] for side in (0, 1))
    return {name: None if math.isnan(value) else value for name, value in agreement(first, second).items()}


def summarize(
    given: Sequence[Order],
    orders: Sequence[Sequence[Order]],
    shuffled: ShuffledRows,
    num_samples: int,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """Of one ranker, for results.json.

    Args:
        given: (S,) its rankings of the rows as given.
        orders: K lists of S, those of the rows in other orders.
        shuffled: The rows.
        num_samples: Bootstrap samples of an interval.
        metrics: Names.

    Returns:
        Metrics of three rankings of the rows: `given`; `shuffled`, the mean over orders; `merged`. Of the last two
        the difference to the first in the first N@k, with its interval. This metric of each order and its standard
        deviation over orders. The agreement of `between`.
    """
    relevance, main = [row.relevance for row in shuffled.rows], compared(metrics)[0]
    sampling = Sampling(np.array([row.user for row in shuffled.rows]), num_samples)
    by_order = [metrics_per_row(Ranking("", one), relevance, metrics=metrics) for one in orders]
    fused = [merged(of_row) for of_row in zip(*orders, strict=True)]
    values = {
        "given": metrics_per_row(Ranking("", given), relevance, metrics=metrics),
        "shuffled": {name: np.mean([one[name] for one in by_order], axis=0) for name in metrics},
        "merged": metrics_per_row(Ranking("", fused), relevance, metrics=metrics),
    }
    found: dict[str, Any] = {kind: {m: float(of[m].mean()) for m in metrics} for kind, of in values.items()}
    for kind in ("shuffled", "merged"):
        difference = sampling.difference(values[kind][main], values["given"][main])
        found[kind] |= {"minus_given": difference[0], "interval": difference[1]}
    found["by_order"] = [float(one[main].mean()) for one in by_order]
    found["spread"] = float(np.std(found["by_order"], ddof=1)) if len(by_order) > 1 else None
    return found | between(orders)
