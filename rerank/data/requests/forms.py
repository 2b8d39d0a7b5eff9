"""Logs of requests in tables: wide, long, and the `behaviors.tsv` of MIND.

Source of the last: https://github.com/msnews/msnews.github.io/blob/master/assets/doc/introduction.md
"""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data import DataArguments
from rerank.data.filters import first_row
from rerank.data.requests import raw
from rerank.data.requests.raw import RawLog, field_texts, refuse_objects
from rerank.data.sources.cells import as_list, as_seconds, as_text, number
from rerank.data.sources.columns import Names, log_columns, pick_columns, require_column
from rerank.data.sources.source import Cells, Source
from rerank.data.tables import materialise, refuse_empty

WIDE = ("request", "user", "time", "history", "candidates", "relevance", "scores", "split")
LONG = ("request", "user", "time", "history", "item", "relevance", "score", "position", "split")
MIND_NAMES = {"request": "impression id", "time": "time", "item": "impressions", "relevance": "impressions"}
MIND_COLUMNS = ["impression", "user", "time", "history", "impressions"]
_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"  # 11/11/2019 9:05:58 AM
_MIND_WORD = r"^(.+?)-(-?[^-]+)$"  # N12-0


@ibis.udf.scalar.builtin
def try_strptime(text: str, form: str) -> datetime.datetime:  # type: ignore[empty-body]
    """A moment from text in a form, null where it is in another; DuckDB's function."""


def read_wide(con: ibis.BaseBackend, source: Source, args: DataArguments) -> RawLog:
    """One line a request, with lists in cells (of text: parted by spaces)."""
    names = _names(source, args, WIDE, ("request", "candidates", "relevance"))
    lists = {"item": names["candidates"], "relevance": names["relevance"]}
    lists |= {"score": names["scores"]} if "scores" in names else {}
    lists |= {f"candidate_{name}": name for name in args.candidate_fields or ()}
    cells = _cells(source, names, args)
    values = {f"list_{name}": as_list(cells[column]) for name, column in lists.items()}
    table = materialise(con, cells.select(**_request_columns(cells, source, names, args), **values), source)
    refuse_objects(table, source)
    _refuse_lengths(table, source, lists)
    columns = {name: table[f"list_{name}"].unnest() for name in lists}
    places = ibis.range(0, table.list_item.length()).unnest()
    flat = table.select(source_row=table.source_row, request_row=table.source_row, place=places, **columns)
    names |= {"item": names["candidates"]} | ({"score": names["scores"]} if "scores" in names else {})
    return _log(con, source, table, _numbers(flat, lists), names)


def read_long(con: ibis.BaseBackend, source: Source, args: DataArguments) -> RawLog:
    """One line a request and candidate; `position` gives the order shown, else the order of the file."""
    names = _names(source, args, LONG, ("request", "item", "relevance"))
    columns: Names = {n: names[n] for n in ("item", "relevance", "score", "position") if n in names}
    columns |= {f"candidate_{name}": name for name in args.candidate_fields or ()}
    cells = _cells(source, names, args)
    values = {name: as_text(cells[column]) for name, column in columns.items()}
    table = materialise(con, cells.select(**_request_columns(cells, source, names, args), **values), source)
    refuse_objects(table, source)
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


