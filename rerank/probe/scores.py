"""Policies paid by the rewards of a recipe, and the scale of what they earn.

D draws, N rows, R rewards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rerank import scoring
from rerank.probe import policies
from rerank.probe.policies import Policy
from rerank.probe.rows import ProbeRow, reward_columns
from rerank.prompts import parse_completion
from rerank.scoring import RANK_GAIN, Reward

ROWS_AT_ONCE = 2000  # whose completions the parser remembers while all rewards read them
NUM_RANDOM = 100  # random orders of each row, whose mean is the zero
SAME = 1e-9  # rewards that differ by less are equal


@dataclass(frozen=True)
class Draws:
    """The scores of one policy.

    Attributes:
        parts: (D, N, R) pay of each reward after condition and weight, 0 where it does not apply.
        outcomes: (D, N) what members of a useful group differ in, nan where it does not apply.
        gains: (D, N) places by which the best-placed positive rises, below every number for no ranking.
    """

    parts: np.ndarray
    outcomes: np.ndarray
    gains: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """(D, N) sums of what is paid."""
        return np.asarray(self.parts.sum(axis=2))

    def useful_share(self, others: "Draws") -> float:
        """The share of rows in which the outcomes of a group of both halves differ."""
        members = np.concatenate([self.outcomes, others.outcomes])
        return float((np.fmax.reduce(members) > np.fmin.reduce(members)).mean())


@dataclass(frozen=True)
class Scorer:
    """Draws of policies, scored by the rewards of a recipe and its outcome."""

    rewards: list[Reward]
    outcome: str
    num_draws: int

    def draw(self, policy: Policy, rows: Sequence[ProbeRow], first_seed: int = 0) -> Draws:
        """Completions of every row; one draw of a policy that is not random, which writes the same in each."""
        values, gains = [], []
        for seed in range(first_seed, first_seed + (self.num_draws if policy in policies.RANDOM else 1)):
            starts = range(0, len(rows), ROWS_AT_ONCE)
            parts = [self._once(policy, rows[start : start + ROWS_AT_ONCE], seed) for start in starts]
            values.append(np.concatenate([value for value, _ in parts]))
            gains.append(np.concatenate([gain for _, gain in parts]))
        paid = np.nan_to_num(values) * [reward.weight for reward in self.rewards]
        names = [RANK_GAIN, *(reward.name for reward in self.rewards)]
        outcomes = [gains, *np.moveaxis(np.array(values), -1, 0)][names.index(self.outcome)]
        return Draws(paid, np.array(outcomes), np.array(gains))

    def _once(self, policy: Policy, rows: Sequence[ProbeRow], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(D, rewards) values and (D,) rank gains of one completion of each row."""
        texts = [policy(row, random.Random(f"{seed} {row.row.row_id}")) for row in rows]
        values = scoring.score(self.rewards, texts, reward_columns(rows, texts)).values
        pairs = zip(rows, texts, strict=True)
        gains = [row.row.rank_gain(parse_completion(text, row.labels, row.top_k).order) for row, text in pairs]
        return values, np.array(gains, dtype=float)


@dataclass(frozen=True)
class Scale:
    """The zero and the one of shares: means of random orders and of the oracle, of reward and of rank gain."""

    random_reward: float
    oracle_reward: float
    random_gain: float
    oracle_gain: float

    @classmethod
    def of(cls, scorer: Scorer, rows: Sequence[ProbeRow]) -> "Scale":
        """On these rows."""
        drawn = replace(scorer, num_draws=NUM_RANDOM).draw(policies.random_order, rows)
        best = scorer.draw(policies.oracle, rows)
        means = (float(values.mean()) for values in (drawn.totals, best.totals, drawn.gains, best.gains))
        return cls(*means)

    def share(self, reward: float) -> float | None:
        """None where the oracle earns no more than random orders."""
        lead = self.oracle_reward - self.random_reward
        return float(reward - self.random_reward) / lead if lead > SAME else None

    def gain_share(self, gain: float) -> float:
        """Of a mean rank gain; the oracle gains on every row."""
        return (gain - self.random_gain) / (self.oracle_gain - self.random_gain)


def best_blind_order(scorer: Scorer, rows: Sequence[ProbeRow]) -> Policy:
    """The policy that shows every list in one and the same order of its places, the best by these rewards.

    An assignment problem: of each place shown to a place in the ranking, by the rewards of the rows with a positive
    (`policies.positive_of`) shown there when it is put there, in a shorter list last, and the others keep their order.
    It is solved once for rows of all lengths, since an order for each length would fit the few rows of that length; a
    list takes the order of the places that it has.
    """
    from scipy.optimize import linear_sum_assignment

    shown = np.array([policies.positive_of(row) for row in rows])
    lengths = np.array([len(row.labels) for row in rows])
    value = np.zeros((lengths.max(), lengths.max()))  # (place shown, place in the ranking)
    paid = np.zeros(len(rows))
    for place in range(lengths.max()):
        long = np.flatnonzero(lengths > place)
        paid[long] = scorer.draw(partial(policies.positive_to, place), [rows[row] for row in long]).totals[0]
        value[:, place] = [paid[shown == of].sum() for of in range(len(value))]
    order = np.argsort(linear_sum_assignment(-value)[1]).tolist()

    def best_fixed_order(row: ProbeRow, rng: random.Random) -> str:
        return policies.answer(row, [place for place in order if place < len(row.labels)])

    return best_fixed_order
