"""Requests with numbered users and items, in memory.

R requests, C candidates of all requests, H items of all histories, E events (a user takes an item).
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rerank.data.requests.raw import RawLog


@dataclass(frozen=True)
class Lists:
    """Lists of different lengths, one after the other: list n is `values[starts[n] : starts[n + 1]]`."""

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, values: np.ndarray, num_lists: int) -> "Lists":
        """From values beside the numbers of their lists, in order."""
        return cls(np.searchsorted(owners, np.arange(num_lists + 1)), values)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Numbered:
    """Original ids to numbers: `ids` in the order of their numbers."""

    ids: pa.Array

    @classmethod
    def of(cls, known: pa.Array, *further: pa.Array) -> "Numbered":
        """The known ids, then those that are not among them, in order of first appearance."""
        together = pa.concat_arrays([known, *further])
        return cls(together.unique())

    def numbers(self, ids: pa.Array) -> np.ndarray:
        """The number of each id."""
        return pc.index_in(ids, value_set=self.ids).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True)
class Feedback:
    """Events that raised the grades of candidates, by candidate, then time: S of them.

    Attributes:
        candidates: (S,), places among all C.
        grades, times: (S,); a time is NaN where unknown.
        kinds: (S,), event types, null where unknown.
    """

    candidates: np.ndarray
    grades: np.ndarray
    times: np.ndarray
    kinds: pa.Array

    @property
    def is_first(self) -> np.ndarray:
        """(S,), whether it is its candidate's first."""
        return np.diff(self.candidates, prepend=-1) > 0

    @property
    def replaced_at(self) -> np.ndarray:
        """(S,), the time from which a higher grade stands in its place; inf for the last of a candidate."""
        return np.where(np.append(self.is_first[1:], True), np.inf, np.append(self.times[1:], np.inf))


@dataclass(frozen=True)
class RequestLog:
    """Requests in the order of the input, candidates in the order shown.

    Attributes:
        source_rows, request_ids, times, raw_splits: (R,); a time is NaN where unknown.
        users: (R,), numbers; a request without a user has one of its own.
        user_ids: (number of users,), null for a request without a user.
        fields: R JSON objects.
        starts: (R + 1,), where the candidates of each request begin.
        items, relevance, scores: (C,), NaN for not seen and for no score; a grade is the highest there ever was.
        columns: Name -> (C,) of each candidate column, NaN where unknown.
        feedback: Of all candidates with a grade above 0; at its request's time where the log tells no other.
        histories: Items of the log's own histories, oldest first, or None.
    """

    source_rows: np.ndarray
    request_ids: pa.Array
    times: np.ndarray
    raw_splits: pa.Array
    users: np.ndarray
    user_ids: pa.Array
    fields: list[str]
    starts: np.ndarray
    items: np.ndarray
    relevance: np.ndarray
    scores: np.ndarray
    columns: dict[str, np.ndarray]
    feedback: Feedback
    histories: Lists | None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def owners(self) -> np.ndarray:
        """(C,), the request of each candidate."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @property
    def places(self) -> np.ndarray:
        """(C,), 0-based places as shown."""
        return np.arange(len(self.items)) - self.starts[self.owners]

    @property
    def ordering_times(self) -> np.ndarray:
        """(R,), times for sorting: where there is none, that of the user's request before it in the input, or -inf."""
        order = np.argsort(self.users, kind="stable")
        users, times = self.users[order], self.times[order]
        is_first = np.concatenate(([True], users[1:] != users[:-1]))
        known = np.where(np.isnan(times) & ~is_first, 0, np.arange(len(times)))
        filled = times[np.maximum.accumulate(known)]
        found = np.empty(len(times))
        found[order] = np.where(np.isnan(filled), -np.inf, filled)
        return found


