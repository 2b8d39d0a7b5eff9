"""Lists of a model of next items, for all rows or in shards.

R rows, K items of a list.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rerank.candidates.counting import PART, in_parts
from rerank.launch import shards
from rerank.launch.shards import Shard
from rerank.next_item.model import NextItemModel
from rerank.rows import TargetRows

if TYPE_CHECKING:
    from rerank.candidates import CandidatesArguments

MAX_HISTORY = 20  # items of the history in a prompt for a model's list


def model_lists(args: "CandidatesArguments", rows: TargetRows) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By part of the rows, their places, a model's most likely items (R, K) and their log-probabilities, items of the
    history left out by `exclude_seen`; read from the shards where there are some.

    Rows of like length are decoded together within a part, so that the last digits of a log-probability depend on it.
    """
    made = shards.merged(args.run_dir, "candidates", "lists")
    ask = _asker(args) if made is None else lambda part: made.take(pc.index_in(pa.array(part.row_ids), made["row_id"]))
    for places in in_parts(np.arange(len(rows)), max(1, PART // args.batch_size) * args.batch_size):
        found = ask(rows.take(places))
        yield places, np.array(found["items"].to_pylist()), np.array(found["logps"].to_pylist())


def make_shard(args: "CandidatesArguments", shard: Shard, folder: Path) -> None:
    """Make the lists of a shard of the rows."""
    rows = TargetRows.load(args.run_dir)
    chosen = rows.take(np.array(shard.of(range(len(rows))), dtype=np.int64))
    shards.make(folder, "lists", lambda: _asker(args)(chosen))


def _asker(args: "CandidatesArguments") -> Callable[[TargetRows], pa.Table]:
    """Makes the lists of rows by a model, one line a row."""
    folder = args.model_dir
    model = NextItemModel.load(Path(folder)) if folder else NextItemModel.load_midtrained(Path(args.run_dir))
    model = model.with_max_history(MAX_HISTORY)

    def ask(rows: TargetRows) -> pa.Table:
        if args.num_beams:
            sizes = args.num_candidates, args.num_beams, args.batch_size
            found = model.by_beams(rows.histories, *sizes, exclude_seen=args.exclude_seen)
        else:
            found = model.by_head(rows.histories, args.num_candidates, args.batch_size, args.exclude_seen)
        for row_id, items in zip(rows.row_ids.tolist(), found.items, strict=True):
            if len(items) < args.num_candidates:
                cure = "raise num_beams" if args.num_beams else "lower num_candidates"
                raise ValueError(
                    f"row_id {row_id}: found {len(items)} items, but a list needs {args.num_candidates}; {cure}"
                )
        return pa.table({"row_id": rows.row_ids, "items": found.items, "logps": found.logps})

    return ask
