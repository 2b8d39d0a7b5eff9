"""A table of interactions beside a log of requests: what users took elsewhere."""

from dataclasses import dataclass

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _

from rerank.data import DataArguments, tables
from rerank.data.filters import count, first_row
from rerank.data.requests import raw
from rerank.data.requests.histories import Events
from rerank.data.requests.log import Numbered, RequestLog, floats, strings
from rerank.data.sources.opening import open_source
from rerank.data.sources.source import Source
from rerank.launch.engines import DuckDB


@dataclass(frozen=True)
class Interactions:
    """Interactions in order of position, then input; `times` are NaN where unknown."""

    source: Source
    user_ids: pa.Array
    item_ids: pa.Array
    times: np.ndarray
    num_read: int
    left_out: dict[str, int]


def read_interactions(con: ibis.BaseBackend, args: DataArguments, needs_times: bool) -> Interactions:
    """The checked interactions, without duplicates; every one has a time where the requests have times."""
    assert args.interactions
    source = open_source(con, args.asked("interactions"))
    read, names, left_out = tables.read_interactions(con, source, args)
    if needs_times and (row := first_row(read.filter(_.time.isnull()), source)):
        problem = "the interaction has no time but the requests have; nothing tells whether it is before one"
        raise ValueError(f"{row['place']}: {problem}; map columns: {{time: COLUMN}} or remove the row")
    if needs_times:
        raw.refuse_unit(read.select("source_row", "time"), source, names["time"], "seconds")
    unique = tables.drop_duplicates(DuckDB(con), read, names).order_by(["position", "source_row"]).to_pyarrow()
    ids = (strings(unique["user_id"]), strings(unique["item_id"]))
    return Interactions(source, *ids, floats(unique["time"]), count(read), left_out)


def join_interactions(
    found: Interactions, split: str, log: RequestLog, levels: np.ndarray, items: Numbered
) -> tuple[Events, pa.Array, dict[str, int]]:
    """The interactions as events, the ids of all users, and counts.

    They are for training, except under split by_user, where they are of their user's split. Those at or after the
    first held-out request (under by_time of all, else of the user) are left out: they could tell of it. Where that
    has no time, those are left out whose item the user took through it.
    """
    numbers = pc.index_in(found.user_ids, value_set=log.user_ids)
    user_ids = pa.concat_arrays([log.user_ids, found.user_ids.filter(numbers.is_null()).unique()])
    users = pc.index_in(found.user_ids, value_set=user_ids).to_numpy().astype(np.int64)
    level_of, first_held_out = np.zeros(len(user_ids), dtype=int), np.full(len(user_ids), np.inf)
    held_out = (levels > 0) & ~np.isnan(log.times)
    if split == "by_user":
        level_of[log.users] = levels
    elif split == "by_time":
        first_held_out[:] = log.times[held_out].min()
    else:
        np.minimum.at(first_held_out, log.users[held_out], log.times[held_out])
    size, item_numbers = len(users), items.numbers(found.item_ids)
    is_left_out = found.times >= first_held_out[users]  # false without a time
    if split != "by_user":
        owners, taken = log.owners[log.feedback.candidates], log.items[log.feedback.candidates]
        is_hidden = ((levels > 0) & np.isnan(log.times))[owners]
        hidden = log.users[owners[is_hidden]] * len(items.ids) + taken[is_hidden]
        is_left_out |= np.isin(users * len(items.ids) + item_numbers, hidden)
    kinds = np.full(size, None, dtype=object)
    is_last = np.full(size, np.inf)
    events = Events(users, item_numbers, found.times, np.full(size, -1), level_of[users], kinds, is_last)
    events = events.take(~is_left_out)
    counts = {"interactions_read": found.num_read, "duplicates_removed": found.num_read - size}
    return events, user_ids, {**counts, "interactions_left_out": int(is_left_out.sum())}
