"""A training as it is watched: a line beside the progress bar, and groups of rollouts as traces of trackio.

Traces have the keys of TRL's asynchronous GRPO trainer (`log_rollout_traces` in
trl/experimental/async_grpo/async_grpo_trainer.py of TRL 1.16) and some of our own.
"""

from collections.abc import Sequence

import numpy as np
from transformers import ProgressCallback

from rerank.dapo.groups import Group, Rollout, record

GAP = "sampling/sampling_logp_difference/mean"
LARGEST_GAP = "sampling/sampling_logp_difference/max"
SHOWN = (  # of all that is logged, what a step prints beside its progress bar
    *("loss", "rollouts/reward", "rollouts/rank_gain", "rollouts/copy_rate", "rollouts/no_ranking"),
    *("groups/share_useful", GAP, "step_time"),
)
OWN_KEYS = (  # columns of the store
    *("kept", "discard_reason", "outcome", "round", "epoch", "row_id", "target_rank", "target_rank_after"),
    *("positive_rank", "positive_rank_after", "failure", "truncated"),
)


class ShortProgress(ProgressCallback):
    """The progress bar of transformers, which prints a few figures of a step in place of a hundred."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name.rpartition("sampling/")[2]: logs[name] for name in SHOWN if name in logs}
        super().on_log(args, state, control, logs=shown or logs, **kwargs)


def log_traces(groups: Sequence[Group], step: int) -> None:
    """Log the rollouts of groups to trackio's current run, each as a trace."""
    import trackio

    traces = [
        trackio.Trace(messages(group, rollout), metadata(group, rollout))
        for group in groups
        for rollout in group.rollouts
    ]
    trackio.log({"rollouts": traces}, step=step)


def messages(group: Group, rollout: Rollout) -> list[dict[str, str]]:
    """The prompt, as the model reads it, and its completion."""
    prompt, text = group.prompt.asked.prompt, rollout.completion.text
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def metadata(group: Group, rollout: Rollout) -> dict[str, object]:
    """TRL's keys, then columns of the store by their names.

    `group_id` is the number of the prompt within the step, and `model_version` the step that it was sampled for:
    `group` and `step` of the store. Rewards that do not apply are absent, and what is discarded has no advantage.
    """
    totals = [member.total for member in group.rollouts if member.total is not None]
    stored = record(group, rollout, run="")
    return {
        "reward": rollout.total,
        "reward_std": float(np.std(totals)) if totals else None,
        **{f"rewards/{name}": value for name, value in rollout.rewards.items()},
        "advantage": rollout.advantage,
        "group_id": group.number,
        "model_version": group.step,
        "prompt_tokens": len(rollout.completion.prompt_ids),
        "completion_tokens": len(rollout.completion.ids),
        **{name: stored[name] for name in OWN_KEYS},
    }
