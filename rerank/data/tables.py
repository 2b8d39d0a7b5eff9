"""Checked tables from raw sources: items with their text, interactions without duplicates, the k-core, integer ids."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import duckdb
import ibis
from ibis import _
from ibis.expr.types import Column, Table

from rerank.data import DataArguments
from rerank.data.filters import Problem, count, first_row, screen
from rerank.data.sources.cells import as_seconds, as_text, collapsed, has_space, is_nested, plain_text
from rerank.data.sources.columns import Names, log_columns, pick_columns, require_column
from rerank.data.sources.source import Cells, Source
from rerank.data.where import Condition
from rerank.launch.engines import DuckDB

INTERACTION_COLUMNS = ("user", "item", "time", "position", "split")
READ_COLUMNS = ("source_row", "user_id", "item_id", "time", "position", "split")  # of interactions as they were read
IDS = ("user", "item")
_ORDER_COLUMNS = {"time": "float64", "position": "int64", "split": "string"}  # and their types
ITEM_COLUMNS = ("item", "item_id", "title", "category", "text", "source_row")
SPLITS = dict(train="train", history="train", valid="valid", validation="valid", dev="valid", test="test")


def materialise(con: ibis.BaseBackend, table: Table, source: Source) -> Table:
    """The table computed once and kept, so that a file is read a single time; refuses an unreadable or empty one.

    It has `source_row`, the place in the input: that in the table, unless the source has another.
    """
    try:
        made = con.create_table(ibis.util.gen_name("table"), table, temp=True)
    except duckdb.Error as error:
        raise source.unreadable(error) from None
    if count(made) == 0:
        raise ValueError(f"{source.name} is empty; give a file with at least one row")
    return made if "source_row" in made.columns else made.mutate(source_row=made.rowid())


def refuse_empty(empty: Table, source: Source, column: str) -> None:
    """Refuse the rows in which a column is empty."""
    if row := first_row(empty, source):
        raise ValueError(f"{row['place']}: {column} is empty; fill it or remove the row")


def item_columns(source: Source, args: DataArguments) -> tuple[Names, list[str]]:
    """Our column names to those of a source of items, and further columns of the sentence encoder's text."""
    given, text_columns = args.item_columns or {}, args.text_columns
    for name in {*given} & {"item_id", "text", "source_row"}:
        raise ValueError(f"item_columns has the key {name!r}, which items.parquet has already; take another name")
    known = ("item", "title", "category", "brand", *given)
    names = pick_columns(source, given, "item_columns", known, ("item",))
    further = [name for name in text_columns or () if name not in names]
    for name in further:
        require_column(source, "the text", name, "text_columns")
    return names, further


def read_items(con: ibis.BaseBackend, source: Source, args: DataArguments) -> tuple[Table, dict[str, int]]:
    """Items in file order, and the number of rows left out by reason.

    Their columns: source_row, item_id, title, category, text, then the others that the recipe names.
    """
    (names, further), text_columns = item_columns(source, args), args.text_columns
    log_columns(source, names, *further)
    named, texts = _texts(con, source, dict.fromkeys(further) | names, names["item"])
    if args.category_separator and "category" in named:
        named["category"] = named["category"].replace(args.category_separator, ", ")
    title, category = (named.get(name, ibis.literal("")) for name in ("title", "category"))
    if text_columns is None:
        text_columns = [name for name in ("title", "category") if name in names]
    others = {name: column for name, column in named.items() if name not in ITEM_COLUMNS}
    ours = {"item_id": named["item"], "title": title, "category": category}
    text = _encoder_text(named, text_columns)
    items = _stored(con, texts.select("source_row", "nested_item", **ours, text=text, **others))
    repeat = ibis.row_number().over(ibis.window(group_by="item_id", order_by="source_row"))
    first = _.source_row.min().over(ibis.window(group_by="item_id"))
    problems = [
        _empty("item", names["item"]),
        _nested("item", names["item"]),
        Problem(
            "item stands there before",
            _.repeat > 0,
            lambda row: f"item {row['item_id']!r} repeats {source.place(row['first_at'])}; keep one row per item",
        ),
    ]
    items, left_out = screen(items.mutate(repeat=repeat, first_at=first), source, problems, args.on_bad_rows)
    return items.drop("nested_item", "repeat", "first_at"), source.num_unreadable() | left_out


