"""Stored rollouts under other rewards: what would have been paid, learnt from and kept, without a model.

    rerank replay RUN_DIR --rewards OTHER.yaml

Rewards see the columns that they see in training (`rewards/__init__.py`), read from the rollouts. Advantages are
scaled as TRL's GRPOTrainer does it (`sum_then_normalize`, `scale_rewards`).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rerank.launch import recipe
from rerank.plugins import parameters
from rerank.rollouts.metrics import SAME_REWARD, dapo_keys, rank_gains, reward_values, reward_weights
from rerank.rollouts.schema import GROUP_KEYS
from rerank.rollouts.store import open_rollouts
from rerank.rows import column_names
from rerank.scoring import (
    RANK_GAIN,
    Reward,
    check_aggregation,
    check_outcome,
    choose_outcome,
    has_several_positives,
    load_rewards,
    main_reward,
    read_rewards,
    total,
)
from rerank.scoring import score as score_rewards

SCALE_REWARDS = "group"  # DapoConfig's default
READ_KEYS = ("rewards", "scale_rewards", "outcome", "multi_objective_aggregation")
ROUNDING = 1e-3  # advantages below are 0: what rounding leaves of a 32-bit total, over 1e-4
BATCH_SIZE = 4096
GROUP = list(GROUP_KEYS)
SIDES = ("stored", "new")


@dataclass(frozen=True)
class Scoring:
    """The rewards of a recipe and how they are used.

    Attributes:
        rewards: The functions with their weights.
        scale_rewards: The scale of advantages.
        outcome: What the members of a group that is learnt from differ in: a reward's name, or rank_gain; None: by
            the rows (`scoring.choose_outcome`).
    """

    rewards: list[Reward]
    scale_rewards: str
    outcome: str | None


def read_scoring(path: str | Path, run_dir: str | Path) -> Scoring:
    """The rewards of a dapo recipe, or of any YAML file with `rewards`, and its `scale_rewards` and `outcome`.

    Args:
        run_dir: Whose dapo stage had the scale and the outcome that the file leaves open.
    """
    keys, rewards = recipe.load(path), load_rewards(read_rewards(str(path), str(path)))
    for key in keys:
        near = difflib.get_close_matches(str(key), READ_KEYS, n=1, cutoff=0.8)
        if near and key not in READ_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {near[0]}?")
    of_run = dapo_keys(run_dir)
    scale = keys.get("scale_rewards", of_run.get("scale_rewards", SCALE_REWARDS))
    if isinstance(scale, bool):
        scale = "group" if scale else "none"
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"{path}: scale_rewards is {scale!r}; choose group, batch or none")
    check_aggregation(keys, str(path))
    outcome = keys.get("outcome", of_run.get("outcome"))
    try:
        check_outcome(outcome, rewards)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Scoring(rewards, scale, outcome)


def rescore(run_dir: str | Path, scoring: Scoring) -> pd.DataFrame:
    """Every stored rollout with what it was worth and would be worth, in the order of the store.

    Returns:
        Columns step, round, group, member (its place in the group, from 1), row_id, kept; `reward`, `advantage`,
        `differs` (whether the totals of the group's members do) and `useful` (whether their outcomes do, so that
        dynamic sampling keeps the group), each as `stored/...` and `new/...`; `stored/NAME` and `new/NAME` of each
        reward, NaN where it does not apply; and sign_changes.

    Raises:
        ValueError: When the run has no readable rollouts, or they lack a column that a reward needs.
    """
    opened = open_rollouts(run_dir)
    for reward in scoring.rewards:
        _check_columns(reward, opened.absent, run_dir)
    columns = [name for name in column_names() if name not in opened.absent]
    others = ["kept", "discard_reason", "prompt", "completion", "completion_ids", "reward", "advantage"]
    others += ["reward_components", "positive_rank", "positive_rank_after"]
    table = opened.read(list(dict.fromkeys([*GROUP, *others, *columns])))
    masked = table["discard_reason"].to_pandas() == "truncated"  # these have neither reward nor outcome
    values = {name: np.where(masked, np.nan, found) for name, found in score(table, scoring.rewards, columns).items()}
    frame: pd.DataFrame = table.select([*GROUP, "row_id", "kept"]).to_pandas()
    frame.insert(3, "member", frame.groupby(GROUP).cumcount() + 1)
    frame["stored/reward"] = table["reward"].to_pandas()
    weights = [reward.weight for reward in scoring.rewards]
    frame["new/reward"] = total(np.stack(list(values.values()), axis=1), weights)
    frame["stored/advantage"] = table["advantage"].to_pandas()
    frame["new/advantage"] = advantages(frame, "new/reward", scoring.scale_rewards)
    signs = []
    for side in SIDES:
        grouped, advantage = frame.groupby(GROUP)[f"{side}/reward"], frame[f"{side}/advantage"]
        frame[f"{side}/differs"] = grouped.transform("max") - grouped.transform("min") > SAME_REWARD
        signs.append(np.sign(advantage).where(frame[f"{side}/differs"] & (advantage.abs() > ROUNDING), 0))
    frame["sign_changes"] = signs[0] * signs[1] < 0
    gains = {RANK_GAIN: np.where(masked, np.nan, np.nan_to_num(rank_gains(table), nan=-np.inf))}  # -inf: no ranking
    stored, relevance = reward_values(table), table["relevance"].to_pylist()
    frame["stored/useful"] = _differ(frame, (gains | stored).get(_stored_outcome(run_dir, relevance)))
    outcome = choose_outcome(scoring.outcome, scoring.rewards, has_several_positives(relevance))
    frame["new/useful"] = _differ(frame, (gains | values)[outcome])
    parts = [pd.DataFrame(stored).add_prefix("stored/"), pd.DataFrame(values).add_prefix("new/")]
    return pd.concat([frame, *parts], axis=1)


def _check_columns(reward: Reward, absent: Sequence[str], run_dir: str | Path) -> None:
    """Refuse a reward that needs a column which an older store lacks."""
    for function in filter(None, (reward.function, reward.condition)):
        for name, parameter in parameters(function).items():
            if name in absent and parameter.default is parameter.empty:
                raise ValueError(
                    f"reward {reward.name} needs the column {name}, which the rollouts of {run_dir} lack: an older "
                    "version stored them; leave that reward out, or run the dapo stage again"
                )


def _stored_outcome(run_dir: str | Path, relevance: Sequence[Sequence[float]]) -> str:
    """The outcome that the run's dapo stage had; rank_gain where no recipe tells."""
    given = dapo_keys(run_dir).get("outcome")
    weights = reward_weights(run_dir) if given is None and has_several_positives(relevance) else None
    return main_reward(weights) if weights else str(given or RANK_GAIN)


