"""Texts of a prompt beside ids and facts: fields of items, of the user and of the request, ages of the history."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rerank.catalogue import Catalogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rerank.prompts import PromptSettings
    from rerank.rows.row import RankingRow

SEMANTIC_ID = "semantic_id"
WITHOUT_IDS = "leave semantic_id out of item_fields and set ranking to number, letter or token in the traces recipe"
HISTORY_FIELDS = {"time": "history_times", "event": "history_events"}  # -> its column of a row
TITLES = {"user_fields": "User", "request_fields": "Request"}  # option -> how its line begins
UNNAMED = ("title", "category")  # fields that stand on an item line without their names
_KEEP = "name it in request_fields of the data stage, or leave it out"
# Seconds of a unit, its sign, and from how many seconds on an age is told in it.
_UNITS = ((365 * 86400, "y", 730 * 86400), (30 * 86400, "mo", 60 * 86400), (86400, "d", 86400), (3600, "h", 3600))


def clean(text: str) -> str:
    """`text` on one line and without anything a tokenizer could take for an id, a tag or the end of a turn."""
    return " ".join(text.split()).replace("<", "‹").replace(">", "›")


def described(catalogue: Catalogue, item: int) -> str:
    """Title and category of an item, cleaned; empty where it has neither."""
    texts = map(clean, (catalogue.titles[item], catalogue.categories[item]))
    return " | ".join(text for text in texts if text)


def cut(text: str, num_tokens: int, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """The beginning of a text, `num_tokens` tokens long at most, or words without a tokenizer; all of it for 0."""
    if num_tokens == 0:
        return text
    if tokenizer is None:
        return " ".join(text.split()[:num_tokens])
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(found.input_ids) <= num_tokens:
        return text
    return text[: found["offset_mapping"][num_tokens - 1][1]].rstrip()


def age(seconds: float) -> str:
    """A time span in one short word: `5m`, `3h`, `2d`, `4mo`, `2y`, rounded down; nothing for nan."""
    if seconds != seconds:
        return ""
    for size, sign, least in _UNITS:
        if seconds >= least:
            return f"{int(seconds // size)}{sign}"
    return f"{max(0, int(seconds // 60))}m"


def shown_value(value: object) -> str:
    """A value of a user or a request as text; empty for null."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class FieldTexts:
    """Writes the fields that the settings name, each cleaned and cut to `max_field_tokens`."""

    catalogue: Catalogue
    settings: "PromptSettings"
    tokenizer: "PreTrainedTokenizerBase | None" = None
    _known: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)

    def item(self, item: int, name: str) -> str:
        """The text of an item's field."""
        if (name, item) not in self._known:
            self._known[name, item] = self._cut(self.catalogue.texts(name)[item])
        return self._known[name, item]

    def item_line(self, item: int, further: Sequence[str] = ()) -> str:
        """The semantic id, if it is shown, then the other fields that are not empty; an item without any by its id.
        Nothing where the prompt shows no field.

        Args:
            item: Its number.
            further: Texts behind these.
        """
        if not self.settings.item_fields:
            return ""
        names = [name for name in self.settings.item_fields if name != SEMANTIC_ID]
        texts = [(name, self.item(item, name)) for name in names]
        shown = [text if name in UNNAMED else f"{clean(name)}: {text}" for name, text in texts if text]
        if self.settings.shows_ids:
            shown += further
            return self.catalogue.semantic_ids[item] + (" " + " | ".join(shown) if shown else "")
        return " " + " | ".join([*(shown or [clean(self.catalogue.item_ids[item])]), *further])

    def history_lines(self, row: "RankingRow") -> list[str]:
        """The latest items, oldest first: one a line, or on one line where nothing but ids is shown; none of them
        without fields."""
        if not self.settings.item_fields:
            return ["History:"]
        first = max(0, len(row.history) - self.settings.max_history)
        places = range(first, len(row.history))
        shown = [self.item_line(row.history[place], self._times_and_events(row, place)) for place in places]
        if self.settings.item_fields == [SEMANTIC_ID]:
            return ["History:" + "".join(shown)]
        return ["History:", *shown]

    def row_lines(self, row: "RankingRow") -> list[str]:
        """The lines `User: ...` and `Request: ...`; none where every value is empty.

        Raises:
            ValueError: When the row lacks a field.
        """
        lines = []
        for key, names in self.settings.row_fields.items():
            texts = {name: self.row_field(row, name, key) for name in names}
            shown = "; ".join(f"{clean(name)}: {text}" for name, text in texts.items() if text)
            lines += [f"{TITLES[key]}: {shown}"] if shown else []
        return lines

    def row_field(self, row: "RankingRow", name: str, key: str) -> str:
        """The text of a field of the user or the request; `key` is the option that names it."""
        if name not in row.fields:
            known = ", ".join(row.fields) or "none"
            raise ValueError(f"row_id {row.row_id}: {key} holds {name!r} but the row has {known}; {_KEEP}")
        return self._cut(shown_value(row.fields[name]))

    def _cut(self, text: str) -> str:
        return cut(clean(text), self.settings.max_field_tokens, self.tokenizer)

    def _times_and_events(self, row: "RankingRow", place: int) -> list[str]:
        """The age and the event type of a history item, as far as they are shown and known."""
        found = []
        for name in self.settings.history_fields:
            if name == "time" and row.history_times and row.time is not None:
                then = row.history_times[place]
                found.append("" if then is None else age(row.time - then))
            elif name == "event" and row.history_events:
                found.append(clean(row.history_events[place] or ""))
        return [text for text in found if text]


def check_catalogue(settings: "PromptSettings", catalogue: Catalogue) -> None:
    """Refuse fields of items that the catalogue lacks."""
    check_item_fields(settings, catalogue.columns, "the catalogue")
    if settings.shows_ids and not catalogue.has_ids:
        raise ValueError(f"item_fields holds semantic_id but the items have no semantic ids; {WITHOUT_IDS}")


def check_item_fields(settings: "PromptSettings", columns: Sequence[str], where: str) -> None:
    """Refuse fields of items that are no column, naming those there are."""
    for name in settings.item_fields:
        if name != SEMANTIC_ID and name not in columns:
            raise ValueError(
                f"item_fields holds {name!r} but {where} has {', '.join(columns)}; name the column in item_columns or "
                "text_columns of the data stage, or leave it out"
            )


def check_row_fields(settings: "PromptSettings", columns: Sequence[str], fields: Mapping[str, object]) -> None:
    """Refuse fields of users, requests and histories that a run's rows lack, naming those there are.

    Args:
        settings: Of the prompt.
        columns: Of data/rows.parquet.
        fields: Of its rows.
    """
    for key, names in settings.row_fields.items():
        for name in names:
            if name not in fields:
                known = ", ".join(fields) or "none"
                raise ValueError(f"{key} holds {name!r} but the rows of the data stage have {known}; {_KEEP}")
    for name in settings.history_fields:
        if HISTORY_FIELDS[name] not in columns:
            raise ValueError(
                f"history_fields holds {name!r}, but the rows of the data stage do not know it; it is known of "
                "requests (option requests of the data stage); leave it out"
            )
