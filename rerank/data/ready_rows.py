"""Ready rows (history and target, already split) put back into one sequence per user.

Consecutive rows of a user overlap: each history is the tail of what came before it. Laid over each other they give the
user's sequence; a row's own history is then the last `available` items before its target, exactly as the file has it.
"""

from collections.abc import Sequence

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.expr.types import ArrayColumn, Column, Table

from rerank.data.readers import Names, Source, as_seconds, as_text, pick_columns, require_column
from rerank.data.tables import materialise, refuse_bad_values, refuse_empty, split_name

COLUMNS = ("user", "time", "split", "items", "history", "item")


def is_ready_rows(source: Source, columns: Names | None) -> bool:
    """Whether a source holds whole rows (an `items` or a `history` column) and not single interactions."""
    return bool({"items", "history"} & {*(columns or {}), *source.table.columns})


def read_ready_rows(con: ibis.BaseBackend, source: Source, columns: Names | None) -> Table:
    """Rows in file order, every field checked: source_row, user_id, time, split, item_ids (history, then target)."""
    names = pick_columns(source, columns, "columns", COLUMNS)
    for name in ("user", "split") if "items" in names else ("user", "split", "history", "item"):
        require_column(source, name, names.get(name, name), "columns")
    cells = source.table
    if "items" in names:
        item_ids = _ids(cells[names["items"]])
    else:
        item_ids = _ids(cells[names["history"]]).concat(ibis.array([as_text(cells[names["item"]])]))
    raw = {name: as_text(cells[names[name]]) for name in ("time", "split") if name in names}
    rows = cells.select(
        "source_row",
        user_id=as_text(cells[names["user"]]),
        time=as_seconds(cells[names["time"]]) if "time" in names else ibis.null("float64"),
        split=split_name(raw["split"]),
        item_ids=item_ids,
        **{f"raw_{name}": value for name, value in raw.items()},
    )
    rows = materialise(con, rows, source)
    refuse_bad_values(rows, source, {name: names[name] for name in raw})
    empty = (_.item_ids.length() == 0) | _.item_ids.contains("")
    refuse_empty(rows.filter(_.user_id == ""), source, "user")
    refuse_empty(rows.filter(empty), source, names.get("items", "item"))
    return rows


def _ids(column: Column) -> ArrayColumn:
    """A list column, or text with white space between ids, as a list of ids."""
    if column.type().is_array():
        return column.cast("array<string>")
    words = as_text(column)
    return ibis.ifelse(words == "", ibis.literal([], "array<string>"), words.split(" "))


def explode(rows: Table) -> Table:
    """One line per item of a row: source_row, place, item_id."""
    return rows.select("source_row", item_ids=_.item_ids).unnest("item_ids", offset="place").rename(item_id="item_ids")


def sequences_of(con: ibis.BaseBackend, rows: Table, items: Table, users: Table) -> Table:
    """Interactions of every user from ready rows: user, item, position, time, split, available.

    Items that only a row's history brings take the row's split, so nothing of a held-out row is trained on.
    """
    order = ["user", "time", "source_row"]
    rows = rows.join(users, "user_id").select(*order, "split", "item_ids")
    cells = explode(rows).join(items, "item_id").select("source_row", "place", "item")
    flat = cells.join(rows.select(*order), "source_row").order_by([*order, "place"]).select("item").to_pyarrow()
    table = rows.order_by(order).select("user", "time", "split", length=_.item_ids.length()).to_pyarrow()
    ends = np.cumsum(table["length"].to_numpy())
    windows = [window.tolist() for window in np.split(flat["item"].to_numpy(), ends[:-1])]
    merged = merge_rows(table["user"].to_pylist(), windows, table["time"].to_pylist(), table["split"].to_pylist())
    return con.create_table(ibis.util.gen_name("sequences"), ibis.memtable(merged), temp=True)


def merge_rows(
    users: Sequence[int], windows: Sequence[list[int]], times: Sequence[float | None], splits: Sequence[str]
) -> pa.Table:
    """Interactions from rows in the order of (user, time, input): each window is laid over the end of the sequence."""
    records: list[tuple] = []
    sequence: list[int] = []
    user_before = None
    for user, window, time, split in zip(users, windows, times, splits, strict=True):
        if user != user_before:
            sequence, user_before = [], user
        overlap = _overlap(sequence, window[:-1])
        for item in window[overlap:-1]:
            records.append((user, item, len(sequence), None, split, 0))
            sequence.append(item)
        records.append((user, window[-1], len(sequence), time, split, len(window) - 1))
        sequence.append(window[-1])
    columns = zip(*records, strict=True)
    types = {"user": "int64", "item": "int64", "position": "int64", "time": "float64", "split": "string"}
    types["available"] = "int64"
    return pa.table({n: pa.array(c, pa.type_for_alias(t)) for (n, t), c in zip(types.items(), columns, strict=True)})


def _overlap(sequence: list[int], history: list[int]) -> int:
    """Length of the longest end of the sequence that is a beginning of the history."""
    longest = min(len(sequence), len(history))
    return next(n for n in range(longest, -1, -1) if sequence[len(sequence) - n :] == history[:n])
