"""From sources to tables in memory: read, check, clean, number, split."""

from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.expr.types import Table

from rerank.data import DataArguments, ready_rows, splits, tables
from rerank.data.filters import count, drop_repetitions, first_row
from rerank.data.requests.prepare import PreparedRequests, prepare_requests
from rerank.data.requests.read import item_source
from rerank.data.sources.columns import Names
from rerank.data.sources.opening import database, open_source
from rerank.data.sources.source import Source
from rerank.data.summary import Sizes, by_split, notes, share_in_history, shared_summary
from rerank.rows.sequences import write_sequences

ROW_SPLITS = ("rerank", "valid", "test")


@dataclass(frozen=True)
class Prepared:
    """The tables of the stage.

    Attributes:
        items, users, interactions: As they are written.
        targets: Indices of the interactions that are a row's target.
        num_read, num_duplicates: Interactions read, and those removed since they stand there before.
        left_out: Reason to the number of other rows that are not in the tables.
        sources: Names of the files.
    """

    items: pa.Table
    users: pa.Table
    interactions: pa.Table
    targets: np.ndarray
    num_read: int
    num_duplicates: int
    left_out: dict[str, int]
    sources: list[str]

    def write(self, out_dir: Path) -> None:
        """Write the four tables as Parquet files."""
        pq.write_table(self.items, out_dir / "items.parquet")
        pq.write_table(self.users, out_dir / "users.parquet")
        pq.write_table(self.interactions.drop_columns("available"), out_dir / "interactions.parquet")
        splits.write_rows(out_dir / "rows.parquet", self.interactions, self.targets)
        write_sequences(out_dir, out_dir / "interactions.parquet", len(self.users))

    def count(self, is_row: bool) -> dict[str, int]:
        """Number of interactions, or of rows, by split."""
        split = self.interactions["split"]
        return by_split(split.take(pa.array(self.targets)) if is_row else split)

    def summary(self, args: DataArguments) -> dict[str, object]:
        """Counts of what was read, kept and split; terms and fingerprints of the sources."""
        rows = self.count(is_row=True)
        sizes = Sizes(self.num_read, self.num_duplicates, {split: rows[split] for split in ROW_SPLITS})
        shared = shared_summary(args, self.items, self.users, self.interactions, sizes, self.sources)
        share = share_in_history(self.interactions, self.targets)
        return {**shared, "left_out": self.left_out, "share_of_targets_in_history": share}

    def notes(self, metrics: dict[str, object]) -> list[str]:
        """Lines for the log on what is unusual in the tables."""
        return notes(metrics)


def prepare(args: DataArguments) -> Prepared | PreparedRequests:
    """Tables and split of a recipe, by Ibis expressions on an embedded DuckDB; refuses what `check` does."""
    with database() as con:
        if args.requests:
            return prepare_requests(con, args)
        assert args.interactions
        source = open_source(con, args.asked("interactions"))
        is_rows = ready_rows.is_to_be_rebuilt(source, args.columns, args.split, args.rebuild)
        prepared = (_from_ready_rows if is_rows else _from_interactions)(con, args, source)
    _refuse_empty_splits(args, prepared)
    return prepared


def _read_items(
    con: ibis.BaseBackend, args: DataArguments, used: Table, source: Source, num_read: int
) -> tuple[Table, list[str], dict[str, int]]:
    """The items, the names of all sources, and rows left out by reason; without a catalogue the used items.

    Args:
        con: The database.
        args: Of the stage.
        used: Interactions whose items need metadata.
        source: Of these.
        num_read: Of them, for the message of a refusal.
    """
    if not args.items:
        return tables.items_of(used), [source.name], {}
    catalogue = item_source(con, args)
    items, left_out = tables.read_items(con, catalogue, args)
    without = used.anti_join(items, "item_id")
    sources, left_out = [source.name, catalogue.name], {f"items: {reason}": n for reason, n in left_out.items()}
    if args.without_metadata == "keep":
        return tables.with_further_items(items, without), sources, left_out
    if row := first_row(without, source):
        num_items, num_rows = without.item_id.nunique().to_pyarrow().as_py(), count(without)
        if args.without_metadata == "drop":
            return items, sources, {**left_out, "item without metadata": num_rows}
        problem = f"item {row['item_id']!r} is not in {catalogue.name}"
        others = f"{num_items} items in {num_rows} of {num_read} interactions lack metadata"
        raise ValueError(
            f"{row['place']}: {problem}; add it there or remove the interaction; {others}: set without_metadata: keep "
            "(with empty text) or drop"
        )
    return items, sources, left_out


