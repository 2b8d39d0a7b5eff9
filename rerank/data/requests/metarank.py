"""Metarank's log of events: items, rankings and interactions in one JSONL file.

Source: https://github.com/metarank/metarank/blob/master/doc/event-schema.md and timestamp-formats.md
"""

import logging
from dataclasses import dataclass, field

import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data import DataArguments
from rerank.data.filters import count, first_row
from rerank.data.requests.raw import RawLog, refuse_unit
from rerank.data.sources.cells import as_seconds, as_text, number, to_json
from rerank.data.sources.json_lines import JsonLines
from rerank.data.sources.source import Source
from rerank.data.tables import materialise, refuse_empty

logger = logging.getLogger(__name__)

NAMES = {"request": "id", "time": "timestamp", "item": "items", "relevance": "relevance", "score": "relevancy"}
UNIT = "milliseconds"
_KINDS = ("item", "user", "ranking", "interaction")
_FIELDS = "STRUCT(name VARCHAR, value JSON)[]"
_COLUMNS = {
    **dict.fromkeys(("event", "id", "item", "ranking", "user", "session", "type", "timestamp"), "VARCHAR"),
    "fields": _FIELDS,
    "items": f"STRUCT(id VARCHAR, relevancy JSON, fields {_FIELDS})[]",
}


def read_items(con: ibis.BaseBackend, source: JsonLines) -> Source:
    """The item events as a table with a column for each field; of a field that is sent again the last value holds."""
    events = _read_events(con, source).filter(_.event == "item")
    if count(events) == 0:
        raise ValueError(f"{source.name} has no item event; leave items out, or name the file that has them")
    events = events.select("source_row", "fields", item=as_text(events["item"]))
    refuse_empty(events.filter(_["item"] == ""), source, "item")
    flat = events.select("source_row", "item", field=events.fields.unnest())
    flat = flat.select("source_row", "item", name=flat.field["name"], text=as_field_text(flat.field["value"]))
    found = flat.select("name").distinct().order_by("name").to_pyarrow()["name"].to_pylist()
    names = [name for name in found if name not in ("item", "source_row")]
    values = {f"c{n}": flat.text.argmax(flat.source_row, where=flat.name == name) for n, name in enumerate(names)}
    rows = events.group_by("item").agg(source_row=_.source_row.min())
    if names:
        rows = rows.left_join(flat.group_by("item").agg(**values), "item").drop("item_right")
    table = rows.select("item", *values, "source_row")
    return ItemEvents(con, source.asked, source.name, ["item", *names], table, log=source)


@dataclass
class ItemEvents(Source):
    """The items of a log of events, whose rows are those of the log."""

    log: Source = field(kw_only=True)

    def place(self, source_row: int) -> str:
        """The line of an event."""
        return self.log.place(source_row)


def read_metarank(con: ibis.BaseBackend, source: JsonLines, args: DataArguments) -> RawLog:
    """Rankings as requests; the grade of a candidate is the highest of its interactions, 0 without one."""
    events, path = _read_events(con, source), source.name
    rankings = events.filter(_.event == "ranking")
    if count(rankings) == 0:
        raise ValueError(f"{path} has no ranking event; set requests_format to the form that it has")
    if num_user := count(events.filter(_.event == "user")):
        logger.info(
            "%d user events of %s are not used: what is known of a user is a field of a ranking", num_user, path
        )
    values = {name: _field_of(rankings.fields, name) for name in args.request_fields or ()}
    if "session" in values:
        values["session"] = to_json(rankings.session)
    requests = rankings.select(
        "source_row",
        request_id=as_text(rankings.id),
        user_id=as_text(rankings.user),
        time=as_moment(rankings.timestamp),
        raw_time=as_text(rankings.timestamp),
        raw_split=ibis.literal(""),
        **{f"field_{name}": value.cast("string") for name, value in values.items()},
    )
    requests = con.create_table(ibis.util.gen_name("requests"), requests, temp=True)
    _refuse_absent(requests, "field_", "request_fields", "ranking", path)
    shown = _shown(con, rankings, args)
    _refuse_absent(shown, "raw_candidate_", "candidate_fields", "ranking's item", path)
    feedback = _feedback(con, source, events, requests, shown, args.grades or {"click": 1.0})
    best = feedback.group_by("request_row", "place").agg(relevance=_.grade.max())
    graded = shown.left_join(best, ("request_row", "place")).drop("request_row_right", "place_right")
    graded = graded.mutate(relevance=_.relevance.fill_null(0.0))
    graded = graded.mutate(raw_relevance=_.relevance.cast("string"))
    candidates = con.create_table(ibis.util.gen_name("candidates"), graded, temp=True)
    return RawLog(source, requests, candidates, None, NAMES, UNIT, _rises(feedback))


def _read_events(con: ibis.BaseBackend, source: JsonLines) -> Table:
    table = con.read_json(source.files, format="newline_delimited", columns=_COLUMNS, hive_partitioning=False)
    events = materialise(con, table, source)
    if row := first_row(events.filter(~_.event.isin(_KINDS) | _.event.isnull()), source):
        problem = f"event is {row['event'] or ''!r}, none of {', '.join(_KINDS)}"
        raise ValueError(f"{row['place']}: {problem}; correct or remove the line")
    return events


def as_moment(text: Column) -> Column:
    """Unix seconds from milliseconds or an ISO date, null for anything else."""
    milliseconds = number(text)
    return ibis.ifelse(milliseconds.isnull(), as_seconds(text), milliseconds / 1000)


