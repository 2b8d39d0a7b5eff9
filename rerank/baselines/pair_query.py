"""Which item follows which, as queries over interactions that stay the same on every engine that Ibis speaks to.

Pairs are made by `lead` and `lag` over a user's interactions in order, so that their number is twenty an interaction
however many of them a user has; a join on the user would make the square of that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ibis
import numpy as np
from ibis.expr.types import Table

from rerank.baselines.pairs import NEAR

COLUMNS = ("user", "item", "position")  # of interactions, and `time` where it is known


def part_of(events: Table, until: float | None = None, without_users: np.ndarray | None = None) -> Table:
    """Interactions before a moment, or without those of some users; one of an unknown time is before no moment."""
    if until is not None:
        if "time" not in events.columns or math.isnan(until):  # DuckDB has nan above every number
            return events.limit(0)
        events = events.filter(events.time.cast("float64") < until)
    if without_users is not None:
        left_out = ibis.memtable({"user": np.unique(without_users)}, schema={"user": events.user.type()})
        events = events.anti_join(left_out, "user")
    return events


def surroundings(events: Table) -> Table:
    """The item of each interaction, and those that its user took just after and before it: next_1, previous_1 ...

    -1 stands for none.
    """
    order = ibis.window(group_by="user", order_by="position")
    after = {f"next_{step}": events.item.lead(step, -1).over(order) for step in range(1, NEAR + 1)}
    before = {f"previous_{step}": events.item.lag(step, -1).over(order) for step in range(1, NEAR + 1)}
    return events.select(item=events.item, **after, **before)


def weighted_pairs(around: Table, forward: Sequence[int], backward: Sequence[int]) -> Table:
    """(first, second, weight) of every two interactions of one user, as `pairs.weighted_pairs` has them.

    Args:
        around: Interactions with their `surroundings`.
        forward: Weights from the earlier to the later one, at distance 1, 2, ..., at most NEAR.
        backward: Weights from the later to the earlier one.
    """
    steps = [(f"next_{step}", weight) for step, weight in enumerate(forward, start=1)]
    steps += [(f"previous_{step}", weight) for step, weight in enumerate(backward, start=1)]
    pairs = [
        around.filter(around[name] >= 0).select(
            first=around.item, second=around[name], weight=ibis.literal(weight, "int64")
        )
        for name, weight in steps
    ]
    return ibis.union(*pairs) if len(pairs) > 1 else pairs[0]


def summed(pairs: Table) -> Table:
    """Equal pairs once, with the sum of their weights."""
    return pairs.group_by("first", "second").aggregate(weight=pairs.weight.sum().cast("int64"))


def largest(pairs: Table, neighbours: int) -> Table:
    """The pairs of the largest weights of each first item, `neighbours` of them, ties by the second item."""
    order = ibis.window(group_by="first", order_by=[ibis.desc("weight"), "second"])
    return pairs.mutate(place=ibis.row_number().over(order)).filter(lambda ranked: ranked.place < neighbours)


def around_moment(events: Table, since: float) -> tuple[Table, Table]:
    """Of users who have interactions from a moment on: these with the last NEAR before, and these NEAR alone.

    The pairs of the former less those of the latter are the pairs with an interaction from the moment on, in sequences
    that are in the order of time.
    """
    is_later = events.time.cast("float64") >= since
    of_user = ibis.window(group_by="user")
    from_end = ibis.window(group_by="user", order_by=ibis.desc("position"))
    marked = events.mutate(
        is_later=is_later, later=is_later.cast("int64").sum().over(of_user), from_end=ibis.row_number().over(from_end)
    )
    near = marked.filter((marked.later > 0) & (marked.from_end < marked.later + NEAR))
    return near, near.filter(~near.is_later)


def disorder(events: Table) -> Table:
    """Interactions whose time is before that of one which their user's order puts earlier."""
    known = events.filter(events.time.notnull())
    order = ibis.window(group_by="user", order_by="position")
    with_before = known.mutate(before=known.time.lag().over(order))
    return with_before.filter(with_before.time < with_before.before)
