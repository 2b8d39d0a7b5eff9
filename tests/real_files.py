"""Files of any kind, written and read as the data stage reads them."""

import functools
import gzip
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from rerank import data
from rerank.data import tables
from rerank.data.prepare import prepared
from rerank.data.requests.read import item_source
from rerank.data.sources.opening import open_source


@functools.cache
def connection() -> ibis.BaseBackend:
    """One database for all tests of a process."""
    return ibis.duckdb.connect(temp_directory=tempfile.mkdtemp())


def write(path: Path, content) -> None:
    """Text, bytes, objects a line, or a Parquet table; gzipped if named so."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
        return
    if isinstance(content, list):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read_interactions(name: str, content=None, **options):
    """(user, item, time) of every interaction, in the order of the file, and the rows left out by reason."""
    if content is not None:
        write(Path(name), content)
    args = data.DataArguments(run_dir="run", interactions=name, **options)
    source = open_source(connection(), args.asked("interactions"))
    table, _, left_out = tables.read_interactions(connection(), source, args)
    rows = table.order_by("source_row").to_pyarrow().to_pylist()
    return [(row["user_id"], row["item_id"], row["time"]) for row in rows], left_out


def prepare(args: data.DataArguments) -> SimpleNamespace:
    """The tables of the stage in memory, and what it counts and says."""
    with prepared(args) as found:
        if args.requests:
            return SimpleNamespace(items=found.items, log=found.log)
        tables = {"items": found.items.order_by("item"), "users": found.users.order_by("user")}
        tables["interactions"] = found.interactions.order_by(["user", "position"])
        summary = found.summary(args)
        counts = {"num_read": found.num_read, "left_out": found.left_out, "notes": found.notes(summary)}
        return SimpleNamespace(summary=summary, **counts, **{n: t.to_pyarrow() for n, t in tables.items()})


def read_items(name: str, content, *others: str, **options):
    """(item, title, category) of every item and the columns of other names, and the rows left out by reason."""
    write(Path(name), content)
    args = data.DataArguments(run_dir="run", interactions="none.csv", items=name, **options)
    table, left_out = tables.read_items(connection(), item_source(connection(), args), args)
    rows = table.order_by("source_row").to_pyarrow().to_pylist()
    return [tuple(row[column] for column in ("item_id", "title", "category", *others)) for row in rows], left_out
