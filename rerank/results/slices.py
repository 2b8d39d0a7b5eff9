"""Where rows are hard: list recall, the first-stage rank of the target, and slices by target, history and columns.

A row of requests has no one target: there it stands for the relevant candidates of the highest grade. The best-placed
of them has the first-stage rank, and the mean of their training interactions makes the row cold or popular.

A rows of a split, R of them evaluated, S seeds.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.metrics import judged
from rerank.results.intervals import Column, Sampling
from rerank.rows import RankingRow, TargetRows, read_records, training_items

COLD_MOST = 5  # training interactions of a cold target
POPULAR_PERCENTILE, SHORT_PERCENTILE = 90, 25  # of the items' training interactions; of the rows' histories
RANK_GROUPS = (*((rank, rank) for rank in range(1, 11)), (11, 20), (21, 50), (51, 100))
MISSED = "not in the list"
OPTIONAL = ("target", "first_stage_ranks", "fields")  # columns of a candidates table
LEAST_ROWS, MOST_VALUES = 20, 10  # of a value of a column that has a slice; such values of a column
BEST_GRADED = "the candidate of the highest grade, of equals the one that the first stage ranks best"
NO_VALUE = "none"  # of a row that lacks the column

K = TypeVar("K")  # names a ranker


@dataclass(frozen=True, eq=False)
class Slices:
    """Rows by target, by history and by the values of columns.

    Attributes:
        meanings: Name of a slice to its definition, with the thresholds.
        members: Name of a slice to whether each row is in it, (A,).
        columns: Name of a column to its slices.
    """

    meanings: dict[str, str]
    members: dict[str, np.ndarray]
    columns: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, interactions: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> "Slices":
        """The slices of rows.

        Args:
            interactions: Training interactions of each item.
            targets: (A,) items.
            lengths: (A,) items of each history.
        """
        return cls._by_counts(interactions, interactions[targets], lengths)

    @classmethod
    def of_requests(cls, interactions: np.ndarray, rows: Sequence[RankingRow], lengths: np.ndarray) -> "Slices":
        """As `of`, by the relevant candidates of the highest grade; without any a row is neither cold nor popular."""
        best = [[row.candidates[place] for place in best_places(row)] for row in rows]
        return cls.of_sets(interactions, best, lengths, "best-graded candidates")

    @classmethod
    def of_sets(
        cls, interactions: np.ndarray, targets: Sequence[Sequence[int] | np.ndarray], lengths: np.ndarray, of: str
    ) -> "Slices":
        """As `of`, with several targets a row, or none; `of` is their name in the definitions."""
        taken = np.array([interactions[items].mean() if len(items) else np.nan for items in targets])
        return cls._by_counts(interactions, taken, lengths, f", mean of the {of}")

    @classmethod
    def _by_counts(cls, interactions: np.ndarray, taken: np.ndarray, lengths: np.ndarray, of: str = "") -> "Slices":
        """By the training interactions of each row's target, (A,)."""
        at_percentile = int(np.percentile(interactions, POPULAR_PERCENTILE, method="higher"))
        popular = max(COLD_MOST + 1, at_percentile)  # no target is cold and popular
        short = int(np.percentile(lengths, SHORT_PERCENTILE, method="lower"))
        meanings = {
            "cold": f"cold targets: at most {COLD_MOST} training interactions{of}",
            "popular": f"popular targets: at least {popular} training interactions{of} ({POPULAR_PERCENTILE}th "
            "percentile of the items)",
            "short": f"short histories: at most {short} items ({SHORT_PERCENTILE}th percentile of the rows)",
        }
        return cls(meanings, {"cold": taken <= COLD_MOST, "popular": taken >= popular, "short": lengths <= short})

    def with_columns(self, fields: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> "Slices":
        """Further slices: the rows of each value that LEAST_ROWS have, the MOST_VALUES most frequent; the others.

        Args:
            fields: A mappings of a row's columns to its values.
            columns: To slice by, each there in some row.
        """
        meanings, members, found = dict(self.meanings), dict(self.members), {}
        for column in columns:
            values = np.array([_value_text(of_row.get(column)) for of_row in fields])
            frequent = [
                value for value, rows in Counter(values.tolist()).most_common(MOST_VALUES) if rows >= LEAST_ROWS
            ]
            of_column = {f"{column}={value}": values == value for value in frequent}
            if (rest := ~np.isin(values, np.array(frequent, dtype=values.dtype))).any():
                of_column[f"{column}: other values"] = rest
            found[column], members = list(of_column), members | of_column
            meanings |= {name: name.replace("=", ": ", 1) for name in of_column}
        return replace(self, meanings=meanings, members=members, columns=found)

    @classmethod
    def of_rows(cls, run: str | Path, rows: TargetRows) -> "Slices":
        """The slices of the rows of a split, which have no lists."""
        return cls.of(training_interactions(run), rows.targets, rows.histories.lengths)

    def taken(self, places: np.ndarray) -> "Slices":
        """The same slices of the rows at these places."""
        return replace(self, members={name: members[places] for name, members in self.members.items()})

    def counts(self) -> dict[str, dict[str, Any]]:
        """Definition of each slice and its number of rows, for results.json."""
        return {
            name: {"meaning": meaning, "rows": int(self.members[name].sum())}
            for name, meaning in self.meanings.items()
        }


def training_interactions(run: str | Path) -> np.ndarray:
    """(items,) training interactions of each item of a run."""
    data_dir = run_dir.stage_dir(run, "data")
    num_items = pq.read_metadata(data_dir / "items.parquet").num_rows
    return np.bincount(training_items(data_dir)[1], minlength=num_items)


def _value_text(value: object) -> str:
    return NO_VALUE if value is None else str(value)


def best_places(row: RankingRow) -> list[int]:
    """Positions of the relevant candidates of the highest grade; none where no candidate is relevant."""
    best = max(judged(row.relevance), default=0.0)
    return [place for place, grade in enumerate(row.relevance) if grade == best > 0]


def check_columns(run: str | Path, split: str, columns: Sequence[str]) -> None:
    """Refuse columns to slice by that neither the rows of a split nor the items have.

    Raises:
        ValueError: Naming those there are.
    """
    if not columns:
        return
    path = run_dir.stage_dir(run, "candidates") / f"{split}.parquet"
    has_fields = "fields" in pq.read_schema(path).names
    texts = pq.read_table(path, columns=["fields"])["fields"].unique().to_pylist() if has_fields else []
    known = sorted({name for text in texts if text for name in json.loads(text)})
    of_items = Catalogue.load(run).columns
    for column in columns:
        if column not in (*known, *of_items):
            raise ValueError(
                f"slices holds {column!r}, but the rows of {path} have {', '.join(known) or 'none'} and the items "
                f"{', '.join(of_items)}; name it in request_fields or item_columns of the data stage, or leave it out"
            )


def _with_items(
    run: str | Path, rows: Sequence[RankingRow], items: Sequence[int | None], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The fields of each row, and those of these columns that its item has and no row."""
    if not columns:
        return [dict(row.fields) for row in rows]
    catalogue = Catalogue.load(run)
    texts = {name: catalogue.texts(name) for name in columns if name in catalogue.columns}
    of_items = [
        {} if item is None else {name: of_name[item] or None for name, of_name in texts.items()} for item in items
    ]
    return [found | dict(row.fields) for found, row in zip(of_items, rows, strict=True)]


@dataclass(frozen=True, eq=False)
class SplitLists:
    """The first-stage lists of all rows of a split.

    Attributes:
        row_ids: (A,), ascending.
        ranks: (A,) first-stage rank of the target, 0 where the list lacks it.
        length: The last first-stage rank of any list.
        slices: Of these rows.
        target: What stands for the target, where rows have no one item that followed.
    """

    row_ids: np.ndarray
    ranks: np.ndarray
    length: int
    slices: Slices
    target: str = ""

    @classmethod
    def load(cls, run: str | Path, split: str, columns: Sequence[str] = ()) -> "SplitLists":
        """The lists of a run's candidates stage, with slices by these columns of the rows' `fields` or of items: those
        of a row's target, or of the candidate that stands for it.

        Raises:
            ValueError: When neither rows nor items have one of the columns.
        """
        check_columns(run, split, columns)
        records = read_records(run_dir.stage_dir(run, "candidates") / f"{split}.parquet", OPTIONAL)
        rows, targets = [RankingRow.of(record) for record in records], [record["target"] for record in records]
        best = [min(best_places(row), key=row.ranks.__getitem__, default=None) for row in rows]
        lengths, interactions = np.array([len(row.history) for row in rows]), training_interactions(run)
        items = targets
        if None in targets:
            slices = Slices.of_requests(interactions, rows, lengths)
            items = [None if place is None else row.candidates[place] for place, row in zip(best, rows, strict=True)]
        else:
            slices = Slices.of(interactions, np.array(targets), lengths)
        return cls(
            row_ids=np.array([row.row_id for row in rows]),
            ranks=np.array([0 if of is None else row.ranks[of] for of, row in zip(best, rows, strict=True)]),
            length=max(max(row.ranks) for row in rows),
            slices=slices.with_columns(_with_items(run, rows, items, columns), columns),
            target=BEST_GRADED if None in targets else "",
        )

    @property
    def recall(self) -> float:
        """Share of the rows whose list holds the target: the ceiling of re-ranking."""
        return float((self.ranks > 0).mean())

    def rank_shares(self) -> dict[str, float]:
        """Share of the rows by first-stage rank of the target, longer lists in groups of ranks; they add up to 1."""
        groups = [group for group in RANK_GROUPS if group[0] <= self.length]
        if self.length > groups[-1][1]:
            groups.append((groups[-1][1] + 1, self.length))
        names = [str(first) if first == last else f"{first}–{min(last, self.length)}" for first, last in groups]
        shares = [float(((self.ranks >= first) & (self.ranks <= last)).mean()) for first, last in groups]
        return {**dict(zip(names, shares, strict=True)), MISSED: 1 - self.recall}

    def members(self, row_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Slice to whether each of some rows is in it, (R,)."""
        return self.slices.taken(np.searchsorted(self.row_ids, row_ids)).members

    def summary(self) -> dict[str, Any]:
        """For results.json."""
        slices = {name: self._recall_of(name) | counts for name, counts in self.slices.counts().items()}
        return {
            "list_recall": self.recall,
            "list_length": self.length,
            "target_ranks": self.rank_shares(),
            **({"target": self.target} if self.target else {}),
            "slices": slices,
        }

    def _recall_of(self, name: str) -> dict[str, float | None]:
        members = self.slices.members[name]
        return {"list_recall": float((self.ranks[members] > 0).mean()) if members.any() else None}


def measure(
    values: Mapping[K, Column],
    reference: Column,
    members: Mapping[str, np.ndarray],
    users: np.ndarray,
    num_samples: int = 2000,
) -> dict[K, dict[str, Any]]:
    """A metric of each ranker on each slice.

    Args:
        values: Ranker to the metric of each row, (R,) or (S, R).
        reference: The metric of the ranker to compare with.
        members: Slice to whether each row is in it, (R,).
        users: (R,).
        num_samples: Bootstrap samples of an interval.

    Returns:
        Ranker and slice to `value`, `minus_reference` and `interval`; each None for a slice without rows, and the
        interval for one of a single user.
    """
    found: dict[K, dict[str, Any]] = {ranker: {} for ranker in values}
    for name, chosen in members.items():
        sampling = Sampling(users[chosen], num_samples)
        for ranker, own in values.items():
            found[ranker][name] = _cell(np.asarray(own)[..., chosen], np.asarray(reference)[..., chosen], sampling)
    return found


def _cell(values: np.ndarray, reference: np.ndarray, sampling: Sampling) -> dict[str, Any]:
    if not len(sampling.users):
        return {"value": None, "minus_reference": None, "interval": None}
    difference, bounds = sampling.difference(values, reference)
    interval = bounds if len(set(np.asarray(sampling.users).tolist())) > 1 else None
    return {"value": float(np.nanmean(values)), "minus_reference": difference, "interval": interval}
