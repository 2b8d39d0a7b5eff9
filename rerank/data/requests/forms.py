"""Logs of requests in tables: wide, long, and the `behaviors.tsv` of MIND.

Source of the last: https://github.com/msnews/msnews.github.io/blob/master/assets/doc/introduction.md
"""

import datetime
from collections.abc import Iterable
from pathlib import Path

import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data import DataArguments
from rerank.data.readers import Names, Source, as_seconds, as_text, number_rows, pick_columns, require_column
from rerank.data.requests import raw
from rerank.data.requests.raw import RawLog, as_list, element_text, field_texts, number
from rerank.data.tables import first_row, materialise, refuse_empty

WIDE = ("request", "user", "time", "history", "candidates", "relevance", "scores", "split")
LONG = ("request", "user", "time", "history", "item", "relevance", "score", "position", "split")
MIND_NAMES = {"request": "impression id", "time": "time", "item": "impressions", "relevance": "impressions"}
_MIND_COLUMNS = ("impression", "user", "time", "history", "impressions")
_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"  # 11/11/2019 9:05:58 AM
_MIND_WORD = r"^(.+?)-(-?[^-]+)$"  # N12-0


@ibis.udf.scalar.builtin
def try_strptime(text: str, form: str) -> datetime.datetime:  # type: ignore[empty-body]
    """A moment from text in a form, null where it is in another; DuckDB's function."""


def read_wide(con: ibis.BaseBackend, source: Source, args: DataArguments) -> RawLog:
    """One line a request, with lists in cells (of text: parted by spaces)."""
    names = pick_columns(source, args.request_columns, "request_columns", WIDE)
    for name in ("request", "candidates", "relevance"):
        require_column(source, name, names.get(name, name), "request_columns")
    lists = {"item": names["candidates"], "relevance": names["relevance"]}
    lists |= {"score": names["scores"]} if "scores" in names else {}
    for name in args.candidate_fields or ():
        require_column(source, "the candidates", name, "candidate_fields")
        lists[f"candidate_{name}"] = name
    cells = {f"list_{name}": as_list(source.table[column]) for name, column in lists.items()}
    table = source.table.select("source_row", **_request_columns(source, names, args), **cells)
    table = materialise(con, table, source)
    _refuse_lengths(table, source, lists)
    columns = {name: table[f"list_{name}"].unnest() for name in lists}
    places = ibis.range(0, table.list_item.length()).unnest()
    flat = table.select(source_row=table.source_row, request_row=table.source_row, place=places, **columns)
    names |= {"item": names["candidates"]} | ({"score": names["scores"]} if "scores" in names else {})
    return _log(con, source, table, _numbers(flat, lists), names)


def read_long(con: ibis.BaseBackend, source: Source, args: DataArguments) -> RawLog:
    """One line a request and candidate; `position` gives the order shown, else the order of the file."""
    names = pick_columns(source, args.request_columns, "request_columns", LONG)
    for name in ("request", "item", "relevance"):
        require_column(source, name, names.get(name, name), "request_columns")
    columns: Names = {n: names[n] for n in ("item", "relevance", "score", "position") if n in names}
    for name in args.candidate_fields or ():
        require_column(source, "the candidates", name, "candidate_fields")
        columns[f"candidate_{name}"] = name
    cells = {name: source.table[column] for name, column in columns.items()}
    table = source.table.select("source_row", **_request_columns(source, names, args), **cells)
    table = materialise(con, table, source)
    refuse_empty(table.filter(_.request_id == ""), source, names["request"])
    table = table.mutate(request_row=table.source_row.min().over(ibis.window(group_by="request_id")))
    _refuse_changes(table, source, names)
    flat = _numbers(table, columns)
    if "position" in columns:
        if row := first_row(flat.filter(flat.position.isnull()), source):
            problem = f"{names['position']} is {row['raw_position']!r}, not a number"
            raise ValueError(f"{row['place']}: {problem}; correct the row or map another column")
    order = ["position", "source_row"] if "position" in columns else ["source_row"]
    flat = flat.mutate(place=ibis.row_number().over(ibis.window(group_by="request_row", order_by=order)))
    return _log(con, source, table.filter(table.source_row == table.request_row), flat, names, repeats_ids=True)


def read_mind(con: ibis.BaseBackend, path: str, args: DataArguments) -> RawLog:
    """`behaviors.tsv`, without a header: impression id, user, time, history, and impressions such as `N12-0 N7-1`."""
    source = Source(path, read_headerless(con, path, _MIND_COLUMNS))
    cells = source.table
    raw_time = as_text(cells.time)
    moment = try_strptime(raw_time, _MIND_TIME)
    table = cells.select(
        "source_row",
        request_id=as_text(cells.impression),
        user_id=as_text(cells.user),
        time=ibis.coalesce(moment.epoch_seconds().cast("float64"), as_seconds(raw_time)),
        raw_time=raw_time,
        raw_split=ibis.literal(""),
        history=as_list(cells.history),
        list_item=as_list(cells.impressions),
        **field_texts(source, args.request_fields or ()),
    )
    for name in args.candidate_fields or ():
        require_column(source, "the candidates", name, "candidate_fields")
    table = materialise(con, table, source)
    places, words = ibis.range(0, table.list_item.length()).unnest(), table.list_item.unnest()
    flat = table.select(source_row=table.source_row, request_row=table.source_row, place=places, word=words)
    is_graded = flat.word.re_search(_MIND_WORD)
    item = ibis.ifelse(is_graded, flat.word.re_extract(_MIND_WORD, 1), flat.word)
    grade = ibis.ifelse(is_graded, flat.word.re_extract(_MIND_WORD, 2), flat.word)
    flat = flat.select("source_row", "request_row", "place", item=item, relevance=grade)
    return _log(con, source, table, _numbers(flat, ("item", "relevance")), MIND_NAMES)


