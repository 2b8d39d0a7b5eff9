"""The evaluated rows as the report shows them: a few of each outcome, with the ranking of the last trained model.

Of a long list the first candidates are shown, and those further down that matter: the relevant ones, and those that
the other order has among its first.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank.catalogue import Catalogue
from rerank.launch import run_dir as runs
from rerank.results import tables
from rerank.results.rankers import GENERATING
from rerank.rows import RankingRow, read_rows

OUTCOMES = ("moved up", "stayed", "moved down", "no ranking")
SAMPLES_PER_OUTCOME = 4
SHOWN_HISTORY = 5
SHOWN_CANDIDATES = 20  # first of a list


@dataclass(frozen=True)
class RankedRow:
    """A row and the line of rankings.parquet of each ranker."""

    row: RankingRow
    rankings: Mapping[str, Mapping[str, Any]]

    def place(self, ranker: str) -> int | None:
        """Rank of the best-placed relevant item among those judged, from 1; None where the ranker gave no order."""
        return self.row.place_of_positive(self.rankings[ranker]["order"])

    def outcome(self, ranker: str) -> str:
        """One of OUTCOMES."""
        before, after = self.place("no_op"), self.place(ranker)
        if before is None or after is None:
            return "no ranking"
        return "stayed" if after == before else "moved up" if after < before else "moved down"


def read_ranked_rows(run_dir: Path, evaluate_dir: Path, split: str) -> list[RankedRow]:
    """Every evaluated row, by row_id."""
    rankings: dict[int, dict[str, Mapping[str, Any]]] = {}
    for line in pq.read_table(evaluate_dir / "rankings.parquet").to_pylist():
        rankings.setdefault(line["row_id"], {})[line["ranker"]] = line
    rows = read_rows(runs.stage_dir(run_dir, "candidates") / f"{split}.parquet")
    return [RankedRow(row, rankings[row.row_id]) for row in rows if row.row_id in rankings]


def sample_rows(
    rows: Sequence[RankedRow], results: Mapping[str, Any], catalogue: Catalogue
) -> tuple[str | None, list[dict[str, Any]]]:
    """A few rows of each outcome, spread over the split, and the ranker they show; (None, []) without one."""
    name = next((name for name in GENERATING if name in results["rows"]), None)  # the last stage's
    if name is None:
        return None, []
    samples = []
    for outcome in OUTCOMES:
        found = [ranked for ranked in rows if ranked.outcome(name) == outcome]
        shown = {"outcome": outcome, "share": tables.percent(len(found) / len(rows))}
        for index in np.linspace(0, len(found) - 1, min(SAMPLES_PER_OUTCOME, len(found))).round().astype(int):
            samples.append(shown | _sample(found[index], name, catalogue))
    return name, samples


def _shortened(ranking: Sequence[Mapping[str, Any]], wanted: Collection[int]) -> list[dict[str, Any]]:
    """The first candidates of a ranking, and of the others the relevant ones and those of the wanted places before.

    Each gets its `place`, and the number of those `left_out` straight before it; what is left out at the end has a
    line of its own, without a place.
    """
    shown, left_out = [], 0
    for place, candidate in enumerate(ranking, start=1):
        if place <= SHOWN_CANDIDATES or candidate["relevant"] or candidate["before"] in wanted:
            shown.append({**candidate, "place": place, "left_out": left_out})
            left_out = 0
        else:
            left_out += 1
    return shown + ([{"place": None, "left_out": left_out}] if left_out else [])


def _sample(ranked: RankedRow, name: str, catalogue: Catalogue) -> dict[str, Any]:
    """A row as the page shows it."""
    row, line = ranked.row, ranked.rankings[name]
    titles = {item: catalogue.titles[item] or catalogue.item_ids[item] for item in (*row.history, *row.candidates)}
    is_graded = max(grade for grade in row.relevance if not math.isnan(grade)) > 1
    given: list[dict[str, Any]] = [
        {"title": titles[item], "semantic_id": catalogue.semantic_ids[item], "category": catalogue.categories[item]}
        | {"relevant": grade > 0, "grade": f"{grade:g}" if grade > 0 and is_graded else "", "before": place}
        | {"unseen": math.isnan(grade)}
        for place, (item, grade) in enumerate(zip(row.candidates, row.relevance, strict=True), start=1)
    ]
    order = line["order"]
    ranking = None if order is None else [given[position] for position in order]
    first = [shown["before"] for shown in (ranking or [])[:SHOWN_CANDIDATES]]
    return {
        "row_id": row.row_id,
        "places": (ranked.place("no_op"), ranked.place(name)),
        "history": [titles[item] for item in row.history[-SHOWN_HISTORY:]],
        "older": max(0, len(row.history) - SHOWN_HISTORY),
        "incoming": _shortened(given, first),
        "outgoing": None if ranking is None else _shortened(ranking, range(1, SHOWN_CANDIDATES + 1)),
        "several": sum(shown["relevant"] for shown in given) > 1,
        "failure": line["failure"],
        "text": line["completion"] if line["trace"] is None or line["order"] is None else line["trace"],
    }
