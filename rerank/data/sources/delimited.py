"""Text tables: CSV, TSV and those of other separators, with a header or with names from the recipe."""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import duckdb
import ibis

from rerank.data.asked import Asked
from rerank.data.sources.cells import MISSING
from rerank.data.sources.files import in_utf8, line_of_row, open_text, readable
from rerank.data.sources.source import Cells, TextFiles

SEPARATORS = {"csv": ",", "tsv": "\t", "recbole": "\t"}
EXAMPLES = {
    "interactions": "[user, item, ...]",
    "items": "[item, title, ...]",
    "requests": "[request, candidates, ...]",
}
_UNQUOTED = ("\t", " ")  # with these, as with separators of several characters, a quote is a character like others
_FIRST_ROWS = 1000
_NO_VALUES = (*MISSING, "none", "na", "n/a", "\\n", "-")  # in place of a number, in a line without a header
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TRIED = ("::", ";", "|", "\t", ",")  # when a header is one column


class Delimited(TextFiles):
    """Every column is read as text, by the names of the header or of the recipe."""

    def __init__(self, con: ibis.BaseBackend, asked: Asked, name: str, files: Sequence[str], form: str) -> None:
        """Over files of one table; refuses those whose headers differ."""
        self.files, self.as_given = [in_utf8(con, asked, file) for file in files], list(files)
        self.separator = str(asked.csv.get("separator") or SEPARATORS[form])
        self.quote = "" if len(self.separator) > 1 or self.separator in _UNQUOTED else '"'
        given = asked.csv.get("header")
        self.has_header = not given
        self._rejected: list[tuple[int, str]] = []
        self.asked = asked
        self.rejects = ibis.util.gen_name("rejects") if asked.drops_bad else None
        headers = [next(self._rows(file), []) for file in self.files]
        for file, header in zip(self.as_given, headers, strict=True):
            if not any(header):
                raise ValueError(f"{file} line 1 is blank; remove it, and other blank lines at the beginning")
        first_rows = list(itertools.islice(self._rows(self.files[0]), 1, _FIRST_ROWS))
        columns = [word.split(":")[0] for word in headers[0]] if form == "recbole" else headers[0]
        columns = list(map(str, given)) if isinstance(given, list) else columns
        if given:
            self._refuse_header(headers[0], first_rows, columns)
        pairs = {pair for row in first_rows if row != headers[0] for pair in enumerate(row)}
        repeated = {word for place, word in enumerate(headers[0]) if word and (place, word) in pairs}
        self._repeated = set() if _is_counted(headers[0]) else repeated
        for file, header in zip(self.as_given, headers, strict=True):
            if self.has_header and header != headers[0]:
                raise different_columns(asked, {self.as_given[0]: headers[0], file: header})
        super().__init__(con, asked, name, columns, row_word="line", problem=self._problem(headers[0]))

    def _refuse_header(self, first: list[str], rows: Sequence[Sequence[str]], given: Sequence[str]) -> None:
        """Refuse names from the recipe for a file that has a header.

        That is a first line without a number or date, in which a column of ids has its own name, or a word stands
        above numbers.
        """
        if looks_like_data(first) or _is_counted(first):
            return
        for word, name in zip(first, given, strict=False):
            if name in self.asked.id_columns and _plain(word) == _plain(name):
                raise self._has_header(f"{word!r} in the column {name!r}")
        for place, word in enumerate(first):
            below = [row[place] for row in rows if len(row) > place]
            if word.lower() not in _NO_VALUES and below and all(map(is_number, below)):
                raise self._has_header(f"{word!r} where the next {len(below)} rows have numbers")

    def _has_header(self, found: str) -> ValueError:
        cure = "and map its columns where they differ from ours; or remove the line"
        return ValueError(
            f"{self.as_given[0]} line 1 has {found}: a header; leave header out of {self.asked.csv_key}, {cure}"
        )

    def _rows(self, file: str) -> Iterator[list[str]]:
        with readable(self.asked, file), open_text(file) as lines:
            quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
            split = (line.rstrip("\r\n").split(self.separator) for line in lines)
            is_plain = len(self.separator) > 1
            with contextlib.suppress(csv.Error):  # DuckDB's reader says what is wrong, and where
                for words in split if is_plain else csv.reader(lines, delimiter=self.separator, quoting=quoting):
                    yield [word.strip() for word in words]

    def is_data(self, column: str) -> bool:
        """Whether the name of a column is a value of the first line of a file without a header."""
        return self.has_header and bool(self.problem) and (_looks_like_value(column) or column in self._repeated)

    def name_columns(self) -> str:
        """How to give a file without a header its names."""
        cure = f"name its columns in {self.asked.csv_key}: {{header: {EXAMPLES[self.asked.key]}}}"
        return self.asked.cure(cure, "write a line with the names of its columns above it")

    def _problem(self, first_line: list[str]) -> str:
        """The reason why the first lines look wrong, with a cure; nothing where they look right."""
        key, (first, *others) = self.asked.csv_key, first_line or [""]
        if not others:
            for separator in _TRIED:
                if separator in first and separator != self.separator:
                    shown = separator.replace("\t", "\\t")
                    cure = f'set {key}: {{separator: "{shown}"}}'
                    return f"its first line is one column; {self.asked.cure(cure, 'part its columns by commas')}"
        if self.has_header and (looks_like_data(first_line) or self._repeated):
            return f"its first line looks like data, no header; {self.name_columns()}"
        return ""

    def _read(self, columns: list[str], as_text: bool) -> Cells:
        names = [f"c{place}" for place in range(len(self.columns))]
        options = {"delim": self.separator, "quote": self.quote, "escape": self.quote, "header": self.has_header}
        if self.rejects:
            options |= {"store_rejects": True, "rejects_table": self.rejects, "rejects_scan": f"{self.rejects}_scan"}
            options["rejects_limit"] = 0
        types = dict.fromkeys(names, "string")
        table = self.con.read_csv(self.files, columns=types, auto_detect=False, hive_partitioning=False, **options)
        places = {column: names[self.columns.index(column)] for column in columns}
        return Cells(table.select(*places.values()), places)

    def place(self, source_row: int) -> str:
        """The file and line of one input row."""
        lines = [line for line, _ in self._rejects()] if len(self.files) == 1 else []
        where = line_of_row(self.files, source_row, self.quote, int(self.has_header), lines)
        return self._with_given_names(where)

    def _cure(self, error: str) -> str:
        if "Number of Columns" in error and not self.has_header:
            names = f"of which it names {len(self.columns)}"
            return f"correct {self.asked.csv_key}: {{header: [...]}}, {names}, its separator, or the row"
        if "Number of Columns" in error and self.problem:
            return self.problem
        return super()._cure(error)

    def _rejects(self) -> list[tuple[int, str]]:
        if self.rejects and not self._rejected:
            query = (
                f"SELECT line, min(lower(error_type::VARCHAR)) FROM {self.rejects} GROUP BY file_id, line ORDER BY 1"
            )
            try:
                self._rejected = self.con.con.execute(query).fetchall()
            except duckdb.CatalogException:  # nothing has been read
                return []
        return self._rejected

    def num_unreadable(self) -> dict[str, int]:
        """Reason to the number of lines that were left out while the table was read."""
        reasons = [reason for _, reason in self._rejects()]
        return {f"line with {reason}": reasons.count(reason) for reason in sorted({*reasons})}


def _plain(name: str) -> str:
    """The name of a column of ids in small letters, without signs and `id`: `user` of `User ID`."""
    letters = re.sub(r"[\W_]", "", name.lower())
    return letters.removesuffix("id") or letters


def looks_like_data(header: Sequence[str]) -> bool:
    """Whether the first line has numbers or dates among its words, other than names 0, 1, ... of pandas."""
    return not _is_counted(header) and any(map(_looks_like_value, header))


def _is_counted(header: Sequence[str]) -> bool:
    words = [word for word in header if word]
    return words == [str(number) for number in range(len(words))]


def _looks_like_value(word: str) -> bool:
    return is_number(word) or bool(_DATE.match(word))


def is_number(word: str) -> bool:
    """Whether a word reads as a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def different_columns(asked: Asked, columns: dict[str, Sequence[str]]) -> ValueError:
    """The error for the files of one table that are of two."""
    have = " and ".join(f"{file} has {', '.join(names)}" for file, names in columns.items())
    return ValueError(
        f"{asked.named} is {asked.path()}, whose files are no parts of one table: {have}; name one of them"
    )
