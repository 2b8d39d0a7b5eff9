"""rows.parquet of requests: one row a request, with its history, its candidates and what is known of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.data.requests.histories import Histories
from rerank.data.requests.log import RequestLog
from rerank.data.requests.splits import LEVELS

FEEDBACK = pa.struct({"place": pa.int64(), "grade": pa.float64(), "time": pa.float64()})
_ROWS_A_BLOCK = 16_384  # bounds the memory that histories take while they are written


def schema(candidate_fields: Sequence[str]) -> pa.Schema:
    """The columns of rows.parquet."""
    return pa.schema(
        {
            "row_id": pa.int64(),
            "request_id": pa.string(),
            "user": pa.int64(),
            "split": pa.string(),
            "position": pa.int64(),
            "time": pa.float64(),
            "history": pa.list_(pa.int64()),
            "history_times": pa.list_(pa.float64()),
            "history_events": pa.list_(pa.string()),
            "target": pa.int64(),
            "candidates": pa.list_(pa.int64()),
            "relevance": pa.list_(pa.float64()),
            "feedback": pa.list_(FEEDBACK),  # what raised a grade, place from 0, by place and time
            "scores": pa.list_(pa.float64()),
            "fields": pa.string(),
            **{f"candidate_{name}": pa.list_(pa.float64()) for name in candidate_fields},
        }
    )


@dataclass(frozen=True)
class Block:
    """The histories of the requests from `start` on: items, and times and event types unless the log has its own."""

    start: int
    ends: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    kinds: np.ndarray | None


def blocks(log: RequestLog, joined: Histories | None) -> Iterator[Block]:
    """The histories of all requests, some thousand at a time; `joined` is None where the log has its own."""
    for start in range(0, len(log), _ROWS_A_BLOCK):
        requests = range(start, min(start + _ROWS_A_BLOCK, len(log)))
        if joined is None:
            assert log.histories is not None
            lists = [log.histories[request] for request in requests]
        else:
            lists = [joined.places(request) for request in requests]
        ends, values = np.cumsum([len(values) for values in lists]), np.concatenate(lists)
        if joined is None:
            yield Block(start, ends, values, None, None)
        else:
            yield Block(
                start, ends, joined.events.items[values], joined.events.times[values], joined.events.kinds[values]
            )


def write_rows(path: Path, log: RequestLog, levels: np.ndarray, joined: Histories | None) -> None:
    """Write rows.parquet."""
    columns = schema(list(log.columns))
    splits = np.array(LEVELS, dtype=object)[levels]
    with pq.ParquetWriter(path, columns) as writer:
        for block in blocks(log, joined):
            writer.write_table(pa.table(_columns(log, splits, block), schema=columns))


def _columns(log: RequestLog, splits: np.ndarray, block: Block) -> dict[str, pa.Array]:
    size = len(block.ends)
    rows = slice(block.start, block.start + size)
    first, last = log.starts[block.start], log.starts[block.start + size]
    starts, flat = log.starts[rows.start : rows.stop + 1] - first, slice(first, last)
    history_starts = np.concatenate(([0], block.ends))
    has_no_scores = np.isnan(log.scores[log.starts[rows]])  # a request has a score for each candidate or none
    lists = {"relevance": log.relevance, **{f"candidate_{name}": column for name, column in log.columns.items()}}
    return {
        "row_id": pa.array(np.arange(rows.start, rows.stop)),
        "request_id": log.request_ids.slice(rows.start, size),
        "user": pa.array(log.users[rows]),
        "split": pa.array(splits[rows], pa.string()),
        "position": pa.nulls(size, pa.int64()),
        "time": _with_nulls(log.times[rows]),
        "history": _lists(history_starts, pa.array(block.items)),
        "history_times": _nulls_or_lists(history_starts, block.times, pa.float64()),
        "history_events": _nulls_or_lists(history_starts, block.kinds, pa.string()),
        "target": pa.nulls(size, pa.int64()),
        "candidates": _lists(starts, pa.array(log.items[flat])),
        "feedback": _feedback(log, log.starts[rows.start : rows.stop + 1]),
        "scores": _lists(starts, _with_nulls(log.scores[flat]), has_no_scores),
        "fields": pa.array(log.fields[rows], pa.string()),
        **{name: _lists(starts, _with_nulls(values[flat])) for name, values in lists.items()},
    }


def _feedback(log: RequestLog, starts: np.ndarray) -> pa.ListArray:
    """The feedback of the requests whose candidates begin at `starts`, the last of which is the end."""
    bounds = np.searchsorted(log.feedback.candidates, starts)
    told = slice(bounds[0], bounds[-1])
    places = log.feedback.candidates[told] - np.repeat(starts[:-1], np.diff(bounds))
    columns = pa.array(places), pa.array(log.feedback.grades[told]), _with_nulls(log.feedback.times[told])
    return _lists(bounds - bounds[0], pa.StructArray.from_arrays(columns, fields=list(FEEDBACK)))


def _lists(starts: np.ndarray, values: pa.Array, is_null: np.ndarray | None = None) -> pa.Array:
    mask = None if is_null is None else pa.array(is_null)
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values, mask=mask)


def _nulls_or_lists(starts: np.ndarray, values: np.ndarray | None, kind: pa.DataType) -> pa.Array:
    """Lists, whose elements are null where unknown; nulls where nothing is known of any."""
    if values is None:
        return pa.nulls(len(starts) - 1, pa.list_(kind))
    return _lists(starts, pa.array(values, kind, from_pandas=True))


def _with_nulls(values: np.ndarray) -> pa.Array:
    """Numbers, null for NaN."""
    return pa.array(values, pa.float64(), from_pandas=True)
