"""Raw files to Ibis tables: one reader a format, columns as the file names them plus `source_row`, the input order."""

import csv
import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.types import Column, Table

from rerank.data import FORMATS
from rerank.models import names

_FORMAT_OF_SUFFIX = dict(csv="csv", tsv="tsv", jsonl="jsonl", ndjson="jsonl", parquet="parquet")
_FORMAT_OF_SUFFIX |= dict(inter="recbole", item="recbole", txt="s3rec", json="s3rec")  # s3rec: sequences, attributes
_DELIMITERS = {"csv": ",", "tsv": "\t", "recbole": "\t"}

Names = dict[str, str]  # our names of columns to the source's


@dataclass(frozen=True)
class Source:
    """One input table, and what to call its rows in a message."""

    name: str
    table: Table
    row_word: str = "line"
    first_row: int = 1

    def place(self, source_row: int) -> str:
        """The file and line (or row) of one input row, counted from 1."""
        return f"{self.name} {self.row_word} {source_row + self.first_row}"


def format_of(path: str, given: str, key: str) -> str:
    """The format of a source: the given one, or for `auto` that of the suffix (`.gz` aside)."""
    if given != "auto":
        return given
    if Path(path).is_dir():
        return "datasets"
    suffix = Path(path.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in _FORMAT_OF_SUFFIX:
        raise ValueError(f"{key} is {path}, whose suffix tells no format; set the format: one of {', '.join(FORMATS)}")
    return _FORMAT_OF_SUFFIX[suffix]


def read_source(con: ibis.BaseBackend, value: str, given_format: str, key: str) -> Source:
    """The table that a recipe's `interactions` or `items` names, not yet computed."""
    path = names.locate(value, key)
    form = format_of(path, given_format, key)
    if form == "datasets":
        return Source(path, number_rows(_read_dataset(con, path, key)), "row")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} is {path}, which does not exist; correct the path")
    try:
        return _read_file(con, path, form)
    except duckdb.Error as error:
        raise unreadable(path, error) from None


def unreadable(name: str, error: duckdb.Error) -> ValueError:
    """The error for a row or file that DuckDB cannot read."""
    # The first line says what and where; the others are hints about DuckDB's own options.
    return ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}; correct the row or the format")


def _read_file(con: ibis.BaseBackend, path: str, form: str) -> Source:
    if form in _DELIMITERS:
        return Source(path, number_rows(_read_delimited(con, path, form)), first_row=2)
    if form == "jsonl":
        refuse_empty_file(path)
        table = con.read_json(path, format="newline_delimited", sample_size=-1, map_inference_threshold=-1)
        return Source(path, number_rows(table))
    if form == "parquet":
        return Source(path, number_rows(_read_parquet(con, path)), "row")
    return Source(path, _read_s3rec(con, path))


def number_rows(table: Table) -> Table:
    """The table with `source_row`, the order of the input."""
    return table.mutate(source_row=ibis.row_number().cast("int64"))


def open_text(path: str) -> io.TextIOBase:
    """A text file, gzipped if named so."""
    opener = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def refuse_empty_file(path: str) -> None:
    """Refuse a file that is empty, or no text."""
    with open_text(path) as file:
        try:
            start = file.read(1)
        except (gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not UTF-8 text, gzipped if named .gz ({error}); convert it") from None
    if not start:
        raise ValueError(f"{path} is empty; give a file with at least one row")


def _read_delimited(con: ibis.BaseBackend, path: str, form: str) -> Table:
    """Columns are read as text, by the header's names: nothing is guessed from a sample of rows."""
    delimiter, quote = _DELIMITERS[form], '"' if form == "csv" else ""
    refuse_empty_file(path)
    with open_text(path) as file:
        header = next(csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE))
    columns = [name.split(":")[0] for name in header] if form == "recbole" else header
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} names a column twice in its header ({', '.join(columns)}); rename one")
    types, form_options = dict.fromkeys(columns, "string"), {"delim": delimiter, "quote": quote, "escape": quote}
    return con.read_csv(path, columns=types, auto_detect=False, header=True, **form_options)


