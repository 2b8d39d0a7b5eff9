"""Beam search over the catalogue: the items a causal language model finds most likely after a history.

The prefix index is the constraint, on every step and for every beam, so nothing but a catalogue item can come out.
The history is read once per row, and the row's beams share its keys and values. Nothing is sampled, and a model's own
generation_config plays no part. Letters of shapes: B rows, K beams of a row, W children of a beam, V vocabulary.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from rerank.next_item.beam_decoder import BeamDecoder, log_total, shared_cache_obstacle, valid_logits
from rerank.next_item.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BeamResult:
    """The items found for each row, best first, and the log-probability of each item's token sequence.

    `best_dropped` holds, for each row of a beam search, the log-probability of the best prefix or item that no beam
    was left for, -inf where nothing was dropped: no item that the beams lost has more. Other searches leave it empty.
    """

    items: list[list[int]]
    logps: list[list[float]]
    best_dropped: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Beams:
    """Hypotheses of each row, all arrays (B, K).

    Attributes:
        nodes: Node of the prefix index; where a row has fewer than K, its last node, which leads nowhere.
        logps: Log-probability of the tokens so far; -inf where a row has fewer than K.
        parents: The column of the open beam of the step before that it continues; 0 where a row has fewer than K.
        is_open: Whether it continues; else the items that end at its node are its result.
    """

    nodes: np.ndarray
    logps: np.ndarray
    parents: np.ndarray
    is_open: np.ndarray

    def joined(self, other: "Beams") -> "Beams":
        """These and the other hypotheses of each row."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Beams(*(np.concatenate(pair, axis=1) for pair in pairs))

    def best(self, num_beams: int) -> "Beams":
        """The best of each row, best first; on ties the one that comes first in the index."""
        return self._taken(np.lexsort((self.nodes, -self.logps))[:, :num_beams])

    def best_after(self, num_beams: int) -> np.ndarray:
        """(B,) log-probability of the best that `best` leaves out; -inf where it leaves out none."""
        if self.logps.shape[1] <= num_beams:
            return np.full(len(self.logps), -np.inf)
        return -np.partition(-self.logps, num_beams, axis=1)[:, num_beams]

    def where(self, condition: np.ndarray, last_node: int) -> "Beams":
        """Those of each row for which `condition` holds, in the order of the index."""
        chosen = condition & (self.logps > -np.inf)
        if not chosen.any():
            return Beams(*(array[:, :0] for array in vars(self).values()))
        order = np.lexsort((self.nodes, ~chosen))[:, : chosen.sum(axis=1).max()]
        taken, is_there = self._taken(order), np.take_along_axis(chosen, order, axis=1)
        nodes, logps = np.where(is_there, taken.nodes, last_node), np.where(is_there, taken.logps, -np.inf)
        return Beams(nodes, logps, np.where(is_there, taken.parents, 0), taken.is_open)  # a finished beam's is of old

    def _taken(self, order: np.ndarray) -> "Beams":
        return Beams(*(np.take_along_axis(array, order, axis=1) for array in vars(self).values()))


@dataclass(frozen=True)
class ExcludedItems:
    """Items that rows must not find, as sorted keys: row * len(index) + place in `index.items`.

    `closed` and `ended` are keys row * num_nodes + node: of nodes below which nothing is left, and of nodes at which
    items end but none is left.
    """

    closed: np.ndarray
    ended: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, index: PrefixIndex, excluded: Sequence[Collection[int]]) -> "ExcludedItems":
        """The excluded items of each row; those the index lacks are left out."""
        lists = [np.fromiter(items, dtype=np.int64, count=len(items)) for items in excluded]
        rows = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
        places = index.places_of(np.concatenate(lists)) if len(rows) else rows
        keys = np.unique((rows * len(index) + places)[places >= 0])
        return cls(*index.without(*np.divmod(keys, len(index))), keys)


