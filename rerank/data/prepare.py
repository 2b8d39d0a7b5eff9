"""From sources to the tables of the stage: read, check, clean, number, split, write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ibis import _
from ibis.expr.types import Table

from rerank.data import DataArguments, numbering, ready_rows, splits, tables
from rerank.data.filters import count, drop_repetitions, first_row
from rerank.data.requests.prepare import PreparedRequests, prepare_requests
from rerank.data.requests.read import item_source
from rerank.data.sources.columns import Names
from rerank.data.sources.files import find_files
from rerank.data.sources.opening import open_source
from rerank.data.sources.source import Source
from rerank.data.summary import SequenceFacts, Sizes, notes, share_in_history, shared_summary
from rerank.launch.database import database
from rerank.launch.engines import DuckDB, check_backend, engine
from rerank.rows.sequences import write_sequences

ROW_SPLITS = ("rerank", "valid", "test")
BYTES_A_LINE = 60  # of an interaction in interactions.parquet and sequences.npy, and of a row, at most


@dataclass(frozen=True)
class Prepared:
    """The tables of the stage, stored in an engine.

    Attributes:
        engine: That computed them.
        items, users, interactions: As they are written, but for their order; `interactions` have `available` besides.
        rows: The interactions that are a row's target.
        num_read, num_duplicates: Interactions read, and those removed since they stand there before.
        left_out: Reason to the number of other rows that are not in the tables.
        sources: Names of the files.
    """

    engine: DuckDB
    items: Table
    users: Table
    interactions: Table
    rows: Table
    num_read: int
    num_duplicates: int
    left_out: dict[str, int]
    sources: list[str]

    def write(self, out_dir: Path) -> None:
        """Write the four tables as Parquet files, and the users' sequences."""
        write = self.engine.write
        write(self.items.order_by("item"), out_dir / "items.parquet")
        write(self.users.order_by("user"), out_dir / "users.parquet")
        interactions = self.interactions.drop("available").order_by(["user", "position"])
        write(interactions, out_dir / "interactions.parquet")
        write(splits.numbered_rows(self.rows).order_by("row_id"), out_dir / "rows.parquet")
        write_sequences(out_dir, out_dir / "interactions.parquet", count(self.users))

    def num_bytes(self) -> int:
        """Bytes that the files take at most."""
        return BYTES_A_LINE * (count(self.interactions) + count(self.rows))

    def summary(self, args: DataArguments) -> dict[str, object]:
        """Counts of what was read, kept and split; terms and fingerprints of the sources."""
        rows = splits.sizes(self.rows)
        sizes = Sizes(self.num_read, self.num_duplicates, {split: rows[split] for split in ROW_SPLITS})
        without_text = count(self.items.filter(self.items.text == ""))
        facts = SequenceFacts.of_table(self.interactions)
        counts = count(self.users), count(self.items), without_text
        shared = shared_summary(args, *counts, facts, sizes, self.sources)
        share = share_in_history(self.interactions, self.rows)
        return {**shared, "left_out": self.left_out, "share_of_targets_in_history": share}

    def notes(self, metrics: dict[str, object]) -> list[str]:
        """Lines for the log on what is unusual in the tables."""
        return notes(metrics)


@contextmanager
def prepared(args: DataArguments) -> Iterator[Prepared | PreparedRequests]:
    """Tables and split of a recipe, computed by its backend, which is there within it; refuses what `check` does."""
    with engine(args.backend) as made:
        if args.requests:
            yield prepare_requests(made.reader, args)
            return
        assert args.interactions
        source = open_source(made.reader, args.asked("interactions"))
        is_rows = ready_rows.is_to_be_rebuilt(source, args.columns, args.split, args.rebuild)
        found = (_from_ready_rows if is_rows else _from_interactions)(made, args, source)
        _refuse_empty_splits(args, found)
        yield found


def check_names(args: DataArguments) -> None:
    """Refuse a backend, a file or a column that is not there; no row is read."""
    check_backend(args.backend)
    if args.requests:
        find_files(args.asked("requests"))
        return
    with database() as con:
        source = open_source(con, args.asked("interactions"))
        if not ready_rows.is_to_be_rebuilt(source, args.columns, args.split, args.rebuild):
            tables.interaction_columns(source, args)
        if args.items:
            tables.item_columns(item_source(con, args), args)