def read_mind(con: ibis.BaseBackend, source: Source, args: DataArguments) -> RawLog:
    """`behaviors.tsv`, without a header: impression id, user, time, history, and impressions such as `N12-0 N7-1`."""
    for key in ("request_fields", "candidate_fields"):
        for name in getattr(args, key) or ():
            require_column(source, "a request" if key == "request_fields" else "the candidates", name, key)
    cells = source.cells(MIND_COLUMNS)
    raw_time = as_text(cells["time"])
    moment = try_strptime(raw_time, _MIND_TIME)
    table = cells.select(
        request_id=as_text(cells["impression"]),
        user_id=as_text(cells["user"]),
        time=ibis.coalesce(moment.epoch_seconds().cast("float64"), as_seconds(raw_time)),
        raw_time=raw_time,
        raw_split=ibis.literal(""),
        history=as_list(cells["history"]),
        list_item=as_list(cells["impressions"]),
        **field_texts(cells, source, args.request_fields or ()),
    )
    table = materialise(con, table, source)
    places, words = ibis.range(0, table.list_item.length()).unnest(), table.list_item.unnest()
    flat = table.select(source_row=table.source_row, request_row=table.source_row, place=places, word=words)
    is_graded = flat.word.re_search(_MIND_WORD)
    item = ibis.ifelse(is_graded, flat.word.re_extract(_MIND_WORD, 1), flat.word)
    grade = ibis.ifelse(is_graded, flat.word.re_extract(_MIND_WORD, 2), flat.word)
    flat = flat.select("source_row", "request_row", "place", item=item, relevance=grade)
    return _log(con, source, table, _numbers(flat, ("item", "relevance")), MIND_NAMES)


def form_of(source: Source, args: DataArguments) -> str:
    """The form of a table of requests: the given one, or for `auto` wide where it has candidates, long where item."""
    if args.requests_format != "auto":
        return args.requests_format
    for form, column in (("wide", "candidates"), ("long", "item")):
        if column in (args.request_columns or {}) or source.has(column):
            return form
    there = ", ".join(column or "(no name)" for column in source.columns)
    problem = (
        f"requests is {source.name}, which has neither a column candidates (wide) nor item (long); it has {there}"
    )
    raise ValueError(f"{problem}; {source.problem or 'map one in request_columns, or set requests_format'}")


def is_mind(path: str) -> bool:
    """Whether a file has the name of MIND's log."""
    return Path(path.removesuffix(".gz")).name == "behaviors.tsv"


def _names(source: Source, args: DataArguments, known: Sequence[str], needed: Sequence[str]) -> Names:
    """Our names of columns to the source's; a split has a say where the recipe maps it or splits by it."""
    by_name = [name for name in known if name != "split" or args.split == "given"]
    names = pick_columns(source, args.request_columns, "request_columns", known, needed, by_name)
    for name in args.candidate_fields or ():
        require_column(source, "the candidates", name, "candidate_fields")
    for name in args.request_fields or ():
        require_column(source, "a request", name, "request_fields")
    log_columns(source, names, *(args.candidate_fields or ()), *(args.request_fields or ()))
    return names


def _cells(source: Source, names: Names, args: DataArguments) -> Cells:
    return source.cells([*names.values(), *(args.candidate_fields or ()), *(args.request_fields or ())])


def _request_columns(cells: Cells, source: Source, names: Names, args: DataArguments) -> dict[str, Column]:
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
    return columns | field_texts(cells, source, args.request_fields or ())


def _numbers(flat: Table, columns: Iterable[str]) -> Table:
    """item_id, and each of the other columns as a number beside its text."""
    numbers: dict[str, Column] = {}
    for name in [name for name in columns if name != "item"]:
        text = as_text(flat[name])
        numbers |= {f"raw_{name}": text, name: number(text)}
    kept = [name for name in ("source_row", "request_row", "place") if name in flat.columns]
    return flat.select(*kept, item_id=as_text(flat["item"]), **numbers)


def _log(
    con: ibis.BaseBackend, source: Source, requests: Table, flat: Table, names: Names, repeats_ids: bool = False
) -> RawLog:
    unknown = {"score": ibis.null("float64"), "raw_score": ibis.literal("")}
    unknown = {name: value for name, value in unknown.items() if name not in flat.columns}
    flat = flat.mutate(**unknown)
    candidates = con.create_table(ibis.util.gen_name("candidates"), flat, temp=True)
    histories = None
    if "history" in requests.columns:
        histories = con.create_table(ibis.util.gen_name("histories"), raw.history_table(requests), temp=True)
    return RawLog(source, requests, candidates, histories, names, repeats_ids=repeats_ids)


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
