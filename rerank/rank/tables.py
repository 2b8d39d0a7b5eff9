"""New items and interactions, read as the data stage reads them."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from rerank.data import tables
from rerank.data.readers import read_source


@contextmanager
def _connection() -> Iterator[ibis.BaseBackend]:
    with tempfile.TemporaryDirectory() as spill_dir:  # else DuckDB spills into the working folder
        con = ibis.duckdb.connect(temp_directory=spill_dir)
        try:
            yield con
        finally:
            con.disconnect()


def read_items(path: str | Path, reading: Mapping[str, Any], with_text: bool) -> pa.Table:
    """Items in file order: item_id, title, category, text, and the other columns that a run's recipe names.

    Args:
        path: Of the file; its format goes by its ending.
        reading: Keys of that recipe. A column that it maps may bear our name in this file, too.
        with_text: Whether the sentence encoder's text is wanted, and its columns needed.
    """
    with _connection() as con:
        source = read_source(con, str(path), "auto", "--items")
        there = source.table.columns
        mapped = {name: column for name, column in (reading["item_columns"] or {}).items() if column in there}
        wanted = reading["text_columns"] if with_text else []
        separator = reading["category_separator"]
        own = {name: name for name in reading["item_columns"] or {} if name in there and name not in mapped}
        return tables.read_items(con, source, mapped | own, wanted, separator).order_by("source_row").to_pyarrow()


def read_interactions(path: str | Path, columns: Mapping[str, str] | None) -> pa.Table:
    """Interactions, each user's together and oldest first: user_id, item_id, time (seconds, null where unknown).

    Args:
        path: Of the file; its format goes by its ending.
        columns: Of user, item, time and position, where they differ from these.
    """
    with _connection() as con:
        source = read_source(con, str(path), "auto", "--interactions")
        read, names = tables.read_interactions(con, source, dict(columns or {}))
        unique = tables.drop_duplicates(con, read, names)
        ordered = unique.order_by(["user_id", "position", "time", "source_row"])
        return ordered.select("user_id", "item_id", "time").to_pyarrow()
