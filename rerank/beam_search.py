"""Beam search over the catalogue: the items a causal language model finds most likely after a history.

The prefix index is the constraint, on every step and for every beam, so nothing but a catalogue item can come out.
The history is read once per row, and its keys and values are handed on to the row's beams. Nothing is sampled, and a
model's own generation_config plays no part. Letters of shapes: B rows, M beams of all rows, T tokens, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank.prefix_index import PrefixIndex

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BeamResult:
    """For each row the items found, best first, and the log-probability of each item's token sequence."""

    items: list[list[int]]
    logps: list[list[float]]


@dataclass
class Beams:
    """Hypotheses of all rows in parallel arrays, sorted by row and then best first.

    Attributes:
        rows: Row of the batch.
        nodes: Node of the prefix index.
        logps: Log-probability of the tokens so far.
        is_open: Whether it goes on; else the items that end at its node are its result.
        parents: The open beam of the step before that it continues.
        tokens: Its last token.
    """

    rows: np.ndarray
    nodes: np.ndarray
    logps: np.ndarray
    is_open: np.ndarray
    parents: np.ndarray
    tokens: np.ndarray

    def select(self, chosen: np.ndarray) -> "Beams":
        return Beams(*(array[chosen] for array in vars(self).values()))

    def joined(self, other: "Beams") -> "Beams":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Beams(*(np.concatenate(pair) for pair in pairs))


def beam_search(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    index: PrefixIndex,
    num_beams: int = 10,
    num_items: int | None = None,
    excluded: Sequence[Collection[int]] | None = None,
    batch_size: int = 64,
    mask_first: bool = False,
) -> BeamResult:
    """The most likely items after each row of tokens, by batched constrained beam search.

    With `num_beams` at least the number of items it is exact: every item, in the order of its log-probability.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Tokens of each row's prompt, of any lengths from 1 on.
        index: Token sequences of the items that may be found, in the model's vocabulary.
        num_beams: Prefixes kept per row and step. Items that share one sequence share one beam.
        num_items: At most so many items per row; all that the beams hold by default.
        excluded: Per row, items that must not be found, such as those already seen. They take no beam, and leaving
            them out changes no other item's log-probability.
        batch_size: Rows searched at once; memory grows with batch_size * num_beams.
        mask_first: Normalise over the catalogue's continuations instead of the whole vocabulary (as MSL and BEAR do).

    Raises:
        ValueError: When an argument is out of range, a row is empty, or the index has tokens that the model lacks.
    """
    import torch

    excluded = [()] * len(input_ids) if excluded is None else excluded
    _check(input_ids, num_beams, num_items, excluded, batch_size)
    items: list[list[int]] = [[]] * len(input_ids)
    logps: list[list[float]] = [[]] * len(input_ids)
    by_length = sorted(range(len(input_ids)), key=lambda row: len(input_ids[row]))  # little padding
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(by_length), batch_size):
                batch = by_length[start : start + batch_size]
                batch_excluded = [excluded[row] for row in batch]
                beams = _search(model, [input_ids[row] for row in batch], index, num_beams, batch_excluded, mask_first)
                for number, row in enumerate(batch):
                    own = beams.select(beams.rows == number)
                    items[row], logps[row] = _expand_items(own, index, set(excluded[row]), num_items)
    finally:
        model.train(was_training)
    return BeamResult(items, logps)


