"""Histories as the data stage left them: one reader for training, counting and search.

R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.rows.reading import choose_rows
from rerank.rows.sequences import Histories, history_columns, read_histories

TRAINING = ("train", "rerank")  # splits of which nothing is held out
DETAILS = ("request_id", "time", "history_times", "history_events", "fields")  # of requests, handed on as they are
FEEDBACK = ("place", "grade", "time")  # of one entry of the column feedback
COLUMN = "candidate_"  # before the name of a candidate's number


def training_items(data_dir: Path, splits: Sequence[str] = TRAINING) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every interaction of these splits, each user's together and oldest first."""
    table = pq.read_table(data_dir / "interactions.parquet", columns=["user", "item", "position", "split"])
    table = table.filter(pc.field("split").isin(splits)).sort_by([("user", "ascending"), ("position", "ascending")])
    return table["user"].to_numpy(), table["item"].to_numpy()


def by_user(users: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
    """Each user's items, from `training_items`."""
    return np.split(items, np.flatnonzero(np.diff(users)) + 1) if len(items) else []


def training_sequences(data_dir: Path, splits: Sequence[str] = TRAINING) -> dict[int, np.ndarray]:
    """User to items of these splits, oldest first; by default all before validation, which counts may know."""
    users, items = training_items(data_dir, splits)
    return dict(zip(np.unique(users).tolist(), by_user(users, items), strict=True))


def window_places(users: np.ndarray, max_items: int, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of every user's items, each overlapping the one before by half, so that every item has a past: the
    first place of each and the one behind its last.

    Args:
        users: Of each item, as `training_items` has them.
        max_items: Of a window.
        least: Items of a window; shorter ones are left out.
    """
    borders = np.flatnonzero(np.diff(users, prepend=-1, append=-1)) if len(users) else np.zeros(1, dtype=np.int64)
    firsts, lengths = borders[:-1], np.diff(borders)
    step = max(1, max_items // 2)
    numbers = -(-np.maximum(1, lengths - max_items // 2) // step)  # of windows, of each user
    within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    starts = np.repeat(firsts, numbers) + within * step
    ends = np.minimum(starts + max_items, np.repeat(firsts + lengths, numbers))
    kept = ends - starts >= least
    return starts[kept], ends[kept]


@dataclass(frozen=True)
class LoggedLists:
    """The lists that the rows of data/rows.parquet hold where they are requests.

    Attributes:
        candidates: R arrays of items in first-stage order.
        relevance: R arrays of grades, nan for a candidate that was not seen.
        scores: R arrays of first-stage scores; without any in the log, N + 1 minus the place.
        feedback: R arrays (feedback, 3) of what raised the grade of a candidate, by place and time: place from 0,
            grade, time, which is nan where unknown.
        columns: Numbers of the candidates, R arrays each, nan where unknown.
        details: (R rows) the columns of DETAILS.
    """

    candidates: list[np.ndarray]
    relevance: list[np.ndarray]
    scores: list[np.ndarray]
    feedback: list[np.ndarray]
    columns: dict[str, list[np.ndarray]]
    details: pa.Table

    @classmethod
    def of(cls, table: pa.Table) -> "LoggedLists":
        """Those of a table with the columns of rows.parquet.

        One that an earlier version wrote lacks `feedback`, which is then of the time of the request.
        """
        candidates = _split_lists(table["candidates"])
        scores = _split_lists(table["scores"])
        scores = [
            np.arange(len(items), 0, -1.0) if not len(of_row) else of_row
            for items, of_row in zip(candidates, scores, strict=True)
        ]
        names = [name for name in table.column_names if name.startswith(COLUMN)]
        columns = {name: [values.astype(float) for values in _split_lists(table[name])] for name in names}
        relevance = [grades.astype(float) for grades in _split_lists(table["relevance"])]
        times = table["time"].to_numpy().astype(float)
        is_told = "feedback" in table.column_names
        feedback = _split_feedback(table["feedback"]) if is_told else [*map(_at_once, relevance, times)]
        return cls(candidates, relevance, scores, feedback, columns, table.select(DETAILS))

    @property
    def times(self) -> np.ndarray:
        """(R,) times of the requests, nan where unknown."""
        return np.asarray(self.details["time"].to_numpy(zero_copy_only=False), dtype=float)

    def grades_before(self, moment: float) -> list[np.ndarray]:
        """R arrays of grades as they were known before a moment: 0 for a candidate whose feedback had not come."""
        pairs = zip(self.relevance, self.feedback, strict=True)
        return [grades_before(moment, relevance, feedback) for relevance, feedback in pairs]

    def take(self, chosen: Sequence[int] | np.ndarray) -> "LoggedLists":
        """The lists at these places."""
        parts = (self.candidates, self.relevance, self.scores, self.feedback)
        candidates, relevance, scores, feedback = ([values[row] for row in chosen] for values in parts)
        columns = {name: [values[row] for row in chosen] for name, values in self.columns.items()}
        details = self.details.take(pa.array(np.asarray(chosen, dtype=np.int64)))
        return LoggedLists(candidates, relevance, scores, feedback, columns, details)


def grades_before(moment: float, relevance: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """(N,) grades of a list as they were known before a moment, from all of them and the list's feedback."""
    known, earlier = np.where(np.isnan(relevance), np.nan, 0.0), feedback[feedback[:, 2] < moment]
    np.maximum.at(known, earlier[:, 0].astype(int), earlier[:, 1])
    return known


def _split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as an array a row, empty for null; null entries are nan."""
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
    return np.split(pc.list_flatten(column).to_numpy(), ends[:-1]) if len(ends) else []


def _split_feedback(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The column `feedback` as an array (feedback, 3) a row."""
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
    flat = pc.list_flatten(column)
    values = np.stack([pc.struct_field(flat, name).to_numpy().astype(float) for name in FEEDBACK], axis=-1)
    return np.split(values, ends[:-1]) if len(ends) else []


def _at_once(relevance: np.ndarray, time: float) -> np.ndarray:
    """The feedback of a list whose grades above 0 were known at its request."""
    places = np.flatnonzero(relevance > 0)
    return np.stack([places, relevance[places], np.full(len(places), time)], axis=-1)


@dataclass(frozen=True)
class TargetRows:
    """The rows of data/rows.parquet: histories, and the items that follow or the lists that the log holds.

    Attributes:
        row_ids, users, splits: (R,).
        histories: R arrays of items, oldest first; read from the users' sequences only when they are asked for.
        targets: (R,), -1 where the rows are requests.
        lists: Of requests; None where a first stage has yet to make them.
    """

    row_ids: np.ndarray
    users: np.ndarray
    histories: Histories
    targets: np.ndarray
    splits: np.ndarray
    lists: LoggedLists | None = None

    @classmethod
    def load(cls, run: str | Path) -> "TargetRows":
        """The rows of a run's data stage."""
        path = run_dir.stage_dir(run, "data") / "rows.parquet"
        is_log, found = has_lists(run), history_columns(pq.read_schema(path).names)
        columns = ["row_id", "user", "split", "target", *found]
        table = pq.read_table(path, columns=None if is_log else columns).combine_chunks()
        row_ids, users = (table[name].to_numpy() for name in ("row_id", "user"))
        splits = table["split"].to_pandas(deduplicate_objects=True).to_numpy()
        targets = pc.fill_null(table["target"], -1).to_numpy()
        lists = LoggedLists.of(table) if is_log else None
        return cls(row_ids, users, read_histories(table, path.parent, path), targets, splits, lists)

    def of_split(self, split: str, max_rows: int = 0, seed: int = 0) -> "TargetRows":
        """The rows of a split, `max_rows` of them drawn at random; all for 0."""
        return self.take(choose_rows(np.flatnonzero(self.splits == split).tolist(), max_rows, seed))

    def take(self, chosen: Sequence[int] | np.ndarray) -> "TargetRows":
        """The rows at these places."""
        row_ids, users, histories = self.row_ids[chosen], self.users[chosen], self.histories.take(chosen)
        lists = None if self.lists is None else self.lists.take(chosen)
        return TargetRows(row_ids, users, histories, self.targets[chosen], self.splits[chosen], lists)

    def __len__(self) -> int:
        return len(self.row_ids)


def has_lists(run: str | Path) -> bool:
    """Whether the rows of a run are requests, which bring their lists."""
    return "candidates" in pq.read_schema(run_dir.stage_dir(run, "data") / "rows.parquet").names
