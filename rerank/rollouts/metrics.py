"""Reward-hacking metrics of rollouts, by step and of all steps together.

A metric is the mean of a value over the rollouts (or groups) that have it; kept and discarded rollouts count alike.

- `copy_rate`: rankings that equal the first stage's order; `shown_copy_rate`: that equal the order shown, which is
  another one where candidates are shuffled. `kendall_tau`: of rankings with the first stage's order, 1 for a copy.
- `first_from/R`: rankings whose first item has first-stage rank R, a histogram over R up to MOST_RANKS.
- `no_ranking`, and `failure/KIND` of each kind in prompts.FAILURES; `truncated`; `length_tokens` of a completion.
- `reward` in total, `reward/NAME` of each reward where it applies; `condition/NAME`: rollouts in which its condition
  held, all without one; `reward_share/NAME`: its weighted mean over the sum of the magnitudes of all weighted means,
  which compares format with rank.
- `rank_gain`: places that the best-placed positive stands higher in a ranking than in the first stage's order, among
  candidates that were seen; where one is relevant, that a ranking moves the target up. `R@K/before` and `R@K/after`:
  rollouts with a positive among the first K; one without a ranking has it nowhere.
- `target_cited`: traces that name the target, by its label, semantic id or title; `rank_gain/cited` and
  `rank_gain/not_cited`: the gain of those that do and do not.
- `kept`: rollouts trained on. Of groups: `groups/all_best`, every member has a positive first; else
  `groups/all_worse`, each moves the best one down or gives no ranking; else `groups/all_equal`, all have it at one
  place.
  `groups/same_reward`: all totals are the same, so that nothing can be learnt.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rerank.catalogue import Catalogue
from rerank.launch import recipe
from rerank.metrics import kendall_tau, kendall_taus
from rerank.prompts import FAILURES, THINK, THINK_END
from rerank.rollouts.schema import GROUP_KEYS
from rerank.scoring import read_rewards

Steps = TypeVar("Steps", Sequence[float], np.ndarray, "pd.Series[float]", pd.DataFrame)
COLUMNS = (  # those of schema.SCHEMA that the metrics need
    *(*GROUP_KEYS, "target", "completion", "completion_ids", "reward_components", "conditions"),
    *("reward", "truncated", "failure", "order", "candidates", "candidate_labels", "first_stage_ranks"),
    *("positive_rank", "positive_rank_after", "kept"),
)
CUT_OFFS = (1, 3, 5, 10)
MOST_RANKS = 30  # of first_from: lists may have hundreds of candidates
SAME_REWARD = 1e-6  # totals are sums of 32-bit floats


def by_step(
    table: pa.Table, weights: Mapping[str, float] | None = None, catalogue: Catalogue | None = None
) -> pd.DataFrame:
    """The metrics of every step: one row a step, one column a metric, NaN where a step has none.

    Args:
        table: Rollouts with COLUMNS.
        weights: Weight of each reward in the total; without that of every reward there is no `reward_share`.
        catalogue: Where semantic ids and titles stand; without it a trace names items by their labels only.
    """
    tables = [_rollout_values(table, weights, catalogue), _group_values(table)]
    return _with_shares(pd.concat([values.groupby("step").mean() for values in tables], axis=1))


def overall(
    table: pa.Table, weights: Mapping[str, float] | None = None, catalogue: Catalogue | None = None
) -> dict[str, float]:
    """The metrics of all steps together, without those that no rollout has; arguments as of `by_step`."""
    means = pd.concat([_rollout_values(table, weights, catalogue).mean(), _group_values(table).mean()])
    found = _with_shares(means.to_frame().T).iloc[0].dropna()
    return {str(name): float(value) for name, value in found.items()}


def fifths(values: Steps) -> tuple[Steps, Steps]:
    """The first and the last fifth of a series of steps, each at least one step."""
    count = max(1, len(values) // 5)
    return values[:count], values[-count:]


def reward_weights(run_dir: str | Path) -> dict[str, float] | None:
    """The weight of each reward of a run's dapo stage, finished or not; None where no recipe names them."""
    keys = dapo_keys(run_dir)
    if "rewards" not in keys:
        return None
    specs: Sequence[Mapping[str, Any]] = read_rewards(keys["rewards"], f"the dapo recipe of {run_dir}")
    return {spec["name"].rpartition(":")[2]: float(spec.get("weight", 1.0)) for spec in specs}


