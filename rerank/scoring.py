"""A recipe's `rewards`: read, loaded, called and added up, in training, probe and rescoring alike.

C completions, R rewards.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from rerank.launch import recipe
from rerank.plugins import Function, check_entry, load_function, name_of, parameters
from rerank.rows import column_names

RANK_GAIN = "rank_gain"  # the outcome of a completion that is no reward's: places that the best positive moved up
AGGREGATION = "sum_then_normalize"  # TRL's default, the only one that totals are known for
KEYS = ("name", "weight", "kwargs", "condition")
EXAMPLE = "{name: ndcg, weight: 1.0}"
RENAMED_KEYS = {  # key that a dapo recipe had beside its rewards -> what to write now
    "overlong_tokens": "write {name: overlong, kwargs: {cache_tokens: N}} among the rewards",
    "invalid_reward": "take it out: the reward rank_promotion pays -1 to what is no ranking",
}

# What TRL passes to a reward besides the dataset's columns.
TRAINER_COLUMNS = tuple("prompts completions completion_ids trainer_state log_extra log_metric environments".split())
Columns = Mapping[str, object]  # name -> a value for each completion; some of a trainer's are one value for all


def _is_value(value: object) -> bool:
    return value is None or (isinstance(value, Real) and math.isfinite(value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


Kind = tuple[str, Callable[[object], bool]]  # what a function must return, and the check of one value
NUMBERS: Kind = "a list of numbers", _is_value
BOOLEANS: Kind = "a list of booleans", _is_bool


@dataclass(frozen=True)
class Reward:
    """A reward with its weight and its condition, its values checked.

    Attributes:
        name: Of the metric and of the column in the store.
        function: From completions and columns to one value for each completion; None where it does not apply.
        weight: In the total.
        condition: Where it is False the reward counts 0; None: it always counts.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    weight: float = 1.0
    condition: Callable[..., Sequence[bool]] | None = None

    @property
    def __name__(self) -> str:  # what TRL calls the metric
        return self.name

    def __call__(self, completions: Sequence[str], **columns: object) -> list[float | None]:
        """One value for each completion, 0 where the condition does not hold."""
        return self.evaluate(completions, columns)[0]

    def evaluate(self, completions: Sequence[str], columns: Columns) -> tuple[list[float | None], list[bool]]:
        """The value for each completion, and whether the condition holds, which is so without one."""
        holds = [True] * len(completions)
        if self.condition is not None:
            what = f"condition {name_of(self.condition)} of reward {self.name}"
            holds = [bool(held) for held in _call(self.condition, what, BOOLEANS, completions, columns)]
        found = _call(self.function, f"reward {self.name}", NUMBERS, completions, columns)
        values = [None if value is None else float(value) for value in found]
        return [value if held else 0.0 for value, held in zip(values, holds, strict=True)], holds