def as_field_text(value: Column) -> Column:
    """The value of a field as text, lists joined by ", "; null for JSON's null."""
    plain = value.cast("string").nullif("null")
    return ibis.coalesce(value.str, value.try_cast("array<string>").join(", "), plain)


def _field_of(fields: Column, name: str) -> Column:
    """The JSON value of a field of an event, null where the event lacks it."""
    return fields.filter(lambda field: field["name"] == name)[0]["value"]


def _shown(con: ibis.BaseBackend, rankings: Table, args: DataArguments) -> Table:
    """Candidates without feedback: their places, items, scores and columns, as `RawLog` has them."""
    places, items = ibis.range(0, rankings["items"].length()).unnest(), rankings["items"].unnest()
    flat = rankings.select("source_row", request_row=rankings.source_row, place=places, shown=items)
    fields = flat.shown["fields"]
    texts = {"score": ibis.coalesce(flat.shown["relevancy"], _field_of(fields, "relevancy"))}
    texts |= {f"candidate_{name}": _field_of(fields, name) for name in args.candidate_fields or ()}
    texts = {name: as_field_text(value).fill_null("") for name, value in texts.items()}
    columns = {f"raw_{name}": text for name, text in texts.items()} | {n: number(t) for n, t in texts.items()}
    item_id = as_text(flat.shown["id"])
    shown = flat.select("source_row", "request_row", "place", item_id=item_id, **columns)
    return con.create_table(ibis.util.gen_name("shown"), shown, temp=True)


def _refuse_absent(table: Table, prefix: str, key: str, of: str, path: str) -> None:
    """Refuse a field that no event has."""
    for name in [column for column in table.columns if column.startswith(prefix)]:
        if count(table.filter(table[name].fill_null("") != "")) == 0:
            raise ValueError(f"{path} has no {of} with the field {name.removeprefix(prefix)!r}; correct {key}")


def _feedback(
    con: ibis.BaseBackend, source: Source, events: Table, requests: Table, shown: Table, grades: dict[str, float]
) -> Table:
    """The interactions: request_row, place, grade, time (not before the request's: a clock may be skewed), kind."""
    taken = events.filter(_.event == "interaction")
    raw_time = as_text(taken.timestamp)
    taken = taken.select(
        "source_row",
        kind=as_text(taken.type),
        ranking_id=as_text(taken.ranking),
        item_id=as_text(taken["item"]),
        raw_time=raw_time,
        feedback_time=as_moment(taken.timestamp),
        relevance=as_text(taken.type).cases(*grades.items(), else_=ibis.null("float64")).cast("float64"),
    )
    rankings = requests.group_by("request_id").agg(
        request_row=_.source_row.min(), request_time=_.time.argmin(_.source_row)
    )
    taken = taken.left_join(rankings, taken.ranking_id == rankings.request_id).drop("request_id")
    taken = con.create_table(ibis.util.gen_name("feedback"), taken, temp=True)
    _refuse_interactions(source, taken, shown, grades)
    taken = taken.join(shown.select("request_row", "item_id", "place"), ("request_row", "item_id"))
    time = ibis.greatest(taken.feedback_time, taken.request_time)  # null where both are
    return taken.select("source_row", "request_row", "place", "kind", grade=taken.relevance, time=time)


def _rises(feedback: Table) -> Table:
    """The interactions that raised the grade of a candidate above that of all before them, 0 at first."""
    order = [ibis.asc("time", nulls_first=True), ibis.desc("grade"), "source_row"]
    highest = feedback.mutate(
        highest=_.grade.max().over(ibis.cumulative_window(group_by=["request_row", "place"], order_by=order))
    )
    window = ibis.window(group_by=["request_row", "place"], order_by=order)
    with_before = highest.mutate(before=_.highest.lag().over(window).fill_null(0.0))
    return with_before.filter(_.grade > _.before).drop("highest", "before")


def _refuse_interactions(source: Source, taken: Table, shown: Table, grades: dict[str, float]) -> None:
    """Refuse interactions without a known type, a ranking, an item of it, or a time that can be read."""
    if row := first_row(taken.filter(_.relevance.isnull()), source):
        known = ", ".join(f"{kind}: {grade:g}" for kind, grade in grades.items())
        cure = "add it there, with 0 where it says nothing of relevance"
        raise ValueError(f"{row['place']}: type is {row['kind']!r}, which grades {{{known}}} does not name; {cure}")
    if row := first_row(taken.filter(_.request_row.isnull()), source):
        problem = f"ranking is {row['ranking_id']!r}, which no ranking event has as its id"
        raise ValueError(f"{row['place']}: {problem}; add the ranking or remove the interaction")
    if row := first_row(taken.anti_join(shown, ["request_row", "item_id"]), source):
        problem = f"item {row['item_id']!r} is not among those of the ranking {row['ranking_id']!r}"
        raise ValueError(f"{row['place']}: {problem}; correct the item or remove the interaction")
    if row := first_row(taken.filter(_.feedback_time.isnull() & (_.raw_time != "")), source):
        problem = f"timestamp is {row['raw_time']!r}, neither milliseconds nor a date"
        raise ValueError(f"{row['place']}: {problem}; correct the line")
    refuse_unit(taken.select("source_row", time=number(taken.raw_time)), source, NAMES["time"], UNIT)
