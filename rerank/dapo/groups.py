"""Groups of completions of one prompt, and which of them a policy can learn from.

DAPO (arXiv:2503.14476, eq. 11) trains on groups whose answers are neither all right nor all wrong. A ranking is not
right or wrong, so a group is useful when its members differ in a named outcome: exactly, not by a standard deviation,
which is hardly ever zero for a sum of shaped rewards.
"""

import math
from dataclasses import dataclass

import numpy as np

from rerank.dapo.prompt_stream import TrainingPrompt
from rerank.rows import reward_columns


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        prompt_ids: Tokens of its prompt.
        ids: Its tokens.
        text: Its text without special tokens.
        sampling_logps: Log-probability of each token by the engine that sampled it; None where it tells none.
        truncated: Whether the token limit cut it off.
        seed: Of its sampling; None where the engine takes none.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    sampling_logps: list[float] | None
    truncated: bool
    seed: int | None = None


@dataclass
class Rollout:
    """A completion, its ranking and its scores.

    Attributes:
        rewards: Value of each reward that applies.
        conditions: Whether the condition of each reward holds.
        total: Weighted sum of the rewards; None where none applies.
        order: The ranking it states, as positions into the candidates shown; None for no ranking.
        failure: Why it is no ranking; None for one.
        outcome: Members of a useful group differ in it; None where it does not apply.
        masked: Whether it is left out of the loss, as the token limit cut it off.
        advantage: Once computed, of one that is trained on.
        policy_logps: Log-probability of each token by the model in training, alike.
    """

    completion: Completion
    rewards: dict[str, float]
    conditions: dict[str, bool]
    total: float | None
    order: list[int] | None
    failure: str | None
    outcome: float | None
    masked: bool = False
    advantage: float | None = None
    policy_logps: list[float] | None = None


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        step: Optimizer step that it was sampled for.
        round: Sampling round of the step, from 0.
        number: Of its prompt within the step, from 0.
        discard_reason: Why it is not trained on; None where it is.
    """

    prompt: TrainingPrompt
    rollouts: list[Rollout]
    step: int
    round: int
    number: int
    discard_reason: str | None = None

    def is_useful(self) -> bool:
        """Whether members differ in their outcome."""
        return len({rollout.outcome for rollout in self.rollouts} - {None}) > 1


def num_prompts(missing: int, share_useful: float, num_groups: int) -> int:
    """Number of prompts that should bring `missing` useful groups of the `num_groups` of a step; at most twice those.

    Args:
        missing: At least 1.
        share_useful: Of the groups sampled lately.
        num_groups: Of a step.
    """
    return min(2 * num_groups, math.ceil(missing / max(share_useful, missing / (2 * num_groups))))


def request_seed(seed: int, row_id: int, epoch: int, member: int) -> int:
    """The seed of one completion: members of a group differ, and a second run samples the same."""
    return int(np.random.SeedSequence([seed, row_id, epoch, member]).generate_state(1)[0])


def record(group: Group, rollout: Rollout, run: str) -> dict[str, object]:
    """A rollout of the group as the store takes it; `run` is the name of the run's folder."""
    columns = {name: values[0] for name, values in reward_columns([group.prompt.asked]).items()}
    row, completion = group.prompt.asked.row, rollout.completion
    return {
        "prompt": columns.pop("prompts"),
        **columns,
        "step": group.step,
        "run": run,
        "round": group.round,
        "group": group.number,
        "epoch": group.prompt.epoch,
        "seed": completion.seed,
        "target": None if row.target is None else row.candidates[row.target],
        "completion": completion.text,
        "completion_ids": completion.ids,
        "policy_logps": rollout.policy_logps,
        "sampling_logps": completion.sampling_logps,
        "reward_components": rollout.rewards,
        "conditions": rollout.conditions,
        "reward": rollout.total,
        "outcome": rollout.outcome,
        "advantage": rollout.advantage,
        "truncated": completion.truncated,
        "failure": rollout.failure,
        "order": rollout.order,
        "target_rank_after": row.place_of_target(rollout.order),
        "positive_rank": row.positive_rank,
        "positive_rank_after": row.place_of_positive(rollout.order),
        "kept": group.discard_reason is None and not rollout.masked,
        "discard_reason": "truncated" if rollout.masked else group.discard_reason,
    }
