"""JSONL, and JSON files that hold one array or object: each wanted key is read by itself, and no type is guessed."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import duckdb
import ibis
from ibis.expr.types import Table

from rerank.data.asked import Asked
from rerank.data.sources.cells import json_type
from rerank.data.sources.files import in_utf8, line_of_row, open_text, readable, refuse_empty_file, scratch_file
from rerank.data.sources.source import Cells, Source, TextFiles

_SAMPLE = 20_480  # lines in which keys are looked for first


class JsonLines(TextFiles):
    """One object a line; a column is a key of any of them."""

    def __init__(self, con: ibis.BaseBackend, asked: Asked, name: str, files: Sequence[str]) -> None:
        """Over files of one table."""
        self.files, self.as_given = [in_utf8(con, asked, file) for file in files], list(files)
        keys: dict[str, None] = {}
        for file in self.files:
            with readable(asked, file), open_text(file) as lines:
                for line in itertools.islice(lines, _SAMPLE):
                    keys |= dict.fromkeys(_keys(line))
        self._has_all_keys, self._num_unreadable = False, 0
        super().__init__(con, asked, name, list(keys), row_word="line", is_json=True)

    def has(self, column: str) -> bool:
        """Whether any line has this key."""
        if column not in self.columns and not self._has_all_keys:
            self._has_all_keys = True
            query = "SELECT DISTINCT unnest(json_keys(json)) FROM read_json(?, format = 'newline_delimited', "
            query += "records = false, columns = {json: 'JSON'}, ignore_errors = ?)"
            try:
                found = self.con.con.execute(query, [self.files, self.asked.drops_bad]).fetchall()
            except duckdb.Error as error:
                raise self.unreadable(error) from None
            self.columns = [*dict.fromkeys([*self.columns, *sorted(key for (key,) in found)])]
        return column in self.columns

    def _read(self, columns: list[str], as_text: bool) -> Cells:
        places = {column: f"c{number}" for number, column in enumerate(columns)}
        if self.asked.drops_bad:
            lines = self._objects()
            return Cells(
                lines.select("source_row", **{place: lines.json[column] for column, place in places.items()}), places
            )
        options: dict[str, Any] = {"format": "newline_delimited", "hive_partitioning": False}
        if len({column.lower() for column in columns}) == len(columns) and all(columns):
            types = dict.fromkeys(columns, "VARCHAR" if as_text else "JSON")
            table = self.con.read_json(self.files, columns=types, **options)
            return Cells(table.rename(dict(zip(places.values(), table.columns, strict=True))), places)
        # DuckDB takes names that are equal but for case as one
        table = self.con.read_json(self.files, columns={"json": "JSON"}, records="false", **options)
        return Cells(table.select(**{name: table.json[column] for column, name in places.items()}), places)

    def _objects(self) -> Table:
        """The lines that hold an object, with their places, after the others were counted."""
        options: dict[str, Any] = {"format": "newline_delimited", "hive_partitioning": False, "ignore_errors": True}
        lines = self.con.read_json(self.files, columns={"json": "JSON"}, records="false", **options)
        try:
            kept = self.con.create_table(ibis.util.gen_name("lines"), lines, temp=True)
        except duckdb.Error as error:
            raise self.unreadable(error) from None
        is_object = (json_type(kept.json) == "OBJECT").fill_null(False)
        self._num_unreadable = kept.filter(~is_object).count().to_pyarrow().as_py()
        return kept.mutate(source_row=kept.rowid()).filter(is_object)

    def num_unreadable(self) -> dict[str, int]:
        """Reason to the number of lines that were left out while the table was read."""
        return {"line that is no JSON object": self._num_unreadable} if self._num_unreadable else {}

    def place(self, source_row: int) -> str:
        """The file and line of one input row."""
        return self._with_given_names(line_of_row(self.files, source_row, "", 0))


def _keys(line: str) -> list[str]:
    """The keys of a line; of one that is no object none, as its reader says what is wrong."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return []
    return list(value) if isinstance(value, dict) else []


class JsonEntries(JsonLines):
    """The entries of one JSON array or object, written to JSONL."""

    def __init__(self, con: ibis.BaseBackend, asked: Asked, path: str, entries: Iterator[dict]) -> None:
        """The entries, which come from a file."""
        copy = scratch_file(con, ".jsonl")
        with open(copy, "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
        super().__init__(con, replace(asked, csv={}, drops_bad=False), path, [copy])
        self.asked, self.as_given, self.row_word = asked, [path], "entry"

    def place(self, source_row: int) -> str:
        """The file and the entry, counted from 1."""
        return f"{self.name} entry {source_row + 1}"


def open_json(con: ibis.BaseBackend, asked: Asked, path: str) -> Source:
    """A `.json` file: JSONL, an array of objects, one object that is a row, or one object of ids.

    As items such an object holds objects of columns, texts (titles) or lists (categories), as interactions the list
    of items of each user.
    """
    refuse_empty_file(asked, path)
    with readable(asked, path), open_text(path, asked.encoding) as file:
        lines = [line for line in itertools.islice(file, 2) if line.strip()]
        if len(lines) == 2 and _keys(lines[0]):
            return JsonLines(con, asked, path, [path])
    with readable(asked, path), open_text(path, asked.encoding) as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}); a file of one object a line ends in .jsonl") from None
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return JsonEntries(con, asked, path, iter(value))
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is no JSON object of item: [attribute, ...] and no array of objects; a file of one object a line "
            "ends in .jsonl"
        )
    if any(isinstance(value.get(column), str | int | float) for column in asked.id_columns):
        return JsonEntries(con, asked, path, iter([value]))
    if not value:
        raise ValueError(f"{path} is empty; give a file with at least one row")
    entries = (entry for key, held in value.items() for entry in _entries(asked, path, str(key), held))
    return JsonEntries(con, asked, path, entries)


def open_json_parts(con: ibis.BaseBackend, asked: Asked, name: str, files: Sequence[str]) -> Source:
    """One `.json` file, or several of one object a line, which are one table."""
    if len(files) == 1:
        return open_json(con, asked, files[0])
    for path in files:
        refuse_empty_file(asked, path)
        with readable(asked, path), open_text(path, asked.encoding) as file:
            if not _keys(next((line for line in file if line.strip()), "")):
                problem = f"{asked.named} is {name}, of several .json files of which {path} is one array or object"
                raise ValueError(f"{problem}; write each as JSONL (an object a line), or name one")
    return JsonLines(con, asked, name, files)


def _entries(asked: Asked, path: str, key: str, held: object) -> list[dict]:
    """The rows of one id of an object."""
    if isinstance(held, list) and asked.key != "items":
        return [{"user": key, "item": item} for item in held]
    if isinstance(held, dict):
        return [{**held, "item" if asked.key == "items" else "user": key}]
    if isinstance(held, list):
        return [{"item": key, "category": held}]
    if isinstance(held, str) and asked.key == "items":
        return [{"item": key, "title": held}]
    wanted = "titles, lists of attributes or objects" if asked.key == "items" else "lists of items"
    raise ValueError(
        f"{path}: the value of {key!r} is {json.dumps(held)}, but the values of an object of ids are {wanted}; name "
        "the file that has them"
    )