def _differ(frame: pd.DataFrame, outcomes: np.ndarray | None) -> pd.Series:
    """Whether those of the outcomes of a group's members that apply differ, exactly, as dynamic sampling asks."""
    if outcomes is None:
        return pd.Series(False, index=frame.index)
    groups = [frame[name] for name in GROUP]
    return pd.Series(outcomes, index=frame.index).groupby(groups).transform("nunique") > 1


def score(table: pa.Table, rewards: Sequence[Reward], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The value of each reward for every rollout, NaN where it does not apply.

    Args:
        names: The columns that rewards get, beside `prompts` and `completion_ids`.
    """
    values = []
    for start in range(0, table.num_rows, BATCH_SIZE):
        batch = table.slice(start, BATCH_SIZE)
        columns = {name: batch[name].to_pylist() for name in (*names, "completion_ids")}
        columns["prompts"] = batch["prompt"].to_pylist()
        values.append(score_rewards(rewards, batch["completion"].to_pylist(), columns).values)
    return dict(zip([reward.name for reward in rewards], np.concatenate(values).T, strict=True))


def advantages(frame: pd.DataFrame, reward: str, scale_rewards: str) -> pd.Series:
    """TRL's advantages (`sum_then_normalize`): the total minus its group's mean, over a standard deviation + 1e-4.

    Args:
        frame: Rollouts with GROUP and kept.
        reward: The column of totals.
        scale_rewards: `group`: the deviation of the group, `batch`: of the step's rollouts that were trained on,
            `none`: 1.
    """
    centred = frame[reward] - frame.groupby(GROUP)[reward].transform("mean")
    if scale_rewards != "none":
        is_batch = scale_rewards == "batch"
        scaled = frame[reward].where(frame["kept"]) if is_batch else frame[reward]
        deviation = scaled.groupby([frame[name] for name in (["step"] if is_batch else GROUP)]).transform("std")
        centred = centred / (deviation + 1e-4)
    return centred.fillna(0.0)  # as TRL does where no reward applies


def print_summary(frame: pd.DataFrame, top: int, console: Console) -> None:
    """Print what changes overall, and the `top` rollouts whose advantage turns its sign by the most.

    Raises:
        ValueError: When `top` is negative.
    """
    if top < 0:
        raise ValueError(f"top is {top} but must be at least 0")
    groups, turned = frame.drop_duplicates(GROUP), frame[frame["sign_changes"]]
    console.print(_summary_table(frame, groups))
    changes = {"differs": "gain a difference in total and {} lose it", "useful": "be kept anew and {} no more"}
    for column, what in changes.items():
        gained = int((groups[f"new/{column}"] & ~groups[f"stored/{column}"]).sum())
        lost = int((groups[f"stored/{column}"] & ~groups[f"new/{column}"]).sum())
        console.print(f"Of {len(groups):,} groups {gained:,} would {what.format(f'{lost:,}')}.")
    share = len(turned) / len(frame)
    console.print(f"{len(turned):,} of {len(frame):,} rollouts ({share:.1%}) change the sign of their advantage.")
    if top and len(turned):
        console.print(_turned_table(turned, top))


def _summary_table(frame: pd.DataFrame, groups: pd.DataFrame) -> Table:
    """Means of each reward and of the totals, and numbers of groups, stored and new."""

    def mean(name: str) -> str:
        value = frame[name].mean() if name in frame else np.nan
        return "-" if np.isnan(value) else f"{value:.4f}"

    table = Table("", *SIDES)
    rewards = dict.fromkeys(str(name).partition("/")[2] for name in frame if "/" in str(name))
    for name in rewards:
        if name not in ("reward", "advantage", "differs", "useful"):
            table.add_row(f"{name}, mean", *(mean(f"{side}/{name}") for side in SIDES))
    table.add_row("total, mean", *(mean(f"{side}/reward") for side in SIDES))
    table.add_row("total, standard deviation", *(f"{frame[f'{side}/reward'].std():.4f}" for side in SIDES))
    table.add_row("advantage, mean magnitude", *(f"{frame[f'{side}/advantage'].abs().mean():.4f}" for side in SIDES))
    for column, what in (("differs", "groups whose totals differ"), ("useful", "groups that dynamic sampling keeps")):
        table.add_row(what, *(f"{groups[f'{side}/{column}'].sum():,}" for side in SIDES))
    return table


def _turned_table(turned: pd.DataFrame, top: int) -> Table:
    """The rollouts whose advantage moves furthest."""
    distance = (turned["new/advantage"] - turned["stored/advantage"]).abs()
    table = Table("step", "round", "group", "rollout", "row", "total", "new", "advantage", "new")
    for _, row in turned.loc[distance.sort_values(ascending=False, kind="stable").index[:top]].iterrows():
        places = [str(row[name]) for name in (*GROUP, "member", "row_id")]
        numbers = [f"{row[f'{side}/{name}']:.3f}" for name in ("reward", "advantage") for side in SIDES]
        table.add_row(*places, *numbers)
    return table
