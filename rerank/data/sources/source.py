"""A table that was found: the names of its columns, the cells of those that are wanted, and the places of its rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import duckdb
import ibis
import pyarrow as pa
from ibis.expr.types import Column, Table

from rerank.data.asked import Asked
from rerank.data.sources.cells import is_nested

_HINT = re.compile("[.,] Try (?:setting|auto-detecting) ")  # of DuckDB's own options


@dataclass(frozen=True)
class Cells:
    """Some columns of a source, not yet computed.

    Attributes:
        table: With columns of names of its own, so that those of the file may be any, and `source_row` unless a row's
            place in the input is its place in the table.
        names: The file's names to those.
    """

    table: Table
    names: Mapping[str, str]

    def __getitem__(self, column: str) -> Column:
        return self.table[self.names[column]]

    def select(self, **columns: Column) -> Table:
        """A table of these columns, with source_row where there is one."""
        kept = ["source_row"] if "source_row" in self.table.columns else []
        return self.table.select(*kept, **columns)


@dataclass
class Source:
    """One input table.

    Attributes:
        con: The database that reads it.
        asked: What the recipe says of it.
        name: Where it was found.
        columns: Their names as in the file, in its order; of JSON as far as they were looked for.
        table: Its content where that is in memory, with the columns in this order, under names of our own, then
            `source_row` if rows have places of their own.
        row_word: For messages.
        is_json: Whether text in its cells may be that of JSON.
        problem: Why no column of a name is there, with a cure, where it is known.
    """

    con: ibis.BaseBackend
    asked: Asked
    name: str
    columns: Sequence[str]
    table: Table | None = None
    row_word: str = "row"
    is_json: bool = field(default=False, kw_only=True)
    problem: str = field(default="", kw_only=True)

    def has(self, column: str) -> bool:
        """Whether a column of this name is there."""
        return column in self.columns

    def cells(self, columns: Iterable[str], as_text: bool = False) -> Cells:
        """The cells of some columns, `as_text` where their text is all that is wanted, which JSON gives faster."""
        return self._read(list(dict.fromkeys(columns)), as_text)

    def nested(self, cells: Cells, column: str) -> Column:
        """Whether a cell holds a list or an object; never in a table of text."""
        is_plain = cells[column].type().is_string() and not self.is_json
        return ibis.literal(False) if is_plain else is_nested(cells[column])

    def refuse_twice(self, column: str) -> None:
        """Refuse a name that two columns have."""
        if list(self.columns).count(column) > 1:
            raise ValueError(f"{self.name} names a column twice in its header ({', '.join(self.columns)}); rename one")

    def _read(self, columns: list[str], as_text: bool) -> Cells:
        assert self.table is not None
        places = {column: self.table.columns[self.columns.index(column)] for column in columns}
        kept = ["source_row"] if "source_row" in self.table.columns else []
        return Cells(self.table.select(*kept, *places.values()), places)

    def place(self, source_row: int) -> str:
        """The file and line (or row) of one input row, counted from 1."""
        return f"{self.name} {self.row_word} {source_row + 1}"

    def unreadable(self, error: duckdb.Error) -> ValueError:
        """The error for a row or a file that DuckDB cannot read, with its reason."""
        first, *others = str(error).splitlines()
        # The first lines say what and where; the others are hints about DuckDB's own options.
        reasons = [first.partition("Error: ")[2] or first]
        for line in others:
            if line.startswith(("Possible", "LINE ")):
                break
            reasons += [line] if line.strip() else []
        reason = _HINT.split(", ".join(reason.strip(" .") for reason in reasons))[0]
        return ValueError(f"{self.name} cannot be read: {reason}; {self._cure(str(error))}")

    def _cure(self, error: str) -> str:
        if "not utf-8" in error or "invalid UTF-8" in error:
            cure = f"set {self.asked.csv_key}: {{encoding: latin-1}}, or another that it has"
            return self.asked.cure(cure, "write it as UTF-8")
        if "GZIP stream" in error:
            return "copy the file again"
        also = (
            ""
            if self.asked.key == "requests" or self.asked.option
            else ", or leave such rows out with on_bad_rows: drop"
        )
        return f"correct the row or the format{also}"

    def num_unreadable(self) -> dict[str, int]:
        """Reason to the number of lines that were left out while the table was read."""
        return {}


class TextFiles(Source):
    """Files of text, each in UTF-8 or as a copy in UTF-8, whose own name stands in messages.

    Attributes:
        files: That are read.
        as_given: That the recipe names.
    """

    files: Sequence[str]
    as_given: Sequence[str]

    def unreadable(self, error: duckdb.Error) -> ValueError:
        """The error for a row that DuckDB cannot read, in the name of the file that has it."""
        return ValueError(self._with_given_names(str(super().unreadable(error))))

    def _with_given_names(self, text: str) -> str:
        for copy, given in zip(self.files, self.as_given, strict=True):
            text = text.replace(copy, given)
        return text


def in_memory(table: pa.Table) -> Table:
    """An Arrow table for the database, its columns named by their places."""
    return ibis.memtable(table.rename_columns([f"c{place}" for place in range(table.num_columns)]))
