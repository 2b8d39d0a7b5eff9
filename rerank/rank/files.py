"""The user's file of rows, read, and written with the rankings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rerank.launch.files import write_text, write_whole
from rerank.models.ranker import Answer

COLUMNS = ("history", "candidates")
ADDED = ("ranking", "failure", "trace")
FORMATS = (".parquet", ".jsonl", ".csv")

Record = Mapping[str, Any]  # a row of the user's file


def read_records(path: str | Path) -> list[Record]:
    """The rows of a file, with `history` and `candidates` as lists."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of rows to rank.")
    records = _read_jsonl(path) if check_format(path) == ".jsonl" else _read_table(path)
    if not records:
        raise ValueError(f"{path} has no rows.")
    for number, record in enumerate(records, start=1):
        for column in COLUMNS:
            if column not in record:
                known = ", ".join(record) or "no column"
                raise ValueError(f"{path}, row {number}: column {column!r} is missing; it has {known}.")
        for column in ADDED:
            if column in record:
                raise ValueError(f"{path} has a column {column!r} already, which ranking adds; rename it.")
    return records


def check_format(path: Path) -> str:
    """The ending of a file's name; one of another format is refused."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}.")
    return path.suffix


def _read_jsonl(path: Path) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not an object with history and candidates.")
            records.append(record)
    return records


def _read_table(path: Path) -> list[Record]:
    is_csv = path.suffix == ".csv"
    types = dict.fromkeys(COLUMNS, pa.string())  # a history of one item would else be read as a number
    convert = pyarrow.csv.ConvertOptions(column_types=types)
    read = pyarrow.csv.ReadOptions(use_threads=False)  # only then does an error name its row
    try:
        table = pyarrow.csv.read_csv(path, read, convert_options=convert) if is_csv else pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not {'CSV' if is_csv else 'Parquet'}: {' '.join(str(error).split())}") from None
    return [
        {name: value.split() if is_csv and name in COLUMNS else value for name, value in record.items()}
        for record in table.to_pylist()
    ]


def add_answer(record: Record, answer: Answer) -> Record:
    """The row with its ranking, in the ids that the row came with."""
    ranking = None if answer.order is None else [record["candidates"][position] for position in answer.order]
    return {**record, "ranking": ranking, "failure": answer.failure, "trace": answer.trace}


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write rows in the format that the file's ending names, whole or not at all."""
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return
    if path.suffix == ".csv":
        records = [{name: _joined(value) for name, value in record.items()} for record in records]
    names = dict.fromkeys(name for record in records for name in record)
    table = pa.table({name: _column(name, records) for name in names})
    write = pq.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv
    write_whole(path, lambda temporary: write(table, temporary))


def _joined(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _column(name: str, records: Sequence[Record]) -> pa.Array:
    """A column; the ones that may be null throughout keep their type."""
    values = [record.get(name) for record in records]
    column = pa.array(values)
    if not pa.types.is_null(column.type) or name not in ADDED:
        return column
    listed = name == "ranking" and isinstance(records[0]["candidates"], list)
    return pa.array(values, type=pa.list_(pa.string()) if listed else pa.string())
