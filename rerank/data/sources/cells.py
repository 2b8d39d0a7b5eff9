"""Columns of any type as text, numbers, seconds and lists.

Columns of CSV are text, those of JSON are JSON or, where only their text is wanted, text; Parquet's have types.
"""

import datetime

import ibis
from ibis.expr.types import ArrayColumn, Column

MISSING = ("", "null", "nan")  # how a text cell writes a missing number
SPACED_OFFSET = r"(\d)\s+([+-]\d|Z)", r"\1\2"  # of an offset from UTC behind a space, and how it is read
_SPACES = (" ", "\t", "\n", "\r", "\f")


@ibis.udf.scalar.builtin
def to_json(value) -> str:  # type: ignore[empty-body]
    """A value as JSON text, null for null; DuckDB's function."""


@ibis.udf.scalar.builtin
def epoch_us(moment: datetime.datetime) -> int:  # type: ignore[empty-body]
    """Microseconds since 1970; DuckDB's function."""


@ibis.udf.scalar.builtin
def json_type(value) -> str:  # type: ignore[empty-body]
    """ARRAY, OBJECT, VARCHAR or another; DuckDB's function."""


@ibis.udf.scalar.builtin
def json_valid(text: str) -> bool:  # type: ignore[empty-body]
    """Whether text is JSON; DuckDB's function."""


@ibis.udf.scalar.builtin
def isfinite(number: float) -> bool:  # type: ignore[empty-body]
    """Whether a number is neither nan nor infinite; DuckDB's function."""


def is_nested(column: Column) -> Column:
    """Whether a value is a list or an object, in JSON or in the text of JSON."""
    kind = column.type()
    if kind.is_json():
        return json_type(column).isin(["ARRAY", "OBJECT"])
    if kind.is_string():
        # ranges of text, which DuckDB rules out by its statistics, and JSON is read of what is in them alone
        begins = ((column >= "[") & (column < "\\")) | ((column >= "{") & (column < "|"))
        return ibis.ifelse(begins, json_valid(column), False)
    return column.notnull() if kind.is_nested() else ibis.literal(False)


def as_text(column: Column) -> Column:
    """A column of any type as text, lists joined by ", ", white space collapsed, missing values empty."""
    return collapsed(plain_text(column))


def plain_text(column: Column) -> Column:
    """A column of any type as text, lists joined by ", ", null where it is missing."""
    kind = column.type()
    if kind.is_array():
        column = _joined(column)
    elif kind.is_json():
        column = _json_text(column)
    return column.cast("string")


def collapsed(text: Column) -> Column:
    """Text without white space at its ends, any other as one space, null as nothing."""
    return ibis.ifelse(has_space(text), text.re_replace(r"\s+", " ").strip(), text).fill_null("")


def has_space(text: Column) -> Column:
    """Whether text has any white space; several times faster than a regular expression where it has none."""
    found = text.contains(_SPACES[0])
    for space in _SPACES[1:]:
        found = found | text.contains(space)
    return found


def _joined(column: ArrayColumn) -> Column:
    """A list as text, lists in it too."""
    while column.type().value_type.is_array():
        column = column.flatten()
    if column.type().value_type.is_json():
        column = column.map(_json_text)
    return column.cast("array<string>").join(", ")


def _json_text(column: Column) -> Column:
    """A JSON string without its quotes, a list and the lists in it joined by ", ", null for JSON's null."""
    inner = column.try_cast("array<json>").map(
        lambda one: ibis.ifelse(
            json_type(one) == "ARRAY", one.try_cast("array<json>").map(_scalar).join(", "), _scalar(one)
        )
    )
    return ibis.ifelse(json_type(column) == "ARRAY", inner.join(", "), _scalar(column))


def _scalar(column: Column) -> Column:
    return ibis.ifelse(
        json_type(column) == "NULL", ibis.null("string"), ibis.coalesce(column.str, column.cast("string"))
    )


def as_seconds(column: Column) -> Column:
    """Unix seconds from a number, a date or its text; null where it is neither.

    An offset from UTC (`+02:00`, `-0500`, `Z`) or a time zone is read; a date without one is UTC.
    """
    if column.type().is_time():  # of a day
        return ibis.null("float64")
    if column.type().is_temporal():
        return _epoch(column.cast("timestamp"))
    if column.type().is_integer():
        return column.cast("float64")
    text = _scalar(column) if column.type().is_json() else column.cast("string")
    return ibis.coalesce(number(text), _epoch(text.re_replace(*SPACED_OFFSET).try_cast("timestamp('UTC')")))


def _epoch(moment: Column) -> Column:
    # The moment stands here once: DuckDB computes what stands twice for every row, numbers too.
    return epoch_us(moment) / 1e6


def number(text: Column) -> Column:
    """A finite number from text, null for anything else."""
    value = text.try_cast("float64")
    return ibis.ifelse(isfinite(value), value, ibis.null("float64"))


def is_missing(text: Column) -> Column:
    """Whether a text cell says that there is no number."""
    return text.lower().isin(MISSING)


def as_list(column: Column) -> ArrayColumn:
    """A list column, or text with white space between the elements, as a list; empty for a missing cell."""
    if column.type().is_array():
        return column
    words = as_words(_scalar(column) if column.type().is_json() else column)
    if not column.type().is_json():
        return words
    elements = column.try_cast("array<json>").map(_scalar)
    return ibis.ifelse(json_type(column) == "ARRAY", elements, words)


def as_words(column: Column) -> ArrayColumn:
    """Text as the list of its words."""
    words = collapsed(column.cast("string"))
    return ibis.ifelse(words == "", ibis.literal([], "array<string>"), words.split(" "))


def field_text(column: Column) -> Column:
    """The JSON text of a scalar, a list as one text, null where missing."""
    kind = column.type()
    if kind.is_json():
        value = ibis.ifelse(json_type(column) == "ARRAY", to_json(as_text(column)), column.cast("string"))
        return ibis.ifelse(json_type(column) == "NULL", ibis.null("string"), value)
    if kind.is_array() or kind.is_unknown():
        column = as_text(column) if kind.is_array() else ibis.null("string")
    if kind.is_floating():
        column = ibis.ifelse(column.isnan(), ibis.null(kind), column)
    return to_json(column)