@dataclass(frozen=True)
class RawArrays:
    """The tables of a raw log in order, as Arrow."""

    requests: pa.Table
    candidates: pa.Table
    histories: pa.Table | None
    feedback: pa.Table | None

    @classmethod
    def of(cls, raw: RawLog) -> "RawArrays":
        """Read from the database."""
        requests = raw.requests.order_by("source_row").to_pyarrow().combine_chunks()
        candidates = raw.candidates.order_by(["request_row", "place"]).to_pyarrow().combine_chunks()
        histories = None
        if raw.histories is not None:
            histories = raw.histories.order_by(["request_row", "place"]).to_pyarrow().combine_chunks()
        feedback = None
        if raw.feedback is not None:
            feedback = raw.feedback.order_by(["request_row", "place", "grade"]).to_pyarrow().combine_chunks()
        return cls(requests, candidates, histories, feedback)

    @property
    def has_times(self) -> bool:
        """Whether any request has a time."""
        return self.requests["time"].null_count < len(self.requests)

    def item_ids(self) -> list[pa.Array]:
        """The ids of candidates, then those of histories."""
        tables = [self.candidates] if self.histories is None else [self.candidates, self.histories]
        return [strings(table["item_id"]) for table in tables]


def strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array of text."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    return column.cast(pa.string())


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, NaN for null."""
    return column.to_numpy().astype(np.float64)


def number_log(raw: RawArrays, items: Numbered, candidate_fields: list[str], request_fields: list[str]) -> RequestLog:
    """The log with numbers for users and items."""
    requests, candidates = raw.requests, raw.candidates
    source_rows = requests["source_row"].to_numpy()
    owners = np.searchsorted(source_rows, candidates["request_row"].to_numpy())
    users, user_ids = _number_users(strings(requests["user_id"]))
    times = floats(requests["time"])
    starts = np.searchsorted(owners, np.arange(len(users) + 1))
    histories = None
    if raw.histories is not None:
        of = np.searchsorted(source_rows, raw.histories["request_row"].to_numpy())
        histories = Lists.of(of, items.numbers(strings(raw.histories["item_id"])), len(users))
    relevance = floats(candidates["relevance"])
    return RequestLog(
        source_rows=source_rows,
        request_ids=strings(requests["request_id"]),
        times=times,
        raw_splits=strings(requests["raw_split"]),
        users=users,
        user_ids=user_ids,
        fields=_fields(requests, request_fields),
        starts=starts,
        items=items.numbers(strings(candidates["item_id"])),
        relevance=relevance,
        scores=floats(candidates["score"]),
        columns={name: floats(candidates[f"candidate_{name}"]) for name in candidate_fields},
        feedback=_feedback(raw.feedback, source_rows, starts, relevance, times[owners]),
        histories=histories,
    )


def _feedback(
    told: pa.Table | None, source_rows: np.ndarray, starts: np.ndarray, relevance: np.ndarray, times: np.ndarray
) -> Feedback:
    """The feedback that a log tells, else the grades above 0 at the times (C,) of the requests."""
    if told is None:
        chosen = np.flatnonzero(relevance > 0)
        return Feedback(chosen, relevance[chosen], times[chosen], pa.nulls(len(chosen), pa.string()))
    owners = np.searchsorted(source_rows, told["request_row"].to_numpy())
    candidates = starts[owners] + told["place"].to_numpy()
    return Feedback(candidates, floats(told["grade"]), floats(told["time"]), strings(told["kind"]))


def _number_users(user_ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Numbers in order of first appearance, and the id of each; an empty id gives a number of its own, with null."""
    texts = user_ids.to_numpy(zero_copy_only=False)
    is_missing = texts == ""
    own = np.array([f"row {row}" for row in range(len(texts))], dtype=object)
    kinds = np.where(is_missing, own, "user " + texts)
    encoded = pa.array(kinds, pa.string()).dictionary_encode()
    keys = encoded.dictionary.to_pylist()
    ids = [key.removeprefix("user ") if key.startswith("user ") else None for key in keys]
    return encoded.indices.to_numpy().astype(np.int64), pa.array(ids, pa.string())


def _fields(requests: pa.Table, names: list[str]) -> list[str]:
    """The columns of each request that the recipe names, as one JSON object."""
    columns = {name: requests[f"field_{name}"].to_pylist() for name in names}
    found = []
    for row in range(len(requests)):
        texts = {name: column[row] for name, column in columns.items()}
        values = {name: None if text is None else json.loads(text) for name, text in texts.items()}
        plain = {n: ", ".join(map(str, v)) if isinstance(v, list) else v for n, v in values.items()}
        found.append(json.dumps(plain, ensure_ascii=False))
    return found