def dapo_keys(run_dir: str | Path) -> dict[str, Any]:
    """The keys of the recipe of a run's dapo stage, finished or not; none for rollouts without their run."""
    for path in (Path(run_dir) / "dapo/recipe.yaml", Path(run_dir) / "dapo.partial/begun.json"):
        if path.is_file():
            keys = recipe.load(path)  # JSON is YAML
            return dict(keys.get("given", keys))
    return {}


def agreement(first: Sequence[Sequence[int] | None], second: Sequence[Sequence[int] | None]) -> dict[str, float]:
    """Agreement of two rankings of each row, made from its candidates in two orders.

    A policy that reads the candidates gives the same ranking twice; one that copies the order shown does not.

    Args:
        first: The items of each row, best first; None for a completion that is no ranking.
        second: The same rows in the same order, each with the same items.

    Returns:
        `kendall_tau` (mean) and `same_first` (share) of the rows with two rankings, NaN without one; `both_ranked`,
        their share.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    places = [{item: place for place, item in enumerate(a)} for a, _ in pairs]
    taus = [kendall_tau([place_of[item] for item in b]) for place_of, (_, b) in zip(places, pairs, strict=True)]
    return {
        "kendall_tau": float(np.mean(taus)) if pairs else np.nan,
        "same_first": float(np.mean([a[0] == b[0] for a, b in pairs])) if pairs else np.nan,
        "both_ranked": len(pairs) / len(first) if first else np.nan,
    }


def _rollout_values(table: pa.Table, weights: Mapping[str, float] | None, catalogue: Catalogue | None) -> pd.DataFrame:
    """One row a rollout, one column a number, indexed by step; NaN where the rollout has no such value."""
    before, after = _numbers(table["positive_rank"]), _numbers(table["positive_rank_after"])
    gain, cited = rank_gains(table), _citations(table, catalogue)
    failure = table["failure"].to_numpy()
    values = {
        **_order_values(table),
        "no_ranking": _numbers(table["failure"].is_valid()),
        **{f"failure/{kind}": failure == kind for kind in FAILURES},
        "truncated": _numbers(table["truncated"]),
        "length_tokens": _numbers(pc.list_value_length(table["completion_ids"])),
        **_paid(table, weights),
        **_by_name(table["conditions"], "condition/"),
        "rank_gain": gain,
        **{f"R@{k}/{when}": ranks <= k for k in CUT_OFFS for when, ranks in (("before", before), ("after", after))},
        "target_cited": cited,
        "rank_gain/cited": np.where(cited == 1, gain, np.nan),
        "rank_gain/not_cited": np.where(cited == 0, gain, np.nan),
        "kept": _numbers(table["kept"]),
    }
    return pd.DataFrame(values, index=pd.Index(table["step"].to_numpy(), name="step"), dtype=float)


def _group_values(table: pa.Table) -> pd.DataFrame:
    """One row a group, one column a number, indexed by step."""
    before, after = _numbers(table["positive_rank"]), _numbers(table["positive_rank_after"])
    keys = [pd.Index(table[name].to_numpy(), name=name) for name in GROUP_KEYS]
    places = np.nan_to_num(after)  # 0 without a ranking
    members = {"reward": _numbers(table["reward"]), "place": places, "worse": np.where(after <= before, 0.0, 1.0)}
    groups = pd.DataFrame(members).groupby(keys)
    lowest, highest = groups.min(), groups.max()
    is_one_place = lowest["place"] == highest["place"]
    best, worse = is_one_place & (lowest["place"] == 1), lowest["worse"] == 1
    values = {
        "all_best": best,
        "all_worse": worse & ~best,
        "all_equal": is_one_place & ~best & ~worse,
        "same_reward": highest["reward"] - lowest["reward"] <= SAME_REWARD,
    }
    return pd.DataFrame(values).astype(float).add_prefix("groups/").droplevel(["round", "group"])


def _order_values(table: pa.Table) -> dict[str, np.ndarray]:
    """Values of the order of each ranking; NaN without a ranking."""
    is_ranked = table["order"].is_valid()
    index, ranked = np.flatnonzero(is_ranked), table.filter(is_ranked)
    lengths = pc.list_value_length(ranked["order"]).to_numpy()
    starts = np.cumsum(lengths) - lengths
    order = pc.list_flatten(ranked["order"]).to_numpy()
    ranks = pc.list_flatten(ranked["first_stage_ranks"]).to_numpy()[np.repeat(starts, lengths) + order]
    first_from = [f"first_from/{rank}" for rank in range(1, min(MOST_RANKS, int(lengths.max(initial=0))) + 1)]
    names = ("copy_rate", "shown_copy_rate", "kendall_tau", *first_from)
    values = {name: np.full(table.num_rows, np.nan) for name in names}
    for length in np.unique(lengths):
        places = starts[lengths == length, None] + np.arange(length)  # (rankings, N), into the flat arrays
        rows = index[lengths == length]
        values["copy_rate"][rows] = (ranks[places] == np.arange(1, length + 1)).all(axis=1)
        values["shown_copy_rate"][rows] = (order[places] == np.arange(length)).all(axis=1)
        values["kendall_tau"][rows] = kendall_taus(ranks[places])
        for rank, name in enumerate(first_from, start=1):
            values[name][rows] = ranks[places[:, 0]] == rank
    return values


def rank_gains(table: pa.Table) -> np.ndarray:
    """Places by which each rollout moves the best-placed positive up, NaN without a ranking."""
    return np.asarray(_numbers(table["positive_rank"]) - _numbers(table["positive_rank_after"]))


def reward_values(table: pa.Table) -> dict[str, np.ndarray]:
    """The stored value of each reward for every rollout, NaN where it does not apply."""
    return _by_name(table["reward_components"])


def _by_name(maps: pa.ChunkedArray, prefix: str = "") -> dict[str, np.ndarray]:
    """A column of maps as one column of numbers for each key."""
    names = sorted({name for chunk in maps.chunks for name in pc.unique(chunk.keys).to_pylist()})
    return {f"{prefix}{name}": _numbers(pc.map_lookup(maps, pa.scalar(name), "first")) for name in names}


def _paid(table: pa.Table, weights: Mapping[str, float] | None) -> dict[str, np.ndarray]:
    """The total, each reward, and what it pays in the total: 0 where it does not apply."""
    rewards = reward_values(table)
    values = {"reward": _numbers(table["reward"]), **{f"reward/{name}": value for name, value in rewards.items()}}
    if weights is None or any(name not in weights for name in rewards):
        return values
    return values | {f"reward_share/{name}": weights[name] * np.nan_to_num(rewards[name]) for name in rewards}


def _with_shares(means: pd.DataFrame) -> pd.DataFrame:
    """`means` with the pay of each reward as a share of that of all, signs left out of the sum."""
    paid = means.filter(like="reward_share/")
    means[paid.columns] = paid.div(paid.abs().sum(axis=1).replace(0, np.nan), axis=0)
    return means


def _citations(table: pa.Table, catalogue: Catalogue | None) -> np.ndarray:
    """1 for a rollout whose trace names the target, 0 where it does not, NaN without a trace."""
    columns = (table[name].to_pylist() for name in ("completion", "target", "candidates", "candidate_labels"))
    cited = []
    for completion, target, candidates, labels in zip(*columns, strict=True):
        own = [] if catalogue is None else [catalogue.semantic_ids[target], catalogue.titles[target]]
        cited.append(_cites(completion, [labels[candidates.index(target)], *own]))
    return np.array(cited)


def _cites(completion: str, names: Sequence[str]) -> float:
    """1 when the trace has one of the names, 0 when it has none, NaN without a trace."""
    trace, end, _ = completion.partition(THINK_END)
    if not end or not trace.lstrip().startswith(THINK):
        return np.nan
    return float(any(name in trace and _whole(name).search(trace) for name in names if name.strip()))


@cache
def _whole(name: str) -> re.Pattern[str]:
    """A name that is no part of a longer word or number; a fact such as `like:8` names no item."""
    if name.startswith("<"):
        return re.compile(re.escape(name))
    return re.compile(rf"(?<![\w:])(?<!\d\.){re.escape(name)}(?!\w)(?!\.\d)")


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as floats, NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy())
