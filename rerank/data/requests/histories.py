"""The interactions of each user, and which of them a request may have as its history.

R requests, E events: a user takes an item, through a request or in a table of interactions.
"""

from dataclasses import dataclass, replace

import numpy as np

from rerank.data.requests.log import Lists, RequestLog


@dataclass(frozen=True)
class Events:
    """Items that users took.

    Attributes:
        users, items: (E,), numbers.
        times: (E,), seconds, NaN where unknown.
        requests: (E,), the number of the request, -1 for one of the table of interactions.
        levels: (E,), number of the split: 0 for training.
        kinds: (E,), event type or None.
        replaced_at: (E,), the time from which a higher grade of the same candidate is an event in its place; inf.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    requests: np.ndarray
    levels: np.ndarray
    kinds: np.ndarray
    replaced_at: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def columns(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order of the attributes."""
        return self.users, self.items, self.times, self.requests, self.levels, self.kinds, self.replaced_at

    def take(self, chosen: np.ndarray) -> "Events":
        """The events at these places, or where a mask holds."""
        return Events(*(column[chosen] for column in self.columns()))

    def then(self, further: "Events") -> "Events":
        """These events, then the further ones."""
        pairs = zip(self.columns(), further.columns(), strict=True)
        return Events(*(np.concatenate(pair) for pair in pairs))


def positives(log: RequestLog, levels: np.ndarray, is_by_time: bool) -> Events:
    """The feedback that raised a grade as events, in the order of the log.

    An event is of its request's split or, where these are of time, of the later one that begins before it.
    """
    told = log.feedback
    owners, items = log.owners[told.candidates], log.items[told.candidates]
    of_events = levels[owners]
    if is_by_time:
        begins = [log.times[levels >= level].min() for level in (1, 2)]
        of_events = np.maximum(of_events, np.searchsorted(begins, told.times, side="right"))
    kinds = told.kinds.to_numpy(zero_copy_only=False)
    return Events(log.users[owners], items, told.times, owners, of_events, kinds, told.replaced_at)


def in_order(log: RequestLog, taken: Events) -> Events:
    """Events by user, then time, then input (the table of interactions first), then the list shown."""
    filled = np.where(taken.requests < 0, -np.inf, log.ordering_times[np.maximum(taken.requests, 0)])
    times = np.where(np.isnan(taken.times), filled, taken.times)
    return taken.take(np.lexsort((np.arange(len(taken)), taken.requests, times, taken.users)))


class Histories:
    """The history of every request, joined from events: those before its time, a gap of seconds kept free.

    An event of a later split than the request's is never part of it. Where a request or an event has no time, earlier
    in the input counts as before; a table of interactions is before every request of a log without times.
    """

    def __init__(self, log: RequestLog, events: Events, levels: np.ndarray, gap: float) -> None:
        """From events in order, the split of each request, and the seconds before it whose events are left out."""
        self.log, self.events, self.levels, self.gap = log, events, levels, gap
        self.starts = np.searchsorted(events.users, np.arange(log.users.max() + 2))
        self.has_times = not np.isnan(log.times).all()

    def places(self, request: int) -> np.ndarray:
        """The events of a request's history, oldest first."""
        user, time = self.log.users[request], self.log.times[request]
        start, end = self.starts[user : user + 2]
        times, requests = self.events.times[start:end], self.events.requests[start:end]
        replaced_at = self.events.replaced_at[start:end]
        is_earlier = requests < request  # in the input; -1 is before all
        if np.isnan(time):
            is_earlier &= ((requests >= 0) | (not self.has_times)) & np.isinf(replaced_at)
        else:
            is_earlier = np.where(np.isnan(times), is_earlier, times < time - self.gap)
            is_earlier &= ~(replaced_at < time - self.gap)
        may_be_seen = self.events.levels[start:end] <= self.levels[request]
        return start + np.flatnonzero(is_earlier & (requests != request) & may_be_seen)


def without_held_out(log: RequestLog, levels: np.ndarray) -> tuple[RequestLog, int]:
    """A log with histories of its own, without what these tell of requests of a later split; the items left out.

    Such are items that its user is known to have taken, at that moment, through a request of a later split. Where one
    of the two has no time, what stands earlier in the input is known.
    """
    assert log.histories is not None
    taken = positives(log, levels, is_by_time=False).take(log.feedback.is_first)
    taken = in_order(log, taken.take(taken.levels > 0))
    starts = np.searchsorted(taken.users, np.arange(log.users.max() + 2))
    kept = []
    for request, user in enumerate(log.users.tolist()):
        of_user = taken.take(np.arange(starts[user], starts[user + 1]))
        is_earlier = np.where(
            np.isnan(of_user.times + log.times[request]),
            of_user.requests < request,
            of_user.times <= log.times[request],
        )
        hidden = of_user.items[is_earlier & (of_user.levels > levels[request])]
        kept.append(~np.isin(log.histories[request], hidden))
    ends = np.cumsum([mask.sum() for mask in kept])
    is_kept = np.concatenate(kept)
    histories = Lists(np.concatenate(([0], ends)), log.histories.values[is_kept])
    return replace(log, histories=histories), int((~is_kept).sum())