def _from_interactions(con: ibis.BaseBackend, args: DataArguments, source: Source) -> Prepared:
    read, names, left_out = tables.read_interactions(con, source, args)
    _check_split_columns(args, source, read, names)
    order = tables.sequence_order(args.split)
    unique = tables.drop_duplicates(con, read, names)
    num_read, num_unique = count(read), count(unique)
    kept = drop_repetitions(con, unique, args.dedupe, order)
    repeated = {f"dedupe: {args.dedupe}": num_unique - count(kept)} if args.dedupe else {}
    minimum = args.min_user_interactions, args.min_item_interactions
    core = tables.k_core(con, kept, *minimum)
    items, sources, of_items = _read_items(con, args, core, source, num_read)
    if args.without_metadata == "drop":
        core = tables.k_core(con, core.semi_join(items, "item_id"), *minimum)
    if args.min_item_interactions:
        items = items.semi_join(core, "item_id")
    users, items = tables.number_users(core), tables.number_items(items)
    numbered = core.join(users, "user_id").join(items.select("item", "item_id"), "item_id")
    sequences = _split(args, splits.number_positions(numbered, order))
    sizes = num_read + sum(left_out.values()), num_read - num_unique, {**left_out, **repeated, **of_items}
    return _computed(args, items, users, sequences, sizes, sources)


def _from_ready_rows(con: ibis.BaseBackend, args: DataArguments, source: Source) -> Prepared:
    rows = ready_rows.read_ready_rows(con, source, args.columns)
    unreadable = source.num_unreadable()
    items, sources, of_items = _read_items(con, args, ready_rows.explode(rows), source, count(rows))
    if args.without_metadata == "drop" and "item without metadata" in of_items:
        raise ValueError("without_metadata is drop but rebuild is true, and rows must stay whole; set it to keep")
    users, items = tables.number_users(rows), tables.number_items(items)
    held_out = splits.hold_out_latest(rows, args.valid_fraction)
    sequences = ready_rows.sequences_of(con, source, held_out, items, users)
    sizes = count(rows) + sum(unreadable.values()), 0, unreadable | of_items
    return _computed(args, items, users, sequences, sizes, sources)


def _computed(
    args: DataArguments,
    items: Table,
    users: Table,
    sequences: Table,
    sizes: tuple[int, int, dict[str, int]],
    sources: list[str],
) -> Prepared:
    """The expressions of the tables as tables, with the re-ranker's training targets marked.

    `sizes` are the interactions read, those removed as duplicates, and the rows left out by reason.
    """
    marked = splits.mark_rerank(sequences, args.num_rerank, args.min_history)
    interactions = marked.order_by(["user", "position"]).to_pyarrow()
    targets = splits.targets(interactions, args.min_history)
    by_number = (items.order_by("item").to_pyarrow(), users.order_by("user").to_pyarrow())
    num_read, num_duplicates, left_out = sizes
    return Prepared(*by_number, interactions, targets, num_read, num_duplicates, left_out, sources)


def _check_split_columns(args: DataArguments, source: Source, read: Table, names: Names) -> None:
    """Refuse a split by a column that the interactions lack."""
    needed = {"given": "split", "by_time": "time"}.get(args.split)
    if needed and needed not in names:
        problem = f"split is {args.split} but {source.name} has no column {needed!r}"
        raise ValueError(f"{problem}; map it in columns: {{{needed}: COLUMN}}")
    if needed == "time" and (row := first_row(read.filter(_.time.isnull()), source)):
        raise ValueError(f"{row['place']}: the time is empty but split is by_time; fill it or remove the row")


def _split(args: DataArguments, sequences: Table) -> Table:
    if args.split == "per_user":
        return splits.split_per_user(sequences, args.num_test, args.num_valid)
    if args.split == "by_time":
        return splits.split_by_time(sequences, args.valid_fraction, args.test_fraction)
    if args.split == "random":
        return splits.split_at_random(sequences, args.valid_fraction, args.test_fraction, args.seed)
    return splits.hold_out_latest(sequences, args.valid_fraction)


def _refuse_empty_splits(args: DataArguments, prepared: Prepared) -> None:
    rows = prepared.count(is_row=True)
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
