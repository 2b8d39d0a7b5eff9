"""Text files of sequences, `user item item ...` a line, as S3-Rec has them."""

from collections.abc import Sequence

import ibis
import numpy as np
import pyarrow as pa

from rerank.data.asked import Asked
from rerank.data.sources.delimited import EXAMPLES, is_number
from rerank.data.sources.files import open_text, readable, refuse_empty_file
from rerank.data.sources.source import Source, in_memory

_FEWEST = 3  # words of a line that may be a row of a table
_LEAST_TIME = 1e8  # seconds, of 1973: numbers from here on are times, no items


class Sequences(Source):
    """One interaction for each item of a line, in the order of the file; a user of two lines has two sessions."""

    def __init__(self, con: ibis.BaseBackend, asked: Asked, path: str) -> None:
        """Of a file; refuses one that is a table."""
        refuse_empty_file(asked, path)
        with readable(asked, path), open_text(path, asked.encoding) as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        words = [line.split() for _, line in lines]
        if asked.format == "auto":
            _refuse_table(asked, path, [line for _, line in lines], words)
        sizes = [len(of_line) - 1 for of_line in words]
        for (number, _), size in zip(lines, sizes, strict=True):
            if size == 0:
                cure = "give `user item item ...`, or remove the line"
                raise ValueError(f"{path} line {number}: a sequence without an item; {cure}")
        self.lines = np.repeat([number for number, _ in lines], sizes)
        users = [of_line[0] for of_line in words for _ in of_line[1:]]
        items = [item for of_line in words for item in of_line[1:]]
        table = in_memory(pa.table({"user": users, "item": items}))
        super().__init__(con, asked, path, ["user", "item"], table)

    def place(self, source_row: int) -> str:
        """The file and the line in which an item stands."""
        return f"{self.name} line {self.lines[source_row]}"


def _refuse_table(asked: Asked, path: str, lines: Sequence[str], words: Sequence[Sequence[str]]) -> None:
    """Refuse a file that has one interaction a line, and one that is named as items."""
    separator = next((s for s in ("\t", ",", ";", "|") if all(s in line for line in lines)), " ")
    reason = ""
    if asked.key == "items":
        reason = "and a text file of sequences has no items' columns"
    elif separator != " ":
        reason = "but its columns are parted as those of a table"
    elif len({len(of_line) for of_line in words}) == 1 and len(words[0]) >= _FEWEST:
        users = [of_line[0] for of_line in words]
        if len({*users}) < len(users):
            reason = f"but each line has {len(words[0])} words and some users stand in several lines, as in a table"
        elif any(all(map(_is_measure, column)) for column in list(zip(*words, strict=True))[2:]):
            reason = f"but each line has {len(words[0])} words, a time or a rating among them, as in a table"
    if reason:
        shown = separator.replace("\t", "\\t")
        cure = (
            f'set {asked.csv_key}: {{separator: "{shown}"}}, with header: {EXAMPLES[asked.key]} in it if it has none'
        )
        also = "" if asked.key == "items" else f"; or {asked.format_key}: s3rec where all words are items"
        raise ValueError(f"{asked.named} is {path}, {reason}; {asked.cure(cure + also)}")


def _is_measure(word: str) -> bool:
    """Whether a word is a number with a fraction, or a time."""
    return is_number(word) and ("." in word or float(word) >= _LEAST_TIME)
