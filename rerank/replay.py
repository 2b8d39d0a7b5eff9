"""Stored rollouts under other rewards: what would have been paid, learnt from and kept, without a model.

    rerank replay RUN_DIR --rewards OTHER.yaml

Rewards see the columns that they see in training (`rewards/__init__.py`), read from the rollouts. Advantages are
scaled as TRL's GRPOTrainer does it (`sum_then_normalize`, `scale_rewards`).
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rerank import plugins, recipe, rollouts
from rerank.plugins import RANK_GAIN
from rerank.rollout_metrics import SAME_REWARD, dapo_keys, reward_values

STORED = {  # column of a reward -> column of the store
    **{name: name for name in ("row_id", "user", "history", "candidates", "relevance", "candidate_labels")},
    "first_stage_ranks": "first_stage_ranks",
    "target_rank": "target_rank_before",
}
SCALE_REWARDS = "group"  # DapoConfig's default
READ_KEYS = ("rewards", "overlong_tokens", "max_completion_length", "scale_rewards", "outcome", "invalid_reward")
ROUNDING = 1e-3  # advantages below are 0: what rounding leaves of a 32-bit total, over 1e-4
BATCH_SIZE = 4096
GROUP = ["step", "round", "group"]


@dataclass(frozen=True)
class Scoring:
    """What a recipe says of rewards.

    Attributes:
        rewards: The functions with their weights.
        scale_rewards: The scale of advantages.
        outcome: What the members of a group that is learnt from differ in: a reward's name, or rank_gain.
    """

    rewards: list[plugins.Reward]
    scale_rewards: str
    outcome: str


def read_scoring(path: str | Path, run_dir: str | Path) -> Scoring:
    """The rewards of a dapo recipe, or of any YAML file with `rewards`, and its `scale_rewards` and `outcome`.

    Args:
        run_dir: Whose dapo stage had the scale and the outcome that the file leaves open, and where the token limit
            stands when `overlong_tokens` needs one.
    """
    keys = recipe.load(path)
    for key in keys:
        near = difflib.get_close_matches(str(key), READ_KEYS, n=1, cutoff=0.8)
        if near and key not in READ_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {near[0]}?")
    if "rewards" not in keys:
        raise ValueError(
            f"{path} has no rewards; give a dapo recipe, or a file with `rewards:` as such a recipe has it"
        )
    rewards = plugins.load_rewards(keys["rewards"], tuple(STORED))
    if keys.get("overlong_tokens"):
        from trl.rewards import get_soft_overlong_punishment

        punishment = get_soft_overlong_punishment(_token_limit(keys, path, Path(run_dir)), keys["overlong_tokens"])
        rewards.append(plugins.Reward(punishment.__name__, punishment))
    of_run = dapo_keys(run_dir) or {}
    scale = keys.get("scale_rewards", of_run.get("scale_rewards", SCALE_REWARDS))
    if isinstance(scale, bool):
        scale = "group" if scale else "none"
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"{path}: scale_rewards is {scale!r}; choose group, batch or none")
    if keys.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise ValueError(f"{path}: replay knows sum_then_normalize only; remove multi_objective_aggregation")
    if keys.get("invalid_reward") is not None:
        raise ValueError(f"{path}: replay knows no invalid_reward; remove it to see what the rewards alone would pay")
    outcome = keys.get("outcome", of_run.get("outcome", RANK_GAIN))
    try:
        plugins.check_outcome(outcome, rewards)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Scoring(rewards, scale, outcome)


def _token_limit(keys: Mapping[str, Any], path: str | Path, run_dir: Path) -> int:
    if keys.get("max_completion_length"):
        return keys["max_completion_length"]
    for folder in ("dapo/model", "sft/model"):
        if (run_dir / folder / "generation.json").is_file():
            return json.loads((run_dir / folder / "generation.json").read_text())["max_completion_tokens"]
    raise ValueError(f"{path} has overlong_tokens but no max_completion_length, nor has {run_dir}; add it")


def replay(run_dir: str | Path, scoring: Scoring) -> pd.DataFrame:
    """Every stored rollout with what it was worth and would be worth, in the order of the store.

    Returns:
        Columns step, round, group, member (its place in the group, from 1), row_id, kept; `reward`, `advantage`,
        `differs` (whether the totals of the group's members do) and `useful` (whether their outcomes do, so that
        dynamic sampling keeps the group), each as `stored/...` and `new/...`; `stored/NAME` and `new/NAME` of each
        reward, NaN where it does not apply; and sign_changes.

    Raises:
        ValueError: When the run has no readable rollouts.
    """
    names = [*GROUP, "kept", "prompt", "completion", "completion_ids", "reward", "advantage", "reward_components"]
    table = rollouts.read_rollouts(run_dir, [*names, "target_rank_after", *STORED.values()])
    if not table.num_rows:
        raise ValueError(f"{run_dir} holds no rollouts; run the dapo stage, or give the folder of a run that did")
    frame = table.select([*GROUP, "row_id", "kept"]).to_pandas()
    frame.insert(3, "member", frame.groupby(GROUP).cumcount() + 1)
    values = score(table, scoring.rewards)
    frame["stored/reward"], frame["new/reward"] = table["reward"].to_pandas(), totals(values, scoring.rewards)
    frame["stored/advantage"] = table["advantage"].to_pandas()
    frame["new/advantage"] = advantages(frame, "new/reward", scoring.scale_rewards)
    signs = []
    for which in ("stored", "new"):
        grouped = frame.groupby(GROUP)[f"{which}/reward"]
        frame[f"{which}/differs"] = grouped.transform("max") - grouped.transform("min") > SAME_REWARD
        advantage = frame[f"{which}/advantage"]
        signs.append(np.sign(advantage).where(frame[f"{which}/differs"] & (advantage.abs() > ROUNDING), 0))
    frame["sign_changes"] = signs[0] * signs[1] < 0
    gain = {RANK_GAIN: _rank_gains(table)}
    paid = reward_values(table)
    frame["stored/useful"] = _differ(frame, (gain | paid).get((dapo_keys(run_dir) or {}).get("outcome", RANK_GAIN)))
    frame["new/useful"] = _differ(frame, (gain | values)[scoring.outcome])
    stored = {f"stored/{name}": of_reward for name, of_reward in paid.items()}
    new = {f"new/{name}": of_reward for name, of_reward in values.items()}
    return pd.concat([frame, pd.DataFrame(stored | new)], axis=1)


def _rank_gains(table: pa.Table) -> np.ndarray:
    """Places that each ranking moves the target up, below every rank for what is no ranking."""
    before, after = (table[f"target_rank_{when}"].to_pandas() for when in ("before", "after"))
    return (before - after).fillna(-np.inf).to_numpy(dtype=float)


def _differ(frame: pd.DataFrame, outcomes: np.ndarray | None) -> pd.Series:
    """Whether those of the outcomes of a group's members that apply differ, exactly, as dynamic sampling asks."""
    if outcomes is None:
        return pd.Series(False, index=frame.index)
    return pd.Series(outcomes, index=frame.index).groupby([frame[name] for name in GROUP]).transform("nunique") > 1


