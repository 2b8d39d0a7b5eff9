"""The row to rank.

N candidates of a row, F features of a candidate.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from rerank.metrics import judged_order


@dataclass(frozen=True)
class RankingRow:
    """A history and a list of candidates in the order shown.

    A candidate that was not seen (NaN) is shown and ranked, but left out of a ranking before anything is computed on
    it: what is said of judged candidates is said of those with a grade. A positive is one of a grade above 0.

    Attributes:
        row_id: Number of the row.
        history: Items, oldest first.
        candidates: (N,) items.
        relevance: (N,) grades: 0 shown, 1 clicked, 2 bought ...; NaN: not seen. Empty where nobody knows them.
        user: None where nobody is named.
        ranks: (N,) first-stage rank of each candidate, from 1; their order where not given.
        features: (N, F) float32, columns as in features.json; None without them.
        fields: Further columns of the row, by name.
        list_number: Of the lists that a training row has, from 0 (`candidates.augmentation`).
        request_id: Original id of a request; None for a row that was made of interactions, as are the next three.
        time: Of the request, in seconds; None where it is unknown.
        history_times: Of each item of the history, None where it is unknown; empty where none is known.
        history_events: Event type of each item of the history, alike.
    """

    row_id: int
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    relevance: tuple[float, ...] = ()
    user: int | None = None
    ranks: tuple[int, ...] = ()
    features: np.ndarray | None = field(default=None, compare=False, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)
    list_number: int = 0
    request_id: str | None = None
    time: float | None = None
    history_times: tuple[float | None, ...] = ()
    history_events: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(1, len(self.candidates) + 1)))
        self._check_lengths("candidates", relevance=self.relevance, ranks=self.ranks, features=self.features)
        self._check_lengths("history", history_times=self.history_times, history_events=self.history_events)

    def _check_lengths(self, name: str, **columns: Sequence[object] | np.ndarray | None) -> None:
        """Refuse columns that are not one entry for each candidate or item of the history."""
        wanted = len(self.history if name == "history" else self.candidates)
        things = "items in the history" if name == "history" else "candidates"
        for column, values in columns.items():
            if values is not None and len(values) not in (0, wanted):
                raise ValueError(
                    f"row_id {self.row_id}: {column} has {len(values)} entries but there are {wanted} {things}; "
                    "give one for each"
                )

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "RankingRow":
        """The row of a record of a candidates table."""
        features = record.get("features")
        return cls(
            row_id=record["row_id"],
            history=tuple(record["history"]),
            candidates=tuple(record["candidates"]),
            relevance=tuple(math.nan if grade is None else grade for grade in record.get("relevance") or ()),
            user=record.get("user"),
            ranks=tuple(record.get("first_stage_ranks") or ()),
            features=np.asarray(features, dtype=np.float32) if features else None,
            fields=json.loads(record["fields"]) if record.get("fields") else {},
            list_number=record.get("list_number") or 0,
            request_id=record.get("request_id"),
            time=record.get("time"),
            history_times=tuple(record.get("history_times") or ()),
            history_events=tuple(record.get("history_events") or ()),
        )

    @cached_property
    def best(self) -> tuple[int, ...]:
        """Positions of the judged candidates of the highest grade, the first stage's order; none where they say
        nothing: without a positive, and where all judged grades are equal."""
        grades = [grade for grade in self.relevance if not math.isnan(grade)]
        if not grades or max(grades) <= 0 or min(grades) == max(grades):
            return ()
        places = [place for place, grade in enumerate(self.relevance) if grade == max(grades)]
        return tuple(sorted(places, key=self.ranks.__getitem__))

    @property
    def is_hit(self) -> bool:
        """Whether a ranking of the row can be good or bad: there is a positive, and a judged candidate below the
        highest grade."""
        return bool(self.best)

    @property
    def positives(self) -> list[int]:
        """Positions of the candidates of a grade above 0, in the order shown."""
        return [place for place, grade in enumerate(self.relevance) if grade > 0]

    @property
    def target(self) -> int | None:
        """Position of the most relevant candidate, of equals the one that the first stage ranks best; None for a row
        that is no hit."""
        return self.best[0] if self.best else None

    @property
    def target_rank(self) -> int | None:
        """First-stage rank of the target among all candidates, None without one."""
        return None if self.target is None else self.ranks[self.target]

    @cached_property
    def first_stage_order(self) -> tuple[int, ...]:
        """Positions in the order of the first stage."""
        return tuple(sorted(range(len(self.candidates)), key=self.ranks.__getitem__))

    def place_of_target(self, order: Sequence[int] | None) -> int | None:
        """1-based place that a ranking (positions, best first) gives the target among all candidates, as `target_rank`
        counts; None without either."""
        return None if order is None or self.target is None else list(order).index(self.target) + 1

    def place_of_positive(self, order: Sequence[int] | None) -> int | None:
        """1-based place that a ranking gives its best-placed positive among the judged candidates; None without
        either."""
        seen = judged_order(order, self.relevance) if order is not None and self.relevance else []
        return next((number for number, place in enumerate(seen, start=1) if self.relevance[place] > 0), None)

    @cached_property
    def positive_rank(self) -> int | None:
        """1-based place of the best-placed positive in the first stage's order, among the judged candidates."""
        return self.place_of_positive(self.first_stage_order)

    def rank_gain(self, order: Sequence[int] | None) -> float:
        """Places by which the best-placed positive stands higher in a ranking than in the first stage's order, among
        the judged candidates; below every number for a completion that is no ranking."""
        place = self.place_of_positive(order)
        return -math.inf if place is None or self.positive_rank is None else float(self.positive_rank - place)

    def shuffled(self, order: Sequence[int]) -> "RankingRow":
        """The same row with its candidates shown in another order; each keeps its first-stage rank.

        Args:
            order: Position in this row of each candidate to show.
        """
        return replace(
            self,
            candidates=tuple(self.candidates[place] for place in order),
            relevance=tuple(self.relevance[place] for place in order) if self.relevance else (),
            ranks=tuple(self.ranks[place] for place in order),
            features=None if self.features is None else self.features[list(order)],
        )


def shuffle(row: RankingRow, seed: int, epoch: int = 0) -> RankingRow:
    """The row with its candidates in a random order that depends on seed, epoch and row alone."""
    order = np.random.default_rng([seed, epoch, row.row_id]).permutation(len(row.candidates))
    return row.shuffled(order.tolist())
