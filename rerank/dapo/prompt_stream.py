"""The order of prompts: seeded, and the same for any number of processes.

R rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from rerank.rows import PromptedRow, Prompter, RankingRow
from rerank.rows.stored import TrainingLists
from rerank.scoring import has_several_positives


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompted row in one of the epochs."""

    asked: PromptedRow
    epoch: int


@dataclass
class PromptStream:
    """Rows epoch by epoch without an end, each epoch a permutation that follows from the seed.

    Where rows have several lists (`candidates.augmentation`), epoch e is of their lists number e, then of the first
    again.

    Attributes:
        rows: To train on, one for each list.
        prompter: Writes their prompts.
        seed: Of the order.
        max_completion_tokens: Token limit of a completion.
        lists: Of rows that are by row_id and made when they are read; None: the rows are looked at.
        check: Refuses a prompt when it is read.
    """

    rows: Sequence[RankingRow]
    prompter: Prompter
    seed: int
    max_completion_tokens: int
    lists: TrainingLists | None = None
    check: Callable[[PromptedRow], None] | None = None

    def __post_init__(self) -> None:
        if self.lists is None:
            self.rows = sorted(self.rows, key=lambda row: row.row_id)

    @cached_property
    def epochs(self) -> list[np.ndarray]:
        """The places of the rows of each epoch, before the first of them comes again."""
        if self.lists is None:
            numbers = np.array([row.list_number for row in self.rows])
        else:
            numbers = self.lists.list_numbers
        return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]

    @property
    def has_several_positives(self) -> bool:
        """Whether some row has several positives."""
        if self.lists is None:
            return has_several_positives(row.relevance for row in self.rows)
        return bool((self.lists.num_positives > 1).any())

    def take(self, first: int, count: int) -> list[TrainingPrompt]:
        """`count` prompts from number `first` on."""
        return [self._prompt(number) for number in range(first, first + count)]

    def ask(self, row: RankingRow) -> PromptedRow:
        """The row with its prompt."""
        return self.prompter.ask(row, self.max_completion_tokens)

    def _prompt(self, number: int) -> TrainingPrompt:
        cycle, place = divmod(number, len(self.rows))
        begins = np.cumsum([0, *map(len, self.epochs)])
        part = int(np.searchsorted(begins, place, side="right")) - 1
        epoch, places = cycle * len(self.epochs) + part, self.epochs[part]
        asked = self.ask(self.rows[int(places[_order(self.seed, epoch, len(places))[place - begins[part]]])])
        if self.check is not None:
            self.check(asked)
        return TrainingPrompt(asked, epoch)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
