"""New items, interactions and times, read as the data stage reads them."""

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa

from rerank.data import DataArguments, tables
from rerank.data.asked import FORMAT_OF_SUFFIX, suffix_of
from rerank.data.filters import drop_repetitions
from rerank.data.requests.read import item_source
from rerank.data.sources.cells import as_seconds
from rerank.data.sources.opening import open_source
from rerank.data.sources.source import Source
from rerank.launch.database import database
from rerank.launch.engines import DuckDB

NO_RUN = "."  # of arguments that no stage runs by
ORDERED = ("user", "item", "time", "position")  # of interactions; a split has no say

logger = logging.getLogger(__name__)


def _given(reading: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The keys that a run's recipe gave."""
    return {name: reading[name] for name in names if reading.get(name) is not None}


def _fitting(path: str | Path, form: str, csv: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """A recipe's format and csv keys as far as a file's ending does not say otherwise."""
    found = FORMAT_OF_SUFFIX.get(suffix_of(path), "s3rec")  # which tells little
    both = {form, found}
    fits = form not in ("datasets", "metarank") and (
        found in ("s3rec", form) or both in ({"csv", "tsv"}, {"mind", "tsv"})
    )
    takes_csv = found in ("csv", "tsv", "s3rec") and suffix_of(path) != "json"
    return form if fits else "auto", csv if takes_csv else {}


def _open(con: ibis.BaseBackend, key: str, path: str | Path, args: DataArguments) -> Source:
    """The table that an option of the command names."""
    asked = args.asked(key.removeprefix("--"))
    form, csv = _fitting(path, asked.format, asked.csv)
    if form == "mind":
        return item_source(con, args)
    if form == "auto" and suffix_of(path) not in FORMAT_OF_SUFFIX and not csv.keys() & {"separator", "header"}:
        raise ValueError(f"{key} is {path}, but must end in .{', .'.join(FORMAT_OF_SUFFIX)}; convert or rename it")
    return open_source(con, replace(asked, value=str(path), format=form, csv=csv, option=key))


def _say(left_out: Mapping[str, int], source: Source) -> None:
    if left_out:
        reasons = ", ".join(f"{reason} ({number})" for reason, number in left_out.items())
        logger.warning("%s: rows are left out, as of the run's data: %s", source.name, reasons)


def read_items(path: str | Path, reading: Mapping[str, Any], with_text: bool) -> pa.Table:
    """Items in file order: item_id, title, category, text, and the other columns that a run's recipe names.

    Args:
        path: Of the file; its format goes by its ending, or where that tells none by the recipe.
        reading: Keys of that recipe. A column that it maps may bear our name in this file, too.
        with_text: Whether the sentence encoder's text is wanted, and its columns needed.
    """
    given = _given(reading, ("category_separator", "items_format", "items_csv", "on_bad_rows"))
    args = DataArguments(run_dir=NO_RUN, interactions=str(path), items=str(path), **given)
    with database() as con:
        source = _open(con, "--items", path, args)
        columns = _columns(source, reading["item_columns"] or {})
        texts = reading["text_columns"] if with_text else []
        items, left_out = tables.read_items(con, source, replace(args, item_columns=columns, text_columns=texts))
        _say(left_out, source)
        return items.order_by("source_row").to_pyarrow()


def _columns(source: Source, mapped: Mapping[str, str | None]) -> dict[str, str | None]:
    """Our names to a file's columns, by a recipe's map or by our own name; others that it lacks are left out."""
    if not (source.has(mapped.get("item") or "item") or source.has("item")):
        problem = f"{source.name} has no column {mapped.get('item') or 'item'!r}, of ids"
        raise ValueError(f"{problem}; rename the one of ids, or write a line with the names of its columns above it")
    found: dict[str, str | None] = {name: name for name in mapped if source.has(name)}
    return found | {name: column for name, column in mapped.items() if column is None or source.has(column)}


def read_interactions(
    path: str | Path, reading: Mapping[str, Any], columns: Mapping[str, str | None] | None = None
) -> pa.Table:
    """Interactions that a run's recipe counts, each user's together and oldest first: user_id, item_id, time (null
    where unknown).

    Args:
        path: Of the file; its format goes by its ending, or where that tells none by the recipe.
        reading: Keys of that recipe, as far as they are known.
        columns: Of user, item, time and position, where they differ from these and from the recipe's.
    """
    given = _given(reading, ("format", "csv", "where", "dedupe", "on_bad_rows"))
    args = DataArguments(run_dir=NO_RUN, interactions=str(path), **given)
    with database() as con:
        source = _open(con, "--interactions", path, args)
        mapped = {
            name: column
            for name, column in (reading.get("columns") or {}).items()
            if name in ORDERED and (column is None or source.has(column))
        }
        args = replace(args, columns=mapped | dict(columns or {}))
        read, names, left_out = tables.read_interactions(con, source, args)
        _say(left_out, source)
        order = tables.sequence_order(reading.get("split"))
        engine = DuckDB(con)
        kept = drop_repetitions(engine, tables.drop_duplicates(engine, read, names), args.dedupe, order)
        return kept.order_by(["user_id", *order]).select("user_id", "item_id", "time").to_pyarrow()


def read_times(values: Sequence[object]) -> np.ndarray:
    """(R,) times as the data stage reads numbers, dates and their texts, nan for anything else."""
    texts = [None if value is None else _time_text(value) for value in values]
    with database() as con:
        column = ibis.memtable(pa.table({"time": pa.array(texts, pa.string())})).time
        found = con.to_pyarrow(as_seconds(column))
    return found.to_numpy(zero_copy_only=False).astype(float)


def _time_text(value: object) -> str:
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        value = value.astimezone(datetime.UTC)
    text = value.isoformat() if isinstance(value, datetime.date) else str(value)
    return text.encode(errors="replace").decode()  # half of a surrogate pair
