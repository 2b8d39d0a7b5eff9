"""Counts that every run of the stage writes, of interactions and of requests alike."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rerank.data import DataArguments
from rerank.launch.files import fingerprint


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
        "sources": {Path(p).name: fingerprint(p) if Path(p).exists() else None for p in sources},
    }


def by_split(splits: pa.ChunkedArray) -> dict[str, int]:
    """The number of each split."""
    return {entry["values"]: entry["counts"] for entry in splits.value_counts().to_pylist()}
