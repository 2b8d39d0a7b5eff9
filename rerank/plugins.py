"""Plugins: the only place that turns a name in a recipe into code.

A short name is a file of a shipped folder (`ndcg` -> `rewards/ndcg.py`, function `ndcg`); anything else is
`module.path:function` or `path/to/file.py:function`.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Function = Callable[..., Any]  # users write them too, so signatures are checked at run time


def load_function(name: str, folder: str, /, **kwargs: object) -> Function:
    """The function (or class) that `name` stands for, with `kwargs` bound.

    Args:
        name: A short name, `module.path:function` or `path/to/file.py:function`.
        folder: The package of the short names, such as "rewards" or "rewards.conditions".
        kwargs: Values of named parameters; an unknown name is refused, even where the function takes `**columns`.
    """
    function = _find(name, folder)
    if not callable(function):
        raise ValueError(f"{name} is {type(function).__name__}, not a function; name a function")
    named = [p.name for p in parameters(function).values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in kwargs:
        if key not in named:
            raise ValueError(f"{name} has no parameter {key!r}{did_you_mean(key, named)}; it takes {', '.join(named)}")
    return functools.update_wrapper(functools.partial(function, **kwargs), function) if kwargs else function


def known_names(folder: str) -> list[str]:
    """The short names of `folder`."""
    paths = sorted(Path(importlib.import_module(folder).__path__[0]).glob("*.py"))
    return [path.stem for path in paths if not path.stem.startswith("_")]


def check_entry(entry: object, what: str, known: Sequence[str], example: str) -> Mapping[str, Any]:
    """An entry of a recipe's list of plugins, refused unless it is a mapping of known keys with a name.

    Args:
        entry: Of the recipe.
        what: The kind of plugin, such as "reward".
        known: The keys that an entry may have.
        example: A valid entry, for the message.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ValueError(f"{what} {entry!r} has no name; write it as {example}")
    for key in entry:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f"{what} {entry['name']} has an unknown key {key!r}{hint}; known: {', '.join(known)}")
    if not isinstance(entry.get("kwargs", {}), Mapping):
        raise ValueError(
            f"kwargs of {what} {entry['name']} is {entry['kwargs']!r} but must be a mapping, such as {{k: 5}}"
        )
    return entry


def _find(name: str, folder: str) -> object:
    place, colon, attribute = name.rpartition(":")
    if colon:
        return _attribute(_load_file(place) if place.endswith(".py") else _import(place, name), attribute, name)
    known = known_names(folder)
    if name not in known:
        raise ValueError(
            f"{folder} has no {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}; "
            "for your own code write module.path:function or path/to/file.py:function"
        )
    return _attribute(_import(f"{folder}.{name}", name), name, name)


def _import(module: str, name: str) -> ModuleType:
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        raise ValueError(f"{name!r} is neither a short name, module.path:function nor path/to/file.py:function")
    try:
        return importlib.import_module(module)
    except Exception as error:  # user code may raise anything; the recipe's line is where to look first
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        hint = "; is its folder the working folder?" if is_absent else ""
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}{hint}") from error


def _load_file(path: str) -> ModuleType:
    """The module of a file, loaded once and under the same name in every process."""
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file (looked for {file}); give a path from the working folder")
    name = "plugin" + re.sub(r"\W", "_", str(file.with_suffix("")))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # as of every .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code, as in _import
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> object:
    if attribute not in vars(module):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{name}: {module.__file__} has no {attribute!r}{did_you_mean(attribute, public)}; "
            f"it has {', '.join(public) or 'no function'}"
        )
    return vars(module)[attribute]


def name_of(function: Function, otherwise: str = "") -> str:
    """The name of a function; of another callable the one given, or that of its class."""
    return str(getattr(function, "__name__", otherwise or type(function).__name__))


def parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, by name."""
    return inspect.signature(function).parameters


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A hint at the known name that is nearest, for a message; empty when none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
