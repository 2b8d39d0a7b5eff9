"""The order of prompts: seeded, and the same for any number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from rerank.rows import PromptedRow, Prompter, RankingRow


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
    """

    rows: Sequence[RankingRow]
    prompter: Prompter
    seed: int
    max_completion_tokens: int

    def __post_init__(self) -> None:
        self.rows = sorted(self.rows, key=lambda row: row.row_id)

    @cached_property
    def epochs(self) -> list[list[RankingRow]]:
        """The rows of each epoch, before the first of them comes again."""
        numbers = sorted({row.list_number for row in self.rows})
        return [[row for row in self.rows if row.list_number == number] for number in numbers]

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
        epoch, rows = cycle * len(self.epochs) + part, self.epochs[part]
        return TrainingPrompt(self.ask(rows[_order(self.seed, epoch, len(rows))[place - begins[part]]]), epoch)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
