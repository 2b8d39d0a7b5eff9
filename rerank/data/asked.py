"""A table as a recipe asks for it: what it names, its format, and how its text is written."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rerank.models import names

FORMATS = ("csv", "tsv", "jsonl", "parquet", "recbole", "s3rec", "datasets")
ALLOWED = "comparisons, AND, OR, NOT, IN, BETWEEN, LIKE, IS NULL, + - * / and names of columns"  # in `where`
FORMAT_OF_SUFFIX = dict(csv="csv", tsv="tsv", jsonl="jsonl", ndjson="jsonl", parquet="parquet")
FORMAT_OF_SUFFIX |= dict(inter="recbole", item="recbole", txt="s3rec", json="s3rec")  # s3rec: sequences, attributes


def suffix_of(path: str | Path) -> str:
    """The ending of a file's name in lower case, without its dot and `.gz`."""
    return Path(str(path).removesuffix(".gz")).suffix.removeprefix(".").lower()


@dataclass(frozen=True)
class Asked:
    """A table as a recipe asks for it.

    Attributes:
        key: Of the recipe: requests, interactions or items.
        value: What it names.
        format: One of FORMATS, or auto.
        csv: separator, header and encoding, as far as the recipe has them.
        drops_bad: Whether lines that cannot be read are left out, and counted.
        option: Of the command, where one and no recipe names the table; then no cure is a key of a recipe.
        id_columns: Names of columns of ids: a JSON object that has one of them is a row.
    """

    key: str
    value: str
    format: str = "auto"
    csv: Mapping[str, object] = field(default_factory=dict)
    drops_bad: bool = False
    id_columns: Sequence[str] = ("user", "item")
    option: str = ""

    @property
    def named(self) -> str:
        """The option or the key that names it, for messages."""
        return self.option or self.key

    def cure(self, of_recipe: str, of_file: str = "write the file as UTF-8 CSV with commas and a header") -> str:
        """The cure in the recipe, or where an option names the table that in the file."""
        return of_file if self.option else of_recipe

    @property
    def csv_key(self) -> str:
        """The recipe's key of `csv`."""
        return "csv" if self.key == "interactions" else f"{self.key}_csv"

    @property
    def format_key(self) -> str:
        """The recipe's key of `format`."""
        return "format" if self.key == "interactions" else f"{self.key}_format"

    @property
    def encoding(self) -> str:
        """Of its text."""
        return str(self.csv.get("encoding") or "utf-8")

    def path(self) -> str:
        """The path that it names, with variables resolved."""
        return names.locate(self.value, self.named)

    def format_of(self, path: str) -> str:
        """The format of a file: the given one, or by its suffix (`.gz` aside)."""
        if self.format != "auto":
            return self.format
        found = FORMAT_OF_SUFFIX.get(suffix_of(path))
        if self.csv.keys() & {"separator", "header"}:
            return found if found in ("csv", "tsv") else "csv"
        if found is None:
            also = f'of a text table also {self.csv_key}: {{separator: "::"}} where no comma parts its columns'
            cure = self.cure(f"set the format: one of {', '.join(FORMATS)} as {self.format_key}; {also}")
            raise ValueError(f"{self.named} is {path}, whose suffix tells no format; {cure}")
        return found


def checked_csv(key: str, given: Mapping[str, object] | None) -> dict[str, object]:
    """The keys of `csv` with a separator as it stands in the file, and names of columns as text.

    Raises:
        ValueError: Naming a key that there is not, or a value that cannot be.
    """
    found = dict(given or {})
    for name in found:
        if name not in ("separator", "header", "encoding"):
            raise ValueError(f"{key} has the unknown key {name!r}; known: separator, header, encoding")
    if "separator" in found:
        found["separator"] = _separator(key, found["separator"])
    if "header" in found:
        found["header"] = _header(key, found["header"])
    if "encoding" in found:
        _check_encoding(key, found["encoding"])
    return found


def _separator(key: str, given: object) -> str:
    text = given.replace("\\t", "\t") if isinstance(given, str) else ""
    if not 1 <= len(text.encode()) <= 4 or set(text) & set('\r\n"'):
        raise ValueError(f'{key} has the separator {given!r}; give 1 to 4 characters, such as "::", ";", "|" or "\\t"')
    return text


def _header(key: str, given: object) -> list[str]:
    header = list(map(str, given)) if isinstance(given, list) else []
    if not header or len({*header}) < len(header):
        cure = "give the names of all columns of a file without a header, each once: [user, item, time]"
        raise ValueError(f"{key} has the header {given!r}; {cure}, or leave it out for a file that has one")
    return header


def _check_encoding(key: str, given: object) -> None:
    try:
        "".encode(codecs.lookup(str(given)).name)
    except LookupError:
        raise ValueError(
            f"{key} has the encoding {given!r}, which there is not; try utf-8, latin-1 or cp1252"
        ) from None
