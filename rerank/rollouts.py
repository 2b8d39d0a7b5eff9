"""What a rollout is, written and read: one Parquet row per sampled completion.

The dapo stage writes `RUN_DIR/dapo/rollouts/part-<step>-<process>[-<number>].parquet`. A part gets its name only when
it is whole and on disk, so a crash at any moment leaves readable files; `.tmp` files are what a crash cut off.
`open_rollouts` gives the parts as a DuckDB view, `read_rollouts` as a table. SCHEMA documents the columns; in SQL
`order`, `group` and `user` are reserved words and stand in double quotes. Each part carries SCHEMA_VERSION in its
metadata. Of several equally relevant candidates the target is the one that the first stage ranks best.
"""

import glob
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

SCHEMA_VERSION = "2"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step that the rollout was sampled for
        ("run", pa.string()),  # name of the run's folder
        ("round", pa.int64()),  # sampling round of dynamic sampling, 0 the first
        ("group", pa.int64()),  # rollouts of one step, round and group answer the same prompt
        ("row_id", pa.int64()),
        ("user", pa.int64()),
        ("target", pa.int64()),  # item that the row is about: the best relevant candidate
        ("history", pa.list_(pa.int64())),  # items, oldest first
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("policy_logps", pa.list_(pa.float32())),  # log-probability of each token, by the model in training
        ("sampling_logps", pa.list_(pa.float32())),  # the same, by the engine that sampled
        ("reward_components", pa.map_(pa.string(), pa.float64())),  # each reward after its gate, before its weight
        ("reward_gates", pa.map_(pa.string(), pa.bool_())),  # whether a reward's `when` held; true without one
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("truncated", pa.bool_()),
        ("failure", pa.string()),  # null for a ranking, else one of prompts.FAILURES
        ("order", pa.list_(pa.int64())),  # positions into candidates, best first; null for no ranking
        ("candidates", pa.list_(pa.int64())),  # items in the order shown
        ("candidate_labels", pa.list_(pa.string())),  # what a completion writes for each shown candidate
        ("relevance", pa.list_(pa.float64())),  # of each shown candidate
        ("first_stage_ranks", pa.list_(pa.int64())),  # 1-based, of each shown candidate
        ("target_rank_before", pa.int64()),
        ("target_rank_after", pa.int64()),  # null for no ranking
        ("kept", pa.bool_()),  # whether it was trained on
        ("discard_reason", pa.string()),  # null for a kept one, else all_equal, surplus or stale
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)
_NAMES = dict.fromkeys(SCHEMA.names)  # looked up for each record
_MAPS = [field.name for field in SCHEMA if pa.types.is_map(field.type)]
_PART = re.compile(r"part-(\d+)-(\d+)(-\d+)?\.parquet")
_MAX_PENDING = 8  # parts handed over and not yet on disk; beyond it the writer waits


