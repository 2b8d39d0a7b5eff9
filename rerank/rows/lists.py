"""Lists of items that another ranker made, one for each row of data/rows.parquet: read and checked row by row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LEAST = 2  # candidates of a list


def read_lists(
    path: str | Path, row_ids: np.ndarray, item_ids: Sequence[str], length: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The lists in the order of `row_ids`: R arrays of N items and of N scores.

    Args:
        path: Parquet file with row_id, candidates (original item ids, best first) and optionally scores. Without
            scores a candidate's score is N + 1 minus its place.
        row_ids: (R,) of the rows that need a list.
        item_ids: Original id of each item.
        length: N of every list; None where lists may differ, in at least two candidates each.

    Raises:
        ValueError: Naming the file and the row (from 1) of the first list that does not fit.
    """
    table = _read_table(path)
    numbers = {str(item_id): item for item, item_id in enumerate(item_ids)}
    places = {int(row_id): place for place, row_id in enumerate(row_ids)}
    items: list[np.ndarray] = [np.empty(0)] * len(places)
    scores = list(items)
    left = set(places)
    for number, record in enumerate(table.to_pylist(), start=1):
        where, row_id = f"{path}, row {number}", record["row_id"]
        if row_id not in left:
            problem = "appears twice" if row_id in places else "is not in data/rows.parquet"
            raise ValueError(f"{where}: row_id {row_id} {problem}; give each row of data/rows.parquet one list")
        left.remove(row_id)
        found = np.array(_numbered(record["candidates"], numbers, length, where))
        items[places[row_id]] = found
        given = _finite_scores(record["scores"], len(found), where) if "scores" in record else None
        scores[places[row_id]] = np.arange(len(found), 0, -1.0) if given is None else np.array(given)
    if left:
        first = next(row_id for row_id in places if row_id in left)
        raise ValueError(f"{path} has no list for row_id {first}; give each row of data/rows.parquet one list")
    return items, scores


def _read_table(path: str | Path) -> pa.Table:
    """The file with its columns checked."""
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a Parquet file; write the lists as Parquet") from None
    for name in ("row_id", "candidates"):
        if name not in table.column_names:
            raise ValueError(f"{path} has no column {name!r} but {', '.join(table.column_names)}; rename or add it")
    for name in {"candidates", "scores"} & set(table.column_names):
        kind = table.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ValueError(f"{path}: column {name!r} holds {kind} but must hold a list a row")
        if name == "scores" and not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
            raise ValueError(f"{path}: column 'scores' holds {kind} but must hold lists of numbers")
    return table


def _numbered(
    candidates: Sequence[object] | None, numbers: dict[str, int], length: int | None, where: str
) -> list[int]:
    """The items of one list of original ids."""
    names = [str(name) for name in candidates or []]
    if length is not None and len(names) != length:
        raise ValueError(f"{where}: {len(names)} candidates but a list has {length}; give exactly that many")
    if len(names) < LEAST:
        raise ValueError(f"{where}: {len(names)} candidates, too few to rank; give at least {LEAST}")
    for place, name in enumerate(names):
        if name not in numbers:
            raise ValueError(f"{where}: candidate {name!r} is not among the items; use the ids of the data stage")
        if name in names[:place]:
            raise ValueError(f"{where}: candidate {name!r} appears twice; give each item once")
    return [numbers[name] for name in names]


def _finite_scores(scores: Sequence[float | None] | None, length: int, where: str) -> list[float]:
    values = [float("nan") if score is None else float(score) for score in scores or []]
    if len(values) != length or not np.isfinite(values).all():
        raise ValueError(f"{where}: scores are {scores} but must be {length} finite numbers")
    return values
