"""Losses of the sft stage, one a file: `rerank/losses/<name>.py` holds `<name>`, and a recipe names it.

    losses:
      - {name: bear, kwargs: {num_beams: 10, lambda_c: 0.25}}     # exactly one token loss
      - {name: iirg, kwargs: {window: 5}}                         # and what goes with it

The folder is the registry: drop a file in, or write `module.path:function` or `path/to/file.py:function`.

    TASKS = ("next_item", "rerank")  # what it is meant for; both where this line is left out
    NEEDS, COSTS = "...", "..."      # for `rerank losses`, if you like

    def focal(inputs, gamma=2.0):
        logps = inputs.label_logps()
        return -((1 - logps.detach().exp()) ** gamma) * logps

A token loss is a plain function from `LossInputs` and its own parameters to one value for each position under loss,
(P,). The trainer adds the values up and divides by the number of such positions in the whole optimizer step, known
before its first forward, so a step does not depend on how its batch is cut. `REACHES = "legal"` says that it is a
softmax over what may follow in the catalogue: positions with one legal token are then taken out of the loss before
training (their loss is zero), and the model's beam search masks first.

What goes beside a token loss is a class, a subclass of `Extra`, with any of its methods: rows of its own, redrawn each
epoch or not, weights of tasks, parameters of its own, embeddings, terms, files beside the model. `rerank losses` lists
what there is, what each needs and what it costs.

Letters of shapes: B rows, T tokens, P positions under loss (of all rows of a micro-batch), H hidden size, V
vocabulary, W children of a prefix.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rerank.loss_inputs import Head, LossInputs
from rerank.plugins import known_names, load_function
from rerank.prefix_index import PrefixIndex

FOLDER = "rerank.losses"
TASKS = ("next_item", "rerank")


class Extra:
    """What goes beside a token loss. A subclass has any of these methods and the lower-case name of its file."""

    tasks: tuple[str, ...] = TASKS
    task_numbers: Mapping[str, int]  # name of a task -> its number in a batch's column `task`; set by the trainer

    def rows(self, maker: Any) -> dict[str, list[dict[str, Any]]]:
        """Task name -> rows that are trained on beside the stage's own, made with `maker` (`ItemRows`)."""
        return {}

    def redraw(self, task: str, row: dict[str, Any], rng: np.random.Generator, maker: Any) -> dict[str, Any]:
        """The row as it is read this time; called for each row of each batch where `redraws` is True."""
        return row

    redraws: bool = False

    def task_weights(self) -> dict[str, float]:
        """Task name -> weight; 1 for any task that it leaves out."""
        return {}

    divides_by_task: bool = False  # whether a weight is that of the task's mean loss, not of each of its tokens

    def parameters(self, model: Any, maker: Any) -> nn.Module | None:
        """Parameters beyond the model's, trained with it. They are kept in `self` too."""
        return None

    def embed(self, embedding: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """(B, T, H) what the model reads in place of its own embeddings; None to leave them."""
        return None

    def counts(self, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Name -> what a term divides by, of one micro-batch; always the same names."""
        return {}

    def terms(self, inputs: LossInputs, embedding: nn.Module) -> dict[str, torch.Tensor]:
        """Name -> what is added to the loss, divided by `inputs.counts` already."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what later stages need beside the model."""


@dataclass(frozen=True)
class LossSpec:
    """One entry of a recipe's `losses`."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "LossSpec":
        """A spec from a recipe's mapping."""
        known = [f.name for f in fields(cls)]
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError(f"loss {entry!r} has no name; write it as {{name: nll}}")
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(f"loss {entry['name']} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
        if not isinstance(entry.get("kwargs", {}), Mapping):
            raise ValueError(f"kwargs of loss {entry['name']} is {entry['kwargs']!r} but must be a mapping")
        return cls(entry["name"], dict(entry.get("kwargs", {})))


@dataclass(frozen=True)
class Losses:
    """What a recipe's `losses` stand for.

    Attributes:
        token: From LossInputs to (P,) values.
        extras: Name to what goes beside it.
        masks_first: Whether the token loss is a softmax over legal tokens.
    """

    token: Callable[[LossInputs], torch.Tensor]
    extras: dict[str, Extra]
    masks_first: bool

    @property
    def task_weights(self) -> dict[str, float]:
        """Of all extras."""
        return {task: weight for extra in self.extras.values() for task, weight in extra.task_weights().items()}


def load_losses(specs: Sequence[Mapping[str, Any]], task: str) -> Losses:
    """The losses that a recipe names, each tried on four made-up positions.

    Args:
        specs: Entries of the recipe: name and kwargs.
        task: `next_item` or `rerank`.

    Raises:
        ValueError: On an unknown loss, none or two token losses, one that is meant for the other task, or bad kwargs.
    """
    if isinstance(specs, str | Mapping) or not specs:
        raise ValueError(f"losses is {specs!r} but must be a list such as [{{name: nll}}]")
    tokens, extras, masks_first = {}, {}, False
    for spec in map(LossSpec.of, specs):
        found = load_function(spec.name, FOLDER, **spec.kwargs)
        plain = getattr(found, "func", found)
        name = plain.__name__
        if name in tokens or name in extras:
            raise ValueError(f"two losses are called {name}; keep one")
        is_extra = inspect.isclass(plain)
        module = sys.modules[plain.__module__]
        meant_for = plain.tasks if is_extra else getattr(module, "TASKS", TASKS)
        if task not in meant_for:
            raise ValueError(f"loss {name} is for the task {' and '.join(meant_for)}, not for {task}; take it out")
        if is_extra:
            extras[name] = _made(name, found)
        else:
            tokens[name] = found
            masks_first = getattr(module, "REACHES", "vocabulary") == "legal"
        brings_rows = is_extra and (plain.rows is not Extra.rows or plain.redraw is not Extra.redraw)
        if brings_rows and task == "rerank":
            raise ValueError(
                f"loss {name} brings rows, which the task rerank takes none of; say tasks = ('next_item',)"
            )
    ways = {
        extra.divides_by_task: name for name, extra in extras.items() if extra.divides_by_task or extra.task_weights()
    }
    if len(ways) > 1:
        raise ValueError(
            f"loss {ways[False]} weighs tokens, but {ways[True]} the means of tasks; set divide_by to task"
        )
    if len(tokens) != 1:
        stated = f"{' and '.join(tokens)} are token losses" if tokens else "losses has no token loss"
        raise ValueError(f"{stated}; give exactly one of {', '.join(token_losses())}, or one of your own")
    name, token = next(iter(tokens.items()))
    try_out(name, token, task)
    return Losses(token, extras, masks_first)


def _made(name: str, maker: Callable[[], Extra]) -> Extra:
    try:
        made = maker()
    except TypeError as error:
        raise ValueError(f"loss {name}: {error}") from error
    if not isinstance(made, Extra):
        raise ValueError(f"loss {name} is a class but no subclass of rerank.losses.Extra; make it one, or a function")
    return made


@dataclass(frozen=True)
class LossEntry:
    """What `rerank losses` says of a loss."""

    name: str
    kind: str
    tasks: tuple[str, ...]
    needs: str
    costs: str


def list_losses() -> list[LossEntry]:
    """The losses of the folder."""
    entries = []
    for name in known_names(FOLDER):
        found = load_function(name, FOLDER)
        module, is_extra = sys.modules[found.__module__], inspect.isclass(found)
        kind = "beside a token loss" if is_extra else "token loss"
        tasks = found.tasks if is_extra else getattr(module, "TASKS", TASKS)
        told = (getattr(module, constant, "(its file does not say)") for constant in ("NEEDS", "COSTS"))
        entries.append(LossEntry(name, kind, tasks, *told))
    return entries


def token_losses() -> list[str]:
    """Short names that are token losses."""
    return [name for name in known_names(FOLDER) if not inspect.isclass(load_function(name, FOLDER))]


def try_out(name: str, token: Callable[[LossInputs], torch.Tensor], task: str) -> None:
    """Call a token loss on four positions of a made-up model, so that a mistake shows before a real one is loaded.

    Raises:
        ValueError: When it raises, returns something else than four finite numbers, or has no gradient.
    """
    inputs = example_inputs(task)
    try:
        values = token(inputs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"loss {name}: {error}") from error
    shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
    if shape != (4,):
        raise ValueError(f"loss {name} returned {shape} for 4 positions; return a tensor of one value for each")
    if not values.requires_grad or not torch.isfinite(values).all():
        raise ValueError(f"loss {name} returned {values.tolist()}; its values must be finite and have a gradient")


def example_inputs(task: str) -> LossInputs:
    """Four positions of a model with twelve tokens and a catalogue of five items of two tokens."""
    rng = torch.Generator().manual_seed(0)
    index = PrefixIndex.build([[5, 8], [5, 9], [5, 10], [6, 8], [7, 11]])
    nodes = torch.tensor([index.root, index.find([5]), index.root, index.find([6])])
    is_next = task == "next_item"
    return LossInputs(
        hidden=torch.randn(4, 3, generator=rng).requires_grad_(),
        labels=torch.tensor([5, 9, 6, 8]),
        head=Head(torch.randn(12, 3, generator=rng)),
        is_ranking=torch.tensor([True] * 4 if is_next else [False, False, True, True]),
        nodes=nodes if is_next else torch.full((4,), -1),
        items=torch.tensor([1, -1, 3, -1] if is_next else [-1] * 4),
        tasks=torch.zeros(4, dtype=torch.long),
        index=index if is_next else None,
        counts={task: 4},
    )
