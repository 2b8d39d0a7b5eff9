"""The evaluated rows as the report shows them: a few of each outcome, with the ranking of the last trained model."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class RankedRow:
    """A row and the line of rankings.parquet of each ranker."""

    row: RankingRow
    rankings: Mapping[str, Mapping[str, Any]]

    def place(self, ranker: str) -> int | None:
        """Place of the best-placed positive, from 1, among candidates that were seen; None where the ranker gave no
        order."""
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


def _sample(ranked: RankedRow, name: str, catalogue: Catalogue) -> dict[str, Any]:
    """A row as the page shows it."""
    row, line = ranked.row, ranked.rankings[name]
    titles = {item: catalogue.titles[item] or catalogue.item_ids[item] for item in (*row.history, *row.candidates)}
    shown = [
        {"title": titles[item], "semantic_id": catalogue.semantic_ids[item], "category": catalogue.categories[item]}
        | {"relevant": gain > 0, "before": place}
        for place, (item, gain) in enumerate(zip(row.candidates, row.relevance, strict=True), start=1)
    ]
    return {
        "row_id": row.row_id,
        "places": (ranked.place("no_op"), ranked.place(name)),
        "history": [titles[item] for item in row.history[-SHOWN_HISTORY:]],
        "older": max(0, len(row.history) - SHOWN_HISTORY),
        "incoming": shown,
        "outgoing": None if line["order"] is None else [shown[position] for position in line["order"]],
        "failure": line["failure"],
        "text": line["completion"] if line["trace"] is None or line["order"] is None else line["trace"],
    }
