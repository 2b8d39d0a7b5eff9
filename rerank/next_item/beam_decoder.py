"""A causal language model that reads each row's history once and continues it with several beams.

The beams of a row stand one after another in the row's own sequence, as a tree: a 4-D mask lets each token see the
history and its own ancestors only, and position_ids say how deep it stands. So keys and values of a history exist
once, whatever the number of beams, and nothing is reordered; a beam that was dropped leaves a token nobody sees.
Models that cannot take such a mask get a copy of the history per beam. Letters of shapes: B rows, K beams of a row,
T tokens of the longest history, S tokens in the cache, V vocabulary, W children of a node of the prefix index.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rerank.next_item.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shared_cache_obstacle(model: "PreTrainedModel") -> str | None:
    """The reason why beams cannot share one cache of their history with this model; None when they can."""
    if not model._supports_attention_backend:  # it may add masks or biases of its own, by place in the cache
        return "the model computes attention in a way of its own"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention {attention} takes no mask per beam; load the model with attn_implementation sdpa or eager"
    others = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    return f"the model keeps {', '.join(sorted(others))}, not all keys and values" if others else None


def _accepted(model: "PreTrainedModel") -> set[str]:
    """Names of the arguments that the model's forward takes, and those of the models in it, as with an adapter."""
    forwards = {type(module).forward for module in model.modules()}
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def valid_logits(
    logits: torch.Tensor, nodes: np.ndarray, index: PrefixIndex
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Logits (B, K, W) in float64 of the children of nodes (B, K), given those of all tokens (B, K, V).

    They are -inf beyond a node's own number of children. First child and that number (B * K,) come with them.
    """
    first, counts, table = index.child_table(nodes.ravel())
    shape = (*nodes.shape, table.shape[1])
    vocabulary = torch.from_numpy(index.vocabulary.astype(np.int64)).to(logits.device)
    tokens = vocabulary[torch.from_numpy(table.astype(np.int64)).to(logits.device)].view(shape)
    num_children = torch.from_numpy(counts).to(logits.device).view(*shape[:2], 1)
    is_none = torch.arange(shape[2], device=logits.device) >= num_children
    return logits.gather(2, tokens).double().masked_fill_(is_none, -np.inf), first, counts


def log_total(logits: torch.Tensor, valid: torch.Tensor, constrained: bool) -> torch.Tensor:
    """(B, K) log of the sum that a token's probability is a share of: over valid continuations, or over all tokens."""
    return (valid if constrained else logits.float()).logsumexp(dim=2)


class BeamDecoder:
    """Histories of different length, read; `step` reads the next token of each beam.

    Attributes:
        logits: (B, 1, V), after the histories.
    """

    def __init__(self, model: "PreTrainedModel", input_ids: Sequence[Sequence[int]], shared: bool) -> None:
        accepted = _accepted(model)
        if "past_key_values" not in accepted:
            raise ValueError(f"{type(model).__name__} takes no past_key_values; use a model with a cache of them")
        self.model, self.shared = model, shared
        self.options = accepted & {"position_ids", "logits_to_keep"}
        self.cache = DynamicCache(config=model.config)
        lengths = torch.tensor([len(row) for row in input_ids])[:, None]
        width = int(lengths.max())
        padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in input_ids])  # (B, T); the mask hides 0
        mask = (torch.arange(width) >= width - lengths).to(model.device)  # (B, T)
        self.lengths = lengths.to(model.device)  # (B, 1)
        self.seen = mask[:, None]  # (B, K, S): which cached tokens each beam sees
        self.logits = self._forward(padded.to(model.device), mask.long(), (mask.cumsum(dim=1) - 1).clamp(min=0), 1)

    def step(self, parents: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
        """Logits (B, K, V) after each beam's new token.

        Args:
            parents: (B, K), the column of the beam of the step before that each continues.
            tokens: (B, K).
        """
        num_rows, num_beams = parents.shape
        columns = torch.from_numpy(parents).to(self.model.device)
        input_ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)
        positions = self.lengths.expand(-1, num_beams)
        self.lengths = self.lengths + 1
        rows = torch.arange(num_rows, device=self.model.device)[:, None]
        seen = self.seen[rows, columns]  # (B, K, S)
        if self.shared:
            own = torch.eye(num_beams, dtype=torch.bool, device=seen.device).expand(num_rows, -1, -1)
            self.seen = torch.cat([seen, own], dim=2)
            return self._forward(input_ids, self._tree_mask(), positions, num_beams)
        self.cache.reorder_cache((rows * self.seen.shape[1] + columns).flatten())
        self.seen = torch.cat([seen, seen.new_ones(num_rows, num_beams, 1)], dim=2)
        mask = self.seen.flatten(0, 1).long()
        return self._forward(input_ids.view(-1, 1), mask, positions.reshape(-1, 1), 1).view(num_rows, num_beams, -1)

    def _tree_mask(self) -> torch.Tensor:
        """(B, 1, K, S): boolean for SDPA, to be added to the scores for eager attention."""
        mask = self.seen[:, None]
        if self.model.config._attn_implementation == "sdpa":
            return mask
        zeros = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(self.model.dtype).min)

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor, num_kept: int
    ) -> torch.Tensor:
        """Logits of the last `num_kept` tokens."""
        options = {"position_ids": position_ids, "logits_to_keep": num_kept}
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: options[name] for name in self.options},
        )
        return output.logits[:, -num_kept:]
