"""Training rows of a run in a memory-mapped file, read one by one.

R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.rows.mapped import Column, mapped
from rerank.rows.on_read import MadeOnRead, column, read_parts, store
from rerank.rows.reading import (
    check_features,
    check_use,
    choose_rows,
    columns_of,
    data_dir_of,
    records_of,
    refuse_no_hits,
    refuse_no_rows,
)
from rerank.rows.row import RankingRow
from rerank.rows.sequences import HISTORY, PLACE, read_histories

KEYS = ("row_id", "relevance", "list_number")


def hits(relevance: pa.Array) -> np.ndarray:
    """(R,) `RankingRow.is_hit` of lists of grades."""
    grades, owners = _judged(relevance)
    highest, lowest = np.full(len(relevance), -np.inf), np.full(len(relevance), np.inf)
    np.maximum.at(highest, owners, grades)
    np.minimum.at(lowest, owners, grades)
    found: np.ndarray = (highest > 0) & (lowest < highest)
    return found


def _judged(relevance: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The grades of all candidates that were seen, and the row of each."""
    lengths = pc.fill_null(pc.list_value_length(relevance), 0).to_numpy(zero_copy_only=False)
    grades = pc.list_flatten(relevance).to_numpy(zero_copy_only=False).astype(float)  # null becomes nan
    judged = ~np.isnan(grades)
    return grades[judged], np.repeat(np.arange(len(lengths)), lengths)[judged]


def _keys(part: pa.RecordBatch) -> pa.Table:
    """Row_id, number of the list, and number of positives of the rows of a part."""
    grades, owners = _judged(part.column("relevance"))
    is_numbered = "list_number" in part.schema.names
    numbers = pc.fill_null(part.column("list_number"), 0) if is_numbered else np.zeros(len(part), dtype=np.int64)
    positives = np.bincount(owners[grades > 0], minlength=len(part))
    return pa.table({"row_id": part.column("row_id"), "list_number": numbers, "num_positives": positives})


