"""Would a lazy policy out-earn an honest one? `rerank probe RECIPE.yaml` asks a recipe's rewards, before training.

No model is needed: policies that copy, shuffle, cut off or write junk (`policies`) answer the dapo stage's own
training rows (`rows`) and are paid by the recipe's own rewards, conditions and weights. The verdict falls on the
rows whose target is not first already: there a policy without rank gain should earn little of what the oracle earns.

D draws, N rows, R rewards.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank import scoring
from rerank.launch import recipe
from rerank.probe.policies import POLICIES, RANDOM, Policy, input_order, random_order
from rerank.probe.rows import ProbeRow, read_rows, reward_columns
from rerank.prompts import parse_completion
from rerank.results.tables import NO_VALUE, number, percent
from rerank.rollouts.metrics import dapo_keys
from rerank.scoring import RANK_GAIN, Reward

if TYPE_CHECKING:
    from rich.table import Table

NUM_ROWS, MAX_SHARE = 500, 0.25
GROUP_SIZE = 8  # TRL's num_generations
SAME = 1e-9  # rewards that differ by less are equal
REWARD_FILE_KEYS = {"rewards", "outcome"}  # a file with no other keys is no recipe of a run
COLUMNS = ("rank\ngain", "reward", "spread", "of the\noracle", "above\nno-op", "useful\nno-op", "useful\nrandom")
CAPTION = (
    "Rank gain: mean places by which the target rises, – for no ranking. Above no-op: rows in which it earns more "
    "than the input order. Useful: groups, half from the policy and half from the input order or random orders, that "
    "differ in the recipe's outcome; others are discarded. If first: its reward where the target is first already."
)


@dataclass(frozen=True)
class Outcome:
    """The earnings of one policy. Means are over rows whose target is not first, but for `reward_if_first`.

    Attributes:
        rank_gain: Mean places by which the target rises; None for what is no ranking.
        spread: Standard deviation of its reward over rows.
        above_no_op: Share of rows in which it earns more than the input order.
        useful_with_no_op: Share of groups, half from it and half from the input order, whose outcomes differ.
        useful_with_random: The same with random orders as the other half.
        reward_if_first: Its reward where the target is first already; None without such rows.
        parts: Mean of each reward after its condition and weight.
    """

    policy: str
    rank_gain: float | None
    reward: float
    spread: float
    above_no_op: float
    useful_with_no_op: float
    useful_with_random: float
    reward_if_first: float | None
    parts: dict[str, float]

    @property
    def has_rank_gain(self) -> bool:
        """Whether the target rises on average."""
        return self.rank_gain is not None and self.rank_gain > 0


@dataclass(frozen=True)
class Probe:
    """The earnings of every policy, the oracle last, and the verdict."""

    outcomes: list[Outcome]
    rows: str  # which rows were used, in words
    max_share: float

    @property
    def oracle(self) -> Outcome:
        """The earnings of the best order."""
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
        """Whether no policy without rank gain earns too much."""
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
                f"no policy without rank gain earns more than {percent(self.max_share, 0)} of the oracle's reward; "
                f"the most is {percent(share, 0)} ({worst.policy})"
            )
        return (
            f"{worst.policy} {_movement(worst)} and yet earns {percent(share, 0)} of the oracle's reward "
            f"({worst.reward:.3f} of {self.oracle.reward:.3f}, the bar is {percent(self.max_share, 0)}), "
            f"{_source(worst)}; pay it only where the ranking helped, such as `condition: promoted_or_kept_first`"
        )


def _movement(outcome: Outcome) -> str:
    """The movement of the target, in words."""
    if outcome.rank_gain is None:
        return "is no ranking"
    return f"moves the target by {outcome.rank_gain:+.2f} places" if outcome.rank_gain else "wins the target no place"


def _source(outcome: Outcome) -> str:
    """The reward that pays a policy most."""
    paid = {name: value for name, value in outcome.parts.items() if value > 0}
    name = max(paid, key=paid.__getitem__)
    share = paid[name] / sum(paid.values())
    return f"all of it from {name}" if share == 1 else f"{percent(share, 0)} of it from {name}"


def read_keys(path: str | Path, run: str | None) -> dict[str, Any]:
    """The keys to probe: a dapo recipe's, or of a file of rewards and of the run's own dapo recipe, if it has one.

    Args:
        run: Folder of the run, in place of the recipe's `run_dir`.
    """
    keys = recipe.load(path) | {"rewards": scoring.read_rewards(str(path), str(path))}
    if run and set(keys) <= REWARD_FILE_KEYS:
        keys = dapo_keys(run) | keys
    keys |= {"run_dir": run} if run else {}
    if not keys.get("run_dir"):
        raise ValueError(f"{path}: run_dir is missing; add it, or give --run-dir")
    return keys


def probe(keys: Mapping[str, Any], num_rows: int = NUM_ROWS, max_share: float = MAX_SHARE) -> Probe:
    """Score all policies on the rows and with the rewards of a dapo recipe.

    Args:
        keys: The recipe's.
        num_rows: Number of rows, drawn at random; 0 for all.
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
    rewards = scoring.load_rewards(scoring.read_rewards(keys.get("rewards"), "the dapo recipe"))
    outcome = keys.get("outcome", RANK_GAIN)
    scoring.check_outcome(outcome, rewards)
    open_rows = [row for row in rows if row.row.target_rank != 1]
    first_rows = [row for row in rows if row.row.target_rank == 1]
    if not open_rows:
        raise ValueError(f"the target of all {len(rows)} rows is first already, so there is nothing to gain; add rows")
    outcomes = _outcomes(open_rows, first_rows, Scorer(rewards, outcome, max(1, group_size // 2)))
    return Probe(outcomes, f"{len(open_rows)} of {len(rows)} {what}, their target not first", max_share)


def problem(keys: Mapping[str, Any]) -> str | None:
    """Why DAPO should not start with this recipe, or None; never asked where the recipe says `probe: false`."""
    if keys.get("probe") is False:
        return None
    found = probe(keys)
    return None if found.passed else found.sentence


@dataclass(frozen=True)
class Draws:
    """The scores of one policy.

    Attributes:
        parts: (D, N, R) pay of each reward after condition and weight, 0 where it does not apply.
        outcomes: (D, N) what members of a useful group differ in, nan where it does not apply.
        gains: (D, N) places by which the target rises, below every number for no ranking.
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
        for seed in range(first_seed, first_seed + (self.num_draws if policy in RANDOM else 1)):
            texts = [policy(row, random.Random(f"{seed} {row.row.row_id}")) for row in rows]
            values.append(scoring.score(self.rewards, texts, reward_columns(rows, texts)).values)
            orders = [parse_completion(text, row.labels).order for row, text in zip(rows, texts, strict=True)]
            gains.append([row.row.rank_gain(order) for row, order in zip(rows, orders, strict=True)])
        paid = np.nan_to_num(values) * [reward.weight for reward in self.rewards]
        names = [RANK_GAIN, *(reward.name for reward in self.rewards)]
        outcomes = [gains, *np.moveaxis(np.array(values), -1, 0)][names.index(self.outcome)]
        return Draws(paid, np.array(outcomes), np.array(gains))


def _outcomes(open_rows: Sequence[ProbeRow], first_rows: Sequence[ProbeRow], scorer: Scorer) -> list[Outcome]:
    no_op, others = scorer.draw(input_order, open_rows), scorer.draw(random_order, open_rows, scorer.num_draws)
    alone, outcomes = replace(scorer, num_draws=1), []
    for policy in POLICIES:
        drawn = scorer.draw(policy, open_rows)
        means = drawn.parts.mean(axis=(0, 1)).tolist()
        outcomes.append(
            Outcome(
                policy=policy.__name__,
                rank_gain=float(drawn.gains.mean()) if np.isfinite(drawn.gains).all() else None,
                reward=float(drawn.totals.mean()),
                spread=float(drawn.totals.std()),
                above_no_op=float((drawn.totals > no_op.totals + SAME).mean()),
                useful_with_no_op=drawn.useful_share(no_op),
                useful_with_random=drawn.useful_share(others),
                reward_if_first=float(alone.draw(policy, first_rows).totals.mean()) if first_rows else None,
                parts={reward.name: mean for reward, mean in zip(scorer.rewards, means, strict=True)},
            )
        )
    return outcomes


def table(found: Probe) -> "Table":
    """One line for each policy, for a terminal of 80 columns."""
    from rich import box
    from rich.table import Table

    shown = Table(title=found.rows, caption=CAPTION, caption_justify="left", box=box.SIMPLE, padding=0)
    shown.add_column("policy", no_wrap=True)
    for column in (*COLUMNS, "if\nfirst"):
        shown.add_column(column, justify="right", no_wrap=True)
    for outcome in found.outcomes:
        shares = (found.share(outcome), outcome.above_no_op, outcome.useful_with_no_op, outcome.useful_with_random)
        shown.add_row(
            outcome.policy,
            NO_VALUE if outcome.rank_gain is None else f"{outcome.rank_gain:+.2f}",
            *(number(value, 3) for value in (outcome.reward, outcome.spread)),
            *(percent(share, 0) for share in shares),
            number(outcome.reward_if_first, 3),
        )
    return shown
