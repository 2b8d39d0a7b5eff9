"""One HTML page of a run: the results with intervals, training curves, the ids, each stage, a sample of rows."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import page
from rerank import run_dir as runs
from rerank.catalogue import Catalogue
from rerank.evaluate import tables
from rerank.evaluate.results import RANKERS
from rerank.semantic_ids import id_report

GENERATING = ("dapo", "sft", "sft_no_trace")  # the sample shows the first of them that is there
SAMPLES_PER_OUTCOME = 4
SHOWN_HISTORY = 5
CURVES = (  # title, log of which stage, keys or patterns of them
    ("Mid-training loss", "midtrain/log_history.json", ("loss", "loss_*")),
    ("Mid-training: the next item on validation rows", "midtrain/log_history.json", ("eval_R@10", "eval_N@10")),
    ("SFT loss", "sft/log_history.json", ("loss", "eval_loss")),
    ("SFT without trace: loss", "sft/log_history_no_trace.json", ("loss", "eval_loss")),
    ("DAPO reward", "dapo/log_history.json", ("reward",)),
    ("DAPO completion length, tokens", "dapo/log_history.json", ("completions/mean_length",)),
    (
        "DAPO gap between sampling and training log-probabilities",
        "dapo/log_history.json",
        ("sampling/sampling_logp_difference/mean",),
    ),
)


def write_report(run_dir: str | Path, evaluate_dir: str | Path, path: str | Path) -> None:
    """Write the page of a run whose evaluation stands in `evaluate_dir`, finished or about to be.

    Raises:
        FileNotFoundError: When there is no evaluation.
    """
    results_path = Path(evaluate_dir) / "results.json"
    if not results_path.is_file():
        raise FileNotFoundError(f"{results_path} is missing; run the evaluate stage first.")
    results = json.loads(results_path.read_text(encoding="utf-8"))
    rows = read_ranked_rows(Path(run_dir), Path(evaluate_dir), results["split"])
    charts = [gain_chart(results), place_chart(rows, results), *training_charts(Path(run_dir))]
    name, samples = sample_rows(rows, results, Catalogue.load(run_dir))
    ids = id_report.section(id_report.read_quality(run_dir))
    page.write(
        path,
        "report.html.j2",
        charts=[*charts, *ids["charts"]],
        name=Path(run_dir).resolve().name,
        title=tables.title(results),
        columns=tables.COLUMNS,
        table={ranker: tables.cells(ranker, row) for ranker, row in results["rows"].items()},
        rankers=RANKERS,
        notes=tables.notes(results),
        headline=headline(results),
        plots=charts,
        ids=ids,
        stages=stage_facts(run_dir),
        sampled=name,
        samples=samples,
    )


def headline(results: Mapping[str, Any]) -> str:
    """The outcome in a sentence: the last trained model against the input order."""
    name = next((name for name in (*GENERATING, "midtrained") if name in results["rows"]), None)
    if name is None:
        return "No language model was evaluated."
    row, no_op = results["rows"][name], results["rows"]["no_op"]["N@5"]
    relative = f", {100 * row['N@5_minus_no_op'] / no_op:+.1f} % relative" if no_op else ""
    low, high = row["N@5_interval"]
    verdict = "above the input order" if low > 0 else "below the input order" if high < 0 else "no clear difference"
    return (
        f"{name}: NDCG@5 {row['N@5']:.4f}, input order {no_op:.4f}{relative}; difference "
        f"{tables.interval(row['N@5_minus_no_op'], row['N@5_interval'])}: {verdict}."
    )


def stage_facts(run_dir: str | Path) -> dict[str, list[tuple[str, str]]]:
    """The metrics of each finished stage, as names and printed values."""
    finished = [stage for stage in runs.STAGES if stage != "evaluate" and runs.is_finished(run_dir, stage)]
    return {stage: _facts(runs.read_metrics(run_dir, stage)) for stage in finished}


def _facts(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Plain values first, then those of nested mappings; lists longer than three are left to metrics.json."""
    plain = [(prefix + name, value) for name, value in metrics.items() if not isinstance(value, dict)]
    facts = [(name, _printed(value)) for name, value in plain if not isinstance(value, list) or len(value) <= 3]
    for name, value in metrics.items():
        if isinstance(value, dict):
            facts += _facts(value, f"{prefix}{name} / ")
    return facts


def _printed(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_printed(part) for part in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: tables.NO_VALUE}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def gain_chart(results: Mapping[str, Any]) -> dict[str, Any]:
    """NDCG@5 of each ranker minus that of the input order, with intervals."""
    import plotly.graph_objects as go

    names = [name for name in results["rows"] if name not in ("no_op", "random", "oracle")][::-1]
    rows = [results["rows"][name] for name in names]
    gains = [row["N@5_minus_no_op"] for row in rows]
    above = [row["N@5_interval"][1] - gain for row, gain in zip(rows, gains, strict=True)]
    below = [gain - row["N@5_interval"][0] for row, gain in zip(rows, gains, strict=True)]
    error = {"type": "data", "array": above, "arrayminus": below, "thickness": 2, "width": 6}
    points = go.Scatter(x=gains, y=names, mode="markers", error_x=error, marker={"size": 10})
    return page.chart(
        go.Figure(points), "NDCG@5 minus that of the input order, 95 % intervals", xaxis={"tickformat": "+"}
    )


def place_chart(rows: Sequence[RankedRow], results: Mapping[str, Any]) -> dict[str, Any]:
    """Where each ranker puts the relevant item: share of rows at each rank."""
    import plotly.graph_objects as go

    last = max(len(ranked.row["candidates"]) for ranked in rows)
    figure = go.Figure()
    for name in (name for name in ("no_op", "lambdamart", *GENERATING[::-1]) if name in results["rows"]):
        places = [place for ranked in rows if (place := ranked.place(name)) is not None]
        shares = np.bincount(places, minlength=last + 1)[1:] / len(rows)
        figure.add_scatter(x=list(range(1, last + 1)), y=shares.tolist(), mode="lines+markers", name=name)
    axes = {"xaxis": {"title": {"text": "rank"}, "dtick": 1}, "yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    return page.chart(figure, "Rank of the relevant item, share of rows", **axes)


def training_charts(run_dir: Path) -> list[dict[str, Any]]:
    """The curves of CURVES whose log is there and holds them."""
    import plotly.graph_objects as go

    charts = []
    for title, log, keys in CURVES:
        history = json.loads((run_dir / log).read_text()) if (run_dir / log).is_file() else []
        figure = go.Figure()
        present = dict.fromkeys(name for entry in history for name in entry)
        names = [name for pattern in keys for name in fnmatch.filter(present, pattern)]
        for name in names:
            steps, values = zip(*((entry["step"], entry[name]) for entry in history if name in entry), strict=True)
            label, is_long = name if len(keys) > 1 else "value", len(steps) > 20
            if len(names) <= 2 or not is_long:  # more lines would be a thicket
                figure.add_scatter(x=steps, y=values, mode="lines", name=label, opacity=0.5 if is_long else 1)
            if is_long:
                mean = _moving_mean(values, len(values) // 10)
                figure.add_scatter(x=steps, y=mean, name=f"{label}, moving mean")
        if figure.data:
            charts.append(page.chart(figure, title, xaxis={"title": {"text": "step"}}))
    return charts


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window - 1` before it, as far as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


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
