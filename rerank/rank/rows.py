"""Rows of a user's file as rows that a model ranks: items instead of ids, with what its prompts show.

A row that cannot be ranked is a sentence that says why. N candidates of a row that the model knows.
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.models.ranker import Answer, RankingModel
from rerank.prompts import PromptSettings
from rerank.prompts.fields import HISTORY_FIELDS, shown_value
from rerank.rank.files import COLUMNS, Record
from rerank.rows import RankingRow
from rerank.rows.histories import COLUMN


@dataclass(frozen=True)
class EncodedRow:
    """A row of a file, ready to be ranked.

    Attributes:
        row: Of the candidates that the model knows.
        ids: (N,) these, as the file has them.
        last: Ids of the others, which stand behind every ranking.
        unknown: Numbers of unknown ids in the history and among the candidates.
        numbers: Numbers of each candidate (N,), by column of the file.
    """

    row: RankingRow
    ids: list[Any]
    last: list[Any]
    unknown: tuple[int, int]
    numbers: Mapping[str, np.ndarray]

    def ranking(self, answer: Answer) -> list[Any] | None:
        """The ids of an answer, best first; None where it has none."""
        return None if answer.order is None else [self.ids[place] for place in answer.order] + self.last


@dataclass(frozen=True)
class SettledRow:
    """A row with at most one candidate that the model knows, and others that stand behind it.

    Attributes:
        ranking: All of them, as the file has them.
        unknown: As of an EncodedRow.
    """

    ranking: list[Any]
    unknown: tuple[int, int]


Encoded = EncodedRow | SettledRow | str  # or why it cannot be ranked


def check_columns(records: Sequence[Record], model: RankingModel, where: str) -> None:
    """Refuse a file of which no row has a column that the model's prompts show."""
    there = {name for record in records for name in record}
    for name, option in shown_columns(model).items():
        if name not in there:
            raise ValueError(f"{where}: {_missing(name, option)}")


def shown_columns(model: RankingModel) -> dict[str, str]:
    """Columns of rows that the model's prompts show, with the options that name them."""
    settings = model.prompter.settings
    found = {name: key for key, names in settings.row_fields.items() for name in names}
    found |= {HISTORY_FIELDS[name]: f"history_fields: {name}" for name in settings.history_fields}
    found |= {"time": "history_fields: time"} if "time" in settings.history_fields else {}
    for fact in settings.evidence_names if model.prompter.needs_features else ():
        if fact == "first_stage_score" or fact.startswith(COLUMN):
            name = "scores" if fact == "first_stage_score" else fact.removeprefix(COLUMN)
            found[name] = f"evidence_names: {fact}"
    return found


def _missing(name: str, option: str) -> str:
    return f"column {name!r} is missing, which the model's prompts show ({option}); add it."


def encode_row(
    record: Record,
    number: int,
    items: Mapping[str, int],
    shown: Mapping[str, str],
    settings: PromptSettings,
    unknown: str,
    most: int | None,
) -> EncodedRow | SettledRow:
    """A row of a file, without facts about its candidates.

    Args:
        record: With `history` and `candidates` as lists.
        number: Of the row.
        items: The numbers of items by their ids.
        shown: As of `shown_columns`.
        settings: Of the prompts.
        unknown: `last`, `drop` or `refuse`: what becomes of candidates that the model does not know.
        most: Candidates that the model has labels for; None for no limit.

    Raises:
        ValueError: Saying why it cannot be ranked.
    """
    for name in COLUMNS:
        if name not in record:
            raise ValueError(f"column {name!r} is missing; add it.")
    for name, option in shown.items():
        if name not in record:
            raise ValueError(_missing(name, option))
    history, ids = (_ids(record[name], name) for name in COLUMNS)
    fields = {name: _shown(record[name], name) for names in settings.row_fields.values() for name in names}
    past = _past(record, len(history), settings.history_fields)
    numbers = {
        name: _numbers(record, name, len(ids)) for name, option in shown.items() if option.startswith("evidence")
    }
    taken = [place for place, item_id in enumerate(history) if item_id in items]
    known = [place for place, item_id in enumerate(ids) if item_id in items]
    _check_candidates(ids, len(known), most, unknown, [one for one in ids if one not in items])
    as_given, missed = record["candidates"], (len(history) - len(taken), len(ids) - len(known))
    others = [place for place, item_id in enumerate(ids) if item_id not in items] if unknown == "last" else []
    if len(known) < 2:
        return SettledRow([as_given[place] for place in known + others], missed)
    row = RankingRow(
        number,
        tuple(items[history[place]] for place in taken),
        tuple(items[ids[place]] for place in known),
        fields=fields,
        time=past.get("time"),
        history_times=tuple(past["history_times"][place] for place in taken if "history_times" in past),
        history_events=tuple(past["history_events"][place] for place in taken if "history_events" in past),
    )
    return EncodedRow(
        row,
        [as_given[place] for place in known],
        [as_given[place] for place in others],
        missed,
        {name: values[known] for name, values in numbers.items()},
    )


