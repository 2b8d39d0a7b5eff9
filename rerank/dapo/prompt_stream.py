"""The order of prompts: seeded, and the same for any number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rerank.rows import PromptedRow, Prompter, RankingRow, shuffle


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompted row in one of the epochs."""

    asked: PromptedRow
    epoch: int


@dataclass
class PromptStream:
    """Rows epoch by epoch without an end, each epoch a permutation of all of them that follows from the seed.

    Attributes:
        rows: To train on.
        prompter: Writes their prompts.
        seed: Of the order.
        max_completion_tokens: Token limit of a completion.
        shuffle_candidates: Show the candidates of every epoch in another order; they keep their first-stage ranks.
    """

    rows: Sequence[RankingRow]
    prompter: Prompter
    seed: int
    max_completion_tokens: int
    shuffle_candidates: bool = False

    def __post_init__(self) -> None:
        self.rows = sorted(self.rows, key=lambda row: row.row_id)

    def take(self, first: int, count: int) -> list[TrainingPrompt]:
        """`count` prompts from number `first` on."""
        return [self._prompt(*divmod(number, len(self.rows))) for number in range(first, first + count)]

    def ask(self, row: RankingRow) -> PromptedRow:
        """The row with its prompt."""
        return self.prompter.ask(row, self.max_completion_tokens)

    def _prompt(self, epoch: int, place: int) -> TrainingPrompt:
        row = self.rows[_order(self.seed, epoch, len(self.rows))[place]]
        return TrainingPrompt(self.ask(shuffle(row, self.seed, epoch) if self.shuffle_candidates else row), epoch)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
