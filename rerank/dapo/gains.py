"""Reward gained over a training, from its own rollouts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rerank.rollouts import store
from rerank.rollouts.metrics import fifths

Gains = dict[str, float | list[float] | None]


def gain_over_training(rewards: Sequence[float]) -> Gains:
    """Mean reward of the first and last fifth of the steps, and a 95 % interval of the difference (Welch)."""
    from scipy.stats import ttest_ind

    first, last = fifths(np.asarray(rewards))
    gain: Gains = {"reward_first_fifth": float(first.mean()), "reward_last_fifth": float(last.mean())}
    if len(first) < 2:
        return {**gain, "reward_gain_interval": None}
    interval = ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    return {**gain, "reward_gain_interval": [float(interval.low), float(interval.high)]}


def gain_at_equal_ranks(rollouts: Path) -> Gains:
    """The gain of `gain_over_training`, had both fifths of the steps the same mix of rows, and its 95 % interval.

    A step's mean reward says as much of its rows as of the policy: where the target stands first there is nothing to
    gain. So groups are compared with groups whose target had the same first-stage rank, and the differences averaged
    by how frequent a rank is in all steps (post-stratification; normal interval, groups of a rank independent). Ranks
    with fewer than two groups in either fifth are left out.
    """
    from scipy.stats import norm

    table = store.read_rollouts(rollouts, ["step", "group", "target_rank", "reward"]).to_pandas()
    groups = table.groupby(["step", "group"], as_index=False).mean()
    chosen = fifths(np.unique(groups["step"]))
    parts = [groups[groups["step"].isin(part)].groupby("target_rank") for part in chosen]
    (mean, variance, size), (last_mean, last_variance, last_size) = (
        (part["reward"].mean(), part["reward"].var(), part["reward"].size()) for part in parts
    )
    difference, squared_error = last_mean - mean, variance / size + last_variance / last_size
    known = squared_error.dropna().index
    if known.empty:
        return {"reward_gain_at_equal_ranks": None, "reward_gain_at_equal_ranks_interval": None}
    shares = groups["target_rank"].value_counts()[known]
    shares = shares / shares.sum()
    gain, error = float((shares * difference).sum()), float(np.sqrt((shares**2 * squared_error).sum()))
    interval = [float(end) for end in norm.interval(0.95, gain, error)] if error > 0 else [gain, gain]
    return {"reward_gain_at_equal_ranks": gain, "reward_gain_at_equal_ranks_interval": interval}
