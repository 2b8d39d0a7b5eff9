"""Behaviour of the policy while variants were trained by reinforcement learning: a table and a picture beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rerank.compare.evaluations import RunsOf, by_seed, list_metrics, load_lists
from rerank.launch import run_dir as runs
from rerank.metrics import compared
from rerank.results.intervals import Sampling
from rerank.results.tables import NO_VALUE, markdown_table
from rerank.rollouts.metrics import fifths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {  # of log_history.json, and their names in the table
    "rollouts/copy_rate": "copies",
    "rollouts/kendall_tau": "Kendall tau",
    "rollouts/no_ranking": "no ranking",
    "rollouts/rank_gain": "rank gain",
    "rollouts/length_tokens": "tokens",
    "groups/share_useful": "useful groups",
}
PICTURED = {
    "rollouts/copy_rate": "Share of rollouts that copy the input order",
    "rollouts/rank_gain": "Rank gain of rollouts",
}


def read_curves(run: Path) -> pd.DataFrame:
    """(steps, COLUMNS and step_time) of a run's dapo stage; a step without rollouts repeats the one before."""
    log = json.loads((runs.stage_dir(run, "dapo") / "log_history.json").read_text())
    entries = [entry for entry in log if "step_time" in entry]
    steps = [entry["step"] for entry in entries]
    return pd.DataFrame(entries, index=steps).reindex(columns=[*COLUMNS, "step_time"]).ffill()


def table_lines(runs_of: RunsOf) -> list[str]:
    """Steps, minutes and prompts of each variant, and its rollouts in the first and the last fifth of the steps."""
    rows = []
    for variant, folders in runs_of.items():
        curves = [read_curves(run) for run in folders]
        metrics = [runs.read_metrics(run, "dapo") for run in folders]
        cells = [
            variant,
            f"{np.mean([one['steps'] for one in metrics]):.0f}",
            f"{np.mean([curve['step_time'].sum() / 60 for curve in curves]):.1f}",
            f"{np.mean([one['prompts_drawn'] for one in metrics]):.0f}",
        ]
        for column in COLUMNS:
            first, last = np.mean([[part.mean() for part in fifths(curve[column])] for curve in curves], axis=0)
            cells.append(NO_VALUE if np.isnan(first) or np.isnan(last) else f"{first:.3f} → {last:.3f}")
        rows.append(cells)
    return [
        "While training, means over seeds: rollouts in the first fifth of the steps → the last. Copies: rankings in "
        "the first stage's order, of those that are rankings; tau: their correlation with it. Rank gain: places that "
        "the target moves up.",
        "",
        *markdown_table(["variant", "steps", "minutes", "prompts", *COLUMNS.values()], rows),
    ]


def draw(runs_of: RunsOf, path: Path) -> None:
    """A PNG: copies and rank gain over the steps, each seed thin and the mean bold, then what the models are worth."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, (*over_steps, final) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        colours = {name: f"C{number}" for number, name in enumerate(runs_of)}
        curves = {name: [read_curves(run) for run in folders] for name, folders in runs_of.items()}
        for axes, column in zip(over_steps, PICTURED, strict=True):
            for name, of_runs in curves.items():
                seeds = pd.concat([curve[column] for curve in of_runs], axis=1)
                smooth = seeds.rolling(max(1, len(seeds) // 10), min_periods=1).mean()
                axes.plot(smooth, color=colours[name], linewidth=0.6, alpha=0.4)
                axes.plot(smooth.mean(axis=1), color=colours[name], linewidth=1.8, label=name)
            axes.set(xlabel="step", title=PICTURED[column])
        _draw_final(final, runs_of, colours)
        handles, names = over_steps[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _draw_final(axes: "Axes", runs_of: RunsOf, colours: Mapping[str, str]) -> None:
    """The first N@k minus the no-op's with its interval: the sft model that variants started from, then each's own."""
    read, metric = load_lists(runs_of), compared(list_metrics(runs_of))[0]
    first = next(iter(read.values()))
    ranked = {"sft": (first, "sft", "black")} if "sft" in first[0].values else {}
    ranked |= {name: (found, "dapo", colours[name]) for name, found in read.items() if "dapo" in found[0].values}
    sampling, no_op = Sampling(first[0].users), by_seed(first, "no_op", metric)
    for place, (found, ranker, colour) in enumerate(ranked.values()):
        gain, (low, high) = sampling.difference(by_seed(found, ranker, metric), no_op)
        axes.errorbar(gain, place, xerr=[[gain - low], [high - gain]], fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(ranked)), list(ranked))
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(title=f"{metric} − no-op, 95 % interval")
