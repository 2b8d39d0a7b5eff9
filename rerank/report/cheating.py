"""The reward-hacking metrics of a run, as the report shows them: of the first and last steps, and as curves."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rerank.report.page import FROM_ZERO, STEPS, Chart, chart
from rerank.results.tables import number
from rerank.rollouts import metrics
from rerank.rollouts.groups import RolloutGroups

ROLLOUTS_AT_ONCE = 100_000
FACTS = (  # shown for the first and the last fifth of the steps: metric, its name on the page
    ("reward", "reward"),
    ("copy_rate", "rankings that copy the input order"),
    ("kendall_tau", "Kendall tau to the input order"),
    ("rank_gain", "places the target moves up"),
    ("no_ranking", "completions that are no ranking"),
    ("truncated", "truncated completions"),
    ("length_tokens", "tokens of a completion"),
    ("target_cited", "traces that name the target"),
    ("kept", "rollouts trained on"),
)
SHARE: dict[str, Any] = {"tickformat": "~%", **FROM_ZERO}
CURVES: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    # title, {metric or pattern/: name of the line; a pattern stands for all that begin so}, axis
    (
        "Copies of an order, share of rankings",
        {"copy_rate": "of the first stage's", "shown_copy_rate": "of the one shown"},
        SHARE,
    ),
    ("Kendall tau of rankings with the input order", {"kendall_tau": "tau"}, {}),
    ("Completions that are no ranking, by kind", {"failure/": "", "truncated": "truncated"}, SHARE),
    ("Completion length, tokens", {"length_tokens": "tokens"}, FROM_ZERO),
    ("Each reward, mean", {"reward/": ""}, {}),
    ("Conditions of rewards met, share of rollouts", {"condition/": ""}, SHARE),
    ("What each reward pays, share of all: format against rank", {"reward_share/": ""}, {"tickformat": "~%"}),
    ("Targets among the first K, share of rollouts", {f"R@{k}/after": f"K = {k}" for k in (1, 3, 5)}, SHARE),
    ("Traces that name the target", {"target_cited": "share"}, SHARE),
    (
        "Places the target moves up, by whether the trace names it",
        {"rank_gain/cited": "named", "rank_gain/not_cited": "not named"},
        {},
    ),
    (
        "Groups that teach nothing, and groups by where the target goes",
        {
            "groups/same_reward": "all rewards equal",
            "groups/all_best": "target first in all",
            "groups/all_worse": "target lower in all",
            "groups/all_equal": "target at one place",
        },
        SHARE,
    ),
)


def by_step(groups: RolloutGroups) -> pd.DataFrame:
    """`metrics.by_step` of a run, read some steps at a time so that any number of rollouts fits in memory."""
    weights = metrics.reward_weights(groups.run_dir)
    steps = groups.rollouts.query("SELECT step, count(*) AS rollouts FROM rollouts GROUP BY step ORDER BY step")
    parts = []
    frame: pd.DataFrame = steps.to_pandas()
    for _, part in frame.groupby((frame["rollouts"].cumsum() - 1) // ROLLOUTS_AT_ONCE):
        where = f"step BETWEEN {part['step'].min()} AND {part['step'].max()}"
        parts.append(metrics.by_step(groups.rollouts.read(metrics.COLUMNS, where), weights, groups.catalogue))
    return pd.concat(parts)


def section(steps: pd.DataFrame) -> dict[str, Any]:
    """The page's part of `by_step`: facts as (name, first fifth, last fifth), and charts."""
    first, last = (part.mean() for part in metrics.fifths(steps))
    facts = [
        (label, *(number(None if pd.isna(means[name]) else means[name], 3) for means in (first, last)))
        for name, label in FACTS
        if name in first
    ]
    curves = [found for title, lines, axis in CURVES if (found := _curves(steps, title, lines, axis)) is not None]
    return {"facts": facts, "charts": [*curves[:2], _origins(first, last), *curves[2:]]}


def _curves(steps: pd.DataFrame, title: str, lines: dict[str, str], axis: dict[str, Any]) -> Chart | None:
    """A line for each metric over the steps, a moving mean where the steps are many; None when nothing is there."""
    figure, known = go.Figure(), [str(name) for name in steps]
    for pattern, label in lines.items():
        names = [name for name in known if name.startswith(pattern)] if pattern.endswith("/") else [pattern]
        for name in (name for name in names if name in known and steps[name].any()):
            shown = steps[name].rolling(max(1, len(steps) // 20), min_periods=1).mean().round(4)
            line = {"mode": "lines", "connectgaps": True, "name": label or name.partition("/")[2]}
            figure.add_scatter(x=shown.index.tolist(), y=shown.tolist(), **line)
    return chart(figure, title, xaxis=STEPS, yaxis=axis) if figure.data else None


def _origins(first: "pd.Series[float]", last: "pd.Series[float]") -> Chart:
    """The first-stage rank of the item that a ranking puts first."""
    figure = go.Figure()
    for label, means in (("first fifth of the steps", first), ("last fifth", last)):
        origins = means.filter(like="first_from/").round(4)
        figure.add_bar(x=[int(name.partition("/")[2]) for name in origins.index], y=origins.tolist(), name=label)
    axes = {"xaxis": {"title": {"text": "rank in the input"}, "dtick": 1}, "yaxis": SHARE}
    return chart(figure, "Where the item ranked first came from, share of rankings", **axes)