def beam_search(
    model: "PreTrainedModel",
    input_ids: Sequence[Sequence[int]],
    index: PrefixIndex,
    num_beams: int = 10,
    num_items: int | None = None,
    excluded: Sequence[Collection[int]] | None = None,
    allowed: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 64,
    constrained: bool = False,
) -> BeamResult:
    """The most likely items after each row of tokens, by batched constrained beam search.

    With `num_beams` at least the number of items it is exact: every item, in the order of its log-probability.
    On ties the item whose tokens come first wins.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Tokens of each row's prompt, of any lengths from 1 on.
        index: Token sequences of the items that may be found, in the model's vocabulary.
        num_beams: Prefixes kept per row and step. Items that share one sequence share one beam.
        num_items: At most, per row; all that the beams hold by default.
        excluded: Per row, items that must not be found, such as those already seen. They take no beam, and leaving
            them out changes no other item's log-probability.
        allowed: The only items that may be found in any row, such as those in stock; all by default. Costs one pass
            over the index: for many calls with one set, call `index.only(allowed)` once and pass that index instead.
        batch_size: Rows searched at once; memory grows with batch_size * num_beams.
        constrained: Softmax over valid continuations instead of the whole vocabulary (as MSL and BEAR do); with
            `allowed`, these items are the catalogue.
    """
    excluded = [()] * len(input_ids) if excluded is None else excluded
    _check(input_ids, excluded, {"num_beams": num_beams, "num_items": num_items, "batch_size": batch_size})
    if num_beams > len(index):
        logger.warning(
            "num_beams is %d but the prefix index has %d items; that many are enough", num_beams, len(index)
        )
    if allowed is not None:
        index = index.only(allowed)
    num_beams = min(num_beams, len(index))  # never more prefixes than items
    if (obstacle := shared_cache_obstacle(model)) is not None:
        logger.info("every beam gets a copy of its history: %s", obstacle)
    found: dict[int, tuple[list[int], list[float], float]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches_by_length(input_ids, batch_size):
                excluded_items = ExcludedItems.of(index, [excluded[row] for row in batch])
                decoder = BeamDecoder(model, [input_ids[row] for row in batch], shared=obstacle is None)
                finished, dropped = _search(decoder, index, num_beams, excluded_items, constrained)
                lists = _found_items(finished, index, excluded_items, num_items)
                found |= {row: (*of, most) for row, of, most in zip(batch, lists, dropped.tolist(), strict=True)}
    finally:
        model.train(was_training)
    rows = [found[row] for row in range(len(input_ids))]
    return BeamResult([items for items, _, _ in rows], [logps for _, logps, _ in rows], [most for *_, most in rows])


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Numbers of the prompts in batches of like length, so that there is little padding."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check(
    input_ids: Sequence[Sequence[int]], excluded: Sequence[Collection[int]], numbers: dict[str, int | None]
) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1")
    if len(excluded) != len(input_ids):
        raise ValueError(f"excluded has {len(excluded)} rows but input_ids {len(input_ids)}; give one for each")
    for row, tokens in enumerate(input_ids):
        if len(tokens) == 0:
            raise ValueError(f"row {row} of input_ids is empty; a history needs at least one token")


def _search(
    decoder: BeamDecoder, index: PrefixIndex, num_beams: int, excluded_items: ExcludedItems, constrained: bool
) -> tuple[Beams, np.ndarray]:
    """The finished beams of one batch, and the best log-probability that was dropped on the way, (B,)."""
    logits = decoder.logits  # (B, K, V), K = 1 before the first step
    if index.vocabulary[-1] >= logits.shape[2]:
        raise ValueError(
            f"the prefix index has token {index.vocabulary[-1]} but the model only {logits.shape[2]}; "
            "build the index with the model's own tokenizer"
        )
    zeros, last_node = np.zeros((len(logits), 1), dtype=np.int64), index.num_nodes - 1
    beams = Beams(zeros + index.root, zeros.astype(float), zeros, zeros == 0)
    finished = beams.where(~beams.is_open, last_node)
    best_dropped = np.full(len(logits), -np.inf)
    while beams.nodes.size:
        scores, first = _child_logps(beams, logits, index, excluded_items.closed, constrained)
        grown, left_out = _grown(scores, first, num_beams, last_node)
        is_end, is_inner = _kinds(grown.nodes, index, excluded_items.ended)
        # an item that is also the beginning of another counts twice: it ends, and it continues
        ended, inner = grown.where(is_end, last_node), grown.where(is_inner, last_node)
        inner.is_open[:] = True
        hypotheses = finished.joined(ended).joined(inner)
        best = hypotheses.best(num_beams)
        best_dropped = np.maximum.reduce([best_dropped, left_out, hypotheses.best_after(num_beams)])
        finished, beams = best.where(~best.is_open, last_node), best.where(best.is_open, last_node)
        if beams.nodes.size:
            logits = decoder.step(beams.parents, index.vocabulary[index.tokens[beams.nodes - 1]])
    return finished, best_dropped


