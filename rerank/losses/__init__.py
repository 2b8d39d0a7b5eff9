"""Losses of the sft stage, one a file: `rerank/losses/<name>.py` holds `<name>`, and a recipe names it.

    losses:
      - {name: bear, kwargs: {num_beams: 10, lambda_c: 0.25}}     # exactly one token loss
      - {name: iirg, kwargs: {window: 5}}                         # and auxiliary losses beside it

The folder is the registry: drop a file in, or write `module.path:function` or `path/to/file.py:function`.

    def focal(inputs, gamma=2.0):
        logps = inputs.label_logps()
        return -((1 - logps.detach().exp()) ** gamma) * logps

A token loss is a plain function from `LossInputs` and its own parameters to one value for each position under loss,
(P,). The trainer averages the values of a task over its positions in the whole optimizer step, counted before its
first forward, so a step does not depend on how its batch is cut; the tasks' means, weighted, are summed.

An auxiliary loss is a subclass of `AuxiliaryLoss` with any of its methods: rows of its own, redrawn each epoch or
not, weights of tasks, parameters of its own, embeddings, terms, files beside the model.

Either kind may declare in its file, for the checks and for `rerank losses`:

    INFO = LossInfo(tasks=("next_item",), constrained=True, needs="...", costs="...")

With `tasks=("rerank",), first_label=True` a loss gets `inputs.first_labels`: the logits of a row's candidates where
the first label of its ranking is predicted, and the candidates' ranks, grades and teacher's scores.

Letters of shapes: B rows, T tokens, P positions under loss (of all rows of a micro-batch), H hidden size, V
vocabulary, W children of a prefix.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from rerank.losses._inputs import LIST_COLUMNS, FirstLabels, Head, LossInputs
from rerank.next_item.prefix_index import PrefixIndex
from rerank.plugins import check_entry, known_names, load_function

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rerank.next_item.encoder import NextItemEncoder

__all__ = [
    "LIST_COLUMNS",
    "AuxiliaryLoss",
    "Batch",
    "FirstLabels",
    "Head",
    "LossInfo",
    "LossInputs",
    "Losses",
    "Row",
    "load_losses",
]

FOLDER = "rerank.losses"
TASKS = ("next_item", "rerank")

Row = dict[str, Any]  # of one example: input_ids, labels and what else `NextItemEncoder` writes
Batch = Mapping[str, torch.Tensor]
TokenLoss = Callable[[LossInputs], torch.Tensor]


@dataclass(frozen=True)
class LossInfo:
    """A loss's declaration.

    Attributes:
        tasks: What it is meant for.
        constrained: Whether a token loss is a softmax over valid continuations in the catalogue. Positions with one
            such token are then taken out of the loss before training (their loss is zero), and the model's beam
            search is constrained likewise.
        first_label: Whether it reads `LossInputs.first_labels`; every label must then be one token. A token loss that
            does is asked for no other position: rows have no trace and end at their first label.
        needs: What it is computed from.
        costs: Beside the model's forward and backward pass.
    """

    tasks: tuple[str, ...] = TASKS
    constrained: bool = False
    first_label: bool = False
    needs: str = "(its file does not say)"
    costs: str = "(its file does not say)"

    def __post_init__(self) -> None:
        if self.first_label and self.tasks != ("rerank",):
            raise ValueError(f"first_label is for rankings, but tasks is {self.tasks}; write tasks=('rerank',)")

    @classmethod
    def of(cls, loss: Callable[..., object]) -> "LossInfo":
        """The INFO in the file of a function or class."""
        module = vars(sys.modules[loss.__module__])
        info = module.get("INFO", cls())
        for name in ("TASKS", "REACHES"):  # as earlier versions had it
            if "INFO" not in module and isinstance(module.get(name), str | tuple):
                raise ValueError(
                    f"the file of loss {loss.__name__} says {name}, which is gone; write INFO = LossInfo(tasks="
                    "('next_item',), constrained=True), with what it said"
                )
        if not isinstance(info, cls):
            raise ValueError(f"INFO of loss {loss.__name__} is {info!r}; write it as LossInfo(tasks=('next_item',))")
        return info


class AuxiliaryLoss:
    """A loss beside a token loss. A subclass has any of these methods and the lower-case name of its file."""

    task_numbers: Mapping[str, int]  # name of a task -> its number in a batch's column `task`; set by the trainer
    redraws: bool = False  # whether `redraw` is to be called

    def check_size(self, num_items: int, hidden_size: int, num_targets: int) -> None:
        """Refuse sizes that it is not for, before a model loads: of the catalogue, of a state (0: unknown), and the
        next items that a micro-batch predicts at most."""

    def rows(self, encoder: "NextItemEncoder") -> Mapping[str, Sequence[Row]]:
        """Task name -> rows that are trained on beside the stage's own, such as a list, or made when they are read."""
        return {}

    def redraw(self, task: str, row: Row, rng: np.random.Generator, encoder: "NextItemEncoder") -> Row:
        """The row as it is read this time; called for each row of each batch."""
        return row

    def task_weights(self) -> dict[str, float]:
        """Task name -> weight of its mean; 1 for any task that it leaves out."""
        return {}

    def parameters(self, model: "PreTrainedModel", encoder: "NextItemEncoder") -> nn.Module | None:
        """Parameters beyond the model's, trained with it. They are kept in `self` too."""
        return None

    def embed(self, embedding: nn.Embedding, batch: Batch) -> torch.Tensor | None:
        """(B, T, H) embeddings that the model reads in place of its own; None to leave them."""
        return None

    def counts(self, batch: Batch) -> dict[str, int]:
        """Name -> divisor of a term, of one micro-batch; always the same names."""
        return {}

    def terms(self, inputs: LossInputs, embedding: nn.Embedding) -> dict[str, torch.Tensor]:
        """Name -> term that is added to the loss, divided by `inputs.counts` already."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what later stages need beside the model."""


