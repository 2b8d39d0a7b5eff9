"""Counts that every run of the stage writes, of interactions and of requests alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rerank.data import DataArguments
from rerank.launch.files import files_of, fingerprint


@dataclass(frozen=True)
class Sizes:
    """Interactions that were read, those removed as duplicates, and the rows of each split."""

    num_read: int
    num_duplicates: int
    rows: dict[str, int]


def shared_summary(
    args: DataArguments, items: pa.Table, users: pa.Table, interactions: pa.Table, sizes: Sizes, sources: list[str]
) -> dict[str, object]:
    """Counts of what was read, kept and split; terms and fingerprints of the sources."""
    owners, times = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    same_user = owners[1:] == owners[:-1]
    ties = same_user & (times[1:] == times[:-1])
    lengths = np.bincount(owners)
    return {
        "users": len(users),
        "items": len(items),
        "interactions": len(owners),
        "interactions_read": sizes.num_read,
        "duplicates_removed": sizes.num_duplicates,
        "interactions_of_split": by_split(interactions["split"]),
        "rows": sizes.rows,
        "sequence_length": {"least": int(lengths.min()), "mean": float(lengths.mean()), "most": int(lengths.max())},
        # Where this is high, the file's order decides what a target is, and directed counts see that order.
        "share_of_time_ties": float(ties.sum() / max(1, same_user.sum())),
        "items_without_text": int(np.sum(items["text"].to_numpy(zero_copy_only=False) == "")),
        "midtrain_has_seen_rerank_targets": args.num_rerank == "all",
        "terms": args.terms,
        "sources": {Path(p).name: fingerprint(p) if files_of(Path(p)) else None for p in sources},
    }


def by_split(splits: pa.ChunkedArray) -> dict[str, int]:
    """The number of each split."""
    return {entry["values"]: entry["counts"] for entry in splits.value_counts().to_pylist()}


def share_in_history(interactions: pa.Table, targets: np.ndarray) -> float:
    """The share of targets that stand in their own history.

    Args:
        interactions: By user and position, with the number of items before each that are available as history.
        targets: Indices of the interactions that are a row's target.
    """
    pairs = interactions.select(["user", "item"]).to_pandas()
    order = np.lexsort((np.arange(len(pairs)), pairs["item"], pairs["user"]))
    same = (np.diff(pairs["user"].to_numpy()[order]) == 0) & (np.diff(pairs["item"].to_numpy()[order]) == 0)
    before = np.full(len(pairs), -1)
    before[order[1:][same]] = order[:-1][same]  # the user's last interaction with the item
    first = np.arange(len(pairs)) - interactions["available"].to_numpy()
    return float(np.mean((before >= first)[targets])) if len(targets) else 0.0


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
