"""The evaluated rows as the report shows them: a few of each outcome, with the ranking of the last trained model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.catalogue import Catalogue
from rerank.evaluate import tables

GENERATING = ("dapo", "sft", "sft_no_trace")  # the sample shows the first of them that is there
SAMPLES_PER_OUTCOME = 4
SHOWN_HISTORY = 5


@dataclass(frozen=True)
class RankedRow:
    """A row of the candidates stage with what each ranker made of it."""

    row: Mapping[str, Any]
    rankings: Mapping[str, Mapping[str, Any]]  # ranker -> its line of rankings.parquet

    def place(self, ranker: str) -> int | None:
        """Rank of the best-placed relevant item, from 1; None where the ranker gave no order."""
        order = self.rankings[ranker]["order"]
        gains = None if order is None else [self.row["relevance"][position] for position in order]
        return None if gains is None else next(rank for rank, gain in enumerate(gains, start=1) if gain > 0)


def read_ranked_rows(run_dir: Path, evaluate_dir: Path, split: str) -> list[RankedRow]:
    """Every evaluated row, in the order of the candidates file."""
    rankings: dict[int, dict] = {}
    for line in pq.read_table(evaluate_dir / "rankings.parquet").to_pylist():
        rankings.setdefault(line["row_id"], {})[line["ranker"]] = line
    path = runs.stage_dir(run_dir, "candidates") / f"{split}.parquet"
    rows = pq.read_table(path, columns=["row_id", "history", "candidates", "relevance"]).to_pylist()
    return [RankedRow(row, rankings[row["row_id"]]) for row in rows if row["row_id"] in rankings]


def sample_rows(
    rows: Sequence[RankedRow], results: Mapping[str, Any], catalogue: Catalogue
) -> tuple[str | None, list[dict[str, Any]]]:
    """A few rows of each outcome, spread over the split, and the ranker they show; (None, []) without one."""
    name = next((name for name in GENERATING if name in results["rows"]), None)
    if name is None:
        return None, []
    by_outcome: dict[str, list[RankedRow]] = {"moved up": [], "stayed": [], "moved down": [], "no ranking": []}
    for ranked in rows:
        by_outcome[_outcome(ranked.place("no_op"), ranked.place(name))].append(ranked)
    samples = []
    for outcome, found in by_outcome.items():
        for index in np.linspace(0, len(found) - 1, min(SAMPLES_PER_OUTCOME, len(found))).round().astype(int):
            samples.append(_sample(found[index], name, outcome, len(found) / len(rows), catalogue))
    return name, samples


def _outcome(before: int, after: int | None) -> str:
    if after is None:
        return "no ranking"
    return "stayed" if after == before else "moved up" if after < before else "moved down"


def _sample(ranked: RankedRow, name: str, outcome: str, share: float, catalogue: Catalogue) -> dict[str, Any]:
    """What the page shows of one row."""
    line, candidates = ranked.rankings[name], ranked.row["candidates"]
    shown = [
        {
            "title": catalogue.titles[item] or catalogue.item_ids[item],
            "semantic_id": catalogue.semantic_ids[item],
            "category": catalogue.categories[item],
            "relevant": gain > 0,
            "before": place,
        }
        for place, (item, gain) in enumerate(zip(candidates, ranked.row["relevance"], strict=True), start=1)
    ]
    history = ranked.row["history"]
    return {
        "row_id": ranked.row["row_id"],
        "outcome": outcome,
        "share": tables.percent(share),
        "places": (ranked.place("no_op"), ranked.place(name)),
        "history": [catalogue.titles[item] or catalogue.item_ids[item] for item in history[-SHOWN_HISTORY:]],
        "older": max(0, len(history) - SHOWN_HISTORY),
        "incoming": shown,
        "outgoing": None if line["order"] is None else [shown[position] for position in line["order"]],
        "failure": line["failure"],
        "text": line["completion"] if line["trace"] is None or line["order"] is None else line["trace"],
    }