def _read_parquet(con: ibis.BaseBackend, path: str) -> Table:
    if not path.endswith(".gz"):
        return con.read_parquet(path)
    with gzip.open(path) as file:
        return ibis.memtable(pq.read_table(io.BytesIO(file.read())))


def _read_s3rec(con: ibis.BaseBackend, path: str) -> Table:
    """`user item item ...` a line, or the JSON object `{item: [attribute, ...]}`; order is the file's."""
    refuse_empty_file(path)
    if ".json" in Path(path).suffixes:
        attributes = _load_json_object(path)
        columns = {"item": list(attributes), "category": [[str(a) for a in ids] for ids in attributes.values()]}
        return number_rows(ibis.memtable(pa.table(columns)))
    with open_text(path) as file:
        lines = [line.split() for line in file]
    columns = {
        "user": [words[0] for words in lines for _ in words[1:]],
        "item": [item for words in lines for item in words[1:]],
        "position": [place for words in lines for place in range(len(words) - 1)],
        "source_row": [row for row, words in enumerate(lines) for _ in words[1:]],
    }
    return ibis.memtable(pa.table(columns))


def _load_json_object(path: str) -> dict[str, list]:
    with open_text(path) as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is no JSON object of item: [attribute, ...]; a file of one object a line ends in .jsonl"
        )
    return value


def _read_dataset(con: ibis.BaseBackend, path: str, key: str) -> Table:
    """A `datasets` folder or name, written `NAME[:CONFIG][@SPLIT]`."""
    import datasets

    name, _, split = path.partition("@")
    name, _, config = name.partition(":")
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config or None)
    except OSError as error:
        raise FileNotFoundError(f"{key} is {path}, no data set on disk or on the hub: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded and (split or len(loaded) > 1):
            raise ValueError(f"{key} is {path}, which has the splits {', '.join(loaded)}; name one, as {name}@SPLIT")
        loaded = loaded[split] if split else next(iter(loaded.values()))
    return ibis.memtable(loaded.with_format("arrow")[:])


def pick_columns(source: Source, given: Names | None, key: str, known: Sequence[str]) -> Names:
    """Our column names to the file's: as the recipe maps them, else by the same name where the file has it."""
    given = given or {}
    for name, column in given.items():
        if name not in known:
            raise ValueError(f"{key} has the unknown key {name!r}; known: {', '.join(known)}")
        require_column(source, name, column, key)
    return {name: name for name in known if name in source.table.columns} | given


def require_column(source: Source, name: str, column: str, key: str) -> None:
    """Refuse a source without the column, listing the columns that are there."""
    if column not in source.table.columns:
        there = ", ".join(c for c in source.table.columns if c != "source_row")
        raise ValueError(f"{source.name} has no column {column!r} for {name}; it has {there}; correct {key}")


def as_text(column: Column) -> Column:
    """A column of any type as text, lists joined by ", ", white space collapsed, missing values empty."""
    if column.type().is_array():
        column = column.cast("array<string>").join(", ")
    elif column.type().is_json():
        column = ibis.coalesce(column.str, column.cast("string"))
    return column.cast("string").re_replace(r"\s+", " ").strip().fill_null("")


def as_seconds(column: Column) -> Column:
    """Unix seconds from a number, a date or its text; null where it is neither."""
    if column.type().is_temporal():
        moment, number = column.cast("timestamp"), ibis.null("float64")
    else:
        column = column.cast("string")
        moment, number = column.try_cast("timestamp"), column.try_cast("float64")
    number = ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
    # Truncated first: some backends' epoch has a fraction, others round it away.
    return ibis.coalesce(number, moment.truncate("s").epoch_seconds() + moment.microsecond() / 1e6)
