"""Integer ids of users and items, in order of first appearance in the input."""

import ibis
from ibis import _
from ibis.expr.types import Table

from rerank.data.tables import ITEM_COLUMNS


def number_users(table: Table) -> Table:
    """user and user_id, in order of first appearance in the input."""
    firsts = table.group_by("user_id").agg(first_at=_.source_row.min())
    return _number(firsts, "user", ["first_at", "user_id"]).select("user", "user_id")


def number_items(items: Table) -> Table:
    """ITEM_COLUMNS, then the other columns that the recipe names, in the order of the items file."""
    numbered = _number(items, "item", ["source_row", "item_id"])
    return numbered.select(*ITEM_COLUMNS, *(name for name in items.columns if name not in ITEM_COLUMNS))


def _number(table: Table, name: str, order: list[str]) -> Table:
    return table.mutate(**{name: ibis.row_number().over(ibis.window(order_by=order)).cast("int64")}).order_by(name)


def with_further_items(items: Table, used: Table) -> Table:
    """The items and those of interactions that are not among them: empty text, and no place in the file."""
    further = used.select("item_id").distinct()
    empty = {name: ibis.literal("") for name in items.columns if name not in ("item_id", "source_row")}
    further = further.mutate(**empty, source_row=ibis.null("int64")).select(*items.columns)
    return items.union(further)


def items_of(table: Table) -> Table:
    """A catalogue without text from the interactions alone, in order of first appearance."""
    empty = ibis.literal("")
    return table.group_by("item_id").agg(source_row=_.source_row.min()).mutate(title=empty, category=empty, text=empty)
