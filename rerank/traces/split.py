"""Which hit training rows the sft stage gets, by whole users; the dapo stage gets the rest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.rows import RankingRow


def users_for_sft(users: Sequence[int | None], share: float, seed: int) -> set[int]:
    """Users, in a seeded order, until their rows make up `share` of all; at least one.

    Args:
        users: The user of each row.
        share: In (0, 1].
    """
    names, counts = np.unique(np.asarray(users), return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    rows_before = np.cumsum(counts[order]) - counts[order]
    return {int(name) for name in names[order][rows_before < share * len(users)]}


def write_split(path: str | Path, rows: Sequence[RankingRow], sft_users: set[int]) -> None:
    """Write row_split.parquet: for every hit training row whether it is for "sft" or "dapo"."""
    used_for = ["sft" if row.user in sft_users else "dapo" for row in rows]
    pq.write_table(pa.table({"row_id": [row.row_id for row in rows], "used_for": used_for}), path)
