"""Shards: equal parts of the rows that a stage runs a model over, each made by a command of its own.

`--shard 2/8` makes `RUN_DIR/<stage>.shard-2-of-8`, a folder with the lock, the record and the `.partial` folder of a
stage's. Once all eight are finished, the same command without `--shard` reads them where it would have run the model,
and deletes them when the stage's own folder is complete.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import run_dir as runs
from rerank.launch.files import write_whole
from rerank.launch.run_dir import Values
from rerank.launch.stages import STAGES, load_stage

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Shard `number`, from 1, of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """A shard as the command line has it, `2/8`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--shard is {text} but must be I/N with I from 1 to N, such as 2/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def name(self, stage: str) -> str:
        """Of its folder."""
        return f"{stage}.shard-{self.number}-of-{self.count}"

    def of(self, rows: Sequence[T]) -> Sequence[T]:
        """Its rows, in order; the shards' rows one after the other are all rows.

        Raises:
            ValueError: When there are more shards than rows, so that some have none.
        """
        if 0 < len(rows) < self.count:
            raise ValueError(
                f"--shard is {self} but there are {len(rows)} rows; make at most {len(rows)} shards, and delete the "
                "folders of these"
            )
        start, end = (len(rows) * number // self.count for number in (self.number - 1, self.number))
        return rows[start:end]


ALL_ROWS = Shard(1, 1)


def folder_name(run_dir: str | Path, stage: str, shard: Shard | None) -> str:
    """The name of the folder that a command makes: a shard's, or the stage's own, also where that is finished."""
    return stage if shard is None or runs.is_finished(run_dir, stage) else shard.name(stage)


def check_stage_takes(stage: str, shard: Shard | None) -> None:
    """Refuse a shard of a stage that runs no model over rows."""
    if shard is not None and load_stage(stage).main_of_shard is None:
        known = [name for name in STAGES if load_stage(name).main_of_shard is not None]
        raise ValueError(f"--shard {shard}: the stage {stage} has no shards, only {', '.join(known)}; leave it out")


def begun(run_dir: str | Path, stage: str) -> list[Shard]:
    """The shards of a stage that are begun or finished, by number."""
    name = re.compile(rf"{stage}\.shard-(\d+)-of-(\d+)(?:\.partial)?")
    found = [match for path in Path(run_dir).glob(f"{stage}.shard-*") if (match := name.fullmatch(path.name))]
    return sorted({Shard(int(match[1]), int(match[2])) for match in found}, key=lambda one: (one.count, one.number))


def check(
    run_dir: str | Path,
    stage: str,
    given: Values,
    arguments: Sequence[Any],
    shard: Shard | None,
    command: str,
    remade: Sequence[str] = (),
    accelerate: str | None = None,
) -> None:
    """Refuse shards that do not go together or with the recipe, and a merge that lacks one.

    Args:
        run_dir: Folder of the run.
        stage: Name of the stage, which is not finished.
        given: The keys of its recipe.
        arguments: Its dataclasses.
        shard: To make; None to merge those that are there.
        command: That makes a shard once `--shard I/N` is added.
        remade: Stages that the same command is about to run again.
        accelerate: The accelerate file of the command.

    Raises:
        ValueError, FileNotFoundError: Naming the folder and the cure.
    """
    if shard is not None:
        load_stage(stage).check_shard(*arguments)
    others = begun(run_dir, stage)
    together = [*others, *([shard] if shard else [])]
    if other := next((one for one in together if one.count != together[-1].count), None):
        folders = [runs.stage_dir(run_dir, one.name(stage)) for one in (other, together[-1])]
        raise ValueError(
            f"{folders[0]} is one of {other.count} shards but {folders[1]} one of {together[-1].count}; give one "
            "number for all, and delete the folders of the other"
        )
    finished = [one for one in others if runs.is_finished(run_dir, one.name(stage))]
    for one in finished:
        runs.check_finished(run_dir, one.name(stage), given, remade, accelerate)
    if others and shard is None and len(finished) < others[0].count:
        every = [Shard(number, others[0].count) for number in range(1, others[0].count + 1)]
        missing = [one for one in every if one not in finished]
        raise FileNotFoundError(
            f"{runs.stage_dir(run_dir, missing[0].name(stage))} is missing, so that the shards of {stage} cannot be "
            f"merged; make {', '.join(map(str, missing))}: `{command} --shard {missing[0]}`"
        )


def make(folder: Path, name: str, rows: Callable[[], pa.Table]) -> None:
    """Write a table of a shard's rows into its folder, whole or not at all; nothing is made again that is there."""
    path = folder / f"{name}.parquet"
    if not path.is_file():
        write_whole(path, partial(pq.write_table, rows()))


def merged(run_dir: str | Path, stage: str, name: str) -> pa.Table | None:
    """The table that the shards of a stage have made, in the order of the shards; None where it has no shards."""
    paths = [runs.stage_dir(run_dir, one.name(stage)) / f"{name}.parquet" for one in begun(run_dir, stage)]
    return pa.concat_tables([pq.read_table(path) for path in paths]) if paths else None
