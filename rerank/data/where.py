"""The condition of a recipe, `where`, over the columns of a source."""

import datetime
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ibis
import sqlglot
from ibis import _
from ibis.expr.types import Column, Table
from sqlglot import exp

from rerank.baselines.times import MILLISECONDS
from rerank.data.asked import ALLOWED
from rerank.data.filters import Problem, count, screen
from rerank.data.sources.cells import SPACED_OFFSET, as_seconds, as_text, number
from rerank.data.sources.delimited import is_number
from rerank.data.sources.source import Cells, Source

Operator = Callable[[Any, Any], Any]
_JOINS: dict[type[exp.Expr], Operator] = {exp.And: operator.and_, exp.Or: operator.or_}
_ORDERS: dict[type[exp.Expr], Operator] = {
    exp.GT: operator.gt,
    exp.GTE: operator.ge,
    exp.LT: operator.lt,
    exp.LTE: operator.le,
}
_COMPARED: dict[type[exp.Expr], Operator] = {exp.EQ: operator.eq, exp.NEQ: operator.ne, **_ORDERS}
_ARITHMETIC: dict[type[exp.Expr], Operator] = {
    exp.Add: operator.add,
    exp.Sub: operator.sub,
    exp.Mul: operator.mul,
    exp.Div: operator.truediv,
}
_PLAIN: tuple[type[exp.Expr], ...] = (
    *_JOINS,
    *_COMPARED,
    *_ARITHMETIC,
    exp.Not,
    exp.Paren,
    exp.Neg,
    exp.In,
    exp.Between,
    exp.Like,
    exp.ILike,
)
_PLAIN += (exp.Is, exp.Column, exp.Identifier, exp.Literal, exp.Boolean, exp.Null)
_EXACT = 2**53  # whole numbers from here on are not each a float of their own
_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")


