"""The whole path from sources to tables in memory: read, check, clean, number, split."""

import tempfile
from dataclasses import dataclass

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.expr.types import Table

from rerank.data import DataArguments, ready_rows, splits, tables
from rerank.data.readers import Source, read_source

ROW_SPLITS = ("rerank", "valid", "test")


@dataclass(frozen=True)
class Prepared:
    """What the stage writes; `targets` are the indices of the interactions that are a row's target."""

    items: pa.Table
    users: pa.Table
    interactions: pa.Table
    targets: np.ndarray
    num_read: int
    num_duplicates: int
    sources: list[str]


@dataclass(frozen=True)
class _Catalogue:
    """The items as read, or None, and the source to name when an interaction's item is not among them."""

    items: Table | None
    source: Source | None

    def known(self, table: Table, source: Source) -> Table:
        """The items, every one of the table's among them; without a catalogue, the table's own."""
        if self.items is None:
            return tables.items_of(table)
        tables.refuse_unknown_items(table, self.items, source, self.source)
        return self.items


@dataclass(frozen=True)
class _Sequences:
    """Expressions of everything but the rows."""

    items: Table
    users: Table
    interactions: Table
    num_read: int
    num_duplicates: int = 0


def prepare(args: DataArguments) -> Prepared:
    """Tables and split of a recipe, by Ibis expressions on an embedded DuckDB.

    Raises:
        FileNotFoundError: When an input is not there.
        ValueError: When an input is empty, lacks a column, has a bad row, or leaves a split without rows.
    """
    with tempfile.TemporaryDirectory() as spill_dir:  # else DuckDB spills into the working folder
        con = ibis.duckdb.connect(temp_directory=spill_dir)
        try:
            return _prepare(con, args)
        finally:
            con.disconnect()


def _prepare(con: ibis.BaseBackend, args: DataArguments) -> Prepared:
    source = read_source(con, args.interactions, args.format, "interactions")
    catalogue = _read_catalogue(con, args)
    is_rows = args.split == "given" and ready_rows.is_ready_rows(source, args.columns)
    made = (_from_ready_rows if is_rows else _from_interactions)(con, args, source, catalogue)
    sequences = splits.mark_rerank(made.interactions, args.num_rerank, args.min_history)
    interactions = sequences.order_by(["user", "position"]).to_pyarrow()
    prepared = Prepared(
        items=made.items.order_by("item").to_pyarrow(),
        users=made.users.order_by("user").to_pyarrow(),
        interactions=interactions,
        targets=splits.targets(interactions, args.min_history),
        num_read=made.num_read,
        num_duplicates=made.num_duplicates,
        sources=[s.name for s in (source, catalogue.source) if s],
    )
    _refuse_empty_splits(args, prepared)
    return prepared


def _read_catalogue(con: ibis.BaseBackend, args: DataArguments) -> _Catalogue:
    if args.items:
        source = read_source(con, args.items, args.items_format, "items")
        items = tables.read_items(con, source, args.item_columns, args.text_columns, args.category_separator)
        return _Catalogue(items, source)
    for name in ("item_columns", "text_columns", "category_separator"):
        if getattr(args, name):
            raise ValueError(f"{name} is {getattr(args, name)} but items is not set; name the table of items")
    return _Catalogue(None, None)


def _from_interactions(
    con: ibis.BaseBackend, args: DataArguments, source: Source, catalogue: _Catalogue
) -> _Sequences:
    read = tables.read_interactions(con, source, args.columns)
    _check_split_columns(args, read)
    items = catalogue.known(read.table, source)
    unique = tables.drop_duplicates(con, read)
    core = tables.k_core(con, unique, args.min_user_interactions, args.min_item_interactions)
    if args.min_item_interactions:
        items = items.semi_join(core, "item_id")
    users, items = tables.number_users(core), tables.number_items(items)
    numbered = core.join(users, "user_id").join(items.select("item", "item_id"), "item_id")
    order = ["time", "position", "source_row"] if args.split == "by_time" else ["position", "time", "source_row"]
    sequences = _split(args, splits.number_positions(numbered, order))
    num_read = read.table.count().to_pyarrow().as_py()
    return _Sequences(items, users, sequences, num_read, num_read - unique.count().to_pyarrow().as_py())


