"""Checked tables from raw sources: items with their text, interactions without duplicates, the k-core, integer ids."""

import duckdb
import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data.readers import Names, Source, as_seconds, as_text, pick_columns, require_column, unreadable

ITEM_COLUMNS = ("item", "item_id", "title", "category", "text", "source_row")
SPLITS = dict(train="train", history="train", valid="valid", validation="valid", dev="valid", test="test")


def materialise(con: ibis.BaseBackend, table: Table, source: Source) -> Table:
    """The table computed once and kept, so that a file is read a single time; refuses an unreadable or empty one."""
    try:
        made = con.create_table(ibis.util.gen_name("table"), table, temp=True)
    except duckdb.Error as error:
        raise unreadable(source.name, error) from None
    if count(made) == 0:
        raise ValueError(f"{source.name} is empty; give a file with at least one row")
    return made


def count(table: Table) -> int:
    """Number of rows."""
    return table.count().to_pyarrow().as_py()


def first_row(bad: Table, source: Source) -> dict | None:
    """The first of some bad rows, with its `place` in the source, or None when there is none."""
    rows = bad.order_by("source_row").limit(1).to_pyarrow().to_pylist()
    return {**rows[0], "place": source.place(rows[0]["source_row"])} if rows else None


def refuse_empty(empty: Table, source: Source, column: str) -> None:
    """Refuse the rows in which a column is empty."""
    if row := first_row(empty, source):
        raise ValueError(f"{row['place']}: {column} is empty; fill it or remove the row")


def read_items(
    con: ibis.BaseBackend,
    source: Source,
    item_columns: Names | None,
    text_columns: list[str] | None,
    category_separator: str | None,
) -> Table:
    """Items in file order: source_row, item_id, title, category, text, then the other columns of the recipe."""
    for name in {*(item_columns or {})} & {"item_id", "text", "source_row"}:
        raise ValueError(f"item_columns has the key {name!r}, which items.parquet has already; take another name")
    known = ("item", "title", "category", "brand", *(item_columns or {}))
    names = pick_columns(source, item_columns, "item_columns", known)
    require_column(source, "item", names.get("item", "item"), "item_columns")
    columns = {name: as_text(source.table[column]) for name, column in names.items()}
    if category_separator and "category" in columns:
        columns["category"] = columns["category"].replace(category_separator, ", ")
    title, category = (columns.get(name, ibis.literal("")) for name in ("title", "category"))
    text = _encoder_text(source, columns, text_columns)
    named = {name: as_text(source.table[name]) for name in text_columns or () if name not in columns} | columns
    others = {name: column for name, column in named.items() if name not in ITEM_COLUMNS}
    ours = {"item_id": columns["item"], "title": title, "category": category, "text": text}
    items = materialise(con, source.table.select("source_row", **ours, **others), source)
    refuse_empty(items.filter(_.item_id == ""), source, names["item"])
    twice = items.group_by("item_id").agg(source_row=_.source_row.max(), first_at=_.source_row.min())
    if row := first_row(twice.filter(_.source_row > _.first_at), source):
        first = source.place(row["first_at"])
        raise ValueError(f"{row['place']}: item {row['item_id']!r} repeats {first}; keep one row per item")
    return items


def _encoder_text(source: Source, columns: dict[str, Column], text_columns: list[str] | None) -> Column:
    """`TITLE. NAME: VALUE. NAME: VALUE` of the columns that have a value; the first goes without its name."""
    if text_columns is None:
        text_columns = [name for name in ("title", "category") if name in columns]
    text = ibis.literal("")
    for place, name in enumerate(text_columns):
        if name not in columns:
            require_column(source, "the text", name, "text_columns")
        value = columns[name] if name in columns else as_text(source.table[name])
        labelled = value if place == 0 else ibis.literal(f"{name}: ") + value
        text = ibis.cases((value == "", text), (text == "", labelled), else_=text + ". " + labelled)
    return text