def parse_condition(text: str) -> exp.Expr:
    """The tree of one boolean expression over columns.

    Raises:
        ValueError: When it is none, or holds more than ALLOWED.
    """
    try:
        tree = sqlglot.parse_one(text, dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        reason = re.sub(r"\x1b\[\d*m", "", str(error)).splitlines()[0]
        raise ValueError(f"where is {text!r}, no condition ({reason}); write one such as: rating >= 4") from None
    for node in tree.walk():
        if type(node) not in _PLAIN or (isinstance(node, exp.Column) and len(node.parts) > 1):
            kind = "calls a function" if isinstance(node, exp.Func) else "holds more than a condition may"
            shown = node.sql(dialect="duckdb")
            raise ValueError(f"where is {text!r}, which {kind}: {shown}; it may hold {ALLOWED}")
    if isinstance(tree.unnest(), (exp.Literal, exp.Null, exp.Neg, *_ARITHMETIC)):
        raise ValueError(f"where is {text!r}, a value and no condition; write one such as: rating >= 4")
    return tree


@dataclass
class Condition:
    """The condition of a recipe over the columns of a source, whose text is compared as what it is compared with.

    Attributes:
        text: As the recipe has it.
        tree: Of it.
        columns: Of the source, that it names.
        compared: Columns that are compared with a `number` or a `time`, with which of these.
    """

    text: str
    tree: exp.Expr
    columns: list[str]
    compared: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, source: Source) -> "Condition":
        """Refuses a condition with a column that the source lacks."""
        tree = parse_condition(text)
        columns = list(dict.fromkeys(node.name for node in tree.find_all(exp.Column)))
        if not columns:
            raise ValueError(f"where is {text!r}, which names no column of {source.name}; correct it")
        for column in columns:
            if not source.has(column):
                there = ", ".join(name or "(no name)" for name in source.columns)
                cure = (
                    "correct it; a name with other signs than letters stands in \"double quotes\", a text in 'single'"
                )
                raise ValueError(
                    f"where is {text!r} but {source.name} has no column {column!r}; it has {there}; {cure}"
                )
        return cls(text, tree, columns)

    def values(self, cells: Cells) -> dict[str, Column]:
        """`holds`, and for each column that should be a number or a time the text that is none, `bad_PLACE`."""
        self.compared.clear()
        holds = self._boolean(self.tree, cells).fill_null(False)
        self.compared = list(dict.fromkeys(self.compared))
        bad = {}
        for place, (column, kind) in enumerate(self.compared):
            text = as_text(cells[column])
            bad[f"bad_{place}"] = ibis.ifelse((text == "") | _IS_SO[kind](text), ibis.null("string"), text)
        return {"holds": holds, **bad}

    def screened(self, table: Table, source: Source, on_bad_rows: str) -> tuple[Table, dict[str, int]]:
        """The rows for which it holds, and the number of the others by reason."""
        problems = [
            Problem(
                f"{column} is no {kind}", _[f"bad_{place}"].notnull(), functools.partial(_SAID[kind], column, place)
            )
            for place, (column, kind) in enumerate(self.compared)
        ]
        table, left_out = screen(table, source, problems, on_bad_rows) if problems else (table, {})
        kept = table.filter(_.holds)
        num_all, num_kept = count(table), count(kept)
        if num_kept == 0:
            problem = f"where is {self.text!r}, which holds for none of {num_all} rows of {source.name}"
            raise ValueError(f"{problem}; correct it")
        return kept, left_out | ({f"not {self.text}": num_all - num_kept} if num_kept < num_all else {})

    def _boolean(self, node: exp.Expr, cells: Cells) -> Column:
        if isinstance(node, exp.Paren):
            return self._boolean(node.this, cells)
        if isinstance(node, exp.Not):
            return ~self._boolean(node.this, cells)
        for kind, join in _JOINS.items():
            if isinstance(node, kind):
                return join(self._boolean(node.this, cells), self._boolean(node.expression, cells))
        if isinstance(node, exp.Boolean):
            return ibis.literal(node.this)
        if isinstance(node, exp.Column):
            text = as_text(cells[node.name]).lower()
            return text.cases(
                *((word, True) for word in _TRUE), *((w, False) for w in _FALSE), else_=ibis.null("boolean")
            )
        return self._comparison(node, cells)

    def _comparison(self, node: exp.Expr, cells: Cells) -> Column:
        if isinstance(node, exp.Is):
            if isinstance(node.expression, exp.Null):
                return self._text(node.this, cells).isnull()
            is_so = self._boolean(node.this, cells) == self._boolean(node.expression, cells)
            return is_so.fill_null(False)
        if isinstance(node, exp.In):
            return self._compared(node.this, node.expressions, cells, lambda left, *others: left.isin(others))
        if isinstance(node, exp.Between):
            bounds = [node.args["low"], node.args["high"]]
            return self._compared(node.this, bounds, cells, lambda left, low, high: left.between(low, high), True)
        if isinstance(node, exp.Like | exp.ILike) and _is_text(node.expression):
            left, pattern = self._text(node.this, cells), node.expression.name
            return left.ilike(pattern) if isinstance(node, exp.ILike) else left.like(pattern)
        if type(node) not in _COMPARED:
            raise self._refusal(node)
        if isinstance(node.expression.unnest(), exp.Boolean):
            return _COMPARED[type(node)](self._boolean(node.this, cells), self._boolean(node.expression, cells))
        return self._compared(node.this, [node.expression], cells, _COMPARED[type(node)], type(node) in _ORDERS)

    def _compared(
        self,
        left: exp.Expr,
        others: Sequence[exp.Expr],
        cells: Cells,
        compare: Callable[..., Column],
        is_order: bool = False,
    ) -> Column:
        """As numbers where one side is one, or two columns are put in order; as times beside a date; else as text.

        A whole number that floats do not tell from its neighbors equals the same text alone.
        """
        sides = [left, *others]
        texts = [side.unnest().name for side in sides if _is_text(side)]
        self._refuse_texts(texts, is_order)
        is_exact = not is_order and any(map(_is_long, sides))
        if not is_exact and (any(map(_is_numeric, sides)) or (is_order and not texts)):
            return compare(*(self._number(side, cells) for side in sides))
        if is_order and all(map(_is_date, texts)):
            self.compared += [(side.unnest().name, "time") for side in sides if isinstance(side.unnest(), exp.Column)]
            return compare(*(as_seconds(self._text(side, cells)) for side in sides))
        return compare(*(self._text(side, cells) for side in sides))

    def _refuse_texts(self, texts: Sequence[str], is_order: bool) -> None:
        """Refuse texts of which a comparison would not be what it looks like."""
        for text in texts:
            if text == "":
                raise ValueError(f"where is {self.text!r}, but a missing value equals no text; write IS NULL")
            if is_order and is_number(text):
                raise ValueError(
                    f"where is {self.text!r}, which puts the text '{text}' in order; write the number without quotes: "
                    f"{text}"
                )
            if is_order and text[0].isdigit() and not _is_date(text):
                raise ValueError(
                    f"where is {self.text!r}, which puts the text '{text}' in order, letter by letter; "
                    "write a date as '2024-03-31 12:00:00'"
                )

    def _number(self, node: exp.Expr, cells: Cells) -> Column:
        if isinstance(node, exp.Paren):
            return self._number(node.this, cells)
        if isinstance(node, exp.Neg):
            return -self._number(node.this, cells)
        for kind, compute in _ARITHMETIC.items():
            if isinstance(node, kind):
                return compute(self._number(node.this, cells), self._number(node.expression, cells))
        if isinstance(node, exp.Column):
            self.compared.append((node.name, "number"))
            return number(as_text(cells[node.name]))
        if not isinstance(node, exp.Literal) or node.is_string and not is_number(node.name):
            raise self._refusal(node)
        return ibis.literal(float(node.name))

    def _text(self, node: exp.Expr, cells: Cells) -> Column:
        node = node.unnest()
        if not isinstance(node, exp.Column | exp.Literal):
            raise self._refusal(node)
        return as_text(cells[node.name]).nullif("") if isinstance(node, exp.Column) else ibis.literal(node.name)

    def _refusal(self, node: exp.Expr) -> ValueError:
        shown = node.sql(dialect="duckdb")
        return ValueError(f"where is {self.text!r}, in which {shown} stands in the wrong place; it may hold {ALLOWED}")