def _check(
    input_ids: Sequence[Sequence[int]],
    num_beams: int,
    num_items: int | None,
    excluded: Sequence[Collection[int]],
    batch_size: int,
) -> None:
    for name, value in (("num_beams", num_beams), ("num_items", num_items), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1")
    if len(excluded) != len(input_ids):
        raise ValueError(f"excluded has {len(excluded)} rows but input_ids {len(input_ids)}; give one for each")
    for row, tokens in enumerate(input_ids):
        if len(tokens) == 0:
            raise ValueError(f"row {row} of input_ids is empty; a history needs at least one token")


def _search(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    index: PrefixIndex,
    num_beams: int,
    excluded: Sequence[Collection[int]],
    mask_first: bool,
) -> Beams:
    """The finished beams of one batch."""
    decoder = _Decoder(model, input_ids)
    closed, ended = _excluded_keys(index, excluded)
    num_rows = len(input_ids)
    zeros = np.zeros(num_rows, dtype=np.int64)
    beams = Beams(np.arange(num_rows), zeros, np.zeros(num_rows), np.ones(num_rows, dtype=bool), zeros, zeros)
    logits = decoder.logits
    if index.vocabulary[-1] >= logits.shape[1]:
        raise ValueError(
            f"the prefix index has token {index.vocabulary[-1]} but the model only {logits.shape[1]}; "
            "build the index with the model's own tokenizer"
        )
    while beams.is_open.any():
        grown = _grow(beams.select(beams.is_open), logits, index, mask_first)
        keys = grown.rows * index.num_nodes + grown.nodes
        grown = grown.select(~np.isin(keys, closed) & (grown.is_open | ~np.isin(keys, ended)))
        beams = _best(beams.select(~beams.is_open).joined(grown), num_beams)
        if beams.is_open.any():
            going_on = beams.select(beams.is_open)
            logits = decoder.step(going_on.parents, going_on.tokens)
    return beams


def _excluded_keys(index: PrefixIndex, excluded: Sequence[Collection[int]]) -> tuple[np.ndarray, np.ndarray]:
    """row * num_nodes + node of what each row must not enter, and of where it must not end."""
    closed, ended = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for row, items in enumerate(excluded):
        if len(items):
            row_closed, row_ended = index.without(list(items))
            closed.append(row * index.num_nodes + row_closed)
            ended.append(row * index.num_nodes + row_ended)
    return np.concatenate(closed), np.concatenate(ended)


def _grow(beams: Beams, logits: "torch.Tensor", index: PrefixIndex, mask_first: bool) -> Beams:
    """Every continuation of open beams; one that is an item and also goes on appears twice."""
    offsets, tokens, nodes = index.children(beams.nodes)
    parents = np.repeat(np.arange(len(beams.nodes)), np.diff(offsets))
    logps = beams.logps[parents] + _token_logps(logits, parents, tokens, offsets, mask_first)
    first, end = index.child_ranges(nodes)
    grown = Beams(beams.rows[parents], nodes, logps, first < end, parents, tokens)
    finished = grown.select(index.num_items_at(nodes) > 0)
    finished.is_open = np.zeros(len(finished.nodes), dtype=bool)
    return finished.joined(grown.select(grown.is_open))


def _token_logps(
    logits: "torch.Tensor", parents: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, mask_first: bool
) -> np.ndarray:
    """Log-probability of each continuation, for logits (M, V) of the beams they continue."""
    import torch

    where = (torch.from_numpy(parents).to(logits.device), torch.from_numpy(tokens.astype(np.int64)).to(logits.device))
    chosen = logits[where].double().cpu().numpy()
    if np.isnan(chosen).any():
        raise ValueError("the model's logits are NaN; its weights are broken or its precision is too low")
    if mask_first:
        # sums over each beam's continuations; each has at least one, as reduceat needs
        greatest = np.maximum.reduceat(chosen, offsets[:-1])
        sums = np.add.reduceat(np.exp(chosen - greatest[parents]), offsets[:-1])
        return chosen - (greatest + np.log(sums))[parents]
    return chosen - torch.logsumexp(logits.float(), dim=-1).double().cpu().numpy()[parents]


def _best(beams: Beams, num_beams: int) -> Beams:
    """The best beams of each row; on ties the one that comes first in the index."""
    beams = beams.select(np.lexsort((beams.nodes, -beams.logps, beams.rows)))
    places = np.arange(len(beams.rows)) - np.searchsorted(beams.rows, beams.rows)
    return beams.select(places < num_beams)


def _expand_items(
    beams: Beams, index: PrefixIndex, excluded: set[int], num_items: int | None
) -> tuple[list[int], list[float]]:
    """The items of one row's finished beams, best first, and their log-probabilities."""
    offsets, items = index.items_at(beams.nodes)
    logps = np.repeat(beams.logps, np.diff(offsets))
    found = [(i, logp) for i, logp in zip(items.tolist(), logps.tolist(), strict=True) if i not in excluded][
        :num_items
    ]
    return [item for item, _ in found], [logp for _, logp in found]


class _Decoder:
    """A model with the keys and values of what it has read, one row of them per beam."""

    def __init__(self, model: Any, input_ids: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        lengths = torch.tensor([len(row) for row in input_ids])
        width = int(lengths.max())
        padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in input_ids])  # (B, T); the mask hides 0
        self.mask = (torch.arange(width) >= width - lengths[:, None]).long().to(model.device)  # (B, T)
        self.lengths = lengths.to(model.device)
        self.logits = self._forward(padded.to(model.device), (self.mask.cumsum(dim=1) - 1).clamp(min=0))  # (B, V)

    def step(self, parents: np.ndarray, tokens: np.ndarray) -> "torch.Tensor":
        """Logits (M, V) after each beam's new token; beam m continues the beam `parents[m]` of the step before."""
        import torch

        chosen = torch.from_numpy(parents).to(self.model.device)
        self.cache.reorder_cache(chosen)
        self.mask = torch.cat([self.mask[chosen], self.mask.new_ones(len(chosen), 1)], dim=1)
        positions, self.lengths = self.lengths[chosen][:, None], self.lengths[chosen] + 1
        return self._forward(torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)[:, None], positions)

    def _forward(self, input_ids: "torch.Tensor", position_ids: "torch.Tensor") -> "torch.Tensor":
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