@dataclass(frozen=True)
class Scores:
    """The rewards of completions.

    Attributes:
        names: (R,) of the rewards.
        values: (C, R) of each reward, 0 where its condition does not hold, nan where it does not apply.
        conditions: (C, R) whether the condition of each reward holds.
        totals: (C,) weighted sums of what applies, nan where nothing does.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    conditions: npt.NDArray[np.bool_]
    totals: npt.NDArray[np.float64]


def score(rewards: Sequence[Reward], completions: Sequence[str], columns: Columns) -> Scores:
    """Call each reward and each condition once and add up what is paid.

    Args:
        rewards: Of a recipe.
        completions: Texts.
        columns: Those of `rows.reward_columns`, and what a trainer adds.
    """
    values = np.zeros((len(completions), len(rewards)))
    conditions = np.ones((len(completions), len(rewards)), dtype=bool)
    for number, reward in enumerate(rewards):
        of_reward, conditions[:, number] = reward.evaluate(completions, columns)
        values[:, number] = np.array(of_reward, dtype=float)
    names = tuple(reward.name for reward in rewards)
    return Scores(names, values, conditions, total(values, [reward.weight for reward in rewards]))


def total(values: npt.NDArray[np.float64], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """(C,) weighted sums over rewards of (C, R) values, without those that do not apply (nan); nan where none does."""
    return np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(values * np.asarray(weights), axis=1))


def choose_outcome(given: str | None, rewards: Sequence[Reward], has_several: bool) -> str:
    """The outcome in which the completions of a useful group differ: the recipe's, or else one that fits its rows.

    Where each row has one positive it is `rank_gain`, which says of a ranking all that a single positive can. Where
    some row has several it is the main reward: that of the largest weight, of equals the one named first.

    Args:
        given: The recipe's `outcome`; None where it names none.
        rewards: Of the recipe.
        has_several: Whether some row has several positives.
    """
    if given is not None:
        return given
    if not has_several:
        return RANK_GAIN
    return main_reward({reward.name: reward.weight for reward in rewards})


def has_several_positives(relevance: Iterable[Sequence[float]]) -> bool:
    """Whether the grades of some row are above 0 for more than one candidate."""
    return any(sum(grade > 0 for grade in grades) > 1 for grades in relevance)


def main_reward(weights: Mapping[str, float]) -> str:
    """The reward of the largest weight, of equals the first."""
    return max(weights, key=weights.__getitem__)


def check_outcome(outcome: str | None, rewards: Sequence[Reward]) -> None:
    """Refuse an outcome that the rewards of a recipe do not report."""
    known = [RANK_GAIN, *(reward.name for reward in rewards)]
    if outcome is not None and outcome not in known:
        raise ValueError(f"outcome is {outcome!r}, but the recipe's rewards report only {', '.join(known)}")


def check_aggregation(keys: Mapping[str, object], source: str) -> None:
    """Refuse totals that are no weighted sum of the rewards."""
    if keys.get("multi_objective_aggregation", AGGREGATION) != AGGREGATION:
        raise ValueError(f"{source}: totals are known for {AGGREGATION} only; remove multi_objective_aggregation")
    if "reward_weights" in keys:
        raise ValueError(f"{source}: reward_weights is not read; give each of `rewards` its weight")


def read_rewards(value: object, source: str) -> list[dict[str, object]]:
    """The entries of a list of rewards, for `load_rewards`.

    Args:
        value: The list, or the path of a YAML file with `rewards:`: a dapo recipe, whose `rewards:` may be a path
            again, or a file such as recipes/rewards/naive.yaml.
        source: What errors name.
    """
    for _ in range(2):
        if isinstance(value, str):
            source, keys = value, recipe.load(value)
            recipe.refuse_renamed(keys, RENAMED_KEYS, source)
            value = keys.get("rewards")
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{source}: rewards is {value!r} but must be a list of at least one reward, such as [{EXAMPLE}], or the "
            "path of a file with such a list"
        )
    return value


def load_rewards(specs: Sequence[Mapping[str, object]]) -> list[Reward]:
    """The rewards that a recipe names.

    Args:
        specs: Entries of the recipe: name, weight, kwargs, condition.

    Raises:
        ValueError: On an entry, a name or a parameter that is unknown, or two rewards of one name.
    """
    rewards: dict[str, Reward] = {}
    for entry in specs:
        reward = _load_reward(entry)
        if reward.name in rewards:
            raise ValueError(f"two rewards are called {reward.name}; keep one, or wrap the other under a new name")
        rewards[reward.name] = reward
    return list(rewards.values())


def _load_reward(entry: Mapping[str, object]) -> Reward:
    if isinstance(entry, Mapping) and "when" in entry:
        raise ValueError(f"reward {entry.get('name')} has the key 'when', which is called 'condition' now; rename it")
    checked = check_entry(entry, "reward", KEYS, EXAMPLE)
    name, kwargs, condition_name = checked["name"], checked.get("kwargs", {}), checked.get("condition")
    weight = checked.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"weight of reward {name} is {weight!r}, not a finite number; write it as 1.0e-1")
    if condition_name is not None and not isinstance(condition_name, str):
        raise ValueError(f"condition of reward {name} is {condition_name!r} but must be the name of one condition")
    for key in kwargs:
        if key in (*column_names(), *TRAINER_COLUMNS):
            raise ValueError(f"kwargs of reward {name} holds {key!r}, but the column of that name wins; remove it")
    function = load_function(name, "rewards", **kwargs)
    _check_signature(function, f"reward {name}")
    condition = load_function(condition_name, "rewards.conditions") if condition_name else None
    if condition is not None:
        _check_signature(condition, f"condition {condition_name}")
    return Reward(name_of(function, name.rpartition(":")[2]), function, float(weight), condition)


def _check_signature(function: Function, what: str) -> None:
    """Refuse now what would fail in the first training step."""
    named, known = parameters(function).values(), column_names()
    if inspect.iscoroutinefunction(function) or inspect.isclass(function):
        raise ValueError(f"{what} must be a callable that returns a list, not a class or a coroutine")
    if not any(p.kind is p.VAR_KEYWORD for p in named):
        raise ValueError(f"{what} must take **columns, since it gets every column by name; add it")
    for p in named:
        has_value = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if not has_value and p.name not in (*known, *TRAINER_COLUMNS):
            raise ValueError(f"{what} needs a column {p.name!r}, but rows have {', '.join(known)}; give it a default")


def _call(
    function: Function, what: str, kind: Kind, completions: Sequence[str], columns: Columns
) -> list[float | None]:
    """The values that `function` returns, checked; an exception is raised with its name and its row."""
    wanted, is_valid = kind
    try:
        values = function(completions=completions, **columns)
    except Exception as error:  # never swallowed: a reward that breaks must stop the run
        row = _first_failing_row(function, completions, columns)
        raise ValueError(f"{what} raised {type(error).__name__}: {error} (row_id {row}); repair it") from error
    if not isinstance(values, list):
        raise ValueError(f"{what} returned {type(values).__name__}, not {wanted}; return one value per completion")
    rows = _row_ids(completions, columns)
    if len(values) != len(completions):
        raise ValueError(
            f"{what} returned {len(values)} values for {len(completions)} completions (first row_id "
            f"{next(iter(rows), None)}); return one value per completion"
        )
    for value, row in zip(values, rows, strict=True):
        if not is_valid(value):
            raise ValueError(f"{what} returned {value!r} for row_id {row}, not {wanted}; repair it")
    return values


def _first_failing_row(function: Function, completions: Sequence[str], columns: Columns) -> object:
    """The id of the first row that fails alone too; None when only the whole batch fails."""
    for index, row in enumerate(_row_ids(completions, columns)):
        alone = {
            key: [values[index]] if isinstance(values, list) and len(values) == len(completions) else values
            for key, values in columns.items()
        }
        try:
            function(completions=[completions[index]], **alone)
        except Exception:  # only asked which row it is; the caller raises
            return row
    return None


def _row_ids(completions: Sequence[str], columns: Columns) -> Sequence[object]:
    row_ids = columns.get("row_id")
    return row_ids if isinstance(row_ids, list) and row_ids else range(len(completions))
