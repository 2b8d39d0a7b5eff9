"""The only place that turns a recipe's name into code.

A short name is a file of a folder of ours (`ndcg` -> `rewards/ndcg.py`, function `ndcg`); anything else is
`module.path:function` or `path/to/file.py:function`. `load_rewards` builds on it what TRL calls.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RANK_GAIN = "rank_gain"  # the outcome of a completion that is no reward's: places that the target moved up

# What TRL passes to a reward besides the dataset's columns.
TRAINER_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


def load_function(name: str, folder: str, /, **kwargs: Any) -> Callable:
    """The function (or class) that `name` stands for, with `kwargs` bound.

    Args:
        name: A short name, `module.path:function` or `path/to/file.py:function`.
        folder: The package whose files short names mean, such as "rewards" or "rewards.conditions".
        kwargs: Values of named parameters; a name the function lacks is refused, even where it takes `**columns`.
    """
    function = _find(name, folder)
    if not callable(function):
        raise ValueError(f"{name} is {type(function).__name__}, not a function; name a function")
    named = [p.name for p in _parameters(function).values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in kwargs:
        if key not in named:
            raise ValueError(
                f"{name} has no parameter {key!r}{_did_you_mean(key, named)}; it takes {', '.join(named)}"
            )
    return functools.update_wrapper(functools.partial(function, **kwargs), function) if kwargs else function


def known_names(folder: str) -> list[str]:
    """Short names that exist in `folder`."""
    paths = sorted(Path(importlib.import_module(folder).__path__[0]).glob("*.py"))
    return [path.stem for path in paths if not path.stem.startswith("_")]


@dataclass
class RewardSpec:
    """One entry of a recipe's `rewards`."""

    name: str
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    when: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a reward's name is {self.name!r} but must be text, such as ndcg")
        if isinstance(self.weight, bool) or not isinstance(self.weight, Real) or not math.isfinite(self.weight):
            raise ValueError(
                f"weight of reward {self.name} is {self.weight!r}, not a finite number; write it as 1.0e-1"
            )
        if not isinstance(self.kwargs, Mapping):
            raise ValueError(
                f"kwargs of reward {self.name} is {self.kwargs!r} but must be a mapping, such as {{k: 5}}"
            )
        if self.when is not None and not isinstance(self.when, str):
            raise ValueError(f"`when` of reward {self.name} is {self.when!r} but must be the name of one condition")

    @classmethod
    def of(cls, entry: "Mapping[str, Any] | RewardSpec") -> "RewardSpec":
        """A spec from a recipe's mapping."""
        if isinstance(entry, RewardSpec):
            return entry
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise ValueError(f"reward {entry!r} has no name; write it as {{name: ndcg, weight: 1.0}}")
        known = [f.name for f in fields(cls)]
        for key in entry:
            if key not in known:
                hint = _did_you_mean(str(key), known)
                raise ValueError(f"reward {entry['name']} has an unknown key {key!r}{hint}; known: {', '.join(known)}")
        return cls(**entry)


@dataclass
class Reward:
    """A reward as TRL calls it: its values checked, and 0.0 wherever the condition `when` does not hold."""

    name: str
    function: Callable[..., list[float | None]]
    weight: float = 1.0
    when: Callable[..., list[bool]] | None = None

    def __post_init__(self) -> None:
        self.__name__ = self.name  # what TRL calls the metric

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        """One value per completion."""
        values = _call(self.function, f"reward {self.name}", "a list of numbers", _is_value, completions, columns)
        pairs = zip(values, self.gates(completions, **columns), strict=True)
        return [None if gate and value is None else float(value) if gate else 0.0 for value, gate in pairs]

    def gates(self, completions: Sequence[str], **columns: Any) -> list[bool]:
        """Whether the reward counts, per completion."""
        if self.when is None:
            return [True] * len(completions)
        what = f"condition {self.when.__name__} of reward {self.name}"
        return [bool(gate) for gate in _call(self.when, what, "a list of booleans", _is_gate, completions, columns)]


def check_outcome(outcome: str, rewards: Sequence[Reward]) -> None:
    """Refuse an outcome that the rewards of a recipe do not report.

    Raises:
        ValueError: Naming those that they do.
    """
    known = [RANK_GAIN, *(reward.name for reward in rewards)]
    if outcome not in known:
        raise ValueError(f"outcome is {outcome!r}, but the recipe's rewards report only {', '.join(known)}")


