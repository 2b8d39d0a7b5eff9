"""Would a lazy policy out-earn an honest one? `rerank probe RECIPE.yaml` asks a recipe's rewards, before training.

No model is needed: policies that copy, shuffle, cut off or write junk (`policies.py`) answer the dapo stage's own
training rows (`rows.py`) and are paid by the recipe's own rewards, conditions and weights. The verdict falls on the
rows whose target is not first already: there a policy without rank gain should earn little of what the oracle earns.
DAPO's soft punishment of overlong completions (`overlong_tokens`) is left out; so short completions have none.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.plugins import RANK_GAIN, Reward, check_outcome, load_rewards
from rerank.probe.policies import POLICIES, RANDOM, Policy, input_order, random_order
from rerank.probe.rows import ProbeRow, read_rows, reward_columns
from rerank.prompts import parse_completion

NUM_ROWS, MAX_SHARE = 500, 0.25
GROUP_SIZE = 8  # TRL's num_generations
SAME = 1e-9  # rewards that differ by less are equal


@dataclass(frozen=True)
class Outcome:
    """What one policy earns. Means are over rows whose target is not first, but for `reward_if_first`."""

    policy: str
    rank_gain: float | None  # mean places by which the target rises; None for what is no ranking
    reward: float
    spread: float  # standard deviation over rows
    above_no_op: float  # share of rows in which it earns more than the input order
    useful_with_no_op: float  # share of groups, half from it and half from the input order, whose outcomes differ
    useful_with_random: float  # the same with random orders as the other half
    reward_if_first: float | None  # where the target is first already; None without such rows
    parts: dict[str, float]  # mean of each reward after its condition and weight

    @property
    def has_rank_gain(self) -> bool:
        return self.rank_gain is not None and self.rank_gain > 0


@dataclass(frozen=True)
class Probe:
    """What every policy earns, the oracle last, and the verdict."""

    outcomes: list[Outcome]
    rows: str  # which rows were used, in words
    max_share: float

    @property
    def oracle(self) -> Outcome:
        return self.outcomes[-1]

    def share(self, outcome: Outcome) -> float | None:
        """Its part of the oracle's reward; None where the oracle earns nothing."""
        return outcome.reward / self.oracle.reward if self.oracle.reward > SAME else None

    @property
    def worst(self) -> Outcome:
        """The policy without rank gain that earns most; of equals the first of the table."""
        return max((o for o in self.outcomes if not o.has_rank_gain), key=lambda outcome: round(outcome.reward, 9))

    @property
    def passed(self) -> bool:
        share = self.share(self.worst)
        return share is not None and share <= self.max_share

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        worst, share = self.worst, self.share(self.worst)
        if share is None:
            return f"the oracle earns {self.oracle.reward:.3f}, so that these rewards pay nobody for ranking better"
        if self.passed:
            return (
                f"no policy without rank gain earns more than {percent(self.max_share)} of the oracle's reward; "
                f"the most is {percent(share)} ({worst.policy})"
            )
        return (
            f"{worst.policy} {_movement(worst)} and yet earns {percent(share)} of the oracle's reward "
            f"({worst.reward:.3f} of {self.oracle.reward:.3f}, the bar is {percent(self.max_share)}), "
            f"{_source(worst)}; pay it only where the ranking helped, such as `when: promoted_or_kept_first`"
        )


def percent(share: float) -> str:
    """A share for a sentence or a table cell."""
    return f"{100 * share:.0f} %"


def _movement(outcome: Outcome) -> str:
    """What a policy does to the target."""
    if outcome.rank_gain is None:
        return "is no ranking"
    return f"moves the target by {outcome.rank_gain:+.2f} places" if outcome.rank_gain else "wins the target no place"


def _source(outcome: Outcome) -> str:
    """Which reward pays a policy most."""
    paid = {name: value for name, value in outcome.parts.items() if value > 0}
    name = max(paid, key=paid.__getitem__)
    share = paid[name] / sum(paid.values())
    return f"all of it from {name}" if share == 1 else f"{percent(share)} of it from {name}"


