"""Charts of results and training, as the page's script draws them."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rerank.launch.run_dir import is_finished, read_metrics
from rerank.metrics import compared, parse_metric
from rerank.report.page import FROM_ZERO, STEPS, Chart, chart
from rerank.report.rows import RankedRow
from rerank.results.rankers import GENERATING
from rerank.results.tables import metrics_of

MIDTRAIN, SFT, DAPO = (f"{stage}/log_history.json" for stage in ("midtrain", "sft", "dapo"))
NO_TRACE = "sft/log_history_no_trace.json"
KEPT = {SFT: ("kept",), NO_TRACE: ("no_trace", "kept"), DAPO: ("kept",)}  # log -> where its stage's metrics tell it
MOST_TICKS = 30  # of an axis of ranks with a number each
CHECKED = ("eval_N@5", "eval_R@1")
AGREEMENT = ("rollouts/consistency/kendall_tau", "rollouts/consistency/same_first")
CURVES = (  # title, log, keys of it or patterns of them
    ("Mid-training loss", MIDTRAIN, ("loss", "loss_*")),
    ("Mid-training: the next item on validation rows", MIDTRAIN, ("eval_R@10", "eval_N@10")),
    ("SFT loss", SFT, ("loss", "eval_loss")),
    ("SFT: validation rows, ranked greedily", SFT, CHECKED),
    ("SFT without trace: loss", NO_TRACE, ("loss", "eval_loss")),
    ("SFT without trace: validation rows, ranked greedily", NO_TRACE, CHECKED),
    ("DAPO reward", DAPO, ("reward",)),
    ("DAPO: validation rows, ranked greedily", DAPO, CHECKED),
    ("DAPO reward of all groups sampled, kept or not", DAPO, ("rollouts/reward",)),
    ("DAPO groups that differ in outcome, share of those sampled", DAPO, ("groups/share_useful",)),
    ("DAPO agreement of rankings of the same rows shown in two orders", DAPO, AGREEMENT),
    ("DAPO completion length, tokens", DAPO, ("completions/mean_length",)),
    ("DAPO gap between sampling and training log-probabilities", DAPO, ("sampling/sampling_logp_difference/mean",)),
)


def gain_chart(results: Mapping[str, Any]) -> Chart:
    """The first NDCG@k of each ranker minus that of the input order, with intervals."""
    metric = compared(metrics_of(results))[0]
    names = [name for name in results["rows"] if name not in ("no_op", "random", "oracle")][::-1]
    rows = [results["rows"][name] for name in names]
    gains = [row[f"{metric}_minus_no_op"] for row in rows]
    above = [row[f"{metric}_interval"][1] - gain for row, gain in zip(rows, gains, strict=True)]
    below = [gain - row[f"{metric}_interval"][0] for row, gain in zip(rows, gains, strict=True)]
    error = {"type": "data", "array": above, "arrayminus": below, "thickness": 2, "width": 6}
    points = go.Scatter(x=gains, y=names, mode="markers", error_x=error, marker={"size": 10})
    title = f"NDCG@{parse_metric(metric)[1]} minus that of the input order, 95 % intervals over users"
    return chart(go.Figure(points), title, xaxis={"tickformat": "+"})


def place_chart(rows: Sequence[RankedRow], results: Mapping[str, Any]) -> Chart:
    """The place that each ranker gives the relevant item: share of rows at each rank."""
    last = max(len(ranked.row.candidates) for ranked in rows)
    figure = go.Figure()
    for name in (name for name in ("no_op", "lambdamart", *GENERATING[::-1]) if name in results["rows"]):
        places = [place for ranked in rows if (place := ranked.place(name)) is not None]
        shares = np.bincount(places, minlength=last + 1)[1:] / len(rows)
        figure.add_scatter(x=list(range(1, last + 1)), y=shares.tolist(), mode="lines+markers", name=name)
    ticks = {"dtick": 1} if last <= MOST_TICKS else {}
    axes = {"xaxis": {"title": {"text": "rank"}, **ticks}, "yaxis": {"tickformat": ".0%", **FROM_ZERO}}
    has_several = any(sum(grade > 0 for grade in ranked.row.relevance) > 1 for ranked in rows)
    which = "best-placed relevant item" if has_several else "relevant item"
    return chart(figure, f"Rank of the {which}, share of rows", **axes)


def click_charts(run_dir: Path) -> list[Chart]:
    """The share of relevant candidates at each place of the requests, where the data stage has counted it."""
    data: Mapping[str, Any] = read_metrics(run_dir, "data") if is_finished(run_dir, "data") else {}
    places = data.get("click_rate_by_place")
    if not places:
        return []
    x, shares = [place["place"] for place in places], [place["share"] for place in places]
    counts = [f"{place['clicked']} of {place['shown']}" for place in places]
    figure = go.Figure(go.Scatter(x=x, y=shares, text=counts, mode="lines+markers"))
    axes = {"xaxis": {"title": {"text": "place"}}, "yaxis": {"tickformat": ".0%", **FROM_ZERO}}
    return [chart(figure, "Click rate by place shown, all requests", **axes)]


def order_chart(results: Mapping[str, Any]) -> Chart:
    """The first NDCG@k of each ranker on rows as given, in each other order, and of the ranking merged over these."""
    orders, metric = results["orders"], compared(metrics_of(results))[0]
    figure, rankers = go.Figure(), dict(reversed(orders["rankers"].items()))
    points = {
        "each other order": [(value, name) for name, found in rankers.items() for value in found["by_order"]],
        "as given": [(found["given"][metric], name) for name, found in rankers.items()],
        "merged": [(found["merged"][metric], name) for name, found in rankers.items()],
    }
    for (kind, places), symbol in zip(points.items(), ("line-ns-open", "circle", "diamond-open"), strict=True):
        values, names = zip(*places, strict=True)
        marker = {"size": 12, "symbol": symbol, "line": {"width": 2}}
        figure.add_scatter(x=values, y=names, mode="markers", name=kind, marker=marker)
    title = f"NDCG@{parse_metric(metric)[1]} by the order in which candidates are shown, {orders['rows']} rows"
    return chart(figure, title)


def training_charts(run_dir: Path) -> list[Chart]:
    """The curves of CURVES whose log is there and holds them."""
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
                mean = pd.Series(values).rolling(len(values) // 10, min_periods=1).mean()
                figure.add_scatter(x=steps, y=mean.tolist(), name=f"{label}, moving mean")
        if figure.data and keys == CHECKED and (kept := _kept_step(run_dir, log)) is not None:
            figure.add_vline(x=kept, line_dash="dot", annotation_text=f"kept: step {kept}")
        if figure.data:
            charts.append(chart(figure, title, xaxis=STEPS))
    return charts


def _kept_step(run_dir: Path, log: str) -> int | None:
    """The step of a log whose model its stage has kept; None where it did not look at validation rows."""
    stage = log.partition("/")[0]
    found: Any = read_metrics(run_dir, stage) if is_finished(run_dir, stage) else {}
    for name in KEPT[log]:
        found = found.get(name, {})
    return found.get("step")
