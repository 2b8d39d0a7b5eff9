"""The user's own first-stage lists: read and checked row by row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def read_lists(
    path: str | Path, row_ids: np.ndarray, item_ids: list[str], num_candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """A user's own lists in the order of `row_ids`: (R, N) items and (R, N) scores.

    Args:
        path: Parquet file with row_id, candidates (original item ids, best first) and optionally scores. Without
            scores a candidate's score is N + 1 minus its place.
        row_ids: Of the rows that need a list.
        item_ids: Original id of each item.
        num_candidates: N, the length that each list must have.

    Raises:
        ValueError: Naming the file and the row (from 1) of the first list that does not fit.
    """
    table = _read_table(path)
    has_scores = "scores" in table.column_names
    numbers = {str(item_id): item for item, item_id in enumerate(item_ids)}
    places = {int(row_id): place for place, row_id in enumerate(row_ids)}
    items = np.zeros((len(row_ids), num_candidates), dtype=np.int64)
    scores = np.tile(np.arange(num_candidates, 0, -1.0), (len(row_ids), 1))
    listed: set[int] = set()
    for number, record in enumerate(table.to_pylist(), start=1):
        where, row_id = f"{path}, row {number}", record["row_id"]
        if row_id not in places or row_id in listed:
            problem = "appears twice" if row_id in listed else "is not in data/rows.parquet"
            raise ValueError(f"{where}: row_id {row_id} {problem}; give each row of data/rows.parquet one list")
        listed.add(row_id)
        items[places[row_id]] = _numbered(record["candidates"], numbers, num_candidates, where)
        if has_scores:
            scores[places[row_id]] = _finite_scores(record["scores"], num_candidates, where)
    for row_id in places:
        if row_id not in listed:
            raise ValueError(f"{path} has no list for row_id {row_id}; give each row of data/rows.parquet one list")
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


def _numbered(candidates: list | None, numbers: dict[str, int], num_candidates: int, where: str) -> list[int]:
    """The items of one list of original ids."""
    names = [str(name) for name in candidates or []]
    if len(names) != num_candidates:
        raise ValueError(f"{where}: {len(names)} candidates but num_candidates is {num_candidates}; give exactly that")
    for place, name in enumerate(names):
        if name not in numbers:
            raise ValueError(f"{where}: candidate {name!r} is not among the items; use the ids of the data stage")
        if name in names[:place]:
            raise ValueError(f"{where}: candidate {name!r} appears twice; give each item once")
    return [numbers[name] for name in names]


def _finite_scores(scores: list | None, num_candidates: int, where: str) -> list[float]:
    values = [float("nan") if score is None else float(score) for score in scores or []]
    if len(values) != num_candidates or not np.isfinite(values).all():
        raise ValueError(f"{where}: scores are {scores} but must be {num_candidates} finite numbers")
    return values