@dataclass(frozen=True)
class Losses:
    """The losses of a recipe.

    Attributes:
        token: From LossInputs to (P,) values.
        auxiliary: By name.
        constrained: Whether the token loss is a softmax over valid continuations.
        first_label: Whether any of them reads the first label.
        one_token: The token loss's name where it is computed at the first label alone; else empty.
    """

    token: TokenLoss
    auxiliary: dict[str, AuxiliaryLoss]
    constrained: bool
    first_label: bool = False
    one_token: str = ""

    @property
    def task_weights(self) -> dict[str, float]:
        """Of all auxiliary losses."""
        return {task: weight for loss in self.auxiliary.values() for task, weight in loss.task_weights().items()}


def load_losses(specs: Sequence[Mapping[str, Any]], task: str, has_scores: bool = True) -> Losses:
    """The losses that a recipe names, the token loss tried on four made-up positions.

    Args:
        specs: Entries of the recipe: name and kwargs.
        task: `next_item` or `rerank`.
        has_scores: Whether rows have a teacher's scores.

    Raises:
        ValueError: On an unknown loss, none or two token losses, one that is meant for the other task, or bad kwargs.
    """
    if isinstance(specs, str | Mapping) or not specs:
        raise ValueError(f"losses is {specs!r} but must be a list such as [{{name: nll}}]")
    tokens: dict[str, TokenLoss] = {}
    auxiliary: dict[str, AuxiliaryLoss] = {}
    constrained = first_label = one_token = False
    for spec in specs:
        entry = check_entry(spec, "loss", ("name", "kwargs"), "{name: nll}")
        found = load_function(entry["name"], FOLDER, **entry.get("kwargs", {}))
        plain = inspect.unwrap(found)
        name, info = plain.__name__, LossInfo.of(plain)
        if name in tokens or name in auxiliary:
            raise ValueError(f"two losses are called {name}; keep one")
        if task not in info.tasks:
            raise ValueError(f"loss {name} is for the task {' and '.join(info.tasks)}, not for {task}; take it out")
        first_label = first_label or info.first_label
        if inspect.isclass(plain):
            auxiliary[name] = _make(name, found, task)
        else:
            tokens[name], constrained, one_token = found, info.constrained, info.first_label
    if len(tokens) != 1:
        stated = f"{' and '.join(tokens)} are token losses" if tokens else "losses has no token loss"
        raise ValueError(f"{stated}; give exactly one of {', '.join(token_losses())}, or one of your own")
    for name, token in tokens.items():
        try_out(name, token, task, one_token, has_scores)
    return Losses(token, auxiliary, constrained, first_label, name if one_token else "")


def _make(name: str, cls: Callable[[], object], task: str) -> AuxiliaryLoss:
    try:
        made = cls()
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name}: {error}") from error
    if not isinstance(made, AuxiliaryLoss):
        raise ValueError(
            f"loss {name} is a class but no subclass of rerank.losses.AuxiliaryLoss; make it one, or a function"
        )
    own = type(made)
    if task == "rerank" and (own.rows is not AuxiliaryLoss.rows or own.redraw is not AuxiliaryLoss.redraw):
        raise ValueError(
            f"loss {name} brings rows, which the task rerank takes none of; say INFO = LossInfo(tasks=('next_item',))"
        )
    return made


def list_losses() -> list[tuple[str, str, LossInfo]]:
    """Name, kind and declaration of each loss of the folder."""
    losses = [(name, load_function(name, FOLDER)) for name in known_names(FOLDER)]
    kinds = {True: "beside a token loss", False: "token loss"}
    return [(name, kinds[inspect.isclass(loss)], LossInfo.of(loss)) for name, loss in losses]


def token_losses() -> list[str]:
    """Short names that are token losses."""
    return [name for name, kind, _ in list_losses() if kind == "token loss"]


def try_out(name: str, token: TokenLoss, task: str, one_token: bool = False, has_scores: bool = True) -> None:
    """Call a token loss on four positions of a made-up model, so that a mistake shows before a real one is loaded.

    Raises:
        ValueError: When it raises, returns something else than four finite numbers, or has no gradient.
    """
    try:
        values = token(example_first_labels(has_scores) if one_token else example_inputs(task))
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


def example_first_labels(has_scores: bool = True) -> LossInputs:
    """`example_inputs` of four rows of two or three candidates, each with its first label alone under loss."""
    plain = example_inputs("rerank")
    tokens = torch.tensor([[5, 6, 7], [9, 8, 0], [6, 7, 5], [8, 9, 0]])
    batch = {"first_label": torch.ones(4, dtype=torch.long), "label_tokens": tokens}
    batch["grades"] = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, math.nan]] * 2)
    batch["ranks"] = torch.tensor([[1, 2, 3], [1, 2, 0]] * 2)
    batch["teacher_scores"] = batch["grades"] if has_scores else torch.full_like(batch["grades"], math.nan)
    return replace(plain, states=torch.stack([plain.hidden] * 2, dim=1), batch=batch)