def _texts(
    con: ibis.BaseBackend, source: Source, names: Mapping[str, str | None], ids: str
) -> tuple[dict[str, Column], Table]:
    """Our names to the text of their columns (None: of the same name), and the table that these are of.

    It also has `nested_item`, whether the column of ids holds a list or an object.
    """
    if len({name.lower() for name in names}) < len(names):
        listed = ", ".join(names)
        raise ValueError(f"item_columns and text_columns name {listed}, two of them equal but for case; rename one")
    cells = source.cells(column or name for name, column in names.items())
    plain = {f"t{n}": plain_text(cells[column or name]) for n, (name, column) in enumerate(names.items())}
    raw = materialise(con, cells.select(nested_item=source.nested(cells, ids), **plain), source)
    texts = _stored(con, raw.select("source_row", "nested_item", **{place: collapsed(raw[place]) for place in plain}))
    return {name: texts[place] for name, place in zip(names, plain, strict=True)}, texts


def _stored(con: ibis.BaseBackend, table: Table) -> Table:
    """The table computed, so that expressions over it do not hold those of its columns several times."""
    return con.create_table(ibis.util.gen_name("table"), table, temp=True)


def _encoder_text(named: dict[str, Column], text_columns: list[str]) -> Column:
    """`TITLE. NAME: VALUE. NAME: VALUE` of the columns that have a value; the first goes without its name."""
    text = ibis.literal("")
    for place, name in enumerate(text_columns):
        value = named[name]
        labelled = value if place == 0 else ibis.literal(f"{name}: ") + value
        text = ibis.cases((value == "", text), (text == "", labelled), else_=text + ". " + labelled)
    return text


def interaction_columns(source: Source, args: DataArguments) -> tuple[Names, Condition | None]:
    """Our column names to those of a source of interactions, and the recipe's condition on them.

    A `position` has a say only where the recipe maps it, a `split` also under `split: given`.
    """
    by_name = ("user", "item", "time", *(("split",) if args.split == "given" else ()))
    names = pick_columns(source, args.columns, "columns", INTERACTION_COLUMNS, ("user", "item"), by_name)
    return names, Condition.of(args.where, source) if args.where else None


def read_interactions(
    con: ibis.BaseBackend, source: Source, args: DataArguments
) -> tuple[Table, Names, dict[str, int]]:
    """Interactions in file order, every field checked, our column names to the source's, and rows left out by reason.

    Their columns: source_row, user_id, item_id, and time, position and split, null where the source has none.
    """
    names, condition = interaction_columns(source, args)
    of_condition = condition.columns if condition else []
    log_columns(source, names, *of_condition)
    cells = source.cells([*names.values(), *of_condition], as_text=True)
    of_row = condition.values(cells) if condition else {}
    table = cells.select(**_id_columns(cells, source, names), **_order_columns(cells, names), **of_row)
    table = _with_constants(_with_plain_ids(con, materialise(con, table, source)), source)
    left_out = source.num_unreadable()
    if condition:  # first, so that the rows for which it does not hold may hold anything
        table, excluded = condition.screened(table, source, args.on_bad_rows)
        left_out |= excluded
    problems = [check(name, names[name]) for name in ("user", "item") for check in (_empty, _nested)]
    table, bad = screen(table, source, [*problems, *bad_values(names)], args.on_bad_rows)
    left_out |= bad
    return table, names, left_out


def _id_columns(cells: Cells, source: Source, names: Names) -> dict[str, Column]:
    """The ids, whether any `has_space`, and `nested_user` and `nested_item` where their texts do not tell it."""
    texts = {f"{name}_id": plain_text(cells[names[name]]).fill_null("") for name in IDS}
    kinds = {name: cells[names[name]].type() for name in IDS}
    typed = [name for name, kind in kinds.items() if not kind.is_string()]
    nested = {f"nested_{name}": source.nested(cells, names[name]) for name in typed}
    spaced = [has_space(texts[f"{name}_id"]) for name, kind in kinds.items() if not kind.is_integer()]
    any_spaced = functools.reduce(operator.or_, spaced, ibis.literal(False))
    return {**texts, "has_space": any_spaced, **nested}