def read_headerless(con: ibis.BaseBackend, path: str, columns: tuple[str, ...]) -> Table:
    """A file of tab-separated text without a header, with source_row."""
    types = dict.fromkeys(columns, "string")
    options = {"auto_detect": False, "header": False, "delim": "\t", "quote": "", "escape": ""}
    return number_rows(con.read_csv(path, columns=types, **options))


def form_of(path: str, source_columns: tuple[str, ...], args: DataArguments) -> str:
    """The form of a table of requests: the given one, or for `auto` wide where it has candidates, long where item."""
    if args.requests_format != "auto":
        return args.requests_format
    mapped = {*source_columns, *(args.request_columns or {})}
    for form, column in (("wide", "candidates"), ("long", "item")):
        if column in mapped:
            return form
    there = ", ".join(column for column in source_columns if column != "source_row")
    problem = f"requests is {path}, which has neither a column candidates (wide) nor item (long); it has {there}"
    raise ValueError(f"{problem}; map one in request_columns, or set requests_format")


def is_mind(path: str) -> bool:
    """Whether a file has the name of MIND's log."""
    return Path(path.removesuffix(".gz")).name == "behaviors.tsv"


def _request_columns(source: Source, names: Names, args: DataArguments) -> dict[str, Column]:
    cells = source.table
    text = {name: as_text(cells[names[name]]) for name in ("request", "user", "time", "split") if name in names}
    empty = ibis.literal("")
    columns = {
        "request_id": text["request"],
        "user_id": text.get("user", empty),
        "time": as_seconds(cells[names["time"]]) if "time" in names else ibis.null("float64"),
        "raw_time": text.get("time", empty),
        "raw_split": text.get("split", empty),
    }
    if "history" in names:
        columns["history"] = as_list(cells[names["history"]])
    return columns | field_texts(source, args.request_fields or ())


def _numbers(flat: Table, columns: Iterable[str]) -> Table:
    """item_id, and each of the other columns as a number beside its text."""
    numbers: dict[str, Column] = {}
    for name in [name for name in columns if name != "item"]:
        text = element_text(flat[name])
        numbers |= {f"raw_{name}": text, name: number(text)}
    kept = [name for name in ("source_row", "request_row", "place") if name in flat.columns]
    return flat.select(*kept, item_id=element_text(flat["item"]), **numbers)


def _log(
    con: ibis.BaseBackend, source: Source, requests: Table, flat: Table, names: Names, repeats_ids: bool = False
) -> RawLog:
    unknown = {"score": ibis.null("float64"), "raw_score": ibis.literal("")}
    unknown = {name: value for name, value in unknown.items() if name not in flat.columns}
    flat = flat.mutate(**unknown, event=ibis.null("string"), feedback_time=ibis.null("float64"))
    candidates = con.create_table(ibis.util.gen_name("candidates"), flat, temp=True)
    histories = None
    if "history" in requests.columns:
        histories = con.create_table(ibis.util.gen_name("histories"), raw.history_table(requests), temp=True)
    return RawLog(source, requests, candidates, histories, names, repeats_ids)


def _refuse_lengths(table: Table, source: Source, lists: Names) -> None:
    """Refuse a list of another length than the candidates; a request may lack its scores."""
    size = table.list_item.length().fill_null(0)
    for name in [name for name in lists if name != "item"]:
        length = table[f"list_{name}"].length().fill_null(0)
        bad = (length != size) & ((length > 0) if name == "score" else True)
        counted = table.select("source_row", "request_id", size=size, length=length).filter(bad)
        if row := first_row(counted, source):
            problem = f"{lists[name]} has {row['length']} values but {row['size']} candidates stand in the request"
            problem += f" {row['request_id']!r}"
            raise ValueError(f"{row['place']}: {problem}; give one value a candidate, null where it is unknown")


def _refuse_changes(table: Table, source: Source, names: Names) -> None:
    """Refuse a request whose lines differ in what is the request's."""
    window = ibis.window(group_by="request_row", order_by="source_row")
    columns = {"user_id": names.get("user"), "raw_time": names.get("time"), "raw_split": names.get("split")}
    columns |= {name: name.removeprefix("field_") for name in table.columns if name.startswith("field_")}
    columns |= {"history": names["history"]} if "history" in names else {}
    for name, column in columns.items():
        text = table[name].cast("string").fill_null("")
        compared = table.select("source_row", "request_row", "request_id", text=text, first=text.first().over(window))
        if row := first_row(compared.filter(_.text != _.first), source):
            problem = f"{column} is {row['text']!r} but {source.place(row['request_row'])} has {row['first']!r}"
            cure = "give each request an id of its own, and its lines one value"
            raise ValueError(f"{row['place']}: {problem} for request {row['request_id']!r}; {cure}")
