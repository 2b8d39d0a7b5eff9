"""The engines of the stages data and candidates, which compute tables, counts and lists: DuckDB here, or Spark.

Users' files are read by DuckDB alone, in a stream and in their order: it numbers the rows by file and line
(`source_row`) and turns cells into text, seconds and numbers, so that both engines begin with one table. From there on
an engine is Ibis expressions, stored tables and Parquet files.
"""

import contextlib
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import ibis
import ibis.expr.operations as ops
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.types import Table

from rerank.launch.database import database
from rerank.launch.files import write_whole

P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S", bound="Shared")
CELL = "cell"  # a column of pickled objects
_STORED = "ibis_table_"  # begins the names of stored tables
_SPARK_OPTIONS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",  # what overflows or is no number ends the stage, and is no null
    "spark.sql.catalogImplementation": "in-memory",  # no metastore of Hive in the working folder
    "spark.sql.parquet.compression.codec": "snappy",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "1",  # a cell may hold a part of the rows
    "spark.sql.execution.arrow.pyspark.enabled": "false",  # else a small table has a partition a row
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}


class Shared(Protocol):
    """An object that processes of an engine need: written once, and read by each."""

    def save(self, path: Path) -> None:
        """Write one file."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of `save`."""


class DuckDB:
    """DuckDB, which reads the files and computes the tables in one process, out of core.

    Attributes:
        is_local: Whether rows that it holds are read into this process at no cost.
        reader: The database that reads.
        con: The one that computes.
        on_disk: Whether stored tables stand in the file of the database, not among its temporary ones.
    """

    is_local = True

    def __init__(self, reader: ibis.BaseBackend, on_disk: bool = False) -> None:
        """On a database of `launch.database`."""
        self.reader = self.con = reader
        self.on_disk = on_disk

    def taken(self, table: Table) -> Table:
        """A table of the reader's as one of this engine."""
        return table

    def stored(self, table: Table) -> Table:
        """The table computed and kept until `keep_only`."""
        return self.con.create_table(ibis.util.gen_name("table"), table, temp=not self.on_disk)

    def fetched(self, table: Table) -> pa.Table:
        """The rows of a table, which fit into memory."""
        return self.con.to_pyarrow(table)

    def keep_only(self, *tables: Table) -> None:
        """Drop every stored table that these do not stand on."""
        drop_others(self.reader, tables)

    def write(self, table: Table, path: Path) -> None:
        """Write one Parquet file, whole or not at all, its rows as the table orders them."""
        write_whole(path, lambda temporary: self.con.to_parquet(table, temporary))

    def mapped(self, function: Callable[[P, S], R], shared: S, parts: Iterable[P]) -> Iterator[R]:
        """The results of a function, called on one part after the other.

        Args:
            function: From a part and what is shared; of a module, since other processes may call it.
            shared: An object that all parts need.
            parts: What pickle takes; read one by one.
        """
        return (function(part, shared) for part in parts)


class Spark(DuckDB):
    """Spark, which computes the tables; each is stored as Parquet in a folder that goes with the engine."""

    is_local = False

    def __init__(self, reader: ibis.BaseBackend, session: Any, folder: Path) -> None:
        """On a session; `folder` is one that all its machines see."""
        super().__init__(reader)
        self.session, self.folder = session, folder
        self.con = ibis.pyspark.connect(session)

    def taken(self, table: Table) -> Table:
        """A table of the reader's as one of this engine; the reader's are dropped."""
        path = self._new_path()
        self.reader.to_parquet(table, path)
        drop_others(self.reader, ())
        return self.con.read_parquet(str(path), table_name=path.name)

    def stored(self, table: Table) -> Table:
        """The table computed and kept until `keep_only`."""
        path = self._new_path()
        self.con.to_parquet(table, path)
        return self.con.read_parquet(str(path), table_name=path.name)

    def fetched(self, table: Table) -> pa.Table:
        """The rows of a table, which fit into memory; they come by a file, not through the driver of Spark."""
        path = self._new_path()
        self.con.to_parquet(table, path)
        found = pq.read_table(path)
        shutil.rmtree(path)
        return found

    def keep_only(self, *tables: Table) -> None:
        """Delete every stored table that these do not stand on."""
        kept = _names(tables)
        for path in self.folder.iterdir():
            if path.name.startswith(_STORED) and path.name not in kept:
                self.session.catalog.dropTempView(path.name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, table: Table, path: Path) -> None:
        """Write one Parquet file, whole or not at all, its rows as the table orders them."""
        parts = self._new_path()
        self.con.to_parquet(table, parts)
        write_whole(path, lambda temporary: join_parts(sorted(parts.glob("*.parquet")), temporary))
        shutil.rmtree(parts)

    def mapped(self, function: Callable[[P, S], R], shared: S, parts: Iterable[P]) -> Iterator[R]:
        """The results of a function, called on the parts by processes of Spark, in any order.

        Parts and results are cells of Parquet files in the folder of the engine, all parts before the first result.
        """
        given, found, path = self._new_path(), self._new_path(), self._new_path()
        given.mkdir()
        number = 0
        try:
            for part in parts:
                pq.write_table(pa.table({CELL: [pickle.dumps(part)]}), given / f"{number:06d}.parquet")
                number += 1
            if not number:
                return
            shared.save(path)
            work = partial(_map_cells, function, type(shared), path)
            frame = self.session.read.parquet(str(given)).repartition(number)
            frame.mapInArrow(work, f"{CELL} binary").write.parquet(str(found))
            for file in sorted(found.glob("*.parquet")):
                with pq.ParquetFile(file) as results:
                    for batch in results.iter_batches(batch_size=1):
                        yield from map(pickle.loads, batch.column(CELL).to_pylist())
        finally:
            for folder in (given, found):
                shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)

    def _new_path(self) -> Path:
        return self.folder / ibis.util.gen_name("table")


