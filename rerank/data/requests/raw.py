"""A log of requests as text and numbers, the same for every form, and the cells that it is read from."""

from collections.abc import Sequence
from dataclasses import dataclass

import ibis
from ibis.expr.types import ArrayColumn, Column, Table

from rerank.data.readers import Names, Source, as_text, require_column

MISSING = ("", "null", "nan")  # how a text cell writes a missing number


@ibis.udf.scalar.builtin
def to_json(value) -> str:  # type: ignore[empty-body]
    """A value as JSON text, null for null; DuckDB's function."""


@dataclass(frozen=True)
class RawLog:
    """The tables of one log, computed and kept.

    Attributes:
        source: Where it was read, for the places of rows.
        requests: One line a request: source_row, request_id, user_id (empty: none), time (seconds or null), raw_time,
            raw_split, and `field_NAME`, the JSON text of each column of the request.
        candidates: One line a candidate: request_row (source_row of its request), place (0-based, as shown),
            source_row, item_id, relevance and score (number or null), event and feedback_time (of a positive, null
            where unknown), `candidate_NAME`, and `raw_` text for each of the numbers.
        histories: request_row, place (oldest first) and item_id of the items of each history; None where the log has
            none of its own.
        names: Our names to the source's columns, for messages.
        repeats_ids: Whether an id stands in several lines of a request.
    """

    source: Source
    requests: Table
    candidates: Table
    histories: Table | None
    names: Names
    repeats_ids: bool = False


def element_text(column: Column) -> Column:
    """The element of a list as text; empty for null."""
    if column.type().is_json():
        column = ibis.ifelse(column.cast("string") == "null", ibis.null("string"), as_text(column))
    return as_text(column)


def as_list(column: Column) -> ArrayColumn:
    """A list column, or text with white space between the elements, as a list; empty for a missing cell."""
    if column.type().is_array():
        return column
    if column.type().is_unknown():  # a JSON key that holds nothing but nulls
        return column.cast("array<string>")
    words = as_text(column)
    return ibis.ifelse(words == "", ibis.literal([], "array<string>"), words.split(" "))


def number(text: Column) -> Column:
    """A finite number from text, null for anything else."""
    value = text.try_cast("float64")
    return ibis.ifelse(value.isnan() | value.isinf(), ibis.null("float64"), value)


def is_missing(text: Column) -> Column:
    """Whether a text cell says that there is no number."""
    return text.lower().isin(MISSING)


def field_texts(source: Source, names: Sequence[str]) -> dict[str, Column]:
    """`field_NAME` of each column of the requests that the recipe names: a scalar as JSON text, null where missing."""
    found = {}
    for name in names:
        require_column(source, "a request", name, "request_fields")
        column = source.table[name]
        if column.type().is_struct() or column.type().is_map():
            raise ValueError(f"{source.name}: column {name!r} holds objects, no scalars; correct request_fields")
        if column.type().is_array() or column.type().is_unknown():
            column = as_text(column) if column.type().is_array() else ibis.null("string")
        if column.type().is_floating():
            column = ibis.ifelse(column.isnan(), ibis.null(column.type()), column)
        found[f"field_{name}"] = to_json(column)
    return found


def history_table(requests: Table) -> Table:
    """The exploded lists of a column `history`: request_row, place, item_id."""
    flat = requests.select(
        request_row=requests.source_row,
        place=ibis.range(0, requests.history.length()).unnest(),
        item=requests.history.unnest(),
    )
    return flat.select("request_row", "place", item_id=element_text(flat["item"]))
