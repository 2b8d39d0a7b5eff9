"""Rows of a user's file as rows that a model ranks: items instead of ids, with what its prompts show."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rerank.models.ranker import RankingModel, grammars_of
from rerank.prompts import MAX_LETTERS, PromptSettings
from rerank.rank.files import COLUMNS, Record
from rerank.rows import PromptedRow, RankingRow
from rerank.rows.histories import COLUMN


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


def check_limit(rows: Sequence[RankingRow], model: RankingModel, where: str) -> None:
    """Refuse lists whose answers cannot be made rankings, such as those too long for the model's token limit."""
    tokenizer, limit, top_k = model.load_tokenizer(), model.max_completion_tokens, model.prompter.settings.top_k
    try:
        grammars_of(model, [PromptedRow(row, "", model.prompter.labels(row), limit, top_k) for row in rows], tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}, {error}") from None
