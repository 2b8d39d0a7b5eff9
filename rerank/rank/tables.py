"""New items, interactions and times, read as the data stage reads them."""

import datetime
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa

from rerank.data import DataArguments, tables
from rerank.data.asked import FORMAT_OF_SUFFIX, Asked
from rerank.data.sources.cells import as_seconds
from rerank.data.sources.opening import open_source
from rerank.data.sources.source import Source

NO_RUN = "."  # of arguments that no stage runs by


@contextmanager
def _connection() -> Iterator[ibis.BaseBackend]:
    with tempfile.TemporaryDirectory() as spill_dir:  # else DuckDB spills into the working folder
        con = ibis.duckdb.connect(temp_directory=spill_dir)
        try:
            yield con
        finally:
            con.disconnect()


def _open(con: ibis.BaseBackend, key: str, path: str | Path) -> Source:
    """The table that an option of the command names."""
    suffix = Path(str(path).removesuffix(".gz")).suffix.removeprefix(".").lower()
    if suffix not in FORMAT_OF_SUFFIX:
        raise ValueError(f"{key} is {path}, but must end in .{', .'.join(FORMAT_OF_SUFFIX)}; convert or rename it")
    return open_source(con, Asked(key, str(path)))


def read_items(path: str | Path, reading: Mapping[str, Any], with_text: bool) -> pa.Table:
    """Items in file order: item_id, title, category, text, and the other columns that a run's recipe names.

    Args:
        path: Of the file; its format goes by its ending.
        reading: Keys of that recipe. A column that it maps may bear our name in this file, too.
        with_text: Whether the sentence encoder's text is wanted, and its columns needed.
    """
    with _connection() as con:
        source = _open(con, "--items", path)
        columns = _columns(source, reading["item_columns"] or {})
        texts = reading["text_columns"] if with_text else []
        args = DataArguments(
            run_dir=NO_RUN, interactions=str(path), items=str(path), item_columns=columns, text_columns=texts,
            category_separator=reading["category_separator"],
        )  # fmt: skip
        return tables.read_items(con, source, args)[0].order_by("source_row").to_pyarrow()


def _columns(source: Source, mapped: Mapping[str, str | None]) -> dict[str, str | None]:
    """Our names to a file's columns, by a recipe's map or by our own name; others that it lacks are left out."""
    if not (source.has(mapped.get("item") or "item") or source.has("item")):
        raise ValueError(
            f"{source.name} has no column {mapped.get('item') or 'item'!r}, of ids; rename the one of ids"
        )
    found: dict[str, str | None] = {name: name for name in mapped if source.has(name)}
    return found | {name: column for name, column in mapped.items() if column is None or source.has(column)}


def read_interactions(path: str | Path, columns: Mapping[str, str] | None) -> pa.Table:
    """Interactions, each user's together and oldest first: user_id, item_id, time (seconds, null where unknown).

    Args:
        path: Of the file; its format goes by its ending.
        columns: Of user, item, time and position, where they differ from these.
    """
    with _connection() as con:
        source = _open(con, "--interactions", path)
        args = DataArguments(run_dir=NO_RUN, interactions=str(path), columns=dict(columns or {}))
        read, names, _ = tables.read_interactions(con, source, args)
        unique = tables.drop_duplicates(con, read, names)
        ordered = unique.order_by(["user_id", "position", "time", "source_row"])
        return ordered.select("user_id", "item_id", "time").to_pyarrow()


def read_times(values: Sequence[object]) -> np.ndarray:
    """(R,) times as the data stage reads numbers, dates and their texts, nan for anything else."""
    texts = [None if value is None else _time_text(value) for value in values]
    with _connection() as con:
        column = ibis.memtable(pa.table({"time": pa.array(texts, pa.string())})).time
        found = con.to_pyarrow(as_seconds(column))
    return found.to_numpy(zero_copy_only=False).astype(float)


def _time_text(value: object) -> str:
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        value = value.astimezone(datetime.UTC)
    return value.isoformat() if isinstance(value, datetime.date) else str(value)
