"""Re-rank new rows with a trained model: `rerank rank MODEL_DIR --rows FILE --out FILE`.

Rows come as Parquet, JSONL or CSV with `history` (oldest first) and `candidates` (first-stage order), both of original
item ids: lists, or in CSV ids parted by spaces. Every column is kept; `ranking` (best first, null where the completion
is no ranking), `failure` and `trace` are added.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rerank.launch.files import write_text, write_whole
from rerank.models.ranker import Answer, RankingModel, generate_answers
from rerank.rows import RankingRow

COLUMNS = ("history", "candidates")
ADDED = ("ranking", "failure", "trace")
FORMATS = (".parquet", ".jsonl", ".csv")

Record = Mapping[str, Any]  # a row of the user's file


def rank_rows(model_dir: str | Path, rows_path: str | Path, out_path: str | Path) -> None:
    """Rank the rows of a file into another one."""
    model, out_path = RankingModel.load(model_dir), Path(out_path)
    _check_format(out_path)
    if not out_path.parent.is_dir():
        raise FileNotFoundError(f"{out_path.parent} is not a folder; make it, or choose another --out.")
    records = read_records(rows_path)
    answers, _ = generate_answers(model, encode_rows(records, model, str(rows_path)))
    write_records([add_answer(record, answer) for record, answer in zip(records, answers, strict=True)], out_path)


def read_records(path: str | Path) -> list[Record]:
    """The rows of a file, with `history` and `candidates` as lists."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of rows to rank.")
    records = _read_jsonl(path) if _check_format(path) == ".jsonl" else _read_table(path)
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


def _check_format(path: Path) -> str:
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


def encode_rows(records: Sequence[Record], model: RankingModel, where: str) -> list[RankingRow]:
    """Items instead of ids, numbered from 1, with features where the prompt shows evidence.

    Args:
        records: The rows of a file.
        model: That will rank them.
        where: The file, for messages.
    """
    items = {item_id: item for item, item_id in enumerate(model.prompter.catalogue.item_ids)}
    rows = []
    for number, record in enumerate(records, start=1):
        history, candidates = (_items(record[name], items, f"{where}, row {number}: {name}") for name in COLUMNS)
        _check_candidates(candidates, record["candidates"], model, f"{where}, row {number}")
        rows.append(RankingRow(number, history, candidates))
    return _with_features(rows, model) if model.prompter.needs_features else rows


def _items(ids: object, items: Mapping[str, int], where: str) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{where} is {ids!r} but must be a list of at least one item id.")
    for item_id in ids:
        if str(item_id) not in items:
            raise ValueError(f"{where} holds {item_id!r}, which is not in the model's catalogue; leave it out.")
    return tuple(items[str(item_id)] for item_id in ids)


def _check_candidates(candidates: Sequence[int], ids: Sequence[object], model: RankingModel, where: str) -> None:
    duplicate = next((ids[i] for i, item in enumerate(candidates) if item in candidates[:i]), None)
    if duplicate is not None:
        raise ValueError(f"{where}: candidates holds {duplicate!r} twice; give each item once.")
    if len(candidates) < 2:
        raise ValueError(f"{where}: candidates has 1 item; there is nothing to rank.")
    if model.num_candidates not in (None, len(candidates)):
        raise ValueError(
            f"{where}: candidates has {len(candidates)} items but the model ranks lists of {model.num_candidates}; "
            f"give {model.num_candidates}, or train one with candidates.num_candidates={len(candidates)}."
        )


def _with_features(rows: Sequence[RankingRow], model: RankingModel) -> list[RankingRow]:
    """The rows with facts about each candidate, from the counts in the model folder."""
    from rerank.baselines import Counts, feature_rows

    path = model.folder / "evidence.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the model's prompts show evidence; copy the whole folder.")
    counts, known = Counts.load(path), list(rows)
    for length in {len(row.candidates) for row in rows}:
        chosen = [place for place, row in enumerate(rows) if len(row.candidates) == length]
        candidates = np.array([rows[place].candidates for place in chosen])
        unknown = np.zeros(candidates.shape)  # the first stage's scores: no prompt shows them
        features = feature_rows(counts, [np.array(rows[place].history) for place in chosen], candidates, unknown, None)
        for place, of_row in zip(chosen, features, strict=True):
            known[place] = replace(rows[place], features=of_row)
    return known


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
