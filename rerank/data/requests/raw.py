"""A log of requests as text and numbers, the same for every form, and the cells that it is read from."""

from collections.abc import Sequence
from dataclasses import dataclass

import ibis
from ibis.expr.types import Column, Table

from rerank.baselines.times import MILLISECONDS, THIS_CENTURY, unit_of
from rerank.data.filters import first_row
from rerank.data.sources.cells import as_text, field_text
from rerank.data.sources.columns import Names
from rerank.data.sources.source import Cells, Source


@dataclass(frozen=True)
class RawLog:
    """The tables of one log, computed and kept.

    Attributes:
        source: Where it was read, for the places of rows.
        requests: One line a request: source_row, request_id, user_id (empty: none), time (seconds or null), raw_time,
            raw_split, and `field_NAME`, the JSON text of each column of the request.
        candidates: One line a candidate: request_row (source_row of its request), place (0-based, as shown),
            source_row, item_id, relevance and score (number or null), `candidate_NAME`, and `raw_` text for each of
            the numbers.
        histories: request_row, place (oldest first) and item_id of the items of each history; None where the log has
            none of its own.
        names: Our names to the source's columns, for messages.
        time_unit: Of times that are numbers in the source.
        feedback: What raised the grade of a candidate: request_row, place, grade, time (not before the request's, null
            where unknown) and kind, the event type; None where nothing but the grades is known.
        repeats_ids: Whether an id stands in several lines of a request.
    """

    source: Source
    requests: Table
    candidates: Table
    histories: Table | None
    names: Names
    time_unit: str = "seconds"
    feedback: Table | None = None
    repeats_ids: bool = False


def element_text(column: Column) -> Column:
    """The element of a list as text; empty for null."""
    if column.type().is_json():
        column = ibis.ifelse(column.cast("string") == "null", ibis.null("string"), as_text(column))
    return as_text(column)


def field_texts(cells: Cells, source: Source, names: Sequence[str]) -> dict[str, Column]:
    """`field_NAME` of each column of the requests that the recipe names: a scalar as JSON text, null where missing."""
    found = {}
    for name in names:
        kind = cells[name].type()
        if kind.is_struct() or kind.is_map():
            raise objects(source, name)
        found[f"field_{name}"] = field_text(cells[name])
    return found


def refuse_objects(requests: Table, source: Source) -> None:
    """Refuse a column of the requests that holds objects, in JSON."""
    for column in [column for column in requests.columns if column.startswith("field_")]:
        if row := first_row(requests.filter(requests[column].startswith("{")), source):
            raise objects(source, column.removeprefix("field_"), f"{row['place']}: ")


def refuse_unit(times: Table, source: Source, column: str, unit: str) -> None:
    """Refuse a time that is one of our days in another unit only; `times` have source_row and time, a number.

    What is small in any unit may be of a clock of its own.
    """
    too_long = times.time >= MILLISECONDS * (1 if unit == "seconds" else 1000)
    in_seconds = (times.time >= THIS_CENTURY) & (times.time < MILLISECONDS)
    bad = too_long if unit == "seconds" else too_long | in_seconds
    if row := first_row(times.filter(bad), source):
        problem = f"{column} is {row['time']:.17g}, which are {unit_of(row['time'])} since 1970"
        raise ValueError(f"{row['place']}: {problem}; write {unit}, or a date")


def objects(source: Source, name: str, place: str = "") -> ValueError:
    """The error for a column of a request that has keys of its own."""
    return ValueError(
        f"{place or source.name + ': '}column {name!r} holds objects, no scalars; correct request_fields"
    )


def history_table(requests: Table) -> Table:
    """The exploded lists of a column `history`: request_row, place, item_id."""
    flat = requests.select(
        request_row=requests.source_row,
        place=ibis.range(0, requests.history.length()).unnest(),
        item=requests.history.unnest(),
    )
    return flat.select("request_row", "place", item_id=as_text(flat["item"]))