def _child_logps(
    beams: Beams, logits: torch.Tensor, index: PrefixIndex, closed: np.ndarray, constrained: bool
) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probabilities (B, K, W) of the beams' continuations, -inf for none, and each beam's first child (B, K)."""
    scores, first, counts = valid_logits(logits, beams.nodes, index)
    shape, is_none = scores.shape, scores == -np.inf
    before = torch.from_numpy(beams.logps).to(logits.device)
    scores += (before - log_total(logits, scores, constrained))[:, :, None]
    scores.masked_fill_(is_none, -np.inf)  # a beam that leads nowhere has no total
    if len(closed):
        keys = np.arange(shape[0]).repeat(shape[1]) * index.num_nodes + first  # ascending, as nodes are in each row
        slots = np.searchsorted(keys, closed, side="right") - 1
        numbers = closed - keys[slots]
        hit = (numbers >= 0) & (numbers < counts[slots])
        scores.view(-1)[torch.from_numpy((slots * shape[2] + numbers)[hit]).to(logits.device)] = -np.inf
    return scores, first.reshape(shape[:2])


def _grown(scores: torch.Tensor, first: np.ndarray, num_beams: int, last_node: int) -> tuple[Beams, np.ndarray]:
    """The best continuations of each row, none open yet, and the log-probability of the best of the others, (B,)."""
    top, places, left_out = _first_best(scores.flatten(1), num_beams)
    logps = top.cpu().numpy()
    if np.isnan(logps).any():
        raise ValueError("the model's logits are NaN; its weights are broken or its precision is too low")
    parents, numbers = np.divmod(places.cpu().numpy(), scores.shape[2])
    nodes = np.take_along_axis(first, parents, axis=1) + numbers
    beams = Beams(np.where(logps > -np.inf, nodes, last_node), logps, parents, np.zeros(nodes.shape, dtype=bool))
    return beams, left_out.cpu().numpy()


def _first_best(scores: torch.Tensor, num_best: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The greatest of each row, their places, and the greatest of the rest; of equal ones, those that come first."""
    top, places = scores.topk(min(num_best + 1, scores.shape[1]), dim=1)
    left_out = top.new_full(top.shape[:1], -np.inf)
    if top.shape[1] > num_best:
        left_out = top[:, num_best]
        tied = (top[:, num_best - 1] == top[:, num_best]) & (top[:, num_best] > -np.inf)
        if tied.any():  # topk takes any of them, a stable sort the first
            values, order = scores[tied].sort(dim=1, descending=True, stable=True)
            top[tied], places[tied] = values[:, : num_best + 1], order[:, : num_best + 1]
    return top[:, :num_best], places[:, :num_best], left_out


def _kinds(nodes: np.ndarray, index: PrefixIndex, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether nodes (B, K) are the end of an item that may be found, and whether they continue."""
    is_end = index.num_items_at(nodes) > 0
    if len(ended):
        is_end &= ~np.isin(np.arange(len(nodes))[:, None] * index.num_nodes + nodes, ended)
    first, end = index.child_ranges(nodes)
    return is_end, first < end


def _found_items(
    finished: Beams, index: PrefixIndex, excluded_items: ExcludedItems, num_items: int | None
) -> list[tuple[list[int], list[float]]]:
    """Each row's items, best first, and their log-probabilities."""
    num_rows, width = finished.nodes.shape
    beams = finished.best(width)
    offsets, places = index.places_at(beams.nodes.ravel())
    counts = np.diff(offsets)
    rows, logps = np.arange(num_rows).repeat(width).repeat(counts), beams.logps.ravel().repeat(counts)
    keep = (logps > -np.inf) & ~np.isin(rows * len(index) + places, excluded_items.items)
    items, logps = index.items[places[keep]].tolist(), logps[keep].tolist()
    bounds = np.searchsorted(rows[keep], np.arange(num_rows + 1)).tolist()
    return [(items[start:end][:num_items], logps[start:end][:num_items]) for start, end in pairwise(bounds)]
