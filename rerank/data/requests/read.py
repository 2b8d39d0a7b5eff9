"""The log and the items that a recipe with `requests` names, read in the form that each has."""

import json
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa

from rerank.data import DataArguments, tables
from rerank.data.readers import Source, open_text, read_source, refuse_empty_file, unreadable
from rerank.data.requests import forms, metarank
from rerank.data.requests.raw import RawLog
from rerank.models import names

SUFFIXES = ("csv", "tsv", "jsonl", "ndjson", "parquet")
_NEWS_COLUMNS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")


def read_log(con: ibis.BaseBackend, args: DataArguments) -> RawLog:
    """The log that `requests` names, not yet checked."""
    assert args.requests
    path = _existing(args.requests, "requests")
    form = args.requests_format
    if form == "auto" and forms.is_mind(path):
        form = "mind"
    elif form == "auto" and _has_events(path):
        form = "metarank"
    if form in ("mind", "metarank"):
        if args.request_columns:
            raise ValueError(f"request_columns is set but the names of the form {form} are fixed; remove it")
        refuse_empty_file(path)
    try:
        return _read_form(con, path, form, args)
    except duckdb.Error as error:
        raise unreadable(path, error) from None


def _read_form(con: ibis.BaseBackend, path: str, form: str, args: DataArguments) -> RawLog:
    if form == "mind":
        return forms.read_mind(con, path, args)
    if form == "metarank":
        return metarank.read_metarank(con, path, args)
    source = _read_table(con, path)
    read = {"wide": forms.read_wide, "long": forms.read_long}[forms.form_of(path, source.table.columns, args)]
    return read(con, source, args)


def _read_table(con: ibis.BaseBackend, path: str) -> Source:
    suffix = Path(path.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in SUFFIXES and not Path(path).is_dir():
        raise ValueError(f"requests is {path}, whose suffix tells no format; name it .{', .'.join(SUFFIXES)} (or .gz)")
    return read_source(con, path, "auto", "requests")


def _existing(value: str, key: str) -> str:
    path = names.locate(value, key)
    if not Path(path).exists():
        raise FileNotFoundError(f"{key} is {path}, which does not exist; correct the path")
    return path


def _has_events(path: str) -> bool:
    """Whether the first line of a JSONL file is one of Metarank's events."""
    if not path.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return False
    refuse_empty_file(path)
    with open_text(path) as file:
        try:
            first = json.loads(file.readline())
        except json.JSONDecodeError:
            return False  # its reader says which line is no JSON
    return isinstance(first, dict) and "event" in first and "candidates" not in first


def item_source(con: ibis.BaseBackend, args: DataArguments) -> Source:
    """The table of items that `items` names, not yet checked."""
    assert args.items
    form = args.items_format
    if form == "auto" and args.items == args.requests:
        form = "metarank"
    if form not in ("metarank", "mind"):
        return read_source(con, args.items, form, "items")
    path = _existing(args.items, "items")
    refuse_empty_file(path)
    try:
        if form == "mind":
            return Source(path, forms.read_headerless(con, path, _NEWS_COLUMNS))
        return metarank.read_items(con, path)
    except duckdb.Error as error:
        raise unreadable(path, error) from None


def read_items(con: ibis.BaseBackend, args: DataArguments) -> tuple[pa.Table, str | None]:
    """The items with their numbers, and where they were read; none without `items`."""
    if not args.items:
        types = {name: pa.string() for name in tables.ITEM_COLUMNS} | {"item": pa.int64(), "source_row": pa.int64()}
        return pa.schema(types).empty_table(), None
    source = item_source(con, args)
    items = tables.read_items(con, source, args.item_columns, args.text_columns, args.category_separator)
    return tables.number_items(items).order_by("item").to_pyarrow(), source.name
