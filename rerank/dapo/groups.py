"""Groups of completions of one prompt, and which of them a policy can learn from.

DAPO (arXiv:2503.14476, eq. 11) trains on groups whose answers are neither all right nor all wrong. A ranking is not
right or wrong, so a group is useful when its members differ in a named outcome: exactly, not by a standard deviation,
which is hardly ever zero for a sum of shaped rewards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank.dapo.prompt_stream import DrawnPrompt


@dataclass
class Rollout:
    """One sampled completion of a prompt.

    Attributes:
        sampling_logps: Log-probability of each token by the engine that sampled it; None where it tells none.
        rewards: Value of each reward, nan where it does not apply.
        gates: Whether the condition of each reward held.
        order: The ranking it states, as positions into the shown candidates; None for no ranking.
        failure: Why it is no ranking; None for one.
        truncated: Whether the length limit cut it off.
        outcome: What members of a group must differ in; None where it does not apply.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str
    sampling_logps: list[float] | None
    rewards: list[float]
    gates: dict[str, bool]
    order: list[int] | None
    failure: str | None
    truncated: bool
    outcome: float | None = None


@dataclass
class Group:
    """The completions of one drawn prompt.

    Attributes:
        number: Which of the prompts drawn for the step it is, from 0.
        round: The sampling round of the step in which it was sampled, from 0.
    """

    drawn: DrawnPrompt
    rollouts: list[Rollout]
    number: int
    round: int

    def is_useful(self) -> bool:
        """Whether members differ in their outcome."""
        return len({rollout.outcome for rollout in self.rollouts} - {None}) > 1


def target_rank(row: Mapping[str, Any], order: Sequence[int] | None) -> int | None:
    """1-based place that a ranking gives the row's target, None without a ranking."""
    return None if order is None else order.index(row["first_stage_ranks"].index(row["target_rank"])) + 1


def rank_gain(drawn: DrawnPrompt, order: Sequence[int] | None) -> float:
    """Places that the target moved up; below every rank for a completion that is no ranking."""
    place = target_rank(drawn.row, order)
    return -math.inf if place is None else float(drawn.row["target_rank"] - place)


def split(groups: Sequence[Group], wanted: int) -> tuple[list[Group], list[Group], list[Group]]:
    """Useful groups that are wanted, those beyond, and the rest, each in the order sampled."""
    useful = [group for group in groups if group.is_useful()]
    return useful[:wanted], useful[wanted:], [group for group in groups if not group.is_useful()]


def prompts_to_draw(missing: int, share_useful: float, num_groups: int) -> int:
    """How many prompts should bring `missing` useful groups of the `num_groups` of a step; at most twice a step's.

    Args:
        share_useful: Of the groups sampled lately.
    """
    return min(2 * num_groups, math.ceil(missing / max(share_useful, missing / (2 * num_groups))))


def request_seed(seed: int, row_id: int, draw: int, member: int) -> int:
    """The seed of one completion: members of a group differ, and a second run samples the same."""
    return int(np.random.SeedSequence([seed, row_id, draw, member]).generate_state(1)[0])


def record(group: Group, member: int, run: str, step: int, components: Sequence[str], total: float) -> dict[str, Any]:
    """A rollout as the store takes it; `policy_logps`, `advantage` and `kept` are for the trainer to set."""
    row, rollout = group.drawn.row, group.rollouts[member]
    named = zip(components, rollout.rewards, strict=True)
    return {
        **{name: row[name] for name in ("row_id", "user", "history", "prompt", "relevance", "first_stage_ranks")},
        **{name: row[name] for name in ("candidates", "candidate_labels")},
        "run": run,
        "step": step,
        "round": group.round,
        "group": group.number,
        "target": row["candidates"][row["first_stage_ranks"].index(row["target_rank"])],
        "completion": rollout.completion,
        "completion_ids": rollout.completion_ids,
        "policy_logps": None,
        "sampling_logps": rollout.sampling_logps,
        "reward_components": {name: value for name, value in named if not math.isnan(value)},
        "reward_gates": rollout.gates,
        "reward": total,
        "advantage": None,
        "truncated": rollout.truncated,
        "failure": rollout.failure,
        "order": rollout.order,
        "target_rank_before": row["target_rank"],
        "target_rank_after": target_rank(row, rollout.order),
        "kept": True,
        "discard_reason": None,
    }
