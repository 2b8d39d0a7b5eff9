"""Files that a recipe names: what a stage found in them, and whether they still hold the same.

A stage records size, times and sha256 of each file as it begins. Whatever skips or resumes it compares sizes and times
first and hashes only where they differ: a file that was touched, copied or moved to where its `${VARIABLE}` points is
the same file, an edited one is not.

Compared are the files and folders of the options that a stage declares, of the trainer's own, and the file of each
plugin, short names too, but not what a plugin imports. A name on the Hugging Face hub is no file; a file that is gone
cannot be compared, and a stage that needs it says so. The accelerate file says where a stage trains, so one of another
path is never compared, and one of the same path is.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import yaml

from rerank.launch.files import files_of, fingerprint, glob_of, name_in
from rerank.launch.stages import Stage
from rerank.launch.values import default_of
from rerank.models import names

ACCELERATE_VARIABLE = "RERANK_ACCELERATE_FILE"  # tells a launched stage its accelerate file
ACCELERATE_KEY = "the accelerate file"
TRAINER_KEYS = ("accelerator_config", "chat_template_path", "deepspeed", "fsdp_config")  # options of TRL's


@dataclass(frozen=True)
class NamedFile:
    """A file or folder that a recipe names.

    Attributes:
        key: Of the recipe.
        name: As the recipe has it, or the full name of a module.
        is_module: Whether it is a module.
    """

    key: str
    name: str
    is_module: bool = False

    def find(self) -> Path | None:
        """Where it is; None where nothing is there."""
        if self.is_module:
            return _module_file(self.name)
        try:
            path = names.locate(self.name, self.key)
        except (ValueError, FileNotFoundError):  # a variable that is not set, a package that is not installed
            return None
        without_split = path.partition("@")[0]
        tried = (path, without_split, without_split.partition(":")[0])  # a data set is named FOLDER[:CONFIG][@SPLIT]
        return next((Path(text) for text in tried if text and (Path(text).exists() or glob_of(text))), None)


@dataclass(frozen=True)
class FileRecord(NamedFile):
    """A named file as a stage found it.

    Attributes:
        size: Bytes, of all files of a folder or a glob.
        times: Nanoseconds of its last modification and of its last change of status; of a folder or a glob a hash of
            those of its files.
        sha256: Of its content, as `fingerprint` has it.
    """

    size: int = 0
    times: str = ""
    sha256: str = ""


def named_files(stage: Stage, keys: Mapping[str, object], accelerate: str | None = None) -> list[NamedFile]:
    """The files that the recipe of a stage names, and the accelerate file of a stage that trains.

    Args:
        stage: Its declaration.
        keys: Of the recipe, which is valid.
        accelerate: The path with which the stage is launched, where it is known.
    """
    defaults = {option.name: default_of(option) for cls in stage.arguments for option in dataclasses.fields(cls)}
    values, found = {**defaults, **keys}, list[NamedFile]()
    for declared in (*stage.files, *(TRAINER_KEYS if stage.trains else ())):
        key, _, inside = declared.partition("/")
        if values.get(key) != defaults.get(key):  # a default, such as `packages`, is never a file
            names_given = _texts(values[key])
            found += [NamedFile(key, str(Path(name) / inside) if inside else name) for name in names_given]
    for key, folder in stage.plugins.items():
        found += _plugin_files(key, values[key], folder)
    if accelerate and stage.trains:
        found.append(NamedFile(ACCELERATE_KEY, str(Path(accelerate).resolve())))
    return list(dict.fromkeys(found))


def _texts(value: object) -> list[str]:
    """A text, or the texts of a mapping."""
    several = value.values() if isinstance(value, Mapping) else [value]
    return [text for text in several if isinstance(text, str)]


def _plugin_files(key: str, value: object, folder: str) -> list[NamedFile]:
    """The files of a recipe's plugins and of their conditions, and those in which the list of them stands."""
    found = list[NamedFile]()
    for _ in range(2):  # as `scoring.read_rewards` reads them
        if isinstance(value, str):
            found.append(NamedFile(key, value))
            value = yaml.safe_load(Path(value).read_text(encoding="utf-8"))[key]
    assert isinstance(value, list)  # as of every valid recipe
    for entry in value:
        found.append(_plugin_file(key, entry["name"], folder))
        if entry.get("condition"):
            found.append(_plugin_file(key, entry["condition"], f"{folder}.conditions"))
    return found


def _plugin_file(key: str, name: str, folder: str) -> NamedFile:
    """The file of a plugin, whose name `plugins.load_function` takes."""
    place = name.rpartition(":")[0]
    return NamedFile(key, place or f"{folder}.{name}", is_module=not place.endswith(".py"))


def _module_file(module: str) -> Path | None:
    """The file of a module, of which nothing is imported."""
    first, *inner = module.split(".")
    spec, name = importlib.util.find_spec(first), first
    for part in inner:
        if spec is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def record(files: Iterable[NamedFile], known: Sequence[FileRecord] = ()) -> list[FileRecord]:
    """The files as they are, without those that are not there.

    Args:
        files: Named by a recipe.
        known: Records of the same stage. They stay as they are for a file that is gone, and spare the hash of one of
            the same size and times.
    """
    found, before = [], {NamedFile(one.key, one.name, one.is_module): one for one in known}
    for file in files:
        path, known_one = file.find(), before.get(file)
        if path is not None:
            size, times = _size_and_times(path)
            if known_one is None or (known_one.size, known_one.times) != (size, times):
                known_one = FileRecord(
                    **dataclasses.asdict(file), size=size, times=times, sha256=_sha256(path, size, times)
                )
        if known_one is not None:
            found.append(known_one)
    return found


def changed(records: Iterable[FileRecord], accelerate: str | None = None) -> str | None:
    """The first file with another content than recorded, in words with both, or None.

    Args:
        records: Of a stage.
        accelerate: The path of the accelerate file of this launch.
    """
    launched_with = str(Path(accelerate).resolve()) if accelerate else None
    for known in records:
        path = known.find()
        if path is None or (known.key == ACCELERATE_KEY and known.name != launched_with):
            continue
        size, times = _size_and_times(path)
        if (size, times) != (known.size, known.times) and (sha256 := _sha256(path, size, times)) != known.sha256:
            where = "" if str(path) == known.name else f" ({path})"
            hint = " (one of another path is not compared)" if known.key == ACCELERATE_KEY else ""
            return (
                f"{known.key} {known.name}{where}: {known.size} bytes, sha256 {known.sha256[:12]} there and {size} "
                f"bytes, sha256 {sha256[:12]} here{hint}"
            )
    return None


def _size_and_times(path: Path) -> tuple[int, str]:
    """Bytes, and a text of the times of a file or of all files of a folder."""
    stats = {file: file.stat() for file in files_of(path)}
    size = sum(stat.st_size for stat in stats.values())
    times = {file: f"{stat.st_mtime_ns} {stat.st_ctime_ns}" for file, stat in stats.items()}
    if path in times:
        return size, times[path]
    lines = (f"{name_in(path, file)} {stats[file].st_size} {times[file]}\n" for file in stats)
    return size, hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.cache
def _sha256(path: Path, size: int, times: str) -> str:
    """The fingerprint of a file, computed once while its size and times stay the same."""
    return fingerprint(path)
