"""Splits of interactions into training and held-out parts, and the rows that follow from them.

A table here has user, item, position (0-based in the user's sequence), time, split and available: the number of items
of history before the interaction when it is a target.
"""

import ibis
from ibis import _
from ibis.expr.types import Table

from rerank.data.filters import count

ROWS = ("row_id", "user", "split", "position", "history_length", "target")  # columns of rows.parquet
SPLITS = ("train", "rerank", "valid", "test")


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
    table = table.mutate(place=place)
    table = table.mutate(size=_.place.max().over(ibis.window(group_by="user")) + 1)  # items of the user
    num_test, num_valid = (_at_least_one(table.size * share) for share in (test_fraction, valid_fraction))
    table = table.mutate(num_test=num_test, num_held_out=num_test + num_valid)
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


def held_out_last(table: Table) -> Table:
    """Positions that put what is held out after all training interactions of its user, else in the same order."""
    table = table.mutate(part=_.split.cases(("test", 2), ("valid", 1), else_=0))
    return number_positions(table, ["part", "position"])


def _time_at(table: Table, share: float) -> float:
    """The time of the interaction before which the given share of all lies."""
    size = count(table)
    place = min(size - 1, round(size * share))
    times = table.group_by("time").agg(size=_.count().cast("float64"))
    until = times.mutate(until=_.size.sum().over(ibis.window(order_by="time", following=0)))
    return until.filter(_.until > place).time.min().to_pyarrow().as_py()


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


def targets(interactions: Table, min_history: int) -> Table:
    """The interactions that are a row's target."""
    return interactions.filter((_.split != "train") & (_.available >= min_history))


def numbered_rows(rows: Table) -> Table:
    """rows.parquet: the targets with their places in their users' sequences, numbered by user and position."""
    sizes = rows.group_by("user").agg(size=_.count())
    # as floats, exact below 2^53: DuckDB's sum of integers has 128 bits, which Parquet lacks
    ends = _.size.cast("float64").sum().over(ibis.window(order_by="user", following=0))
    starts = sizes.mutate(start=ends.cast("int64") - _.size)
    place = ibis.row_number().over(ibis.window(group_by="user", order_by="position"))
    table = rows.join(starts.select("user", "start"), "user").mutate(place=place)
    return table.mutate(row_id=table.start + table.place, history_length=_.available, target=_.item).select(*ROWS)


def sizes(table: Table) -> dict[str, int]:
    """The number of interactions of each split, those there are."""
    found = table.group_by("split").agg(size=_.count()).to_pyarrow().to_pylist()
    of_split = {row["split"]: row["size"] for row in found}
    return {split: of_split[split] for split in SPLITS if split in of_split}
