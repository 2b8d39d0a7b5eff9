"""What rollouts tell about cheating, as the report shows it: numbers of the first and last steps, and their curves."""

from pathlib import Path
from typing import Any

import pandas as pd

from rerank import page, rollout_metrics
from rerank.catalogue import Catalogue
from rerank.rollouts import read_rollouts

ROLLOUTS_AT_ONCE = 100_000
FACTS = (  # shown for the first and the last fifth of the steps: number, its name on the page
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
SHARE = {"tickformat": "~%", "rangemode": "tozero"}
CURVES = (  # title, {number or pattern/: name of the line; a pattern stands for all that begin so}, axis
    (
        "Copies of an order, share of rankings",
        {"copy_rate": "of the first stage's", "shown_copy_rate": "of the one shown"},
        SHARE,
    ),
    ("Kendall tau of rankings with the input order", {"kendall_tau": "tau"}, {}),
    ("Completions that are no ranking, by kind", {"failure/": "", "truncated": "truncated"}, SHARE),
    ("Completion length, tokens", {"length_tokens": "tokens"}, {"rangemode": "tozero"}),
    ("Each reward, mean", {"reward/": ""}, {}),
    ("Conditions of rewards met, share of rollouts", {"gate/": ""}, SHARE),
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


def numbers_by_step(run_dir: str | Path, catalogue: Catalogue | None) -> pd.DataFrame:
    """`rollout_metrics.by_step` of a run, read some steps at a time so that any number of rollouts fits in memory.

    Raises:
        ValueError: When the run has no readable rollouts.
    """
    weights = rollout_metrics.reward_weights(run_dir)
    steps = read_rollouts(run_dir, ["step"]).to_pandas().value_counts("step", sort=False).reset_index(name="rollouts")
    parts = []
    for _, part in steps.groupby((steps["rollouts"].cumsum() - 1) // ROLLOUTS_AT_ONCE):
        where = f"step BETWEEN {part['step'].min()} AND {part['step'].max()}"
        table = read_rollouts(run_dir, rollout_metrics.COLUMNS, where)
        parts.append(rollout_metrics.by_step(table, weights, catalogue))
    return pd.concat(parts)


def section(numbers: pd.DataFrame) -> dict[str, Any]:
    """What the page shows of `numbers_by_step`: facts as (name, first fifth, last fifth), and charts."""
    first, last = _fifths(numbers)
    facts = [(label, _printed(first[name]), _printed(last[name])) for name, label in FACTS if name in first]
    curves = [chart for title, lines, axis in CURVES if (chart := _curves(numbers, title, lines, axis)) is not None]
    return {"facts": facts, "charts": [*curves[:2], _origins(first, last), *curves[2:]]}


def _fifths(numbers: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Means of the first and last fifth of the steps, at least one."""
    fifth = max(1, len(numbers) // 5)
    return numbers.head(fifth).mean(), numbers.tail(fifth).mean()


def _curves(numbers: pd.DataFrame, title: str, lines: dict[str, str], axis: dict[str, Any]) -> dict[str, Any] | None:
    """A line for each number over the steps, a moving mean where the steps are many; None when nothing is there."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for pattern, label in lines.items():
        names = [name for name in numbers if name.startswith(pattern)] if pattern.endswith("/") else [pattern]
        for name in (name for name in names if name in numbers and numbers[name].any()):
            shown = numbers[name].rolling(max(1, len(numbers) // 20), min_periods=1).mean().round(4)
            line = {"mode": "lines", "connectgaps": True, "name": label or name.partition("/")[2]}
            figure.add_scatter(x=shown.index.tolist(), y=shown.tolist(), **line)
    if not figure.data:
        return None
    return page.chart(figure, title, xaxis={"title": {"text": "step"}}, yaxis=axis)


def _origins(first: pd.Series, last: pd.Series) -> dict[str, Any]:
    """Where the item that a ranking puts first stood in the input."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, means in (("first fifth of the steps", first), ("last fifth", last)):
        origins = means[[name for name in means.index if name.startswith("first_from/")]]
        ranks = [int(name.partition("/")[2]) for name in origins.index]
        figure.add_bar(x=ranks, y=origins.round(4).tolist(), name=label)
    axes = {"xaxis": {"title": {"text": "rank in the input"}, "dtick": 1}, "yaxis": SHARE}
    return page.chart(figure, "Where the item ranked first came from, share of rankings", **axes)


def _printed(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"
