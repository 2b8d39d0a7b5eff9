"""`rerank compare`: variants of a recipe, several seeds each, on one split, into one table.

Each variant is a recipe folder, or one recipe folder with overrides. A run of a variant and seed is an ordinary run in
`OUT/<variant>-seed<k>`, made by the same launcher as `rerank run`, so finished stages are skipped and interrupted ones
continue. With each seed all variants must ask for the same data. A stage up to which two runs have the same recipes is
made once and shared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rerank.compare import bar, curves, tables
from rerank.compare import seeds as seeding
from rerank.compare.evaluations import RunsOf, read_results
from rerank.launch import pipeline
from rerank.launch import run_dir as runs
from rerank.launch.files import write_text
from rerank.launch.stages import load_stage
from rerank.launch.values import check_range
from rerank.results.tables import counted


@dataclass(frozen=True)
class Variant:
    """A name, a recipe folder, and overrides of its keys."""

    name: str
    recipe_dir: str
    overrides: tuple[str, ...] = ()


def read_variants(recipe_dirs: Sequence[str], words: Sequence[Sequence[str]] | None) -> list[Variant]:
    """The variants of a command line: recipe folders, or one folder and for each variant its name and overrides."""
    if words and len(recipe_dirs) != 1:
        raise ValueError(f"--variant overrides one recipe folder, but {len(recipe_dirs)} are given; give one")
    if words:
        variants = [Variant(name, recipe_dirs[0], tuple(overrides)) for name, *overrides in words]
    else:
        variants = [Variant(Path(folder).resolve().name, folder) for folder in recipe_dirs]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"two variants share a name: {', '.join(names)}; rename one")
    return variants


def variant_steps(
    variant: Variant,
    out: str | Path,
    seed: int,
    minutes_per_run: float | None,
    seed_from: str = seeding.DEFAULT_FIRST,
) -> list[pipeline.Step]:
    """The steps of one run: its seed in every stage that has one, from `seed_from` on, and its training minutes.

    `{seed}` in an override is the number of the seed, such as in the path of another variant's model. The minutes are
    cut in equal parts over the training stages.
    """
    own = [word.replace("{seed}", str(seed)) for word in variant.overrides]
    plain = pipeline.read_steps(variant.recipe_dir, str(out), own)
    seeding.check_first(seed_from, plain)
    stages = [step.stage for step in plain]
    overrides = [*own, *seeding.overrides(plain, seed, seed_from)]
    if minutes_per_run is not None:
        trained = [stage for stage in stages if load_stage(stage).trains]
        overrides += [f"{stage}.max_minutes={minutes_per_run / len(trained):.3f}" for stage in trained]
    return pipeline.read_steps(variant.recipe_dir, str(out), overrides)


def share_stage(first: Path, run: Path, stage: str) -> None:
    """Let a run use the folder that a stage of an earlier one made."""
    link = runs.stage_dir(run, stage)
    if run != first and not link.exists():
        run.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # a link whose folder was deleted
        link.symlink_to(runs.stage_dir(first, stage).resolve())


def share_stages(run: Path, steps: Sequence[pipeline.Step], earlier: Mapping[Path, Sequence[pipeline.Step]]) -> None:
    """Let a run use each stage up to which an earlier run has the same recipes."""
    for other, others in earlier.items():
        for step, same in zip(steps, others, strict=False):
            if step.stage != same.stage or runs.difference(step.stage, step.keys, same.keys):
                break
            if runs.is_finished(other, step.stage):
                share_stage(other, run, step.stage)


def check_same_data(variants: Sequence[Sequence[pipeline.Step]]) -> None:
    """Refuse variants whose data recipes differ."""
    reference = variants[0][0]
    for steps in variants[1:]:
        if changed := runs.difference(reference.stage, reference.keys, steps[0].keys):
            raise ValueError(f"{steps[0].path} asks for other data than {reference.path}: {changed}; make them equal")


def report(variants: Sequence[Variant], runs_of: RunsOf, minutes_per_run: float | None, target: Path) -> str:
    """The text of the results file: variants, data and tables; every difference and a picture go beside it."""
    of_first = next(iter(runs_of.values()))
    data = runs.read_metrics(of_first[0], "data")
    results = [read_results(run) for run in of_first]
    budget = f", at most {minutes_per_run:g} training minutes a run" if minutes_per_run is not None else ""
    task, num_seeds = results[0].get("task", "rerank"), len(of_first)
    words_of = {variant.name: [Path(variant.recipe_dir).name, *variant.overrides] for variant in variants}
    lines = [
        f"# Comparison of {', '.join(runs_of)}",
        "",
        f"{counted(len(runs_of), 'variant')}, {counted(num_seeds, 'seed')}{budget}. {tables.rows_of(results)}",
        *(["", seeding.sentence(runs_of)] if num_seeds > 1 else []),
        "",
        *(f"- data: {name}, sha256 {digest}" for name, digest in data["sources"].items()),
        "",
        *(f"- {name}: {' '.join(f'`{word}`' for word in words)}" for name, words in words_of.items()),
        "",
        *tables.LINES[task](runs_of),
    ]
    bar.write(runs_of, task, target.with_suffix(bar.SUFFIX))
    if task == "rerank" and all(runs.is_finished(run, "dapo") for folders in runs_of.values() for run in folders):
        curves.draw(runs_of, target.with_suffix(".png"))
        lines += ["", *curves.table_lines(runs_of), "", f"![curves]({target.stem}.png)"]
    return "\n".join(lines) + "\n"


def compare(
    variants: Sequence[Variant],
    num_seeds: int,
    seed_from: str,
    minutes_per_run: float | None,
    out: str,
    results: str | None,
    accelerate: str,
    say: Callable[[str], None],
) -> int:
    """Run every variant and seed, then write the table; returns the exit code of the first run that fails, or 0."""
    check_range("--seeds", num_seeds, least=1)
    if minutes_per_run is not None:
        check_range("--minutes_per_run", minutes_per_run, above=0)
    folders = {v.name: [Path(out) / f"{v.name}-seed{seed}" for seed in range(num_seeds)] for v in variants}
    steps_of = {
        run: variant_steps(variant, run, seed, minutes_per_run, seed_from)
        for variant in variants
        for seed, run in enumerate(folders[variant.name])
    }
    for of_seed in zip(*folders.values(), strict=True):
        check_same_data([steps_of[run] for run in of_seed])
    from rerank.dapo.start import to_be_made

    models = [runs.stage_dir(run, stage) / "model" for run in steps_of for stage in ("sft", "dapo")]
    with to_be_made(models):
        for variant in variants:  # a misspelt key of the last one should not show after hours of the others
            pipeline.check_steps(steps_of[folders[variant.name][0]], accelerate)
    earlier: dict[Path, Sequence[pipeline.Step]] = {}
    for run, steps in steps_of.items():
        share_stages(run, steps, earlier)
        earlier[run] = steps
        say(f"== {run.name}")
        if code := pipeline.run(steps, accelerate, say):
            return code
    target = Path(results) if results else Path(out) / "RESULTS.md"
    text = report(variants, folders, minutes_per_run, target)
    write_text(target, text)
    say(f"{text}\nwritten to {target}")
    return 0