def _map_cells(
    function: Callable[[Any, Any], object], kind: type[Shared], path: Path, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """In a process of Spark: the results of the parts in cells."""
    for batch in batches:
        for cell in batch.column(0).to_pylist():
            result = function(pickle.loads(cell), _loaded(kind, path))
            yield pa.RecordBatch.from_pydict({CELL: [pickle.dumps(result)]})


_LAST: dict[Path, Any] = {}  # of this process


def _loaded(kind: type[Shared], path: Path) -> Any:
    if path not in _LAST:
        _LAST.clear()  # before another is read
        _LAST[path] = kind.load(path)
    return _LAST[path]


def _names(tables: Sequence[Table]) -> set[str]:
    return {node.name for table in tables for node in table.op().find(ops.DatabaseTable)}


def drop_others(con: ibis.BaseBackend, tables: Sequence[Table]) -> None:
    """Drop the tables of a DuckDB that these do not stand on; those of rejected lines stay."""
    kept = _names(tables)
    for (name,) in con.con.execute("SELECT table_name FROM duckdb_tables()").fetchall():
        if name not in kept and not name.startswith("ibis_rejects"):
            con.con.execute(f'DROP TABLE "{name}"')


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Write the rows of Parquet files into one, in their order, some thousand at a time, integers as int64."""
    fields = pq.read_schema(parts[0]).remove_metadata()
    wide = [pa.field(field.name, pa.int64() if pa.types.is_integer(field.type) else field.type) for field in fields]
    with pq.ParquetWriter(path, pa.schema(wide)) as writer:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                writer.write_batch(batch.cast(writer.schema))


def check_backend(backend: str) -> None:
    """Refuse an engine that is not installed.

    Raises:
        ValueError: With the line that installs it.
    """
    if backend != "pyspark":
        return
    cure = "or set backend: duckdb"
    if find_spec("pyspark") is None:
        raise ValueError(f"backend is pyspark but pyspark is not installed; pip install 'rerank[spark]', {cure}")
    java_home = os.environ.get("JAVA_HOME")
    if not shutil.which("java", path=f"{java_home}/bin" if java_home else None):
        where = f"JAVA_HOME is {java_home}, which has no bin/java" if java_home else "there is no java"
        raise ValueError(f"backend is pyspark but {where}; apt-get install -y openjdk-17-jre-headless, {cure}")


@contextlib.contextmanager
def engine(backend: str, on_disk: bool = False, **limits: int) -> Iterator[DuckDB]:
    """The engine of a backend, whose files are in a temporary folder (TMPDIR) that goes with it.

    Args:
        backend: One of `launch.values.BACKENDS`.
        on_disk, **limits: Of `launch.database`.

    Raises:
        ValueError: When it is not installed or does not start.
    """
    check_backend(backend)
    with database(on_disk=on_disk, **limits) as reader:
        if backend == "duckdb":
            yield DuckDB(reader, on_disk)
            return
        with tempfile.TemporaryDirectory() as folder:
            session = _start_spark(Path(folder))
            try:
                yield Spark(reader, session, Path(folder))
            finally:
                session.stop()


def _start_spark(folder: Path) -> Any:
    """A session; its master and memory are those of `spark-defaults.conf` or PYSPARK_SUBMIT_ARGS."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else the first python3 of the path
    builder = SparkSession.builder.appName("rerank")
    places = {"spark.sql.warehouse.dir": str(folder / "warehouse"), "spark.local.dir": str(folder / "local")}
    for name, value in (_SPARK_OPTIONS | places).items():
        builder = builder.config(name, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # of Java, of Py4J or of Spark
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"backend is pyspark but Spark does not start: {reason}; set backend: duckdb") from None
    session.sparkContext.setLogLevel("ERROR")
    return session