def hit_parts(path: str | Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a candidates table that are hits, part by part.

    Args:
        path: Parquet, as `read_rows` takes it.
        columns: To read, `relevance` among them.
    """
    for part in read_parts(path, columns):
        yield part.filter(pa.array(hits(part.column("relevance"))))


def hit_keys(path: str | Path, names: Sequence[str]) -> pa.Table:
    """Columns of the hits of a candidates table, by row_id.

    Raises:
        ValueError: When a column of a candidates table is missing or there is no hit.
    """
    columns_of(path)
    parts = [part.select(names) for part in hit_parts(path, [*{*names, "relevance"}])]
    if not sum(map(len, parts)):
        refuse_no_hits(path, pq.read_metadata(path).num_rows)
    return pa.concat_tables(pa.Table.from_batches([part]) for part in parts).sort_by("row_id")


def read_some_rows(path: str | Path, max_rows: int, seed: int, needs_features: bool = False) -> list[RankingRow]:
    """`choose_rows` of `read_rows`, in memory that does not grow with the table; raises as they do."""
    row_ids = hit_keys(path, ["row_id"])["row_id"].to_pylist()
    return rows_of(path, choose_rows(row_ids, max_rows, seed), needs_features)


def rows_of(path: str | Path, row_ids: Sequence[int], needs_features: bool = False) -> list[RankingRow]:
    """The hits of a candidates table with these row_ids, by row_id; no other row is looked at.

    Raises:
        ValueError: When a column is missing, or features that are needed.
    """
    columns, chosen = columns_of(path), np.unique(np.asarray(row_ids, dtype=np.int64))
    if needs_features:
        check_features(path)
    parts = (_with_ids(part, chosen) for part in hit_parts(path, columns))
    rows = (RankingRow.of(record) for part in parts for record in _records(part, path))
    return sorted(rows, key=lambda row: row.row_id)


def _with_ids(part: pa.RecordBatch, chosen: np.ndarray) -> pa.RecordBatch:
    """The rows of a part with one of these row_ids, which ascend, at no cost that grows with their number."""
    row_ids = part.column("row_id").to_numpy()
    places = np.searchsorted(chosen, row_ids).clip(max=max(len(chosen) - 1, 0))
    return part.filter(pa.array(chosen[places] == row_ids if len(chosen) else np.zeros(len(part), dtype=bool)))


def _records(part: pa.RecordBatch, path: str | Path) -> list[dict[str, Any]]:
    return records_of(pa.Table.from_batches([part]), path)


def common_rows(path: str | Path, other: str | Path) -> list[RankingRow]:
    """The hits of a candidates table that are hits of another one too, by row_id.

    Rows are the same that have one request_id; without one, user, history and relevant items. Of most rows the user
    and the length of the history tell already that they are not.
    """
    marks = {mark for part in _marked_parts(path) for mark in part[1]}
    alike, identities = set[int](), set[int]()
    for part, of_part in _marked_parts(other):
        for row in _marked_rows(part, of_part, marks, other):
            alike.add(_mark(row.request_id, row.user, len(row.history)))
            identities.add(hash(_identity(row)))
    rows = (row for part in _marked_parts(path) for row in _marked_rows(*part, alike, path)) if alike else iter(())
    return sorted((row for row in rows if hash(_identity(row)) in identities), key=lambda row: row.row_id)


def _mark(request_id: str | None, user: int | None, length: int) -> int:
    return hash((user, length) if request_id is None else request_id)


def _marked_parts(path: str | Path) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
    """The hits of a table, part by part, without features, and a mark of each row."""
    for part in hit_parts(path, [name for name in columns_of(path) if name != "features"]):
        lengths = read_histories(pa.Table.from_batches([part]), data_dir_of(path), Path(path)).lengths.tolist()
        has_requests = "request_id" in part.schema.names
        requests = part.column("request_id").to_pylist() if has_requests else [None] * len(part)
        columns = requests, part.column("user").to_pylist(), lengths
        yield part, [_mark(*of_row) for of_row in zip(*columns, strict=True)]


def _marked_rows(part: pa.RecordBatch, marks: Sequence[int], wanted: set[int], path: str | Path) -> list[RankingRow]:
    places = [place for place, mark in enumerate(marks) if mark in wanted]
    return [*map(RankingRow.of, _records(part.take(pa.array(places, pa.int64())), path))] if places else []


def _identity(row: RankingRow) -> tuple[object, ...]:
    if row.request_id is not None:
        return (row.request_id,)
    relevant = frozenset(item for item, grade in zip(row.candidates, row.relevance, strict=True) if grade > 0)
    return row.user, row.history, relevant


@dataclass(frozen=True)
class HitLists:
    """The hits of a candidates table as trees are fitted on them, by row_id.

    Attributes:
        row_ids: (R,) ascending.
        users: (R,) of each row, None where it has none.
        relevance: R arrays of the grades of its candidates, nan for one that was not seen.
        features: (N, F) float32 of each row, in a memory-mapped file.
    """

    row_ids: Sequence[int]
    users: list[int | None]
    relevance: list[np.ndarray]
    features: Sequence[np.ndarray]

    @classmethod
    def read(cls, path: str | Path) -> "HitLists":
        """Those of a candidates table.

        Raises:
            ValueError: As `read_rows` with features.
        """
        columns_of(path)
        check_features(path)
        parts = hit_parts(path, ("row_id", "user", "relevance"))
        keys = pa.concat_tables(pa.Table.from_batches([part]) for part in parts)
        if not len(keys):
            refuse_no_hits(path, pq.read_metadata(path).num_rows)
        lengths = pc.list_value_length(keys["relevance"]).to_numpy()
        ends, values, begin = np.cumsum(lengths), np.empty((0, 0), dtype=np.float32), 0
        for part in hit_parts(path, ("row_id", "relevance", "features")):
            if not len(part):
                continue
            _check_lines(part, path)
            lines = part.column("features").flatten()
            block = lines.flatten().to_numpy(zero_copy_only=False).reshape(len(lines), -1)
            values = values if values.size else mapped(None, (int(ends[-1]), block.shape[1]), np.float32)
            values[begin : begin + len(block)] = block
            begin += len(block)
        grades = pc.list_flatten(keys["relevance"]).to_numpy(zero_copy_only=False).astype(float)  # null becomes nan
        relevance, users = np.split(grades, ends[:-1]), keys["user"].to_pylist()
        row_ids = keys["row_id"].to_numpy()
        order = np.argsort(row_ids, kind="stable")
        features = Column(values, ends[order], lengths[order])
        ordered = row_ids[order].tolist(), [users[row] for row in order], [relevance[row] for row in order]
        return cls(*ordered, features)


def _check_lines(part: pa.RecordBatch, path: str | Path) -> None:
    """Refuse rows that have features of another number of candidates."""
    found, wanted = (pc.list_value_length(part.column(name)).to_numpy() for name in ("features", "relevance"))
    for row in np.flatnonzero(found != wanted)[:1].tolist():
        raise ValueError(
            f"{path}: row_id {part.column('row_id')[row]}: features has {found[row]} entries but there are "
            f"{wanted[row]} candidates; run the candidates stage again"
        )


@dataclass(frozen=True)
class TrainingLists:
    """The training lists that the traces stage assigned to a use, without their content.

    Attributes:
        path: The candidates table.
        used: (R,) row_ids of the hits of that use, ascending.
        list_numbers, num_positives: (R,) of each.
    """

    path: Path
    used: np.ndarray
    list_numbers: np.ndarray
    num_positives: np.ndarray

    @classmethod
    def find(cls, run: str | Path, use: str) -> "TrainingLists":
        """Those of a run; `use` as `training_rows` takes it.

        Raises:
            ValueError: When none is left.
        """
        check_use(use)
        split = pq.read_table(run_dir.stage_dir(run, "traces") / "row_split.parquet")
        given = split if use == "all" else split.filter(pc.equal(split["used_for"], use))
        path = run_dir.stage_dir(run, "candidates") / "train.parquet"
        names = [name for name in columns_of(path) if name in KEYS]
        parts = [_keys(part) for part in hit_parts(path, names)]
        if not sum(map(len, parts)):
            refuse_no_hits(path, pq.read_metadata(path).num_rows)
        table = pa.concat_tables(parts).filter(pc.is_in(pc.field("row_id"), given["row_id"].combine_chunks()))
        if not len(table):
            refuse_no_rows(use)
        return cls(path, *(values.to_numpy() for values in table.sort_by("row_id").columns))

    def first_only(self) -> "TrainingLists":
        """Without the further lists of a row."""
        first = self.list_numbers == 0
        return TrainingLists(self.path, self.used[first], self.list_numbers[first], self.num_positives[first])

    def stored(self, file: Path, needs_features: bool = False) -> Sequence[RankingRow]:
        """The rows by row_id, read from a memory-mapped copy each time.

        Args:
            file: Of the copy, which every process of a training calls for.
            needs_features: Refuse rows without features; else they are left out.
        """
        if needs_features:
            check_features(self.path)
        names = [name for name in columns_of(self.path) if needs_features or name != "features"]
        schema = pa.schema([field for field in pq.read_schema(self.path) if field.name in names])
        table = store(file, schema, (self.own(part) for part in hit_parts(self.path, schema.names)))
        order = np.argsort(column(table, "row_id"), kind="stable").tolist()
        if HISTORY in schema.names:
            return MadeOnRead(len(order), lambda number: RankingRow.of(table[order[number]]))
        places = pa.table({name: column(table, name) for name in ("user", *PLACE)})
        histories = read_histories(places, data_dir_of(self.path), self.path)

        def row(number: int) -> RankingRow:
            place = order[number]
            return RankingRow.of({**table[place], HISTORY: histories[place].tolist()})

        return MadeOnRead(len(order), row)

    def own(self, part: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of a part with a row_id of that use."""
        return _with_ids(part, self.used)

    def places(self, row_ids: np.ndarray) -> np.ndarray:
        """The places of row_ids among those of the use."""
        return np.searchsorted(self.used, row_ids)