class RolloutWriter:
    """Collects the rollouts of one process and writes each step as one part, in the background.

    What goes wrong there is raised by the next `add`, `flush` or `close`.

    Args:
        folder: Where parts go; made when absent.
        rank: Number of the process, so that no two write one file.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[int, list[dict[str, Any]]] = {}
        self._num_parts: dict[int, int] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future] = deque()

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep records, each with exactly the columns of SCHEMA, until `flush`."""
        self._settle(_MAX_PENDING)
        for record in records:
            self._records.setdefault(record["step"], []).append(_storable(record))

    def flush(self, wait: bool = False) -> None:
        """Hand over what was added, one part a step; a resumed run overwrites the parts of the steps it repeats.

        Args:
            wait: Return only when it is on disk.
        """
        for step in sorted(self._records):
            number = self._num_parts.get(step, 0)
            path = self.folder / f"part-{step:08d}-{self.rank}{f'-{number}' if number else ''}.parquet"
            self._pending.append(self._thread.submit(_write_part, self._records.pop(step), path))
            self._num_parts[step] = number + 1
        self._settle(0 if wait else _MAX_PENDING)

    def close(self) -> None:
        """Write what is left and end the thread."""
        try:
            self.flush(wait=True)
        finally:
            self._thread.shutdown()

    def discard_from(self, step: int, num_processes: int | None = None) -> None:
        """Delete this process's parts of `step` and later, which a run resumed from a checkpoint samples anew, and
        what a crash cut off; of the parts of processes beyond `num_processes`, which an earlier run had, a share."""
        for path in self.folder.glob("part-*"):
            if (named := _PART.fullmatch(f"{path.stem}.parquet")) is None:
                continue  # somebody else's
            written_step, rank = named[1], named[2]
            owner = int(rank) if num_processes is None else int(rank) % num_processes
            if owner == self.rank and (int(written_step) >= step or path.suffix == ".tmp"):
                path.unlink()

    def _settle(self, num_pending: int) -> None:
        """Wait until no more parts than that are pending, and raise what went wrong with those that are done."""
        while self._pending and (len(self._pending) > num_pending or self._pending[0].done()):
            self._pending.popleft().result()


def to_table(records: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Records, each with exactly the columns of SCHEMA, as the table that reading them gives."""
    return pa.Table.from_pylist([_storable(record) for record in records], schema=SCHEMA)


def _write_part(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    table, temporary = pa.Table.from_pylist(records, schema=SCHEMA), path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())  # else a machine that goes down may leave the name without the content
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


@dataclass(frozen=True)
class OpenRollouts:
    """The rollouts of a run, nothing of them read yet.

    `connection` has the view `rollouts`, the rows of all readable `parts` in order of step; `damaged` are the others.
    """

    connection: duckdb.DuckDBPyConnection
    parts: list[Path]
    damaged: list[Path]


def open_rollouts(run_dir: str | Path) -> OpenRollouts:
    """The parts of a run as a DuckDB view; files that are cut off are left out and counted in one warning.

    Args:
        run_dir: A run, its dapo folder (finished or partial), or the folder of the parts.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: When there is no readable part, or one of another schema version.
    """
    parts = _parts(Path(run_dir))
    versions = _read_versions(parts)
    _check_versions(versions)
    return _open(run_dir, list(versions), [path for path in parts if path not in versions])


def read_rollouts(run_dir: str | Path, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
    """The rollouts of a run, by step.

    Args:
        run_dir: As in `open_rollouts`.
        columns: Those to read; all when None.
        where: A SQL condition over the columns, such as `kept = false and target_rank_after > target_rank_before`.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: As `open_rollouts`, and when `where` is no condition over the columns.
    """
    return _read(run_dir, open_rollouts(run_dir), SCHEMA.names if columns is None else columns, where)


def _parts(run_dir: Path) -> list[Path]:
    """The files of parts, by step, process and number."""
    for folder in ("dapo/rollouts", "dapo.partial/rollouts", "rollouts", "."):
        found = [path for path in (run_dir / folder).glob("part-*.parquet") if _PART.fullmatch(path.name)]
        if found:
            return sorted(found, key=lambda path: [int(number) for number in path.stem.split("-")[1:]])
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder of a run")
    raise ValueError(f"{run_dir} holds no rollouts; run the dapo stage, or give the folder of a run that did")


def _read_versions(parts: Sequence[Path]) -> dict[Path, str]:
    """The schema version of each part that is whole, "none" where it names none."""
    whole = [path for path in parts if _has_footer(path)]
    query = "select file_name, value from parquet_kv_metadata(?) where key = 'schema_version'"
    try:
        found = dict(duckdb.execute(query, [_literal(whole)]).fetchall()) if whole else {}
    except duckdb.Error:  # a footer that cannot be read: find out which
        whole = [path for path in whole if _can_be_read(path)]
        found = dict(duckdb.execute(query, [_literal(whole)]).fetchall()) if whole else {}
    return {path: found.get(str(path), b"none").decode() for path in whole}


def _has_footer(path: Path) -> bool:
    """Whether a file ends as Parquet does: not when it is cut off. A thousandth of the time that parsing it takes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        ending = file.read()
    return ending.endswith(b"PAR1") and int.from_bytes(ending[:4], "little") + 12 <= size


def _can_be_read(path: Path) -> bool:
    try:
        pq.read_table(path)
    except (pa.ArrowInvalid, OSError):
        return False
    return True


def _check_versions(versions: Mapping[Path, str]) -> None:
    first: dict[str, Path] = {}
    for path, version in versions.items():
        first.setdefault(version, path)
    if len(first) > 1:
        (version, path), (other, other_path) = list(first.items())[:2]
        raise ValueError(
            f"{path} has rollout schema version {version} but {other_path} has {other}; "
            "move the rollouts of one version to a folder of their own"
        )
    for version, path in first.items():
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has rollout schema version {version} but this code reads {SCHEMA_VERSION}; "
                "read it with the version of rerank that wrote it"
            )


