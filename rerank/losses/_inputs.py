"""Inputs of the sft stage's losses: states, labels, the head, and the catalogue's valid tokens.

Letters of shapes: B rows, T tokens, P positions under loss (of all rows of a micro-batch), H hidden size, V
vocabulary, W children of a prefix, N candidates of the longest list.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from rerank.next_item.prefix_index import PrefixIndex

VOCABULARY_TILE = 32768  # columns that TRL's kernel scores at once
MOST_KEPT = 2**24  # logits and weights of the head, 64 MB of each copy, kept for a backward pass; beyond, TRL's kernel


@dataclass(frozen=True)
class Head:
    """The model's output head: weight (V, H), bias (V,) or None, and the cap that some models put on logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None


# Columns of a row whose first label a loss reads, with what pads them; `first_label` is that label's place in the row.
LIST_COLUMNS = {"label_tokens": 0, "ranks": 0, "grades": math.nan, "teacher_scores": math.nan}


@dataclass(frozen=True)
class FirstLabels:
    """The candidates of each row of a micro-batch, where the first label of its ranking is predicted.

    Attributes:
        logits: (B, N) of each candidate's label; any at padding.
        ranks: (B, N) in the ranking that the row teaches, from 1, among the candidates that were seen; those behind
            the best `top_k` share one. 0 for one that was not seen, and at padding.
        grades: (B, N); NaN for one that was not seen, and at padding.
        teacher_scores: (B, N); NaN where there are none.
    """

    logits: torch.Tensor
    ranks: torch.Tensor
    grades: torch.Tensor
    teacher_scores: torch.Tensor

    @property
    def seen(self) -> torch.Tensor:
        """(B, N) whether it is a candidate that was seen."""
        return ~self.grades.isnan()


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a loss, of one micro-batch.

    Attributes:
        hidden: (P, H) states from which `labels` are predicted.
        labels: (P,) tokens.
        head: Of the model.
        is_ranking: (P,) with the task rerank, whether a label comes after the trace; else True.
        nodes: (P,) node of `index` whose children compete with the label; -1 where the label is no token of an item.
        items: (P,) item whose first token the label is, else -1.
        tasks: (P,) number of the row's task.
        index: The catalogue's token sequences; None with the task rerank.
        states: (B, T, H) all hidden states.
        batch: The collated batch: input_ids, attention_mask, labels, task, columns of extra rows, and, for a loss that
            declares `first_label`, `first_label` (B,) and LIST_COLUMNS (B, N).
        counts: Of the whole optimizer step: supervised positions per task, and what `AuxiliaryLoss.counts` added.
        logged: Fill in name -> (sum, count) for a mean that is to be logged.
    """

    hidden: torch.Tensor
    labels: torch.Tensor
    head: Head
    is_ranking: torch.Tensor
    nodes: torch.Tensor
    items: torch.Tensor
    tasks: torch.Tensor
    index: PrefixIndex | None = None
    states: torch.Tensor | None = None
    batch: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    logged: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def label_logps(self, temperature: float = 1.0, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probability of each label over the whole vocabulary, (P,), or (M,) of the `chosen` positions (P,) bool.

        By TRL's kernel, which makes the logits twice and keeps none; few enough are kept, which is faster. Those are
        in float32 under autocast too, where the kernel's are products of rounded states.
        """
        from trl.trainer.utils import _ChunkedLogProbFunction

        hidden, labels = (self.hidden, self.labels) if chosen is None else (self.hidden[chosen], self.labels[chosen])
        if (len(hidden) + hidden.shape[1]) * len(self.head.weight) <= MOST_KEPT:
            logits = self._logits(hidden, slice(None))
            return -nn.functional.cross_entropy(logits / temperature, labels, reduction="none")
        head = self.head
        options = (temperature, VOCABULARY_TILE, head.softcap, 1.0, ("log_probs",))
        apply: Callable[..., tuple[torch.Tensor, ...]] = _ChunkedLogProbFunction.apply
        return apply(hidden, head.weight, head.bias, labels, *options)[0]

    def _logits(self, hidden: torch.Tensor, vocabulary: torch.Tensor | slice) -> torch.Tensor:
        """(M, K) of the states (M, H) for the K tokens of `vocabulary`, in float32 at least."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.head.bias is None else self.head.bias[vocabulary].to(dtype)
            logits = nn.functional.linear(hidden.to(dtype), self.head.weight[vocabulary].to(dtype), bias)
        return logits if self.head.softcap is None else self.head.softcap * torch.tanh(logits / self.head.softcap)

    @cached_property
    def first_labels(self) -> FirstLabels:
        """The candidates' logits at each row's first label, in float32 at least, and what is known of them."""
        if "first_label" not in self.batch or self.states is None:
            raise ValueError("first_labels is for a loss that declares INFO = LossInfo(('rerank',), first_label=True)")
        before = self.batch["first_label"] - 1
        rows = torch.arange(len(before), device=before.device)
        hidden, tokens = self.states[rows, before], self.batch["label_tokens"]
        vocabulary, places = torch.unique(tokens, return_inverse=True)
        logits = self._logits(hidden, vocabulary).gather(1, places)
        return FirstLabels(logits, *(self.batch[name] for name in ("ranks", "grades", "teacher_scores")))

    @cached_property
    def is_item(self) -> torch.Tensor:
        """(P,) whether a label is a token of an item, and so has valid competitors."""
        return self.nodes >= 0

    def constrained_logps(self, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities over the valid tokens, at the M positions where `is_item` holds.

        Logits are computed for tokens of the catalogue only, whatever the size of the vocabulary.

        Returns:
            logps (M, W), -inf beyond a position's own number of valid tokens; that number (M,); and the place of the
            label in its row (M,).
        """
        if self.index is None:
            raise ValueError("constrained_logps is for the task next_item, the only one with a prefix index")
        device = self.hidden.device
        _, numbers, table = self.index.child_table(self.nodes[self.is_item].cpu().numpy())
        table = table if table.shape[1] else np.zeros((len(table), 1))  # a micro-batch may have no such position
        vocabulary = torch.from_numpy(self.index.vocabulary.astype(np.int64)).to(device)
        places, counts = torch.from_numpy(table.astype(np.int64)).to(device), torch.from_numpy(numbers).to(device)
        logits = self._logits(self.hidden[self.is_item], vocabulary)
        is_none = torch.arange(places.shape[1], device=device) >= counts[:, None]
        logits = (logits.gather(1, places) / temperature).masked_fill(is_none, -math.inf)
        is_label = (vocabulary[places] == self.labels[self.is_item][:, None]) & ~is_none
        return logits.log_softmax(dim=1), counts, is_label.int().argmax(dim=1)


def check_count(name: str, value: object) -> None:
    """Refuse a parameter of a loss that is no whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value} but must be a whole number of at least 1")
