"""The store of rollouts, written and read: one Parquet row for each sampled completion.

The dapo stage writes `RUN_DIR/dapo/rollouts/part-<step>-<process>[-<number>].parquet`. A part gets its name only when
it is whole and on disk, so a crash at any moment leaves readable files; `.tmp` files are what a crash cut off.
`open_rollouts` gives the parts as a DuckDB view, `read_rollouts` as a table. `schema.SCHEMA` documents the columns;
each part carries its version in its metadata.
"""

import glob
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch.files import write_whole
from rerank.rollouts.schema import BEFORE_5, KNOWN, RENAMED, SCHEMA, SCHEMA_VERSION, Rollout

logger = logging.getLogger(__name__)

# by version that can be read: where a column has another source; columns that it lacks are null
OLD_NAMES = {
    "2": {name: old for old, name in RENAMED.items()} | BEFORE_5 | {"positive_rank": "target_rank_before"},
    "3": BEFORE_5,
    "4": BEFORE_5,
    SCHEMA_VERSION: {},
}
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
        self._records: dict[int, list[Rollout]] = {}
        self._num_parts: dict[int, int] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()

    def add(self, records: Iterable[Rollout]) -> None:
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
        with self._thread:
            self.flush(wait=True)

    def discard_from(self, step: int, num_processes: int) -> None:
        """Delete this process's parts of `step` and later, which a run resumed from a checkpoint samples anew, and
        what a crash cut off; of the parts of processes beyond `num_processes`, which an earlier run had, a share."""
        for path in self.folder.glob("part-*"):
            named = _PART.fullmatch(path.name.removesuffix(".tmp"))
            if named is None or int(named[2]) % num_processes != self.rank:
                continue  # somebody else's
            if int(named[1]) >= step or path.suffix == ".tmp":
                path.unlink()

    def _settle(self, num_pending: int) -> None:
        """Wait until no more than `num_pending` parts are pending; raise what went wrong with those that are done."""
        while self._pending and (len(self._pending) > num_pending or self._pending[0].done()):
            self._pending.popleft().result()


def to_table(records: Iterable[Rollout]) -> pa.Table:
    """Records, each with exactly the columns of SCHEMA, as the table that reading them gives."""
    return pa.Table.from_pylist([_storable(record) for record in records], schema=SCHEMA)


def _write_part(records: Sequence[Rollout], path: Path) -> None:
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    write_whole(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _storable(record: Rollout) -> Rollout:
    """A record as Arrow takes it: maps as pairs, and text without lone surrogates, which are not UTF-8."""
    missing = [name for name in _NAMES if name not in record]
    unknown = [name for name in record if name not in _NAMES]
    if missing or unknown:
        raise ValueError(f"a rollout must have the columns of rollouts.SCHEMA; missing {missing}, unknown {unknown}")
    texts = {name: record[name].encode(errors="replace").decode() for name in ("prompt", "completion")}
    return {**record, **texts, **{name: list(record[name].items()) for name in _MAPS}}


@dataclass(frozen=True)
class OpenRollouts:
    """The rollouts of a run, read when they are asked for.

    Attributes:
        connection: Has the view `rollouts`, the rows of `parts` in order of step.
        parts: The files that are whole.
        damaged: The files that are cut off, or whose footer is no Parquet.
        absent: Columns of SCHEMA that an older store lacks and whose values are not known; they are null.
    """

    connection: duckdb.DuckDBPyConnection
    parts: list[Path]
    damaged: list[Path]
    absent: list[str]

    def query(self, sql: str) -> pa.Table:
        """The result of a query.

        Raises:
            ValueError: Naming a part that is damaged inside.
        """
        try:
            return self.connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            self.refuse_damaged(error)
            raise

    def records(self, sql: str) -> list[Rollout]:
        """The rows of the result of a query, as dictionaries; errors as of `query`."""
        found: list[Rollout] = self.query(sql).to_pylist(maps_as_pydicts="strict")
        return found

    def read(self, columns: Sequence[str] = SCHEMA.names, where: str = "true") -> pa.Table:
        """These columns of the rollouts that meet a SQL condition, by step; errors as of `query`."""
        quoted = ", ".join(f'"{name}"' for name in columns)
        found = self.query(f"SELECT {quoted} FROM rollouts WHERE {where}")
        return found.cast(pa.schema([SCHEMA.field(name) for name in columns], SCHEMA.metadata))

    def refuse_damaged(self, error: duckdb.Error) -> None:
        """Name the part that is damaged inside, if that is why a query failed, and not the query itself."""
        if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.ConversionException):
            return
        for path in self.parts:
            try:
                pq.read_table(path)
            except (pa.ArrowInvalid, OSError):
                raise ValueError(f"{path} is damaged; delete it") from None


