"""One HTML page of a run that opens from disk: results, training curves, signs of cheating, rollouts, ids, each stage.

`rerank report RUN_DIR` writes it of whatever a run has so far, and the evaluate stage leaves it beside its results.
What is not there is named on the page.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rerank import page
from rerank import run_dir as runs
from rerank.catalogue import Catalogue
from rerank.evaluate import tables
from rerank.evaluate.results import RANKERS
from rerank.report import charts, cheating, rollouts
from rerank.report.rows import GENERATING, read_ranked_rows, sample_rows
from rerank.rollout_groups import RolloutGroups
from rerank.semantic_ids import id_report

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
    ids = id_report.section(id_report.read_quality(run_dir)) if runs.is_finished(run_dir, "semantic_ids") else None
    parts = {
        "results": results["charts"] if results else [],
        "training": charts.training_charts(run_dir),
        "cheating": found["cheating"]["charts"] if found else [],
        "ids": ids["charts"] if ids else [],
    }
    page.write(
        path,
        "report.html.j2",
        charts=[chart for part in parts.values() for chart in part],
        extra_script=files("rerank").joinpath("rollouts.js").read_text(encoding="utf-8") if found else None,
        first=_first_places(parts),
        name=run_dir.resolve().name,
        columns=tables.COLUMNS,
        rankers=RANKERS,
        results=results,
        training=parts["training"],
        cheating=found.get("cheating"),
        rollouts=found.get("sample"),
        ids=ids,
        stages=stages,
        missing=missing,
    )


def _first_places(parts: Mapping[str, list]) -> dict[str, int]:
    """Where the charts of each part begin among all."""
    places, first = {}, 0
    for name, part in parts.items():
        places[name], first = first, first + len(part)
    return places


def _results(run_dir: Path, evaluate_dir: Path, missing: dict[str, str]) -> dict[str, Any] | None:
    """What the page shows of an evaluation, None without one of re-ranking, which `missing` then says."""
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
        "title": tables.title(results),
        "headline": headline(results),
        "table": {ranker: tables.cells(ranker, row) for ranker, row in results["rows"].items()},
        "notes": tables.notes(results),
        "charts": [charts.gain_chart(results), charts.place_chart(rows, results)],
        "sampled": name,
        "samples": samples,
    }


def _rollouts(run_dir: Path, missing: dict[str, str]) -> dict[str, Any]:
    """The dashboard and the sample of a run's rollouts, empty without readable ones, which `missing` then says."""
    try:
        groups = RolloutGroups(run_dir)
    except ValueError as error:
        missing["rollouts"] = f"{error}."
        return {}
    drawn = rollouts.sample(groups)
    shown, num_rollouts = len(drawn["rollouts"]), drawn["num_rollouts"]
    numbers = cheating.numbers_by_step(run_dir, groups.catalogue)
    num_damaged = len(groups.damaged)
    sample = {"shown": f"{shown:,}", "all": f"{num_rollouts:,}", "is_all": shown == num_rollouts and not num_damaged}
    sample["damaged"] = tables.counted(num_damaged, "file") if num_damaged else ""
    return {"cheating": cheating.section(numbers), "sample": {**sample, "data": page.json_text(drawn)}}


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
