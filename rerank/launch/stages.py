"""The declaration of a stage, and the list of them.

A stage is a package whose module holds `STAGE`. The order of a run, the numbers that it prints and the recipes that a
folder may hold follow from STAGES.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step from folders to a folder.

    Attributes:
        name: Name of the stage and of its folder in a run.
        arguments: Its dataclasses: its own, then those of TRL.
        main: Takes the arguments and the folder to write into; returns metrics.
        check: Takes the arguments; refuses what can be known before the stage starts.
        main_of_shard: Takes the arguments, a shard and its folder to write into; makes what `main` reads of finished
            shards. None for a stage that runs no model over rows.
        check_shard: Takes the arguments; refuses those with which `main` runs no model over rows.
        inputs: Stages whose folders it always reads.
        optional_inputs: Takes its arguments; returns further stages whose folders it reads with these.
        inputs_if_made: Stages that a recipe may leave out, and whose folders it reads where the run has them.
        do_without: Stage -> how a recipe does without it, where this one needs it only with some arguments.
        files: Options that name files or folders, or mappings to such; OPTION/FILE is a file in that folder.
        plugins: Options that list plugins, or name a file with such a list -> the package of their short names.
        trains: Whether every process of a launch takes part, and `max_minutes` can end it.
        renamed_keys: Keys that earlier recipes had -> how to write them now.
        quick_check: In place of `check` where the stage is launched at once, and main would do the work of `check`
            again: it refuses the rest before it writes.
    """

    name: str
    arguments: tuple[type, ...]
    main: Callable[..., dict[str, Any]]
    check: Callable[..., None]
    main_of_shard: Callable[..., None] | None = field(default=None, kw_only=True)
    check_shard: Callable[..., None] = field(default=lambda *arguments: None, kw_only=True)
    inputs: tuple[str, ...] = ()
    optional_inputs: Callable[..., Sequence[str]] = lambda *arguments: ()
    inputs_if_made: tuple[str, ...] = ()
    do_without: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)
    trains: bool = False
    renamed_keys: Mapping[str, str] = field(default_factory=dict)
    quick_check: Callable[..., None] | None = None

    def check_before(self, arguments: Sequence[object], is_launched: bool) -> None:
        """The check before a dry run ends, or before the stage is launched at once."""
        check = self.quick_check if is_launched and self.quick_check else self.check
        check(*arguments)

    def inputs_of(self, *arguments: object) -> list[str]:
        """The stages that it cannot do without, with these arguments."""
        return [*self.inputs, *self.optional_inputs(*arguments)]

    def make(self, arguments: Sequence[object], folder: Path, shard: object | None = None) -> dict[str, Any]:
        """Run `main` or, of a stage that takes shards, `main_of_shard`, which has no metrics."""
        if shard is None:
            return self.main(*arguments, folder)
        assert self.main_of_shard is not None
        self.main_of_shard(*arguments, shard, folder)
        return {}


_NAMES = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft", "dapo", "evaluate")
STAGES = {name: f"rerank.{name}" for name in _NAMES}  # name -> module


def load_stage(name: str) -> Stage:
    """The declaration of a stage; it is imported only now, since most of them take seconds.

    Args:
        name: Of the stage or of its folder; a shard's is `<stage>.shard-2-of-8`.

    Raises:
        ValueError: When there is no such stage.
    """
    name = name.partition(".shard-")[0]
    if name not in STAGES:
        raise ValueError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}")
    return importlib.import_module(STAGES[name]).STAGE
