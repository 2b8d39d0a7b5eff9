"""The user's file of rows, read without re-typing anything and written with the rankings beside what came.

Text of CSV stays text, JSON and Parquet keep their types, and lines of JSON are written as they were. A file that
could not be written is refused before anything is ranked.
"""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch.files import write_text, write_whole

COLUMNS = ("history", "candidates")
ADDED = ("ranking", "failure", "trace")
FORMATS = (".parquet", ".jsonl", ".csv")

Record = Mapping[str, Any]  # a row of the user's file, or what is added to it
Write = Callable[[Sequence[Record]], None]  # writes the file with what is added to each row


class Unreadable(dict[str, Any]):
    """A row that is not as its file has them: the cells that could be read, and the problem."""

    def __init__(self, problem: str, cells: Record = MappingProxyType({})) -> None:
        super().__init__(cells)
        self.problem = problem


@dataclass(frozen=True)
class RowsFile:
    """The rows of a file.

    Attributes:
        path: Of the file.
        records: The rows as they came.
        table: The same of a Parquet file, which keeps their types.
        lines: The same of a JSONL file, as text.
    """

    path: Path
    records: list[Record]
    table: pa.Table | None = None
    lines: list[str] | None = None

    @property
    def rows(self) -> list[Record]:
        """The rows to rank: of CSV with `history` and `candidates` as lists."""
        if self.path.suffix != ".csv":
            return self.records
        return [record if isinstance(record, Unreadable) else _with_lists(record) for record in self.records]


def _with_lists(record: Record) -> Record:
    return {**record, **{name: record[name].split() for name in COLUMNS}}


def check_format(path: Path) -> str:
    """The ending of a file's name; one of another format is refused."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}.")
    return path.suffix


def read_rows_file(path: str | Path) -> RowsFile:
    """The rows of a file that has `history` and `candidates`.

    Raises:
        FileNotFoundError, ValueError: For a file that is not there, cannot be read, has no row, lacks one of the two
            in all its rows, or has a column that ranking adds. Where one row of several is not JSON, or has other
            cells than the header, that row is Unreadable.
    """
    path = Path(path)
    form = check_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of rows to rank.")
    table = _read_parquet(path) if form == ".parquet" else None
    lines = _lines(path) if form == ".jsonl" else None
    if table is not None:
        records = table.to_pylist()
    else:
        records = list(_read_csv(path) if lines is None else map(_of_line, lines, lines.values()))
    if not records:
        raise ValueError(f"{path} has no rows.")
    bad = [record for record in records if isinstance(record, Unreadable)]
    if len(bad) == len(records):
        raise ValueError(f"{path}, {bad[0].problem}")
    names = dict.fromkeys(name for record in records for name in record)
    for column in COLUMNS:
        if column not in names:
            raise ValueError(f"{path}: column {column!r} is missing; it has {', '.join(names) or 'no column'}.")
    for column in ADDED:
        if column in names:
            raise ValueError(f"{path} has a column {column!r} already, which ranking adds; rename it.")
    return RowsFile(path, records, table, None if lines is None else list(lines.values()))


def _read_parquet(path: Path) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a column twice ({', '.join(names)}); rename one")
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {' '.join(str(error).split())}") from None


def _read_text(path: Path) -> str:
    """Its text, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it") from None


def _lines(path: Path) -> dict[int, str]:
    """The lines that are not empty, by their numbers."""
    lines = enumerate(_read_text(path).split("\n"), start=1)
    return {number: line.strip() for number, line in lines if line.strip()}


