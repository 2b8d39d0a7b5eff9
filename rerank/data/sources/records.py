"""Rows of a file in memory, every column as it came: for what returns a user's rows with more columns."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.data.sources.files import open_text, refuse_empty_file

FORMATS = (".parquet", ".jsonl", ".csv")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a Parquet, JSONL or CSV file (of text also gzipped): JSON's values, CSV's text, Parquet's types.

    Raises:
        ValueError: Naming the file and the line that is no row.
    """
    path = str(path)
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    if suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not Parquet: {' '.join(str(error).split())}") from None
    refuse_empty_file(path)
    return list(_json_rows(path) if suffix == ".jsonl" else _csv_rows(path))


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is no object of columns; write one object a line")
            yield row


def _csv_rows(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        rows = csv.reader(file)
        header = next(rows)
        if len({*header}) < len(header):
            raise ValueError(f"{path} names a column twice in its header ({', '.join(header)}); rename one")
        for row in rows:
            if row and len(row) != len(header):
                problem = f"{len(row)} values but the header names {len(header)} columns"
                raise ValueError(f"{path}, line {rows.line_num} has {problem}; correct the row")
            if row:
                yield dict(zip(header, row, strict=True))