def _no_number(column: str, place: int, row: Mapping[str, Any]) -> str:
    return f"{column} is {row[f'bad_{place}']!r}, which where compares with a number; correct the row or where"


def _no_time(column: str, place: int, row: Mapping[str, Any]) -> str:
    problem = (
        f"{column} is {row[f'bad_{place}']!r}, neither a date nor Unix seconds, but where compares it with a date"
    )
    return f"{problem}; write the bound as a number in the unit of {column}, without quotes"


_SAID = {"number": _no_number, "time": _no_time}
_IS_SO: dict[str, Callable[[Column], Column]] = {
    "number": lambda text: number(text).notnull(),
    "time": lambda text: (as_seconds(text) < MILLISECONDS).fill_null(False),
}


def _is_long(node: exp.Expr) -> bool:
    node = node.unnest()
    is_whole = isinstance(node, exp.Literal) and not node.is_string and node.name.isdigit()
    return is_whole and int(node.name) >= _EXACT


def _is_numeric(node: exp.Expr) -> bool:
    node = node.unnest()
    return isinstance(node, (exp.Neg, *_ARITHMETIC)) or (isinstance(node, exp.Literal) and not node.is_string)


def _is_text(node: exp.Expr) -> bool:
    return isinstance(node.unnest(), exp.Literal) and node.unnest().is_string


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(re.sub(*SPACED_OFFSET, text))
    except ValueError:
        return False
    return True