def read_interactions(con: ibis.BaseBackend, source: Source, columns: Names | None) -> tuple[Table, Names]:
    """Interactions in file order, every field checked, and our column names to the source's.

    Their columns: source_row, user_id, item_id, and time, position and split, null where the source has none.
    """
    names = pick_columns(source, columns, "columns", ("user", "item", "time", "position", "split"))
    for name in ("user", "item"):
        require_column(source, name, names.get(name, name), "columns")
    raw = {name: as_text(source.table[column]) for name, column in names.items()}
    table = source.table.select(
        "source_row",
        user_id=raw["user"],
        item_id=raw["item"],
        time=as_seconds(source.table[names["time"]]) if "time" in names else ibis.null("float64"),
        position=raw["position"].try_cast("int64") if "position" in names else ibis.null("int64"),
        split=split_name(raw["split"]) if "split" in names else ibis.null("string"),
        **{f"raw_{name}": raw[name] for name in ("time", "position", "split") if name in names},
    )
    table = materialise(con, table, source)
    for name in ("user", "item"):
        refuse_empty(table.filter(_[f"{name}_id"] == ""), source, names[name])
    refuse_bad_values(table, source, names)
    return table, names


def split_name(text: Column) -> Column:
    """train, valid or test from any of SPLITS; null for other words."""
    return text.lower().cases(*SPLITS.items(), else_=ibis.null("string"))


def refuse_bad_values(table: Table, source: Source, names: Names) -> None:
    """Refuse text where a time, a position or a split should be (`raw_NAME` holds the file's text).

    A missing time is allowed where a position gives the order.
    """
    wanted = {"time": "a number of seconds or a date", "position": "a whole number"}
    wanted["split"] = f"a split ({', '.join(SPLITS)})"
    for name in [name for name in wanted if name in names]:
        bad = table.filter(_[name].isnull())
        if name == "time" and "position" in names:
            bad = bad.filter(_.raw_time != "")
        if row := first_row(bad, source):
            problem = f"{names[name]} is {row[f'raw_{name}']!r}, not {wanted[name]}"
            raise ValueError(f"{row['place']}: {problem}; correct the row or map another column")


def drop_duplicates(con: ibis.BaseBackend, table: Table, names: Names) -> Table:
    """One interaction for each (user, item, time, position): the first in the input.

    Without time and position a repeated (user, item) may be a real second visit: nothing is dropped.
    """
    table = table.select("source_row", "user_id", "item_id", "time", "position", "split")
    if not {"time", "position"} & set(names):
        return table
    firsts = table.group_by(["user_id", "item_id", "time", "position"]).agg(
        split=_.split.argmin(_.source_row), source_row=_.source_row.min()
    )
    return con.create_table(ibis.util.gen_name("table"), firsts, temp=True)


def k_core(con: ibis.BaseBackend, table: Table, min_user: int, min_item: int) -> Table:
    """The largest part in which every user and every item keeps its minimum of interactions."""
    if max(min_user, min_item) <= 1:
        return table
    size = count(table)
    while True:
        users = table.group_by("user_id").agg(n=_.count()).filter(_.n >= min_user)
        items = table.group_by("item_id").agg(n=_.count()).filter(_.n >= min_item)
        kept = table.semi_join(users, "user_id").semi_join(items, "item_id")
        table = con.create_table(ibis.util.gen_name("core"), kept, temp=True)
        before, size = size, count(table)
        if size == 0:
            raise ValueError(
                f"min_user_interactions {min_user} and min_item_interactions {min_item} leave no user; lower them"
            )
        if size == before:
            return table


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


def items_of(table: Table) -> Table:
    """A catalogue without text from the interactions alone, in order of first appearance."""
    empty = ibis.literal("")
    return table.group_by("item_id").agg(source_row=_.source_row.min()).mutate(title=empty, category=empty, text=empty)