def _order_columns(cells: Cells, names: Names) -> dict[str, Column]:
    """time, position and split as far as the source has them, and the text of each that cannot be read, `raw_NAME`."""
    known = {name: cells[names[name]] for name in _ORDER_COLUMNS if name in names}
    read = {
        "time": as_seconds,
        "position": lambda column: as_text(column).try_cast("int64"),
        "split": lambda column: split_name(as_text(column)),
    }
    values = {name: read[name](column) for name, column in known.items()}
    unread = {  # each text stands here once: DuckDB computes what stands twice for every row
        f"raw_{name}": ibis.ifelse(
            values[name].isnull(), plain_text(column).fill_null("").strip(), ibis.null("string")
        )
        for name, column in known.items()
    }
    return values | unread


def _with_plain_ids(con: ibis.BaseBackend, table: Table) -> Table:
    """The interactions with `collapsed` ids, which are computed only where any `has_space`."""
    if count(table.filter(table.has_space)) == 0:
        return table
    return _stored(con, table.mutate(**{f"{name}_id": collapsed(table[f"{name}_id"]) for name in IDS}))


def _with_constants(table: Table, source: Source) -> Table:
    """The interactions with columns that would cost as much to store as the others, and are quickly computed."""
    nested = {f"nested_{name}": is_nested(table[f"{name}_id"]) & source.is_json for name in IDS}
    missing = nested | {name: ibis.null(kind) for name, kind in _ORDER_COLUMNS.items()}
    return table.mutate(**{name: column for name, column in missing.items() if name not in table.columns})


def split_name(text: Column) -> Column:
    """train, valid or test from any of SPLITS; null for other words."""
    return text.lower().cases(*SPLITS.items(), else_=ibis.null("string"))


def bad_values(names: Names) -> list[Problem]:
    """Rows with text where a time, a position or a split should be (`raw_NAME` holds the file's text).

    A missing time is allowed where a position gives the order.
    """
    wanted = {"time": "a number of seconds or a date", "position": "a whole number"}
    wanted["split"] = f"a split ({', '.join(SPLITS)})"
    found = []
    for name in [name for name in wanted if name in names]:
        bad = _[name].isnull()
        if name == "time" and "position" in names:
            bad = bad & (_.raw_time != "")
        found.append(
            Problem(f"{name} is not {wanted[name]}", bad, functools.partial(_not_a, name, names, wanted[name]))
        )
    return found


def _empty(name: str, column: str) -> Problem:
    said = f"{column or '(no name)'} is empty; fill it or remove the row"
    return Problem(f"{name} is empty", _[f"{name}_id"] == "", lambda _: said)


def _nested(name: str, column: str) -> Problem:
    def message(row: Mapping[str, Any]) -> str:
        cure = "write one id a row, or map another column"
        return f"{column or '(no name)'} is {row[f'{name}_id']!r}, a list or an object and no id; {cure}"

    return Problem(f"{name} is a list or an object", _[f"nested_{name}"].fill_null(False), message)


def _not_a(name: str, names: Names, wanted: str, row: Mapping[str, Any]) -> str:
    return f"{names[name]} is {row[f'raw_{name}']!r}, not {wanted}; correct the row or map another column"


def drop_duplicates(engine: DuckDB, table: Table, names: Names) -> Table:
    """One interaction for each (user, item, time, position): the first in the input.

    Without time and position a repeated (user, item) may be a real second visit: nothing is dropped.
    """
    table = table.select(*READ_COLUMNS)
    if not {"time", "position"} & set(names):
        return table
    firsts = table.group_by(["user_id", "item_id", "time", "position"]).agg(
        split=_.split.argmin(_.source_row), source_row=_.source_row.min()
    )
    return engine.stored(firsts)


def sequence_order(split: str | None) -> list[str]:
    """The columns by which a user's interactions are put in order."""
    return ["time", "position", "source_row"] if split == "by_time" else ["position", "time", "source_row"]


def k_core(engine: DuckDB, table: Table, min_user: int, min_item: int) -> Table:
    """The largest part in which every user and every item keeps its minimum of interactions."""
    if max(min_user, min_item) <= 1:
        return table
    size = count(table)
    while True:
        users = table.group_by("user_id").agg(n=_.count()).filter(_.n >= min_user)
        items = table.group_by("item_id").agg(n=_.count()).filter(_.n >= min_item)
        kept = table.semi_join(users, "user_id").semi_join(items, "item_id")
        table = engine.stored(kept)
        before, size = size, count(table)
        if size == 0:
            raise ValueError(
                f"min_user_interactions {min_user} and min_item_interactions {min_item} leave no user; lower them"
            )
        if size == before:
            return table
