"""Names of models and files in recipes, resolved to where they are.

A model is named by its folder, by its name on the Hugging Face hub, or as `package:NAME` by an installed Python
package that brings it. A data file is named by its path or as `package:NAME/PATH`. Both may hold `~` and
`${VARIABLE}`.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "package:"
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def locate(value: str, what: str) -> str:
    """A path with its variables, its `~` and its `package:NAME` resolved; it need not exist.

    Args:
        value: As the recipe has it.
        what: The key that holds it, for the message.
    """
    path = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise ValueError(f"{what} is {value} but {unset[1]} is not set; `export {unset[1]}=...` first")
    if not path.startswith(PACKAGE):
        return path
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    # finds the folder without running the package's code
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{what} is {value} but the package {package} is not installed; `pip install {package}`"
        )
    return str(Path(spec.submodule_search_locations[0]) / inner)


def resolve(name: str, what: str, files: Sequence[str] = ("config.json", "*.gguf")) -> str:
    """The folder of a model, or its name on the hub.

    Args:
        name: A folder, a hub name or `package:NAME`.
        what: The key that holds it, for the message.
        files: Patterns of which a model's folder holds at least one; inside a package it is the folder that is nearest
            to the root and holds the first of them, else the next.
    """
    path, held = locate(name, what), " or ".join(files)
    folder = Path(path)
    if name.startswith(PACKAGE):
        for pattern in files:
            if found := sorted(folder.rglob(pattern), key=lambda file: (len(file.parts), str(file))):
                return str(found[0].parent)
        raise FileNotFoundError(f"{what} is {name} but {folder} holds no {held}, so no model")
    if path and folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{what} {name} is the folder of an adapter; merge it into its base model (PEFT's merge_and_unload), "
                "save that, and give its folder"
            )
        if not any(next(folder.glob(pattern), None) for pattern in files):
            raise FileNotFoundError(f"{what} {name} holds no {held}; give the folder that save_pretrained wrote")
        return str(folder)
    # `models/minilm` beside an existing folder `models` is a misspelt path, not a hub name
    if HUB_NAME.fullmatch(path) and (folder.parent == Path(".") or not folder.parent.is_dir()):
        return path
    raise FileNotFoundError(f"{what} {name} is not there; give a model's folder, its hub name, or {PACKAGE}NAME")


def local(
    name: str, what: str, revision: str = "main", files: Sequence[str] = ("config.json", "*.gguf")
) -> Path | None:
    """The folder of a model on this machine: its own, or of a hub name that in the cache of Hugging Face; else None.

    Args:
        name, what, files: As `resolve` takes them.
        revision: Of a hub name.
    """
    found = resolve(name, what, files)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(found, "config.json", constants.HF_HUB_CACHE, revision)
    return Path(config).parent if isinstance(config, str) else None
