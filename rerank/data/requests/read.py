"""The log and the items that a recipe with `requests` names, read in the form that each has."""

import json
from dataclasses import replace
from pathlib import Path

import ibis
import pyarrow as pa

from rerank.data import DataArguments, tables
from rerank.data.asked import Asked, suffix_of
from rerank.data.numbering import number_items
from rerank.data.requests import forms, metarank
from rerank.data.requests.raw import RawLog
from rerank.data.sources.delimited import Delimited
from rerank.data.sources.files import find_files, open_text, readable, refuse_empty_file
from rerank.data.sources.json_lines import JsonLines
from rerank.data.sources.opening import open_source
from rerank.data.sources.source import Source

SUFFIXES = ("csv", "tsv", "jsonl", "ndjson", "parquet")
_FORMAT_OF_FORM = {"mind": "tsv", "metarank": "jsonl"}

_NEWS_COLUMNS = ["item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"]


def read_log(con: ibis.BaseBackend, args: DataArguments) -> RawLog:
    """The log that `requests` names, not yet checked."""
    asked, form = args.asked("requests"), args.requests_format
    suffix = suffix_of(asked.path())
    is_file = not Path(asked.path()).is_dir()
    if is_file and Path(asked.path()).exists() and form == "auto" and suffix not in SUFFIXES and not asked.csv:
        problem = f"requests is {asked.path()}, whose suffix tells no format"
        raise ValueError(
            f"{problem}; name it .{', .'.join(SUFFIXES)} (or .gz), or set requests_csv: {{separator: ...}}"
        )
    files = find_files(asked if form not in ("mind", "metarank") else replace(asked, format=_FORMAT_OF_FORM[form]))[1]
    if form == "auto" and files and forms.is_mind(files[0]):
        form = "mind"
    elif form == "auto" and files and _has_events(asked, files[0]):
        form = "metarank"
    if form not in ("mind", "metarank"):
        source = open_source(con, asked)
        read = {"wide": forms.read_wide, "long": forms.read_long}[forms.form_of(source, args)]
        return read(con, source, args)
    if args.request_columns:
        raise ValueError(f"request_columns is set but the names of the form {form} are fixed; remove it")
    if form == "mind":
        return forms.read_mind(con, _headerless(con, asked, files, forms.MIND_COLUMNS), args)
    return metarank.read_metarank(con, JsonLines(con, asked, asked.path(), files), args)


def _headerless(con: ibis.BaseBackend, asked: Asked, files: list[str], columns: list[str]) -> Delimited:
    """MIND's files: columns parted by tabs, without a header."""
    written = {**asked.csv, "separator": "\t", "header": columns}
    return Delimited(con, replace(asked, csv=written), asked.path(), files, "tsv")


def _has_events(asked: Asked, path: str) -> bool:
    """Whether the first line of a JSONL file is one of Metarank's events."""
    if suffix_of(path) not in ("jsonl", "ndjson"):
        return False
    refuse_empty_file(asked, path)
    with readable(asked, path), open_text(path, asked.encoding) as file:
        try:
            first = json.loads(file.readline())
        except json.JSONDecodeError:
            return False  # its reader says which line is no JSON
    return isinstance(first, dict) and "event" in first and "candidates" not in first


def item_source(con: ibis.BaseBackend, args: DataArguments) -> Source:
    """The table of items that `items` names, not yet checked."""
    asked = args.asked("items")
    form = "metarank" if asked.format == "auto" and args.items == args.requests else asked.format
    if form not in ("metarank", "mind"):
        return open_source(con, asked)
    files = find_files(replace(asked, format=_FORMAT_OF_FORM[form]))[1]
    if form == "mind":
        return _headerless(con, asked, files, _NEWS_COLUMNS)
    return metarank.read_items(con, JsonLines(con, asked, asked.path(), files))


def read_items(con: ibis.BaseBackend, args: DataArguments) -> tuple[pa.Table, str | None, dict[str, int]]:
    """The items with their numbers, where they were read, and rows left out by reason; none without `items`."""
    if not args.items:
        types = {name: pa.string() for name in tables.ITEM_COLUMNS} | {"item": pa.int64(), "source_row": pa.int64()}
        return pa.schema(types).empty_table(), None, {}
    source = item_source(con, args)
    items, left_out = tables.read_items(con, source, args)
    return number_items(items).order_by("item").to_pyarrow(), source.name, left_out
