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

from rerank.data.filters import refuse_bad
from rerank.data.sources.cells import as_list, as_seconds, as_text
from rerank.data.sources.columns import Given, log_columns, pick_columns, require_column
from rerank.data.sources.source import Source
from rerank.data.tables import bad_values, materialise, refuse_empty, split_name

COLUMNS = ("user", "time", "split", "items", "history", "item")
MOST_TORN = 0.01  # share of a user's further rows that may not continue those before


def is_to_be_rebuilt(source: Source, columns: Given | None, split: str, rebuild: bool) -> bool:
    """Whether a source holds whole rows (an `items` or a `history` column) and not single interactions.

    Raises:
        ValueError: When such rows are to stay what they are, or single interactions are to be rebuilt.
    """
    if split != "given":
        return False
    held = [name for name in ("history", "items") if name in (columns or {}) or source.has(name)]
    if held and not rebuild:
        problem = f"{source.name} has the column {held[0]}: whole rows, not single interactions"
        cure = "set rebuild: true to put overlapping histories back into one sequence a user"
        raise ValueError(f"{problem}; {cure}, or name lists that were shown as requests")
    if rebuild and not held:
        problem = f"rebuild is true but {source.name} has neither a column items nor history"
        raise ValueError(f"{problem}; remove rebuild, or map one in columns")
    return rebuild


def read_ready_rows(con: ibis.BaseBackend, source: Source, columns: Given | None) -> Table:
    """Rows in file order, every field checked: source_row, user_id, time, split, item_ids (history, then target)."""
    names = pick_columns(source, columns, "columns", COLUMNS, ("user", "split"))
    for name in () if "items" in names else ("history", "item"):
        require_column(source, name, names.get(name, name), "columns")
    log_columns(source, names)
    cells = source.cells(names.values())
    if "items" in names:
        item_ids = _ids(cells[names["items"]])
    else:
        item_ids = _ids(cells[names["history"]]).concat(ibis.array([as_text(cells[names["item"]])]))
    raw = {name: as_text(cells[names[name]]) for name in ("time", "split") if name in names}
    rows = cells.select(
        user_id=as_text(cells[names["user"]]),
        time=as_seconds(cells[names["time"]]) if "time" in names else ibis.null("float64"),
        split=split_name(raw["split"]),
        item_ids=item_ids,
        **{f"raw_{name}": value for name, value in raw.items()},
    )
    rows = materialise(con, rows, source)
    refuse_bad(rows, source, bad_values({name: names[name] for name in raw}))
    empty = (_.item_ids.length() == 0) | _.item_ids.contains("")
    refuse_empty(rows.filter(_.user_id == ""), source, "user")
    refuse_empty(rows.filter(empty), source, names.get("items", "item"))
    return rows


def _ids(column: Column) -> ArrayColumn:
    """A list column, or text with white space between ids, as a list of ids."""
    return as_list(column).cast("array<string>")


def explode(rows: Table) -> Table:
    """One line per item of a row: source_row, place, item_id."""
    return rows.select("source_row", item_ids=_.item_ids).unnest("item_ids", offset="place").rename(item_id="item_ids")


def sequences_of(con: ibis.BaseBackend, source: Source, rows: Table, items: Table, users: Table) -> Table:
    """Interactions of every user from ready rows: user, item, position, time, split, available.

    Items that only a row's history brings take the row's split, so nothing of a held-out row is trained on.

    Raises:
        ValueError: When more than 1 % of the rows do not continue those of their user before them.
    """
    order = ["user", "time", "source_row"]
    rows = rows.join(users, "user_id").select(*order, "split", "item_ids")
    cells = explode(rows).join(items, "item_id").select("source_row", "place", "item")
    flat = cells.join(rows.select(*order), "source_row").order_by([*order, "place"]).select("item").to_pyarrow()
    columns = {"length": _.item_ids.length(), "source_row": _.source_row}
    table = rows.order_by(order).select("user", "time", "split", **columns).to_pyarrow()
    ends = np.cumsum(table["length"].to_numpy())
    windows = [window.tolist() for window in np.split(flat["item"].to_numpy(), ends[:-1])]
    owners, splits = table["user"].to_pylist(), table["split"].to_pylist()
    merged, torn = merge_rows(owners, windows, table["time"].to_pylist(), splits)
    _refuse_torn(
        source, table["source_row"].take(pa.array(torn, pa.int64())).to_pylist(), len(owners) - len({*owners})
    )
    return con.create_table(ibis.util.gen_name("sequences"), ibis.memtable(merged), temp=True)


def _refuse_torn(source: Source, torn: list[int], num_following: int) -> None:
    """Refuse rows of which too many do not continue the rows before them; `torn` are their places in the input."""
    if len(torn) > MOST_TORN * num_following:
        share = f"as in {len(torn)} of {num_following} rows that follow another of their user, above {MOST_TORN:.0%}"
        problem = f"its history does not continue the user's rows before it, {share}"
        cure = "give single interactions, or name lists that were shown as requests"
        raise ValueError(f"{source.place(min(torn))}: {problem}; rebuild would make false sequences; {cure}")


def merge_rows(
    users: Sequence[int], windows: Sequence[list[int]], times: Sequence[float | None], splits: Sequence[str]
) -> tuple[pa.Table, list[int]]:
    """Interactions from rows in the order of (user, time, input): each window is laid over the end of the sequence.

    Returns:
        The interactions, and the rows that do not continue the sequence: not their whole history is its end, or, at a
        change of split, where rows in between may be missing, not even the beginning of their history.
    """
    records: list[tuple] = []
    torn: list[int] = []
    sequence: list[int] = []
    user_before = split_before = None
    for row, (user, window, time, split) in enumerate(zip(users, windows, times, splits, strict=True)):
        is_first = user != user_before
        sequence = [] if is_first else sequence
        overlap = _overlap(sequence, window[:-1])
        needed = len(window) - 1 if split == split_before else min(1, len(window) - 1)
        torn += [row] if not is_first and overlap < needed else []
        user_before, split_before = user, split
        for item in window[overlap:-1]:
            records.append((user, item, len(sequence), None, split, 0))
            sequence.append(item)
        records.append((user, window[-1], len(sequence), time, split, len(window) - 1))
        sequence.append(window[-1])
    columns = zip(*records, strict=True)
    types = {"user": "int64", "item": "int64", "position": "int64", "time": "float64", "split": "string"}
    types["available"] = "int64"
    arrays = {n: pa.array(c, pa.type_for_alias(t)) for (n, t), c in zip(types.items(), columns, strict=True)}
    return pa.table(arrays), torn


def _overlap(sequence: list[int], history: list[int]) -> int:
    """Length of the longest end of the sequence that is a beginning of the history."""
    longest = min(len(sequence), len(history))
    return next(n for n in range(longest, -1, -1) if sequence[len(sequence) - n :] == history[:n])