def score(table: pa.Table, rewards: Sequence[plugins.Reward]) -> dict[str, np.ndarray]:
    """Of each reward the value of every rollout, NaN where it does not apply."""
    values: dict[str, list[float | None]] = {reward.name: [] for reward in rewards}
    for start in range(0, table.num_rows, BATCH_SIZE):
        batch = table.slice(start, BATCH_SIZE)
        columns = {name: batch[stored].to_pylist() for name, stored in STORED.items()}
        columns |= {"prompts": batch["prompt"].to_pylist(), "completion_ids": batch["completion_ids"].to_pylist()}
        completions = batch["completion"].to_pylist()
        for reward in rewards:
            values[reward.name] += reward(completions, **columns)
    return {name: np.array(of_reward, dtype=float) for name, of_reward in values.items()}


def totals(values: Mapping[str, np.ndarray], rewards: Sequence[plugins.Reward]) -> np.ndarray:
    """Weighted sums of what applies, NaN where nothing does."""
    weighted = np.stack([reward.weight * values[reward.name] for reward in rewards])
    return np.where(np.isnan(weighted).all(axis=0), np.nan, np.nansum(weighted, axis=0))


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
    summary = Table("", "stored", "new")
    rewards = dict.fromkeys(name.partition("/")[2] for name in frame if name.startswith(("stored/", "new/")))
    for name in rewards:
        if name not in ("reward", "advantage", "differs", "useful"):
            summary.add_row(f"{name}, mean", *(_mean(frame, f"{which}/{name}") for which in ("stored", "new")))
    summary.add_row("total, mean", *(_mean(frame, f"{which}/reward") for which in ("stored", "new")))
    spreads = (f"{frame[f'{which}/reward'].std():.4f}" for which in ("stored", "new"))
    summary.add_row("total, standard deviation", *spreads)
    sizes = (f"{frame[f'{which}/advantage'].abs().mean():.4f}" for which in ("stored", "new"))
    summary.add_row("advantage, mean magnitude", *sizes)
    groups = frame.drop_duplicates(GROUP)
    for column, what in (("differs", "groups whose totals differ"), ("useful", "groups that dynamic sampling keeps")):
        summary.add_row(what, *(f"{groups[f'{which}/{column}'].sum():,}" for which in ("stored", "new")))
    console.print(summary)
    for column, what in (
        ("differs", "gain a difference in total and {} lose it"),
        ("useful", "be kept anew and {} no more"),
    ):
        gained = int((groups[f"new/{column}"] & ~groups[f"stored/{column}"]).sum())
        lost = int((groups[f"stored/{column}"] & ~groups[f"new/{column}"]).sum())
        console.print(f"Of {len(groups):,} groups {gained:,} would {what.format(f'{lost:,}')}.")
    turned = frame[frame["sign_changes"]]
    share = len(turned) / len(frame)
    console.print(f"{len(turned):,} of {len(frame):,} rollouts ({share:.1%}) change the sign of their advantage.")
    if top and len(turned):
        console.print(_turned_table(turned, top))


def _mean(frame: pd.DataFrame, name: str) -> str:
    mean = frame[name].mean() if name in frame else np.nan
    return "-" if np.isnan(mean) else f"{mean:.4f}"


def _turned_table(turned: pd.DataFrame, top: int) -> Table:
    """The rollouts whose advantage moves furthest."""
    distance = (turned["new/advantage"] - turned["stored/advantage"]).abs()
    table = Table("step", "round", "group", "rollout", "row", "total", "new", "advantage", "new")
    for _, row in turned.loc[distance.sort_values(ascending=False, kind="stable").index[:top]].iterrows():
        places = [str(row[name]) for name in (*GROUP, "member", "row_id")]
        numbers = [f"{row[f'{which}/{name}']:.3f}" for name in ("reward", "advantage") for which in ("stored", "new")]
        table.add_row(*places, *numbers)
    return table