def load_rewards(specs: Sequence[Mapping[str, Any] | RewardSpec], columns: Sequence[str]) -> list[Reward]:
    """The rewards that a recipe names, ready for TRL.

    Args:
        specs: Entries of the recipe: name, weight, kwargs, when.
        columns: The dataset's columns; a reward gets each of them by name.
    """
    if isinstance(specs, str | Mapping) or not specs:
        raise ValueError(f"rewards is {specs!r} but must be a list of at least one reward, such as [{{name: ndcg}}]")
    rewards: dict[str, Reward] = {}
    for spec in map(RewardSpec.of, specs):
        for key in spec.kwargs:
            if key in (*columns, *TRAINER_COLUMNS):
                raise ValueError(
                    f"kwargs of reward {spec.name} holds {key!r}, but the column of that name would win; remove it"
                )
        function = load_function(spec.name, "rewards", **spec.kwargs)
        _check_signature(function, f"reward {spec.name}", columns)
        when = load_function(spec.when, "rewards.conditions") if spec.when else None
        if when is not None:
            _check_signature(when, f"condition {spec.when}", columns)
        if function.__name__ in rewards:
            raise ValueError(
                f"two rewards are called {function.__name__}; keep one, or wrap the other under a new name"
            )
        rewards[function.__name__] = Reward(function.__name__, function, float(spec.weight), when)
    return list(rewards.values())


def _find(name: str, folder: str) -> Any:
    place, colon, attribute = name.rpartition(":")
    if colon:
        return _attribute(_load_file(place) if place.endswith(".py") else _import(place, name), attribute, name)
    known = known_names(folder)
    if name not in known:
        raise ValueError(
            f"{folder} has no {name!r}{_did_you_mean(name, known)}; it has {', '.join(known)}; "
            "for your own code write module.path:function or path/to/file.py:function"
        )
    return _attribute(_import(f"{folder}.{name}", name), name, name)


def _import(module: str, name: str) -> ModuleType:
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        raise ValueError(f"{name!r} is neither a short name, module.path:function nor path/to/file.py:function")
    try:
        return importlib.import_module(module)
    except Exception as error:  # user code: whatever it raises, the recipe's line is where to look first
        hint = "; is its folder the working folder?" if getattr(error, "name", None) == module.split(".")[0] else ""
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}{hint}") from error


def _load_file(path: str) -> ModuleType:
    """The module of a file, loaded once, under a name that is the same in every process."""
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file (looked for {file}); give a path from the working folder")
    name = "plugin" + re.sub(r"\W", "_", str(file.with_suffix("")))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code, as in _import
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    if attribute not in vars(module):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{name}: {module.__file__} has no {attribute!r}{_did_you_mean(attribute, public)}; "
            f"it has {', '.join(public) or 'no function'}"
        )
    return vars(module)[attribute]


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _check_signature(function: Callable, what: str, columns: Sequence[str]) -> None:
    """Refuse now what would fail in the first training step."""
    parameters = _parameters(function).values()
    if inspect.iscoroutinefunction(function) or inspect.isclass(function):
        raise ValueError(f"{what} must be a plain function that returns a list, not a class or a coroutine")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{what} must take **columns, since it gets every column by name; add it")
    for p in parameters:
        has_value = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if not has_value and p.name not in (*columns, *TRAINER_COLUMNS):
            raise ValueError(
                f"{what} needs a column {p.name!r}, but rows have {', '.join(columns)}; give it a default"
            )


def _call(
    function: Callable,
    what: str,
    wanted: str,
    is_valid: Callable[[Any], bool],
    completions: Sequence[str],
    columns: Mapping[str, Any],
) -> list:
    """What `function` returns, checked. What it raises is raised, with its name and its row."""
    try:
        values = function(completions=completions, **columns)
    except Exception as error:  # never swallowed: a reward that breaks must stop the run
        row = _first_failing_row(function, completions, columns)
        raise ValueError(f"{what} raised {type(error).__name__}: {error} (row_id {row}); repair it") from error
    if not isinstance(values, list):
        raise ValueError(f"{what} returned {type(values).__name__}, not {wanted}; return one value per completion")
    if len(values) != len(completions):
        first = next(iter(_row_ids(completions, columns)), None)
        raise ValueError(
            f"{what} returned {len(values)} values for {len(completions)} completions (first row_id {first}); "
            "return one value per completion"
        )
    for value, row in zip(values, _row_ids(completions, columns), strict=True):
        if not is_valid(value):
            raise ValueError(f"{what} returned {value!r} for row_id {row}, not {wanted}; repair it")
    return values


def _first_failing_row(function: Callable, completions: Sequence[str], columns: Mapping[str, Any]) -> Any:
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


def _row_ids(completions: Sequence[str], columns: Mapping[str, Any]) -> Sequence[Any]:
    return columns.get("row_id") or list(range(len(completions)))


def _is_value(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and math.isfinite(value))


def _is_gate(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