def _check_split_columns(args: DataArguments, read: tables.Interactions) -> None:
    """Refuse a split by a column that the interactions lack."""
    name = read.source.name
    if args.split == "given" and not read.has_split:
        raise ValueError(f"split is given but {name} has no column 'split'; map it in columns: {{split: COLUMN}}")
    if args.split == "by_time":
        if not read.has_time:
            raise ValueError(f"split is by_time but {name} has no column 'time'; map it in columns: {{time: COLUMN}}")
        if bad := tables.first_row(read.table.filter(_.time.isnull())):
            place = read.source.place(bad["source_row"])
            raise ValueError(f"{place}: the time is empty but split is by_time; fill it or remove the row")


def _split(args: DataArguments, sequences: Table) -> Table:
    if args.split == "per_user":
        return splits.split_per_user(sequences, args.num_test, args.num_valid)
    if args.split == "by_time":
        return splits.split_by_time(sequences, args.valid_fraction, args.test_fraction)
    if args.split == "random":
        return splits.split_at_random(sequences, args.valid_fraction, args.test_fraction, args.seed)
    return splits.hold_out_latest(sequences, args.valid_fraction)


def _from_ready_rows(con: ibis.BaseBackend, args: DataArguments, source: Source, catalogue: _Catalogue) -> _Sequences:
    rows = ready_rows.read_ready_rows(con, source, args.columns)
    items = tables.number_items(catalogue.known(ready_rows.explode(rows), source))
    users = tables.number_users(rows)
    held_out = splits.hold_out_latest(rows, args.valid_fraction)
    sequences = ready_rows.sequences_of(con, held_out, items, users)
    return _Sequences(items, users, sequences, rows.count().to_pyarrow().as_py())


def _refuse_empty_splits(args: DataArguments, prepared: Prepared) -> None:
    rows = _counts(prepared.interactions["split"].take(pa.array(prepared.targets)))
    cure = {
        "per_user": "give longer sequences, or lower min_history, num_test, num_valid or num_rerank",
        "by_time": "give longer sequences, lower min_history, or change valid_fraction and test_fraction",
        "random": "give longer sequences, or lower min_history or num_rerank",
        "given": f"mark such rows in the split column of {prepared.sources[0]}, or lower min_history",
    }[args.split]
    for split in ROW_SPLITS:
        if not rows.get(split):
            raise ValueError(
                f"split: {args.split} leaves no user with a {split} row (min_history {args.min_history}, "
                f"{len(prepared.users)} users); {cure}"
            )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def summary(args: DataArguments, prepared: Prepared) -> dict:
    """Counts of what was read, kept and split."""
    users, times = prepared.interactions["user"].to_numpy(), prepared.interactions["time"].to_numpy()
    rows = _counts(prepared.interactions["split"].take(pa.array(prepared.targets)))
    same_user = users[1:] == users[:-1]
    ties = same_user & (times[1:] == times[:-1])
    lengths = np.bincount(users)
    return {
        "users": len(prepared.users),
        "items": len(prepared.items),
        "interactions": len(users),
        "interactions_read": prepared.num_read,
        "duplicates_removed": prepared.num_duplicates,
        "interactions_of_split": _counts(prepared.interactions["split"]),
        "rows": {split: rows[split] for split in ROW_SPLITS},
        "sequence_length": {"least": int(lengths.min()), "mean": float(lengths.mean()), "most": int(lengths.max())},
        # Where this is high, the file's order decides what a target is, and directed counts see that order.
        "share_of_time_ties": float(ties.sum() / max(1, same_user.sum())),
        "items_without_text": int(np.sum(prepared.items["text"].to_numpy(zero_copy_only=False) == "")),
        "midtrain_has_seen_rerank_targets": args.num_rerank == "all",
    }
