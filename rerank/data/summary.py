"""Counts that every run of the stage writes, of interactions and of requests alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.expr.types import Table

from rerank.data import DataArguments, splits
from rerank.data.filters import count
from rerank.launch.files import files_of, fingerprint


@dataclass(frozen=True)
class Sizes:
    """Interactions that were read, those removed as duplicates, and the rows of each split."""

    num_read: int
    num_duplicates: int
    rows: dict[str, int]


@dataclass(frozen=True)
class SequenceFacts:
    """Counts of the users' sequences.

    Attributes:
        of_split: Interactions of each split.
        least, mean, most: Interactions of a user.
        share_of_ties: Share of the interactions with one of their user before them that has the same time.
    """

    of_split: dict[str, int]
    least: int
    mean: float
    most: int
    share_of_ties: float

    @classmethod
    def of_table(cls, interactions: Table) -> "SequenceFacts":
        """Those of a table of an engine."""
        before = _.time.lag().over(ibis.window(group_by="user", order_by="position"))
        is_tie = (interactions.time == before).fill_null(False).cast("int64")
        ties = interactions.select(is_tie=is_tie).is_tie.sum()
        users = interactions.group_by("user").agg(size=_.count())
        lengths = users.agg(users=_.count(), least=_.size.min(), most=_.size.max(), total=_.size.sum())
        (found,) = lengths.to_pyarrow().to_pylist()
        num_followers = found["total"] - found["users"]
        share = ties.to_pyarrow().as_py() / max(1, num_followers)
        mean = found["total"] / found["users"]
        return cls(splits.sizes(interactions), found["least"], mean, found["most"], share)

    @classmethod
    def of_arrays(cls, interactions: pa.Table) -> "SequenceFacts":
        """Those of a table in memory, sorted by user and position."""
        owners, times = interactions["user"].to_numpy(), interactions["time"].to_numpy()
        same_user = owners[1:] == owners[:-1]
        ties, lengths = same_user & (times[1:] == times[:-1]), np.bincount(owners)
        share = float(ties.sum() / max(1, same_user.sum()))
        of_split = {entry["values"]: entry["counts"] for entry in interactions["split"].value_counts().to_pylist()}
        return cls(of_split, int(lengths.min()), float(lengths.mean()), int(lengths.max()), share)


def shared_summary(
    args: DataArguments,
    num_users: int,
    num_items: int,
    num_without_text: int,
    facts: SequenceFacts,
    sizes: Sizes,
    sources: list[str],
) -> dict[str, object]:
    """Counts of what was read, kept and split; terms and fingerprints of the sources."""
    return {
        "users": num_users,
        "items": num_items,
        "interactions": sum(facts.of_split.values()),
        "interactions_read": sizes.num_read,
        "duplicates_removed": sizes.num_duplicates,
        "interactions_of_split": facts.of_split,
        "rows": sizes.rows,
        "sequence_length": {"least": facts.least, "mean": facts.mean, "most": facts.most},
        # Where this is high, the file's order decides what a target is, and directed counts see that order.
        "share_of_time_ties": facts.share_of_ties,
        "items_without_text": num_without_text,
        "midtrain_has_seen_rerank_targets": args.num_rerank == "all",
        "terms": args.terms,
        "sources": {Path(p).name: fingerprint(p) if files_of(Path(p)) else None for p in sources},
    }


def share_in_history(interactions: Table, rows: Table) -> float:
    """The share of targets that stand in their own history.

    Args:
        interactions: With the number of items before each that are available as history.
        rows: Those that are a row's target.
    """
    before = _.position.lag().over(ibis.window(group_by=["user", "item"], order_by="position"))
    marked = interactions.mutate(before=before).semi_join(rows, ["user", "position"])
    is_in = (marked.before >= marked.position - marked.available).fill_null(False)
    num_in, num_rows = count(marked.filter(is_in)), count(rows)
    return num_in / num_rows if num_rows else 0.0


def notes(metrics: dict[str, Any]) -> list[str]:
    """Lines for the log on what is unusual in tables of interactions."""
    lines = [f"{number} rows left out: {reason}" for reason, number in metrics["left_out"].items() if number]
    if metrics["midtrain_has_seen_rerank_targets"]:
        lines.append("num_rerank is all: mid-training has seen the targets that train the re-ranker")
    if metrics["items_without_text"]:
        lines.append(f"{metrics['items_without_text']} of {metrics['items']} items have no text")
    if share := metrics["share_of_targets_in_history"]:
        cure = "a first stage's lists leave these out unless candidates.exclude_seen is false"
        lines.append(f"{share:.1%} of targets are in their own history: {cure}")
    return lines
