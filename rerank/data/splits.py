"""Splits of interactions into training and held-out parts, and the rows that follow from them.

A table here has user, item, position (0-based in the user's sequence), time, split and available: the number of items
of history before the interaction when it is a target.
"""

from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.expr.types import Table

from rerank.data.filters import count

ROWS = pa.schema(
    {
        "row_id": pa.int64(),
        "user": pa.int64(),
        "split": pa.string(),
        "position": pa.int64(),
        "history_length": pa.int64(),
        "target": pa.int64(),
    }
)


def number_positions(table: Table, order: list[str]) -> Table:
    """Positions 0, 1, ... of each user in the given order; the items before are all available as history."""
    window = ibis.window(group_by="user", order_by=order)
    table = table.mutate(position=ibis.row_number().over(window).cast("int64"))
    return table.select("user", "item", "position", "time", "split", available=_.position)


def split_per_user(table: Table, num_test: int, num_valid: int) -> Table:
    """The last `num_test` interactions of a user are test, the `num_valid` before them validation."""
    table = table.mutate(from_end=_.count().over(ibis.window(group_by="user")) - 1 - table.position)
    split = ibis.cases((_.from_end < num_test, "test"), (_.from_end < num_test + num_valid, "valid"), else_="train")
    return table.mutate(split=split).drop("from_end")


def split_by_time(table: Table, valid_fraction: float, test_fraction: float) -> Table:
    """The latest share of all interactions is test, the share before it validation; one moment is never divided."""
    test_from = _time_at(table, 1 - test_fraction)
    valid_from = _time_at(table, 1 - test_fraction - valid_fraction)
    split = ibis.cases((_.time >= test_from, "test"), (_.time >= valid_from, "valid"), else_="train")
    return table.mutate(split=split)


def split_at_random(table: Table, valid_fraction: float, test_fraction: float, seed: int) -> Table:
    """Shares of each user's items drawn at random, at least one each; positions put what is held out last.

    All interactions of a user with an item are drawn together, so that none tells of another.

    The draw orders a user's interactions by a digest of seed, user and item, so it is the same everywhere.

    Source: the protocol of CLLM4Rec (arXiv:2311.01343), as told in arXiv:2402.09617 sec. 4.1.
    """
    words = table.user.cast("string"), " ", table.item.cast("string")
    table = table.mutate(digest=ibis.literal(f"{seed} ").concat(*words).hexdigest("md5"))
    place = ibis.dense_rank().over(ibis.window(group_by="user", order_by="digest"))  # one of a repeated item
    size = _.item.nunique().over(ibis.window(group_by="user"))
    num_test, num_valid = (_at_least_one(size * share) for share in (test_fraction, valid_fraction))
    table = table.mutate(place=place, num_test=num_test, num_held_out=num_test + num_valid)
    table = table.mutate(part=ibis.cases((_.place < _.num_test, 2), (_.place < _.num_held_out, 1), else_=0))
    table = table.mutate(split=_.part.cases((2, "test"), (1, "valid"), else_="train"))
    return number_positions(table, ["part", "position"])


def _at_least_one(number: ibis.Value) -> ibis.Value:
    return ibis.greatest(number.round().cast("int64"), 1)


def hold_out_latest(table: Table, valid_fraction: float) -> Table:
    """Where a given split has no validation part, the latest share of its training part becomes one."""
    present = set(table.select("split").distinct().to_pyarrow()["split"].to_pylist())
    if "valid" in present or "train" not in present:
        return table
    train = table.filter(_.split == "train")
    if train.time.isnull().any().to_pyarrow().as_py():
        raise ValueError(
            "split is given and has no valid part, and without a time no training rows are the latest; "
            "map columns: {time: COLUMN} or mark rows as valid"
        )
    valid_from = _time_at(train, 1 - valid_fraction)
    return table.mutate(split=ibis.ifelse((_.split == "train") & (_.time >= valid_from), "valid", _.split))


def _time_at(table: Table, share: float) -> float:
    """The time of the interaction before which the given share of all lies."""
    size = count(table)
    place = min(size - 1, round(size * share))
    return table.order_by("time").select("time").limit(1, offset=place).to_pyarrow()["time"][0].as_py()


def mark_rerank(table: Table, num_rerank: int | str, min_history: int) -> Table:
    """The last `num_rerank` training targets of each user train the re-ranker; `all` takes every one.

    The number counts training interactions; those with too little history stay in mid-training.
    """
    is_target = (_.split == "train") & (_.available >= min_history)
    if num_rerank != "all":
        window = ibis.window(group_by=["user", "split"], order_by=ibis.desc("position"))
        table = table.mutate(from_end=ibis.row_number().over(window))
        is_target = is_target & (_.from_end < num_rerank)
    table = table.mutate(split=ibis.ifelse(is_target, "rerank", _.split))
    return table.select("user", "item", "position", "time", "split", "available")


def targets(interactions: pa.Table, min_history: int) -> np.ndarray:
    """Indices of the interactions that are a row's target."""
    is_target = interactions["split"].to_numpy(zero_copy_only=False) != "train"
    return np.flatnonzero(is_target & (interactions["available"].to_numpy() >= min_history))


def write_rows(path: str | Path, interactions: pa.Table, chosen: np.ndarray) -> None:
    """rows.parquet: the chosen interactions as targets, each with its place in its user's sequence."""
    table = interactions.select(["user", "split", "position"]).take(pa.array(chosen))
    table = table.add_column(0, "row_id", pa.array(np.arange(len(chosen))))
    table = table.append_column("history_length", interactions["available"].take(pa.array(chosen)))
    pq.write_table(table.append_column("target", interactions["item"].take(pa.array(chosen))).cast(ROWS), path)
