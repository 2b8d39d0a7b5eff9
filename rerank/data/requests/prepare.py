"""From a log of requests to the tables of the stage: read, check, number, split, join histories."""

from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.data import DataArguments
from rerank.data.requests import checks, read, rows, summary
from rerank.data.requests.histories import Events, Histories, in_order, positives, without_held_out
from rerank.data.requests.interactions import join_interactions, read_interactions
from rerank.data.requests.log import Numbered, RawArrays, RequestLog, number_log, strings
from rerank.data.requests.splits import LEVELS, split_requests
from rerank.data.summary import SequenceFacts, Sizes, shared_summary


@dataclass(frozen=True)
class PreparedRequests:
    """The tables of the stage for a log of requests.

    Attributes:
        items, users: As they are written.
        log: The requests.
        levels: The split of each.
        events: What users took, in order, each item once a list: when its first feedback came.
        joined: Histories joined from the events, None where the log has its own.
        counts: Of interactions read, removed and left out.
        left_out: Reason to the number of rows of interactions and items that are not in the tables.
        num_with_metadata: Items of the items file; those after them are of requests and histories alone.
        sources: Paths of the files.
    """

    items: pa.Table
    users: pa.Table
    log: RequestLog
    levels: np.ndarray
    events: Events
    joined: Histories | None
    counts: dict[str, int]
    left_out: dict[str, int]
    num_with_metadata: int
    sources: list[str]

    def write(self, out_dir: Path) -> None:
        """Write the four tables as Parquet files."""
        pq.write_table(self.items, out_dir / "items.parquet")
        pq.write_table(self.users, out_dir / "users.parquet")
        pq.write_table(self.interactions(), out_dir / "interactions.parquet")
        rows.write_rows(out_dir / "rows.parquet", self.log, self.levels, self.joined)

    def num_bytes(self) -> None:
        """Unknown: rows of requests hold what the log holds."""

    def interactions(self) -> pa.Table:
        """user, item, position, time and split of what users took."""
        taken = self.events
        is_plain = (taken.requests < 0) & (taken.levels == 0)  # of the table of interactions, for training
        splits = np.array(["train", *LEVELS], dtype=object)[np.where(is_plain, 0, taken.levels + 1)]
        columns = {
            "user": taken.users,
            "item": taken.items,
            "position": np.arange(len(taken)) - np.searchsorted(taken.users, taken.users),
            "time": pa.array(taken.times, pa.float64(), from_pandas=True),
            "split": pa.array(splits, pa.string()),
        }
        return pa.table(columns)

    def summary(self, args: DataArguments) -> dict[str, object]:
        """Counts of what was read, kept and split; terms and fingerprints of the sources."""
        rows_of = dict(zip(LEVELS, np.bincount(self.levels, minlength=len(LEVELS)).tolist(), strict=True))
        sizes = Sizes(self.counts["interactions_read"], self.counts["duplicates_removed"], rows_of)
        without_text = int(np.sum(self.items["text"].to_numpy(zero_copy_only=False) == ""))
        counts, facts = (len(self.users), len(self.items), without_text), SequenceFacts.of_arrays(self.interactions())
        shared = shared_summary(args, *counts, facts, sizes, self.sources)
        without = len(self.items) - self.num_with_metadata
        further = {**summary.of_requests(self.log, self.joined), "items_without_metadata": without}
        names = ("interactions_left_out", "items_left_out_of_histories")
        left_out = {**{name: self.counts[name] for name in names}, "left_out": self.left_out}
        return {**shared, "midtrain_has_seen_rerank_targets": True, **left_out, **further}

    def notes(self, metrics: dict[str, object]) -> list[str]:
        """Lines for the log on what is unusual in the requests."""
        return summary.notes(metrics)


def prepare_requests(con: ibis.BaseBackend, args: DataArguments) -> PreparedRequests:
    """Tables and split of a recipe with `requests`; refuses what `check` does."""
    raw, candidate_fields = read.read_log(con, args), args.candidate_fields or []
    checks.check_log(raw, candidate_fields)
    checks.check_options(raw, args)
    arrays, (known, items_path, left_out) = RawArrays.of(raw), read.read_items(con, args)
    found = read_interactions(con, args, arrays.has_times) if args.interactions else None
    items = Numbered.of(strings(known["item_id"]), *arrays.item_ids(), *([] if found is None else [found.item_ids]))
    log = number_log(arrays, items, candidate_fields, args.request_fields or [])
    levels = split_requests(log, args)
    _refuse_empty_splits(args, log, levels, raw.source.name)
    taken, user_ids = positives(log, levels, args.split == "by_time"), log.user_ids
    firsts = taken.take(log.feedback.is_first)
    counts, num_hidden = {"interactions_read": 0, "duplicates_removed": 0, "interactions_left_out": 0}, 0
    if args.split == "given" and log.histories is not None:
        log, num_hidden = without_held_out(log, levels)
    left_out = {f"items: {reason}": number for reason, number in left_out.items()} | (found.left_out if found else {})
    if found is not None:
        before, user_ids, counts = join_interactions(found, args.split, log, levels, items)
        taken, firsts = before.then(taken), before.then(firsts)
    joined = None if log.histories is not None else Histories(log, in_order(log, taken), levels, args.history_gap)
    counts["items_left_out_of_histories"] = num_hidden
    users = pa.table({"user": np.arange(len(user_ids)), "user_id": user_ids})
    paths = [raw.source.name, *([found.source.name] if found else []), *([items_path] if items_path else [])]
    tables = (_all_items(known, items), users)
    sources = [*dict.fromkeys(paths)]
    events = in_order(log, firsts)
    return PreparedRequests(*tables, log, levels, events, joined, counts, left_out, len(known), sources)


def _all_items(known: pa.Table, items: Numbered) -> pa.Table:
    """The items of the file, then those without metadata: empty text, and no place in the file."""
    size = len(items.ids) - len(known)
    further = {name: pa.array([""] * size, pa.string()) for name in known.column_names}
    further["item"] = pa.array(np.arange(len(known), len(items.ids)))
    further["item_id"] = items.ids.slice(len(known))
    further["source_row"] = pa.nulls(size, pa.int64())
    fields = {name: further[name].cast(known.schema.field(name).type) for name in known.column_names}
    return pa.concat_tables([known, pa.table(fields)]).combine_chunks()


def _refuse_empty_splits(args: DataArguments, log: RequestLog, levels: np.ndarray, path: str) -> None:
    """Refuse a split without a part, and a training part in which nothing is relevant."""
    cure = {
        "by_time": "change valid_fraction and test_fraction",
        "by_user": "change valid_fraction and test_fraction, or test_users",
        "per_user": "give more requests of a user, or lower num_test or num_valid",
        "given": "mark such requests in the split column",
    }[args.split]
    for level, split in enumerate(LEVELS):
        if not (levels == level).any():
            raise ValueError(f"{path}: split: {args.split} leaves no {split} request of {len(log)}; {cure}")
    if not (log.relevance[levels[log.owners] == 0] > 0).any():
        raise ValueError(f"{path}: no training request has a candidate with a grade above 0; correct the grades")
