"""Seeds of `rerank compare`: which stages each seed makes anew, and how the results say so."""

from collections.abc import Iterable, Sequence

from rerank.compare.evaluations import RunsOf
from rerank.launch import pipeline
from rerank.launch import run_dir as runs
from rerank.launch.stages import STAGES
from rerank.launch.values import check_choice

# Stages that have the option `seed`.
SEEDED = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft", "dapo")
FIRST = SEEDED[:3]  # choices of the first one that each seed makes anew
DEFAULT_FIRST = "midtrain"


def check_first(stage: str, steps: Iterable[pipeline.Step]) -> None:
    """Refuse an unknown first stage, and a data stage that draws nothing."""
    check_choice("--seed-from", stage, FIRST)
    for step in steps:
        split = step.keys.get("split", "per_user")
        if stage == step.stage == "data" and split != "random":
            raise ValueError(
                f"--seed-from is data but {step.path} has split: {split}, which draws nothing; use semantic_ids"
            )


def overrides(steps: Sequence[pipeline.Step], seed: int, first: str) -> list[str]:
    """The words that give a seed to every stage that draws by one, from the first on."""
    later = SEEDED[SEEDED.index(first) :]
    return [f"{step.stage}.seed={seed}" for step in steps if step.stage in later and _draws(step)]


def _draws(step: pipeline.Step) -> bool:
    """Whether the seed changes anything: candidates draw further lists alone."""
    return step.stage != "candidates" or step.keys.get("lists_per_row", 1) > 1


def sentence(runs_of: RunsOf) -> str:
    """Which stages have seeds of their own, which are made from those, and which the intervals leave out."""
    own: list[str] = []
    from_own: list[str] = []
    same: list[str] = []
    for stage in [name for name in STAGES if name != "evaluate"]:
        made = [folders for folders in runs_of.values() if all(runs.is_finished(run, stage) for run in folders)]
        records = [[runs.read_record(run, stage) for run in folders] for folders in made]
        if not records:
            continue
        if any(len({record.given.get("seed") for record in of_seeds}) > 1 for of_seeds in records):
            own.append(stage)
        elif any(set(record.inputs) & {*own, *from_own} for of_seeds in records for record in of_seeds):
            from_own.append(stage)
        else:
            same.append(stage)
    texts = [f"With a seed of their own in each run: {', '.join(own)}"] if own else []
    texts += [f"made from these: {', '.join(from_own)}"] if from_own else []
    texts += [f"the same for all seeds, so that the intervals leave them out: {', '.join(same)}"] if same else []
    return "; ".join(texts) + "."