def _open(run_dir: str | Path, parts: list[Path], damaged: list[Path]) -> OpenRollouts:
    if damaged:
        steps = sorted({int(_PART.fullmatch(path.name)[1]) for path in damaged})
        named = ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")
        logger.warning(
            "%d of %d rollout files are cut off or damaged and left out (of steps %s), the first is %s; "
            "delete what is damaged",
            len(damaged),
            len(parts) + len(damaged),
            named,
            damaged[0],
        )
    if not parts:
        raise ValueError(f"{run_dir} holds no readable rollouts; run the dapo stage, or give the folder of such a run")
    connection = duckdb.connect()
    connection.read_parquet(_literal(parts)).create_view("rollouts")
    return OpenRollouts(connection, parts, damaged)


def _literal(paths: Iterable[Path]) -> list[str]:
    """Paths for DuckDB, which else takes `[`, `*` and `?` in them for patterns."""
    return [glob.escape(str(path)) for path in paths]


def _read(run_dir: str | Path, opened: OpenRollouts, columns: Sequence[str], where: str | None) -> pa.Table:
    schema = pa.schema([SCHEMA.field(name) for name in columns], SCHEMA.metadata)
    names = ", ".join(f'"{name}"' for name in columns)
    rows = opened.connection.view("rollouts")
    try:
        rows = rows if where is None else rows.filter(where)
    except duckdb.Error as error:
        raise ValueError(_refusal(where, error)) from None
    try:
        return rows.project(names).to_arrow_table().cast(schema)
    except duckdb.Error as error:
        whole = without_damaged(run_dir, opened)
        if whole is None:
            raise ValueError(_refusal(where, error)) from None
    return _read(run_dir, whole, columns, where)


def without_damaged(run_dir: str | Path, opened: OpenRollouts) -> OpenRollouts | None:
    """What is left without the parts that are damaged inside, after one warning; None when all can be read."""
    damaged = [path for path in opened.parts if not _can_be_read(path)]
    whole = [path for path in opened.parts if path not in damaged]
    return _open(run_dir, whole, damaged) if damaged else None


def _refusal(where: str | None, error: duckdb.Error) -> str:
    reason = str(error).splitlines()[0].rstrip("!")
    return f"{where!r} is no SQL condition over the columns of rollouts ({reason}); they are {', '.join(SCHEMA.names)}"


def _storable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as Arrow takes it: maps as pairs, and text without lone surrogates, which are not UTF-8."""
    missing = [name for name in _NAMES if name not in record]
    unknown = [name for name in record if name not in _NAMES]
    if missing or unknown:
        raise ValueError(f"a rollout must have the columns of rollouts.SCHEMA; missing {missing}, unknown {unknown}")
    texts = {name: _utf8(record[name]) for name in ("prompt", "completion")}
    return {**record, **texts, **{name: list(record[name].items()) for name in _MAPS}}


def _utf8(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
