"""Rows that stay out: those that cannot be read, and repetitions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data.sources.source import Source
from rerank.launch.engines import DuckDB


def count(table: Table) -> int:
    """Number of rows."""
    return table.count().to_pyarrow().as_py()


def first_row(bad: Table, source: Source) -> dict | None:
    """The first of some bad rows, with its `place` in the source, or None when there is none."""
    rows = bad.order_by("source_row").limit(1).to_pyarrow().to_pylist()
    return {**rows[0], "place": source.place(rows[0]["source_row"])} if rows else None


@dataclass(frozen=True)
class Problem:
    """Rows that cannot be used.

    Attributes:
        reason: In a few words, for counts.
        holds: True for such a row.
        message: Of the refusal, from the values of the row.
    """

    reason: str
    holds: Column
    message: Callable[[Mapping[str, Any]], str]


def refuse_bad(table: Table, source: Source, problems: Sequence[Problem], also: str = "") -> None:
    """Refuse the first bad row of the input; `also` is one more cure."""
    if row := first_row(_judged(table, problems).filter(_.problem >= 0), source):
        raise ValueError(f"{row['place']}: {problems[row['problem']].message(row)}{also}")


def _judged(table: Table, problems: Sequence[Problem]) -> Table:
    """The table with the number of the first problem of each row, -1 where there is none."""
    return table.mutate(problem=ibis.cases(*((one.holds, place) for place, one in enumerate(problems)), else_=-1))


def screen(
    table: Table, source: Source, problems: Sequence[Problem], on_bad_rows: str
) -> tuple[Table, dict[str, int]]:
    """The table without bad rows, which `refuse` refuses, and the number of these by reason."""
    if on_bad_rows == "refuse":
        refuse_bad(table, source, problems, source.asked.cure(", or leave such rows out with on_bad_rows: drop", ""))
        return table, {}
    judged = _judged(table, problems)
    found = judged.filter(_.problem >= 0).group_by("problem").agg(n=_.count()).order_by("problem").to_pyarrow()
    left_out = {problems[row["problem"]].reason: row["n"] for row in found.to_pylist()}
    kept = judged.filter(_.problem < 0).drop("problem")
    if count(kept) == 0:
        why = ", ".join(f"{reason} ({number} rows)" for reason, number in left_out.items())
        raise ValueError(f"{source.name} has no row that can be used: {why}; correct the recipe or the file")
    return kept, left_out


def drop_repetitions(engine: DuckDB, table: Table, dedupe: str | None, order: Sequence[str]) -> Table:
    """One interaction of each user and item, the first or the last; or of each run of one item the first."""
    if dedupe is None:
        return table
    if dedupe == "consecutive":
        window = ibis.window(group_by="user_id", order_by=list(order))
        before = table.item_id.lag().over(window)
        kept = table.mutate(before=before).filter(_.before.isnull() | (_.before != _.item_id)).drop("before")
    else:
        by = [ibis.desc(name, nulls_first=True) if dedupe == "last" else name for name in order]
        place = ibis.row_number().over(ibis.window(group_by=["user_id", "item_id"], order_by=by))
        kept = table.mutate(place=place).filter(_.place == 0).drop("place")
    return engine.stored(kept)