def _of_line(number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # of JSON, or a number of too many digits
        return Unreadable(f"line {number} is not JSON: {error}; correct it")
    return record if isinstance(record, dict) else Unreadable(f"line {number} is not an object; correct it")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a long history is one cell
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice in its header ({', '.join(header)}); rename one")
        for cells in reader:
            found = dict(zip(header, cells, strict=False))
            if len(cells) not in (0, len(header)):
                problem = f"line {reader.line_num} has {len(cells)} cells but the header has {len(header)}"
                yield Unreadable(f'{problem}; put a cell with a comma in "quotes"', found)
            elif cells:
                yield found
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def open_output(rows: RowsFile, path: Path) -> Write:
    """The function that writes the rows with what is added to them, in the format that the file's ending names.

    Raises:
        FileNotFoundError, ValueError: When the file could not be written, before there is anything to add.
    """
    form = check_format(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; make it, or choose another --out.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; choose another --out.")
    return {".jsonl": _open_jsonl, ".csv": _open_csv, ".parquet": _open_parquet}[form](rows, path)


def _open_jsonl(rows: RowsFile, path: Path) -> Write:
    for number, record in enumerate(() if rows.lines else rows.records, start=1):
        try:
            _json(record)
        except (TypeError, ValueError) as error:
            problem = f"{rows.path}, row {number} does not fit into JSON: {error}"
            raise ValueError(f"{problem}; give an --out that ends in .parquet") from None

    def write(added: Sequence[Record]) -> None:
        texts = rows.lines or map(_json, rows.records)
        pairs = zip(rows.records, texts, added, strict=True)
        write_text(
            path, "".join(_longer(text if record else "{}", _json(more)) + "\n" for record, text, more in pairs)
        )

    return write


def _longer(text: str, more: str) -> str:
    """An object of JSON with the keys of another, not empty, one behind its own."""
    before = text[:-1].rstrip()
    return before + (", " if before != "{" else "") + more[1:]


def _json(record: Record) -> str:
    record = {name: _without_nan(value) for name, value in record.items()}
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(record)
    return text


def _without_nan(value: Any) -> Any:
    """A value with null for nan, which JSON lacks."""
    if isinstance(value, list | dict):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        done = {name: _without_nan(part) for name, part in parts}
        return done if isinstance(value, dict) else list(done.values())
    return None if isinstance(value, float) and math.isnan(value) else value


def _open_csv(rows: RowsFile, path: Path) -> Write:
    names = dict.fromkeys(name for record in rows.records for name in record)
    for number, record in enumerate(rows.rows, start=1):
        for name in COLUMNS:
            ids = record.get(name)
            texts = [one for one in ids if isinstance(one, str)] if isinstance(ids, list) else []
            spaced = [one for one in texts if one.split() != [one]]
            if spaced:
                problem = f"{rows.path}, row {number}: {name} holds {spaced[0]!r}, but CSV parts ids by spaces"
                raise ValueError(f"{problem}; give an --out that ends in .jsonl or .parquet")

    def write(added: Sequence[Record]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *ADDED])
        for record, more in zip(rows.records, added, strict=True):
            cells = [record.get(name) for name in names] + [more[name] for name in ADDED]
            writer.writerow(list(map(_cell, cells)))
        content = text.getvalue().encode(errors="backslashreplace")
        write_whole(path, lambda temporary: temporary.write_bytes(content))

    return write


def _cell(value: object) -> str:
    """A value of any type as the text of a cell: a list parted by spaces, where that keeps its parts apart."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, list):
        parts = list(map(_cell, value))
        if all(part.split() == [part] for part in parts):
            return " ".join(parts)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def _open_parquet(rows: RowsFile, path: Path) -> Write:
    table = rows.table
    if table is None:
        names = dict.fromkeys(name for record in rows.records for name in record)
        table = pa.table({name: _column(rows, name) for name in names})
    kind = table.schema.field("candidates").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    types = dict.fromkeys(ADDED, pa.string()) | {"ranking": pa.list_(kind.value_type if is_list else pa.string())}

    def write(added: Sequence[Record]) -> None:
        whole = table
        for name, of_name in types.items():
            whole = whole.append_column(name, pa.array([more[name] for more in added], type=of_name))
        write_whole(path, lambda temporary: pq.write_table(whole, temporary))

    return write


def _column(rows: RowsFile, name: str) -> pa.Array:
    """A column of a text file with one type; one that would be re-typed is refused."""
    values = [record.get(name) for record in rows.records]
    problem = "its values have no one type"
    try:
        column = pa.array(values)
        there, back = (json.dumps(found, sort_keys=True) for found in (values, column.to_pylist()))
        if there == back:  # 1 is not 1.0
            return column
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        problem = str(error).splitlines()[0]
    raise ValueError(
        f"{rows.path}: column {name!r} does not fit into Parquet: {problem}; give an --out that ends in .jsonl"
    )
