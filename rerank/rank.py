"""Re-rank new rows with a trained model: what `rerank rank MODEL_DIR --rows FILE --out FILE` does.

Rows come as Parquet, JSONL or CSV with `history` (oldest first) and `candidates` (first-stage order), both of original
item ids: lists, or in CSV ids parted by spaces. Every column is kept; `ranking` (best first, null where the completion
is no ranking), `failure` and `trace` are added.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rerank.evaluate.generation import Answer, RankingModel, generate_answers

COLUMNS = ("history", "candidates")
ADDED = ("ranking", "failure", "trace")
FORMATS = (".parquet", ".jsonl", ".csv")


def rank_rows(model_dir: str | Path, rows_path: str | Path, out_path: str | Path, seed: int = 0) -> dict[str, int]:
    """Rank the rows of a file into another one; returns how many `rows` and parse `failures` there are.

    Raises:
        FileNotFoundError: When the model folder, the rows or the folder of `out_path` are not there.
        ValueError: Naming the row, counted from 1, and what is wrong with it.
    """
    model, out_path = RankingModel.load(model_dir), Path(out_path)
    _check_format(out_path)
    if not out_path.parent.is_dir():
        raise FileNotFoundError(f"{out_path.parent} is not a folder; make it, or choose another --out.")
    records = read_records(rows_path)
    rows = encode_rows(records, model, str(rows_path))
    answers, _ = generate_answers(model, rows, seed)
    write_records([add_answer(record, answer) for record, answer in zip(records, answers, strict=True)], out_path)
    return {"rows": len(rows), "failures": sum(answer.order is None for answer in answers)}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, with `history` and `candidates` as lists.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be read, has no rows or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of rows to rank.")
    records = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}[_check_format(path)](path)
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


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {' '.join(str(error).split())}") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
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


def _read_csv(path: Path) -> list[dict[str, Any]]:
    types = dict.fromkeys(COLUMNS, pa.string())  # a history of one item would else be read as a number
    convert = pyarrow.csv.ConvertOptions(column_types=types)
    read = pyarrow.csv.ReadOptions(use_threads=False)  # only then does an error name its row
    try:
        table = pyarrow.csv.read_csv(path, read_options=read, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not CSV: {' '.join(str(error).split())}") from None
    return [
        {name: value.split() if name in COLUMNS else value for name, value in record.items()}
        for record in table.to_pylist()
    ]


def encode_rows(records: Sequence[Mapping[str, Any]], model: RankingModel, where: str) -> list[dict[str, Any]]:
    """The rows as the model's prompts need them: items instead of ids, with features when the prompt shows evidence.

    Raises:
        ValueError: Naming the row and the id or number that does not fit.
    """
    items = {item_id: item for item, item_id in enumerate(model.catalogue.item_ids)}
    rows = []
    for number, record in enumerate(records, start=1):
        row = {name: _items(record[name], items, f"{where}, row {number}: {name}") for name in COLUMNS}
        _check_candidates(row["candidates"], record["candidates"], model, f"{where}, row {number}")
        rows.append(row)
    if model.settings.evidence != "none":
        _add_features(rows, model)
    return rows


def _items(ids: Any, items: Mapping[str, int], where: str) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{where} is {ids!r} but must be a list of at least one item id.")
    for item_id in ids:
        if str(item_id) not in items:
            raise ValueError(f"{where} holds {item_id!r}, which is not in the model's catalogue; leave it out.")
    return [items[str(item_id)] for item_id in ids]


def _check_candidates(candidates: Sequence[int], ids: Sequence[Any], model: RankingModel, where: str) -> None:
    duplicate = next((ids[i] for i, item in enumerate(candidates) if item in candidates[:i]), None)
    if duplicate is not None:
        raise ValueError(f"{where}: candidates holds {duplicate!r} twice; give each item once.")
    if len(candidates) < 2:
        raise ValueError(f"{where}: candidates has 1 item; there is nothing to rank.")
    if model.num_candidates not in (None, len(candidates)):
        raise ValueError(
            f"{where}: candidates has {len(candidates)} items but the model ranks lists of {model.num_candidates}; "
            f"give as many, or train one with candidates.num_candidates={len(candidates)}."
        )


def _add_features(rows: Sequence[dict[str, Any]], model: RankingModel) -> None:
    """Facts about each candidate from the counts that the model folder carries."""
    from rerank.baselines import Counts

    path = model.folder / "evidence.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the model's prompts show evidence; copy the whole folder.")
    counts = Counts.load(path)
    for row in rows:
        unknown = [0.0] * len(row["candidates"])  # the first stage's scores: no prompt shows them
        row["features"] = counts.features(row["history"], row["candidates"], unknown).tolist()


def add_answer(record: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """The row with its ranking, in the ids that the row came with."""
    ranking = None if answer.order is None else [record["candidates"][position] for position in answer.order]
    return {**record, "ranking": ranking, "failure": answer.failure, "trace": answer.trace}


def write_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows by the file's ending, through a temporary name, so that a reader never sees half a file."""
    temporary = path.with_name(f"{path.name}.tmp")
    if path.suffix == ".jsonl":
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")
    else:
        if path.suffix == ".csv":
            records = [{name: _joined(value) for name, value in record.items()} for record in records]
        names = dict.fromkeys(name for record in records for name in record)
        table = pa.table({name: _column(name, records) for name in names})
        (pq.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv)(table, temporary)
    temporary.replace(path)


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _column(name: str, records: Sequence[Mapping[str, Any]]) -> pa.Array:
    """A column; the ones that may be null throughout keep their type."""
    values = [record.get(name) for record in records]
    column = pa.array(values)
    if not pa.types.is_null(column.type) or name not in ADDED:
        return column
    listed = name == "ranking" and isinstance(records[0]["candidates"], list)
    return pa.array(values, type=pa.list_(pa.string()) if listed else pa.string())