def probe(keys: Mapping[str, Any], num_rows: int = NUM_ROWS, max_share: float = MAX_SHARE) -> Probe:
    """Score all policies on the rows and with the rewards of a dapo recipe.

    Args:
        keys: The recipe's.
        num_rows: How many rows, drawn at random; 0 for all.
        max_share: The part of the oracle's reward that a policy without rank gain may earn, in [0, 1].

    Raises:
        FileNotFoundError: When the stages before are missing.
        ValueError: On a bad reward, naming it and the row, or when no row leaves anything to gain.
    """
    if num_rows < 0:
        raise ValueError(f"rows is {num_rows} but must be at least 1, or 0 for all")
    if not 0 <= max_share <= 1:
        raise ValueError(f"max-share is {max_share} but must be from 0 to 1, such as {MAX_SHARE}")
    group_size = keys.get("num_generations", GROUP_SIZE)
    if type(group_size) is not int or group_size < 2:
        raise ValueError(f"num_generations is {group_size!r} but must be an integer of at least 2")
    rows, what = read_rows(keys, num_rows)
    rewards = load_rewards(keys.get("rewards") or [], tuple(rows[0].columns))
    open_rows = [row for row in rows if row.target_rank > 1]
    first_rows = [row for row in rows if row.target_rank == 1]
    if not open_rows:
        raise ValueError(f"the target of all {len(rows)} rows is first already, so there is nothing to gain; add rows")
    outcome = keys.get("outcome", RANK_GAIN)
    check_outcome(outcome, rewards)
    outcomes = _outcomes(open_rows, first_rows, rewards, group_size, outcome)
    return Probe(outcomes, f"{len(open_rows)} of {len(rows)} {what}, their target not first", max_share)


def problem(keys: Mapping[str, Any]) -> str | None:
    """Why DAPO should not start with this recipe, or None; never asked where the recipe says `probe: false`."""
    if keys.get("probe") is False:
        return None
    found = probe(keys)
    return None if found.passed else found.sentence


def _outcomes(
    open_rows: Sequence[ProbeRow],
    first_rows: Sequence[ProbeRow],
    rewards: Sequence[Reward],
    group_size: int,
    outcome: str,
) -> list[Outcome]:
    num_draws = max(1, group_size // 2)
    weights = {reward.name: reward.weight for reward in rewards}
    no_op = _draws(input_order, open_rows, rewards, num_draws)
    no_op_total = sum(_paid(no_op, weights).values())
    others = _draws(random_order, open_rows, rewards, num_draws, first_seed=num_draws)
    outcomes = []
    for policy in POLICIES:
        values = _draws(policy, open_rows, rewards, num_draws)
        parts, gains = _paid(values, weights), values[RANK_GAIN]
        totals = sum(parts.values())
        if_first = sum(_paid(_draws(policy, first_rows, rewards, 1), weights).values()).mean() if first_rows else None
        outcomes.append(
            Outcome(
                policy=policy.__name__,
                rank_gain=float(gains.mean()) if np.isfinite(gains).all() else None,
                reward=float(totals.mean()),
                spread=float(totals.std()),
                above_no_op=float((totals > no_op_total + SAME).mean()),
                useful_with_no_op=_useful_share(values[outcome], no_op[outcome]),
                useful_with_random=_useful_share(values[outcome], others[outcome]),
                reward_if_first=None if if_first is None else float(if_first),
                parts={name: float(values.mean()) for name, values in parts.items()},
            )
        )
    return outcomes


def _draws(
    policy: Policy, rows: Sequence[ProbeRow], rewards: Sequence[Reward], num_draws: int, first_seed: int = 0
) -> dict[str, np.ndarray]:
    """Of each reward its values (nan where it does not apply), and rank_gain; each (draws, rows).

    A policy that is not random writes the same in each draw, so that one is enough.
    """
    seeds = range(first_seed, first_seed + (num_draws if policy in RANDOM else 1))
    parts: dict[str, list[np.ndarray]] = {reward.name: [] for reward in rewards}
    gains = []
    for seed in seeds:
        completions = [policy(row, random.Random(f"{seed} {row.columns['row_id']}")) for row in rows]
        columns = reward_columns(rows, completions)
        for reward in rewards:
            parts[reward.name].append(np.array(reward(completions=completions, **columns), dtype=float))
        gains.append([_places_won(row, text) for row, text in zip(rows, completions, strict=True)])
    return {RANK_GAIN: np.array(gains), **{name: np.stack(values) for name, values in parts.items()}}


def _paid(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """What each reward pays; where it does not apply, TRL leaves it out of the sum."""
    return {name: weight * np.nan_to_num(values[name]) for name, weight in weights.items()}


def _places_won(row: ProbeRow, text: str) -> float:
    """Places by which the target rises, below every rank for what is no ranking."""
    order = parse_completion(text, row.labels).order
    if order is None:
        return -np.inf
    target = row.columns["first_stage_ranks"].index(row.target_rank)
    return row.target_rank - (order.index(target) + 1)


def _useful_share(outcomes: np.ndarray, others: np.ndarray) -> float:
    """The share of rows in which the outcomes of a group of both halves, (draws, rows) each, differ."""
    members = np.concatenate([outcomes, others])
    return float((np.fmax.reduce(members) > np.fmin.reduce(members)).mean())
