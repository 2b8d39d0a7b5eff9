"""One HTML page of a run that opens from disk: results, training curves, signs of cheating, rollouts, ids, each stage.

`rerank report RUN_DIR` writes it of what a run has so far, and `rerank run` leaves it beside the results. The page
names the parts that are missing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rerank.catalogue import Catalogue
from rerank.launch import run_dir as runs
from rerank.launch.stages import STAGES
from rerank.metrics import compared, parse_metric
from rerank.report import charts, cheating, page, rollouts, semantic_ids
from rerank.report.rows import read_ranked_rows, sample_rows
from rerank.results import overview, tables
from rerank.results.rankers import GENERATING, of_task
from rerank.rollouts.groups import RolloutGroups

Section = dict[str, Any]  # what a template shows of a part
MISSING = {
    "results": "There is no evaluation of this run yet; run the evaluate stage.",
    "training": "No training stage has logged yet; run midtrain, sft or dapo.",
    "ids": "There are no semantic ids yet; run the semantic_ids stage.",
    "pipeline": "No stage is finished yet.",
}


def write_report(run_dir: str | Path, evaluate_dir: str | Path, path: str | Path) -> None:
    """Write the page of a run whose evaluation, where there is one, stands in `evaluate_dir`.

    Raises:
        FileNotFoundError: When there is no such run.
        ValueError: When the folder holds neither a finished stage nor rollouts.
    """
    run_dir, evaluate_dir = Path(run_dir), Path(evaluate_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder of a run")
    missing = dict(MISSING)
    results, stages = _results(run_dir, evaluate_dir, missing), stage_facts(run_dir)
    found = _rollouts(run_dir, missing)
    if not stages and not found:
        raise ValueError(f"{run_dir} holds neither a finished stage nor rollouts; give the folder of a run")
    has_ids = runs.is_finished(run_dir, "semantic_ids")
    ids = semantic_ids.section(semantic_ids.read_quality(run_dir)) if has_ids else None
    training = {"charts": charts.training_charts(run_dir)}
    parts: dict[str, Section | None]
    parts = {"results": results, "training": training, "cheating": found.get("cheating"), "ids": ids}
    first: dict[str, int] = {}  # place of the first chart of each part among all
    shown: list[page.Chart] = []
    for name, part in parts.items():
        first[name] = len(shown)
        shown += part["charts"] if part else []
    page.write(
        path,
        "report.html.j2",
        charts=shown,
        extra_scripts=["rollouts.js"] if found else [],
        first=first,
        name=run_dir.resolve().name,
        columns=results["columns"] if results else [],
        rankers={ranker.name: ranker.description for ranker in of_task("rerank")},
        rollouts=found.get("sample"),
        stages=stages,
        missing=missing,
        **parts,
    )


def _results(run_dir: Path, evaluate_dir: Path, missing: dict[str, str]) -> Section | None:
    """The evaluation, None without one of re-ranking, which `missing` then says."""
    path = evaluate_dir / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    if (task := results.get("task", "rerank")) != "rerank":
        missing["results"] = f"The evaluation is of the task {task}; its table is {evaluate_dir.name}/results.md."
        return None
    rows = read_ranked_rows(run_dir, evaluate_dir, results["split"])
    name, samples = sample_rows(rows, results, Catalogue.load(run_dir))
    return {
        "title": overview.title(results),
        "headline": headline(results),
        "columns": overview.columns(results),
        "table": {ranker: overview.cells(ranker, results) for ranker in results["rows"]},
        "notes": overview.notes(results),
        "charts": [
            charts.gain_chart(results),
            charts.place_chart(rows, results),
            *([charts.order_chart(results)] if results.get("orders") else []),
            *charts.click_charts(run_dir),
        ],
        "further": overview.further_tables(results),
        "sampled": name,
        "samples": samples,
        "graded": any(shown.get("grade") for sample in samples for shown in sample["incoming"]),
        "unseen": any(shown.get("unseen") for sample in samples for shown in sample["incoming"]),
    }


def _rollouts(run_dir: Path, missing: dict[str, str]) -> dict[str, Section]:
    """The dashboard and the sample of a run's rollouts, empty without readable ones, which `missing` then says."""
    try:
        groups = RolloutGroups(run_dir)
        drawn = rollouts.sample(groups)
        steps = cheating.by_step(groups)
    except ValueError as error:
        missing["rollouts"] = f"{error}."
        return {}
    shown, num_rollouts, num_damaged = len(drawn["rollouts"]), drawn["num_rollouts"], len(groups.rollouts.damaged)
    sample = {"shown": f"{shown:,}", "all": f"{num_rollouts:,}", "is_all": shown == num_rollouts and not num_damaged}
    sample["damaged"] = tables.counted(num_damaged, "file") if num_damaged else ""
    return {"cheating": cheating.section(steps), "sample": {**sample, "data": page.json_text(drawn)}}


def headline(results: Mapping[str, Any]) -> str:
    """The outcome in a sentence: the last trained model against the input order."""
    name = next((name for name in (*GENERATING, "midtrained") if name in results["rows"]), None)
    if name is None:
        return "No language model was evaluated."
    metric = compared(tables.metrics_of(results))[0]
    row, no_op = results["rows"][name], results["rows"]["no_op"][metric]
    difference, (low, high) = row[f"{metric}_minus_no_op"], row[f"{metric}_interval"]
    relative = f", {100 * difference / no_op:+.1f} % relative" if no_op else ""
    verdict = "above the input order" if low > 0 else "below the input order" if high < 0 else "no clear difference"
    return (
        f"{name}: NDCG@{parse_metric(metric)[1]} {row[metric]:.4f}, input order {no_op:.4f}{relative}; difference "
        f"{tables.interval(difference, (low, high))}: {verdict}. The interval is over users; another training seed "
        "may lie outside."
    )


def stage_facts(run_dir: str | Path) -> dict[str, list[tuple[str, str]]]:
    """The metrics of each finished stage, as names and printed values."""
    finished = [stage for stage in STAGES if stage != "evaluate" and runs.is_finished(run_dir, stage)]
    return {stage: _facts(runs.read_metrics(run_dir, stage)) for stage in finished}


def _facts(metrics: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Plain values first, then those of nested mappings; long lists and lists of mappings are left out."""
    nested = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    plain = ((name, value) for name, value in metrics.items() if name not in nested)
    facts = [(prefix + name, _printed(value)) for name, value in plain if _is_short(value)]
    return facts + [fact for name, value in nested.items() for fact in _facts(value, f"{prefix}{name} / ")]


def _is_short(value: object) -> bool:
    return not isinstance(value, list) or (len(value) <= 3 and not any(isinstance(part, dict) for part in value))


def _printed(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_printed(part) for part in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: tables.NO_VALUE}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