def open_rollouts(run_dir: str | Path) -> OpenRollouts:
    """The parts of a run as a DuckDB view; files that are cut off are left out and counted in one warning.

    Args:
        run_dir: A run, its dapo folder (finished or partial), or the folder of the parts.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: When it holds no rollouts, or some of a schema version that cannot be read.
    """
    found = {path: _read_footer(path) for path in _parts(Path(run_dir))}
    whole = {path: footer for path, footer in found.items() if footer is not None}
    damaged = [path for path in found if path not in whole]
    if damaged:
        steps = sorted({int(path.stem.split("-")[1]) for path in damaged})
        named = ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")
        logger.warning(
            f"{len(damaged)} of {len(found)} rollout files are cut off or damaged and left out (of steps {named}), "
            f"the first is {damaged[0]}; delete what is damaged"
        )
    if not whole:
        raise ValueError(f"{run_dir} holds no readable rollouts; run the dapo stage, or give the folder of such a run")
    first: dict[str, Path] = {}  # part of each version
    for path, footer in whole.items():
        first.setdefault(str((footer.metadata or {}).get(b"schema_version", b"none"), "utf-8"), path)
    version = _check_versions(first)
    if not any(footer.num_rows for footer in whole.values()):
        raise _no_rollouts(run_dir)
    stored = set.intersection(*(set(footer.schema.to_arrow_schema().names) for footer in whole.values()))
    sources = {name: OLD_NAMES[version].get(name, name) for name in SCHEMA.names}
    lacking = [name for name, source in sources.items() if source not in stored]
    absent = [name for name in lacking if name not in KNOWN]
    return OpenRollouts(_connect(list(whole), sources, lacking), list(whole), damaged, absent)


def read_rollouts(run_dir: str | Path, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The rollouts of a run, by step; arguments and errors as of `open_rollouts` and `OpenRollouts.read`."""
    return open_rollouts(run_dir).read(columns)


def _parts(run_dir: Path) -> list[Path]:
    """The files of parts, by step, process and number."""
    for folder in ("dapo/rollouts", "dapo.partial/rollouts", "rollouts", "."):
        found = [path for path in (run_dir / folder).glob("part-*.parquet") if _PART.fullmatch(path.name)]
        if found:
            return sorted(found, key=lambda path: [int(number) for number in path.stem.split("-")[1:]])
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder of a run")
    raise _no_rollouts(run_dir)


def _no_rollouts(run_dir: str | Path) -> ValueError:
    return ValueError(f"{run_dir} holds no rollouts; run the dapo stage, or give the folder of a run that did")


def _read_footer(path: Path) -> pq.FileMetaData | None:
    """The metadata at the end of a part, None where it is cut off or damaged."""
    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return None


def _check_versions(first: Mapping[str, Path]) -> str:
    """The one schema version of all parts, which must be one that can be read; `first` is a part of each."""
    (version, path), *others = first.items()
    for other, other_path in others:
        raise ValueError(
            f"{path} has rollout schema version {version} but {other_path} has {other}; "
            "move the rollouts of one version to a folder of their own"
        )
    if version not in OLD_NAMES:
        raise ValueError(
            f"{path} has rollout schema version {version} but this code reads {', '.join(OLD_NAMES)}; "
            "read it with the version of rerank that wrote it"
        )
    return version


def _connect(parts: Iterable[Path], sources: Mapping[str, str], lacking: Sequence[str]) -> duckdb.DuckDBPyConnection:
    """A connection with the view `rollouts`: the columns of SCHEMA, each from its source; of those that the parts lack
    the values in KNOWN, else null."""
    connection = duckdb.connect()
    paths = [glob.escape(str(path)) for path in parts]  # DuckDB takes `[`, `*` and `?` for patterns
    types = dict(zip(SCHEMA.names, connection.from_arrow(SCHEMA.empty_table()).types, strict=True))
    columns = (
        f'{KNOWN.get(name, "NULL")}::{types[name]} AS "{name}"' if name in lacking else f'"{source}" AS "{name}"'
        for name, source in sources.items()
    )
    connection.read_parquet(paths).project(", ".join(columns)).create_view("rollouts")
    return connection
