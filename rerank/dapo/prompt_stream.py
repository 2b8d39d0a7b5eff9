"""The order in which prompts are drawn: seeded, and the same for any number of processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.sft import RowEncoder

REWARD_COLUMNS = (
    "row_id",
    "user",
    "history",
    "candidates",
    "relevance",
    "candidate_labels",
    "first_stage_ranks",
    "target_rank",
)
PER_CANDIDATE = ("candidates", "relevance", "features", "first_stage_scores")


@dataclass(frozen=True)
class DrawnPrompt:
    """A row as the trainer takes it (`prompt` and the columns that rewards get), and how often it was drawn before."""

    row: Mapping[str, Any]
    draw: int


class PromptStream:
    """Rows drawn epoch by epoch, each epoch a permutation of all of them that follows from the seed.

    Args:
        rows: Rows of the candidates stage.
        shuffle_candidates: Show the candidates of every draw in another order; `first_stage_ranks` keeps theirs.

    Attributes:
        num_drawn: Prompts drawn so far, all that a resumed run must know.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], encoder: RowEncoder, seed: int, shuffle_candidates: bool = False
    ) -> None:
        self.rows, self.encoder, self.seed = sorted(rows, key=lambda row: row["row_id"]), encoder, seed
        self.shuffle_candidates, self.num_drawn = shuffle_candidates, 0
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def draw(self, count: int) -> list[DrawnPrompt]:
        """The next `count` prompts."""
        numbers = range(self.num_drawn, self.num_drawn + count)
        self.num_drawn += count
        return [self._prompt(*divmod(number, len(self.rows))) for number in numbers]

    def _prompt(self, epoch: int, place: int) -> DrawnPrompt:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        row = self.rows[self._order[place]]
        if not self.shuffle_candidates:
            return DrawnPrompt(prompt_row(row, self.encoder), epoch)
        shown = np.random.default_rng([self.seed, epoch, row["row_id"]]).permutation(len(row["candidates"]))
        return DrawnPrompt(prompt_row(row, self.encoder, shown.tolist()), epoch)


def prompt_row(row: Mapping[str, Any], encoder: RowEncoder, shown: Sequence[int] | None = None) -> dict[str, Any]:
    """A row as the trainer takes it, its candidates in first-stage order, or in that of `shown` (places in it)."""
    ranks = list(range(1, len(row["candidates"]) + 1))  # the candidates stage keeps first-stage order
    if shown is not None:
        row = {**row, **{name: [row[name][place] for place in shown] for name in PER_CANDIDATE if name in row}}
        ranks = [place + 1 for place in shown]
    made = {name: row[name] for name in ("row_id", "user", "history", "candidates", "relevance")}
    best = max(row["relevance"])
    target_rank = min(rank for rank, gain in zip(ranks, row["relevance"], strict=True) if gain == best)
    columns = {"candidate_labels": encoder.labels(row), "first_stage_ranks": ranks, "target_rank": target_rank}
    return {"prompt": encoder.prompt(row), **made, **columns}