def _read_items(
    engine: DuckDB, args: DataArguments, used: Table, source: Source, num_read: int
) -> tuple[Table, list[str], dict[str, int]]:
    """The items, the names of all sources, and rows left out by reason; without a catalogue the used items.

    Args:
        engine: That computes the tables.
        args: Of the stage.
        used: Interactions whose items need metadata.
        source: Of these.
        num_read: Of them, for the message of a refusal.
    """
    if not args.items:
        return numbering.items_of(used), [source.name], {}
    catalogue = item_source(engine.reader, args)
    items, left_out = tables.read_items(engine.reader, catalogue, args)
    items = engine.taken(items)
    without = used.anti_join(items, "item_id")
    sources, left_out = [source.name, catalogue.name], {f"items: {reason}": n for reason, n in left_out.items()}
    if args.without_metadata == "keep":
        return numbering.with_further_items(items, without), sources, left_out
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


def _from_interactions(engine: DuckDB, args: DataArguments, source: Source) -> Prepared:
    read, names, left_out = tables.read_interactions(engine.reader, source, args)
    read = engine.taken(read.select(*tables.READ_COLUMNS))
    _check_split_columns(args, source, read, names)
    order = tables.sequence_order(args.split)
    unique = tables.drop_duplicates(engine, read, names)
    num_read, num_unique = count(read), count(unique)
    kept = drop_repetitions(engine, unique, args.dedupe, order)
    repeated = {f"dedupe: {args.dedupe}": num_unique - count(kept)} if args.dedupe else {}
    minimum = args.min_user_interactions, args.min_item_interactions
    core = tables.k_core(engine, kept, *minimum)
    engine.keep_only(core)
    items, sources, of_items = _read_items(engine, args, core, source, num_read)
    if args.without_metadata == "drop":
        core = tables.k_core(engine, core.semi_join(items, "item_id"), *minimum)
    if args.min_item_interactions:
        items = items.semi_join(core, "item_id")
    users, items = engine.stored(numbering.number_users(core)), engine.stored(numbering.number_items(items))
    numbered = core.join(users, "user_id").join(items.select("item", "item_id"), "item_id")
    sequences = _split(args, splits.number_positions(numbered, order))
    sizes = num_read + sum(left_out.values()), num_read - num_unique, {**left_out, **repeated, **of_items}
    return _computed(engine, args, items, users, sequences, sizes, sources)


def _from_ready_rows(engine: DuckDB, args: DataArguments, source: Source) -> Prepared:
    rows = ready_rows.read_ready_rows(engine.reader, source, args.columns)
    unreadable = source.num_unreadable()
    items, sources, of_items = _read_items(engine, args, ready_rows.explode(rows), source, count(rows))
    if args.without_metadata == "drop" and "item without metadata" in of_items:
        raise ValueError("without_metadata is drop but rebuild is true, and rows must stay whole; set it to keep")
    users, items = engine.stored(numbering.number_users(rows)), engine.stored(numbering.number_items(items))
    held_out = splits.hold_out_latest(rows, args.valid_fraction)
    sequences = ready_rows.sequences_of(engine.reader, source, held_out, items, users)
    sizes = count(rows) + sum(unreadable.values()), 0, unreadable | of_items
    return _computed(engine, args, items, users, sequences, sizes, sources)


def _computed(
    engine: DuckDB,
    args: DataArguments,
    items: Table,
    users: Table,
    sequences: Table,
    sizes: tuple[int, int, dict[str, int]],
    sources: list[str],
) -> Prepared:
    """The tables with the re-ranker's training targets marked, the interactions stored and nothing else.

    `sizes` are the interactions read, those removed as duplicates, and the rows left out by reason.
    """
    interactions = engine.stored(splits.mark_rerank(sequences, args.num_rerank, args.min_history))
    engine.keep_only(items, users, interactions)
    num_read, num_duplicates, left_out = sizes
    targets = splits.targets(interactions, args.min_history)
    return Prepared(engine, items, users, interactions, targets, num_read, num_duplicates, left_out, sources)


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
    return splits.held_out_last(splits.hold_out_latest(sequences, args.valid_fraction))


def _refuse_empty_splits(args: DataArguments, found: Prepared) -> None:
    rows = splits.sizes(found.rows)
    cure = {
        "per_user": "give longer sequences, or lower min_history, num_test, num_valid or num_rerank",
        "by_time": "give longer sequences, lower min_history, or change valid_fraction and test_fraction",
        "random": "give longer sequences, or lower min_history or num_rerank",
        "given": f"mark such rows in the split column of {found.sources[0]}, or lower min_history",
    }[args.split]
    for split in ROW_SPLITS:
        if not rows.get(split):
            raise ValueError(
                f"split: {args.split} leaves no user with a {split} row (min_history {args.min_history}, "
                f"{count(found.users)} users); {cure}"
            )
