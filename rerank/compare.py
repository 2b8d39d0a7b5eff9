"""`rerank compare`: variants of a recipe, several seeds each, on one split, into one table.

Each variant is a recipe folder. A run of a variant and seed is an ordinary run in `OUT/<variant>-seed<k>`, made by the
same launcher as `rerank run`, so what was finished is skipped and what was interrupted goes on. The data folder is
made once and shared: all variants must ask for the same data.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import pipeline
from rerank import run_dir as runs
from rerank.evaluate.results import Ranking, Sampling, metrics_per_row

logger = logging.getLogger(__name__)

SEEDED_STAGES = ("midtrain", "traces", "sft", "dapo")
METRICS = ("R@1", "R@5", "N@5")
FAILED = "parse failures"


def variant_steps(recipe_dir: str, out: str | Path, seed: int, minutes_per_run: float | None) -> list[pipeline.Step]:
    """The steps of one run: its seed in every trained stage, its minutes in equal parts over the training stages."""
    plain = pipeline.read_steps(recipe_dir, str(out), [])
    stages = [step.stage for step in plain]
    overrides = [f"{stage}.seed={seed}" for stage in stages if stage in SEEDED_STAGES]
    if minutes_per_run is not None:
        trained = [stage for stage in stages if stage in runs.TRAINING_STAGES]
        overrides += [f"{stage}.max_minutes={minutes_per_run / len(trained):.3f}" for stage in trained]
    return pipeline.read_steps(recipe_dir, str(out), overrides)


def share_data(first: Path, run: Path) -> None:
    """Let a run use the data folder of the first one."""
    link = runs.stage_dir(run, "data")
    if run != first and not link.exists():
        run.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # a link whose folder was deleted
        link.symlink_to(runs.stage_dir(first, "data").resolve())


def check_same_data(variants: Sequence[Sequence[pipeline.Step]]) -> None:
    """Refuse variants whose data recipes differ.

    Raises:
        ValueError: Naming both recipes and the key.
    """
    reference = variants[0][0]
    for steps in variants[1:]:
        if changed := runs.difference(reference.keys, steps[0].keys):
            raise ValueError(f"{steps[0].path} asks for other data than {reference.path}: {changed}; make them equal")


def row_metrics(run: Path) -> tuple[list[int], dict[str, dict[str, np.ndarray]], list[int]]:
    """Of a finished run: its row ids, each ranker's metrics per row, and the rows' users."""
    rankings = pq.read_table(runs.stage_dir(run, "evaluate") / "rankings.parquet").to_pylist()
    split = json.loads((runs.stage_dir(run, "evaluate") / "results.json").read_text())["split"]
    candidates = pq.read_table(runs.stage_dir(run, "candidates") / f"{split}.parquet", columns=["row_id", "relevance"])
    relevance_of = dict(zip(candidates["row_id"].to_pylist(), candidates["relevance"].to_pylist(), strict=True))
    row_ids = [line["row_id"] for line in rankings if line["ranker"] == "no_op"]
    users = [line["user"] for line in rankings if line["ranker"] == "no_op"]
    relevance = [relevance_of[row_id] for row_id in row_ids]
    values = {}
    for name in dict.fromkeys(line["ranker"] for line in rankings):
        orders = [line["order"] for line in rankings if line["ranker"] == name]
        values[name] = metrics_per_row(Ranking(name, orders), relevance)
        values[name][FAILED] = np.array([order is None for order in orders], dtype=float)
    values["random"] = metrics_per_row(Ranking("random", None), relevance)
    return row_ids, values, users


def table_lines(runs_of: dict[str, list[Path]]) -> list[str]:
    """The Markdown table: baselines once, then each variant's models, averaged over seeds.

    Differences are to the no-op and, for the same ranker, to the first variant; a row's value is its mean over seeds.
    """
    read = {name: [row_metrics(run) for run in folders] for name, folders in runs_of.items()}
    first = next(iter(read))
    row_ids, _, users = read[first][0]
    for name, found in read.items():
        for seed, (ids, _, _) in enumerate(found):
            if ids != row_ids:
                raise ValueError(
                    f"variant {name}, seed {seed}, was evaluated on other rows than {first}; use one split"
                )
    sampling = Sampling(users, 2000, 0)
    no_op = read[first][0][1]["no_op"]["N@5"]
    lines = [
        f"| variant | ranker | seeds | R@1 | R@5 | N@5 | {FAILED} | spread | N@5 − no-op | N@5 − first variant |",
        f"|---|---|{'---:|' * 8}",
    ]
    baselines = ("no_op", "random", "oracle", "transitions", "lambdamart")
    for name, found in read.items():
        for ranker in found[0][1]:
            if (ranker in baselines) != (name == first) and ranker in baselines:
                continue
            values = [np.mean([run[1][ranker][metric] for run in found], axis=0) for metric in METRICS]
            seeds = [run[1][ranker]["N@5"].mean() for run in found]
            reference = (
                np.mean([run[1][ranker]["N@5"] for run in read[first]], axis=0)
                if ranker in read[first][0][1]
                else None
            )
            is_baseline = ranker in baselines
            cells = [
                "–" if is_baseline else name,
                ranker,
                str(1 if is_baseline else len(found)),
                *(f"{value.mean():.4f}" for value in values),
                "–" if is_baseline else f"{np.mean([run[1][ranker][FAILED] for run in found]):.1%}",
                "–" if is_baseline or len(seeds) < 2 else f"{np.std(seeds, ddof=1):.4f}",
                "–" if ranker == "no_op" else _difference(values[2], no_op, sampling),
                "–" if name == first or reference is None else _difference(values[2], reference, sampling),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(values: np.ndarray, reference: np.ndarray, sampling: Sampling) -> str:
    mean, (low, high) = sampling.difference(values, reference)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def report(runs_of: dict[str, list[Path]], minutes_per_run: float | None, title: str) -> str:
    """The results file: what was compared, on which data, and the table."""
    some_run = next(iter(runs_of.values()))[0]
    data = runs.read_metrics(some_run, "data")
    results = json.loads((runs.stage_dir(some_run, "evaluate") / "results.json").read_text())
    budget = f", at most {minutes_per_run:g} training minutes a run" if minutes_per_run is not None else ""
    lines = [
        f"# {title}",
        "",
        f"{len(runs_of)} variants, {len(next(iter(runs_of.values())))} seeds{budget}. "
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']}.",
        "Intervals: 95 %, paired bootstrap, whole users drawn. A completion that is no ranking scores zero.",
        "",
        *(f"- data: {name}, sha256 {digest}" for name, digest in data["sources"].items()),
        "",
        *table_lines(runs_of),
    ]
    return "\n".join(lines) + "\n"


def compare(
    recipe_dirs: Sequence[str],
    num_seeds: int,
    minutes_per_run: float | None,
    out: str,
    results: str | None,
    accelerate: str,
    say: Callable[[str], None],
) -> int:
    """Run every variant and seed, then write the table; returns the exit code of the first run that fails, or 0.

    Raises:
        ValueError: On two variants of one name, or variants of different data.
    """
    names = [Path(folder).resolve().name for folder in recipe_dirs]
    if len(set(names)) < len(names):
        raise ValueError(f"two variants share a name: {', '.join(names)}; rename a folder")
    if num_seeds < 1 or (minutes_per_run is not None and minutes_per_run <= 0):
        raise ValueError(f"--seeds is {num_seeds} and --minutes_per_run {minutes_per_run}; both must be above 0")
    folders = {name: [Path(out) / f"{name}-seed{seed}" for seed in range(num_seeds)] for name in names}
    steps_of: dict[Path, Any] = {
        run: variant_steps(folder, run, seed, minutes_per_run)
        for folder, name in zip(recipe_dirs, names, strict=True)
        for seed, run in enumerate(folders[name])
    }
    check_same_data(list(steps_of.values()))
    first = folders[names[0]][0]
    for run, steps in steps_of.items():
        if run != first:
            share_data(first, run)
        say(f"== {run.name}")
        if code := pipeline.run(steps, accelerate, say):
            return code
    text = report(folders, minutes_per_run, f"Comparison of {', '.join(names)}")
    target = Path(results) if results else Path(out) / "RESULTS.md"
    target.write_text(text, encoding="utf-8")
    say(f"{text}\nwritten to {target}")
    return 0
