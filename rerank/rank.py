"""Re-rank new rows with a trained model: `rerank rank MODEL_DIR --rows FILE --out FILE`.

Rows come as Parquet, JSONL or CSV with `history` (oldest first) and `candidates` (first-stage order, of any length),
both of original item ids: lists, or in CSV ids parted by spaces. Where the model's prompts show them, rows have
further columns: those of the user and the request by their names, `time` and `history_times` (seconds),
`history_events`, `scores` of the first stage, and numbers of the candidates by their names, one for each. Every column
is kept; `ranking` (best first), `failure` and `trace` are added. Answers are constrained to be rankings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rerank.launch.files import write_text, write_whole
from rerank.models.one_token import tokens_of
from rerank.models.ranker import Answer, RankingModel, generate_answers, grammars_of
from rerank.prompts import MAX_LETTERS, PromptSettings
from rerank.rows import PromptedRow, RankingRow
from rerank.rows.histories import COLUMN

COLUMNS = ("history", "candidates")
ADDED = ("ranking", "failure", "trace")
FORMATS = (".parquet", ".jsonl", ".csv")

Record = Mapping[str, Any]  # a row of the user's file


def rank_rows(model_dir: str | Path, rows_path: str | Path, out_path: str | Path, one_token: bool = False) -> None:
    """Rank the rows of a file into another one; with `one_token` by the probabilities of the first label."""
    model, out_path = RankingModel.load(model_dir), Path(out_path)
    _check_format(out_path)
    if not out_path.parent.is_dir():
        raise FileNotFoundError(f"{out_path.parent} is not a folder; make it, or choose another --out.")
    records = read_records(rows_path)
    rows = encode_rows(records, model, str(rows_path))
    check_limit(rows, model, str(rows_path), one_token)
    answers, _ = generate_answers(model, rows, constrained=not one_token, one_token=one_token)
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
    """Items instead of ids, numbered from 1, with the fields and features that the prompts show.

    Args:
        records: The rows of a file.
        model: That will rank them.
        where: The file, for messages.
    """
    items = {item_id: item for item, item_id in enumerate(model.prompter.catalogue.item_ids)}
    settings, rows = model.prompter.settings, []
    for number, record in enumerate(records, start=1):
        place = f"{where}, row {number}"
        history, candidates = (_items(record[name], items, f"{place}: {name}") for name in COLUMNS)
        _check_candidates(candidates, record["candidates"], settings, place)
        names = {name: key for key, of_key in settings.row_fields.items() for name in of_key}
        fields = {name: _shown(record, name, key, place) for name, key in names.items()}
        past = _past(record, len(history), settings.history_fields, place)
        rows.append(RankingRow(number, history, candidates, fields=fields, **past))
    return _with_features(rows, records, model, where) if model.prompter.needs_features else rows


def _items(ids: object, items: Mapping[str, int], where: str) -> tuple[int, ...]:
    if not isinstance(ids, list):
        raise ValueError(f"{where} is {ids!r} but must be a list of item ids.")
    for item_id in ids:
        if str(item_id) not in items:
            raise ValueError(f"{where} holds {item_id!r}, which is not in the model's catalogue; leave it out.")
    return tuple(items[str(item_id)] for item_id in ids)


def _check_candidates(candidates: Sequence[int], ids: Sequence[object], settings: PromptSettings, where: str) -> None:
    duplicate = next((ids[i] for i, item in enumerate(candidates) if item in candidates[:i]), None)
    if duplicate is not None:
        raise ValueError(f"{where}: candidates holds {duplicate!r} twice; give each item once.")
    if len(candidates) < 2:
        number = "1 item" if candidates else "no item"
        raise ValueError(f"{where}: candidates has {number}; there is nothing to rank.")
    if settings.ranking == "letter" and len(candidates) > MAX_LETTERS:
        raise ValueError(
            f"{where}: candidates has {len(candidates)} items but the model names them by {MAX_LETTERS} letters; give "
            f"at most {MAX_LETTERS}, or train a model with ranking: number."
        )


def _shown(record: Record, name: str, option: str, where: str) -> Any:
    """A value that the prompts show."""
    if name not in record:
        raise ValueError(f"{where}: column {name!r} is missing, which the model's prompts show ({option}); add it.")
    return record[name]


def _past(record: Record, length: int, shown: Sequence[str], where: str) -> dict[str, Any]:
    """`time`, `history_times` and `history_events` of a row, as far as prompts show them."""
    found: dict[str, Any] = {}
    if "time" in shown:
        time = _shown(record, "time", "history_fields: time", where)
        found["time"] = None if time is None else _number(time, f"{where}: time")
        times = _listed(record, "history_times", "history_fields: time", length, where)
        found["history_times"] = tuple(
            None if then is None else _number(then, f"{where}: history_times") for then in times
        )
    if "event" in shown:
        found["history_events"] = tuple(_listed(record, "history_events", "history_fields: event", length, where))
    return found


def _listed(record: Record, name: str, option: str, length: int, where: str) -> list[Any]:
    """A column of lists, in CSV parted by spaces, one entry for each item."""
    value = _shown(record, name, option, where)
    values = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
    values = [] if value is None else values
    if len(values) != length:
        raise ValueError(f"{where}: {name} has {len(values)} entries but there are {length} items; give one for each.")
    return values


def _number(value: object, where: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # anything else is refused
    except (TypeError, ValueError):
        raise ValueError(f"{where} holds {value!r} but must hold numbers.") from None


def _with_features(
    rows: Sequence[RankingRow], records: Sequence[Record], model: RankingModel, where: str
) -> list[RankingRow]:
    """The rows with facts about each candidate: from the counts in the model folder, and from their own columns."""
    from rerank.baselines import Counts, list_features

    path = model.folder / "evidence.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the model's prompts show evidence; copy the whole folder.")
    shown = model.prompter.settings.evidence_names
    candidates = [np.array(row.candidates) for row in rows]

    def numbers(name: str, fact: str) -> list[np.ndarray]:
        """A column of numbers; zeros for one that no prompt shows."""
        if fact not in shown:
            return [np.zeros(len(row.candidates)) for row in rows]
        pairs = zip(rows, records, strict=True)
        return [_numbers(record, name, fact, row, f"{where}, row {row.row_id}") for row, record in pairs]

    own = [name for name in model.prompter.names if name.startswith(COLUMN)]
    columns = {name: numbers(name.removeprefix(COLUMN), name) for name in own}
    scores = numbers("scores", "first_stage_score")
    histories = [np.array(row.history, dtype=np.int64) for row in rows]
    facts = list_features(model.prompter.names, Counts.load(path), histories, candidates, scores, None, columns)
    return [replace(row, features=features) for row, features in zip(rows, facts, strict=True)]


def _numbers(record: Record, name: str, fact: str, row: RankingRow, where: str) -> np.ndarray:
    """(N,) a number of each candidate, nan for null."""
    values = _listed(record, name, f"evidence_names: {fact}", len(row.candidates), where)
    return np.array([np.nan if value is None else _number(value, f"{where}: {name}") for value in values])


def check_limit(rows: Sequence[RankingRow], model: RankingModel, where: str, one_token: bool = False) -> None:
    """Refuse lists whose answers cannot be made rankings, such as those too long for the model's token limit."""
    tokenizer, limit, top_k = model.load_tokenizer(), model.max_completion_tokens, model.prompter.settings.top_k
    check = tokens_of if one_token or model.one_token else partial(grammars_of, model)
    try:
        check([PromptedRow(row, "", model.prompter.labels(row), limit, top_k) for row in rows], tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}, {error}") from None


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
