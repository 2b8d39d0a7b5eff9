"""Options of a stage: their declaration, their ranges, and values of a recipe against their type hints."""

import contextlib
import copy
import dataclasses
import math
import types
import typing
from collections.abc import Sequence

Bound = float | None
NUMBER_FORMATS = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("duckdb", "pyspark")  # of `launch.engines`, named here so that options are read without Ibis

# Plain type of an option -> types of its values in YAML; a boolean is no number.
IN_YAML: dict[object, type | tuple[type, ...]] = {
    **{kind: kind for kind in (int, str, bool, list, dict, type(None))},
    **{float: (int, float), tuple: list},
}


def option(default: typing.Any, help: str) -> typing.Any:
    """A field of a dataclass of options, with what `--help` says of it.

    Args:
        default: Its value where a recipe has none; a list or mapping is copied for each, a function makes it.
        help: In one sentence.
    """
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def default_of(option: "dataclasses.Field[typing.Any]") -> object:
    """The default of a dataclass's option; `dataclasses.MISSING` where it must be given."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse an option's value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(choices)}")


def check_range(
    name: str, value: float, least: Bound = None, most: Bound = None, above: Bound = None, below: Bound = None
) -> None:
    """Refuse an option's number that is not finite or is out of its range; `above` and `below` are excluded."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    is_in = math.isfinite(value) and (least is None or value >= least) and (most is None or value <= most)
    if not is_in or (above is not None and value <= above) or (below is not None and value >= below):
        stated = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        raise ValueError(f"{name} is {value} but must be {stated}")


def type_hints(arguments: Sequence[type]) -> dict[str, object]:
    """Name -> type hint of every option of the dataclasses."""
    found: dict[str, object] = {}
    for cls in arguments:
        hints = typing.get_type_hints(cls)
        found |= {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    return found


def _fits(value: object, hint: object) -> bool:
    """Whether a YAML value is of an annotated type; only plain hints are checked, others are left to the dataclass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    wanted = IN_YAML.get(origin or hint, object)
    return isinstance(value, wanted) and not (isinstance(value, bool) and hint in (int, float))


def is_same(old: object, new: object) -> bool:
    """Whether two values of a key are equal; `2e-5` is a text in YAML, and 2.0e-5 the same number."""
    if isinstance(old, str) != isinstance(new, str):
        with contextlib.suppress(ValueError, TypeError):
            return float(old) == float(new)  # type: ignore[arg-type]
    return old == new


def typed_value(key: str, value: object, hint: object, source: str) -> object:
    """The value with the type of its option: `2e-5`, which YAML reads as text, becomes a number."""
    if _fits(value, hint):
        return value
    if isinstance(value, str) and _fits(0.5, hint):
        with contextlib.suppress(ValueError):
            return float(value)
    if isinstance(value, (int, float)) and _fits("", hint) and not isinstance(value, bool):
        return str(value)
    wanted = (
        hint.__name__ if isinstance(hint, type) and not typing.get_origin(hint) else str(hint).replace("typing.", "")
    )
    raise ValueError(f"{source}: {key} is {value!r} but must be {wanted}")