def _shown(value: object, name: str) -> object:
    """A value that prompts can show."""
    try:
        shown_value(value)
    except TypeError:
        raise ValueError(f"{name} holds {value!r}, which prompts cannot show; give a text or a number.") from None
    return value


def _ids(value: object, name: str) -> list[str]:
    """Item ids as texts."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r} but must be a list of item ids.")
    for one in value:
        if not isinstance(one, str | int | float) or isinstance(one, bool):
            raise ValueError(f"{name} holds {one!r} but must be a list of item ids, texts or numbers.")
    return list(map(str, value))


def _check_candidates(
    ids: Sequence[str], num_known: int, most: int | None, unknown: str, strangers: Sequence[str]
) -> None:
    """Refuse candidates that cannot be ranked."""
    seen = set[str]()
    for item_id in ids:
        if item_id in seen:
            raise ValueError(f"candidates holds {item_id!r} twice; give each item once.")
        seen.add(item_id)
    if strangers and unknown == "refuse":
        raise ValueError(
            f"candidates holds {strangers[0]!r}, which the model does not know; leave it out, or give it by --items."
        )
    if num_known < 2 and not (strangers and unknown == "last"):
        number = "1 item" if num_known else "no item"
        cure = " that the model knows; give the others by --items" if strangers else "; there is nothing to rank"
        raise ValueError(f"candidates has {number}{cure}.")
    if most is not None and num_known > most:
        raise ValueError(
            f"candidates has {num_known} items but the model has {most} labels; give at most {most}, or train a model "
            "with ranking: number, or with ranking: token and longer lists."
        )


def _past(record: Record, length: int, shown: Sequence[str]) -> dict[str, Any]:
    """`time`, `history_times` and `history_events` of a row, as far as prompts show them."""
    found: dict[str, Any] = {}
    if "time" in shown:
        time = record["time"]
        found["time"] = None if time is None else _seconds(time, "time")
        times = _listed(record, "history_times", length)
        found["history_times"] = [None if then is None else _seconds(then, "history_times") for then in times]
        for then in found["history_times"]:
            if found["time"] is not None and then is not None and math.isinf(found["time"] - then):
                raise ValueError(f"history_times holds {then!r}, too far from the time {found['time']!r}.")
    if "event" in shown:
        found["history_events"] = _listed(record, "history_events", length)
        for event in found["history_events"]:
            if not isinstance(event, str | None):
                raise ValueError(f"history_events holds {event!r} but must hold texts.")
    return found


def _listed(record: Record, name: str, length: int) -> list[Any]:
    """A column of lists, in CSV parted by spaces, one entry for each item."""
    value = record[name]
    values = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
    values = [] if value is None else values
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} entries but there are {length} items; give one for each.")
    return values


def _seconds(value: object, name: str) -> float:
    """A time: a number as it is, a date or the text of one (ISO 8601) in seconds, in UTC where it says no offset."""
    if isinstance(value, str):
        try:
            return _number(value, name)
        except ValueError:
            value = _date(value, name)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    return _number(value, name)


def _date(text: str, name: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        cure = "must hold numbers, or dates such as 2026-01-31T12:00."
        raise ValueError(f"{name} holds {text!r} but {cure}") from None


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # anything else is refused
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"{name} holds {value!r} but must hold numbers.")
    return number


def _numbers(record: Record, name: str, length: int) -> np.ndarray:
    """A number of each candidate, nan for null."""
    values = _listed(record, name, length)
    return np.array([np.nan if value is None else _number(value, name) for value in values])
