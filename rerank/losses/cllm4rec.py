"""Beside a token loss: CLLM4Rec's multinomial item head, and its mutual regularisation of two embedding tables."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rerank.item_head import ItemHead
from rerank.losses import Extra, LossInputs
from rerank.midtrain.documents import NEXT_ITEMS
from rerank.sequences import by_user

NEEDS = "a vector for each item, a second embedding of each id token; rows: 1 for each item with text, masked 1 a user"
COSTS = "scores of all items at each target, the extra rows' tokens"
NEXT_ITEM, CONTENT, MASKED = "next_item", "content", "masked"
TARGETS = ("held_out", "all")


class cllm4rec(Extra):
    """The item head's loss, and the pull between what ids mean in histories and what they mean in texts.

    Head: at each target of a next-item row, -log softmax over all items of the state before it; with `mask_share`
    instead, on prompts of a user's items of which a random share is hidden, -1/|H| sum over the hidden items H of
    log softmax (the paper sums; the mean lets users weigh alike). Both divide by their number in the optimizer step.

    Mutual regularisation: id tokens have a second embedding, which is read in rows of content (an item, then its
    text) in place of the model's own, which is read in histories. For each occurrence of an id token in a row of one
    kind, regularisation / 2 * |own embedding - the other's, held fixed|^2, divided by the occurrences in the step.
    The paper alternates the two sides' steps; here a batch holds both. It restricts softmaxes to items and to text:
    take `msl` as the token loss for the first; a text's softmax is over the whole vocabulary here, ids included.
    Users have no tokens of their own, and the prior of the embeddings (lambda_l) is left to weight decay.

    Args:
        head_weight: Of the head's loss; 0 leaves the head out.
        regularisation: lambda_c; 0 leaves content rows and second embeddings out.
        content_weight: Of the content rows' mean token loss, beside that of the histories. The paper's steps take
            turns, which is near to 1; a small model has little room for texts. For regularisation only.
        shuffle_history: Whether the items of a next-item row are put into another random order each epoch, as the
            paper does where recommendations do not follow an order. Off, since next items do. A row of two stays as
            it is: the second may be the one that is to be found.
        mask_share: Share of a user's items that is hidden in a masked prompt (0.2 in the released code); 0 for none.
        target: With masked prompts, `held_out`: the hidden items (paper), or `all`: all of the user's (code).
        read_items: Whether the model also reads, at an item's last token, the vector of its own that the item has in
            the head, as the paper's items are tokens. Such a model is worth less without its head:
            `rerank.next_items.NextItemModel` loads both. Titles have no such vectors.

    Source: arXiv:2311.01343, sec. 3.3.3 (L-step, C-step), 3.3.4, 3.4 (L_rec).
    """

    tasks = ("next_item",)

    def __init__(
        self,
        head_weight: float = 1.0,
        regularisation: float = 1.0,
        content_weight: float = 1.0,
        shuffle_history: bool = False,
        mask_share: float = 0.0,
        target: str = "held_out",
        read_items: bool = True,
    ) -> None:
        weights = {"head_weight": head_weight, "regularisation": regularisation, "content_weight": content_weight}
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"loss cllm4rec: {name} is {value} but must not be negative")
        if not head_weight and not regularisation:
            raise ValueError("loss cllm4rec: head_weight and regularisation are 0; set one above 0 or take it out")
        if not 0 <= mask_share < 1:
            raise ValueError(f"loss cllm4rec: mask_share is {mask_share} but must be at least 0 and below 1")
        if content_weight != 1.0 and not regularisation:
            raise ValueError(
                f"loss cllm4rec: content_weight is {content_weight}, but regularisation is 0, which leaves content "
                "rows out; set one of them anew"
            )
        if mask_share and not head_weight:
            raise ValueError("loss cllm4rec: mask_share is for the head, whose head_weight is 0; set one of them anew")
        if target not in TARGETS:
            raise ValueError(f"loss cllm4rec: target is {target!r}; use one of {', '.join(TARGETS)}")
        self.head_weight, self.regularisation, self.content_weight = weights.values()
        self.shuffle_history, self.mask_share, self.target = shuffle_history, mask_share, target
        self.read_items = read_items
        self.redraws = shuffle_history or mask_share > 0
        self.divides_by_task = regularisation > 0  # a text is longer than a history; the paper takes them in turn
        self.module: nn.Module | None = None

    def task_weights(self) -> dict[str, float]:
        return {CONTENT: self.content_weight} if self.regularisation else {}

    def rows(self, maker: Any) -> dict[str, list[dict[str, Any]]]:
        """Content rows, and a masked prompt of each user with two training items or more."""
        found = {}
        if self.regularisation:
            found[CONTENT] = content_rows(maker)
        if self.mask_share:
            found[MASKED] = masked_rows(maker)
        return found

    def redraw(self, task: str, row: dict[str, Any], rng: np.random.Generator, maker: Any) -> dict[str, Any]:
        if task == MASKED:
            return masked_prompt(row["sequence"], self.mask_share, self.target, rng, maker)
        if task != NEXT_ITEM or not self.shuffle_history:
            return row
        given, length = row["num_given"], len(row["sequence"])
        if given == 1 and length > 2:  # a window, whose every item is a target; else the last item is the only one
            given = length
        items = [*rng.permutation(row["sequence"][:given]).tolist(), *row["sequence"][given:]]
        return maker.row(NEXT_ITEMS, items, row["num_given"])

    def parameters(self, model: Any, maker: Any) -> nn.Module:
        """The head's item vectors and the second embeddings, which begin where the first are."""
        embeddings = model.get_input_embeddings().weight
        self.module = nn.Module()
        if self.head_weight:
            is_read = self.read_items and maker.item_text == "semantic_id"
            self.module.head = ItemHead(maker.tokens, embeddings.shape[1], is_read)
            if is_read:
                self.module.head.add_to(model.get_input_embeddings())
        if self.regularisation:
            ids = torch.from_numpy(maker.index.vocabulary.astype(np.int64))
            places = torch.full((embeddings.shape[0],), -1)
            places[ids] = torch.arange(len(ids))
            self.module.register_buffer("places", places)  # of a token in `content`, else -1
            self.module.content = nn.Parameter(embeddings[ids].detach().clone().float())
        return self.module

    def _places(self, batch: Mapping[str, torch.Tensor], is_content: bool) -> torch.Tensor:
        """(B, T) place of each id token in the second table, -1 for other tokens and rows of the other kind."""
        places = self.module.places[batch["input_ids"]]
        of_kind = (batch["task"] == self.task_numbers[CONTENT]) == is_content
        return torch.where(of_kind[:, None] & (batch["attention_mask"] > 0), places, -1)

    def embed(self, embedding: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if not self.regularisation:
            return None
        own, places = embedding(batch["input_ids"]), self._places(batch, is_content=True)
        second = self.module.content[places.clamp(min=0)].to(own.dtype)
        second = second * getattr(embedding, "embed_scale", 1.0)  # Gemma's embedding scales what it looks up
        return torch.where((places >= 0)[..., None], second, own)

    def counts(self, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
        found = {}
        if self.mask_share:
            found["masked_prompts"] = int((batch["targets"] >= 0).any(dim=1).sum()) if "targets" in batch else 0
        elif self.head_weight:
            found["head_targets"] = int(_is_target(batch).sum())
        if self.regularisation:
            for name, is_content in (("history_ids", False), ("content_ids", True)):
                found[name] = int((self._places(batch, is_content) >= 0).sum())
        return found

    def terms(self, inputs: LossInputs, embedding: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        if self.head_weight:
            loss = self._masked_loss(inputs, embedding) if self.mask_share else self._next_loss(inputs, embedding)
            found["item_head"] = self.head_weight * loss
        if self.regularisation:
            found["mutual_regularisation"] = self.regularisation / 2 * self._distance(inputs, embedding)
        return found

    def _next_loss(self, inputs: LossInputs, embedding: nn.Module) -> torch.Tensor:
        chosen = inputs.items >= 0
        scores = self.module.head(inputs.hidden[chosen], embedding.weight)
        total = nn.functional.cross_entropy(scores, inputs.items[chosen], reduction="sum")
        return total / max(inputs.counts["head_targets"], 1)

    def _masked_loss(self, inputs: LossInputs, embedding: nn.Module) -> torch.Tensor:
        if "targets" not in inputs.batch:
            return 0.0 * inputs.states.sum()
        targets, last = inputs.batch["targets"], inputs.batch["attention_mask"].sum(dim=1) - 1
        chosen = (targets >= 0).any(dim=1)
        states = inputs.states[torch.arange(len(last), device=last.device), last][chosen]
        logps = self.module.head(states, embedding.weight).log_softmax(dim=1)
        hidden = targets[chosen]
        is_hidden = hidden >= 0
        of_rows = (logps.gather(1, hidden.clamp(min=0)) * is_hidden).sum(dim=1) / is_hidden.sum(dim=1)
        return -of_rows.sum() / max(inputs.counts["masked_prompts"], 1)

    def _distance(self, inputs: LossInputs, embedding: nn.Module) -> torch.Tensor:
        total = 0.0 * self.module.content.sum()
        for name, is_content in (("history_ids", False), ("content_ids", True)):
            places = self._places(inputs.batch, is_content)
            occurs = places >= 0
            own = embedding.weight[inputs.batch["input_ids"][occurs]].float()
            second = self.module.content[places[occurs]].float()
            first, other = (second, own) if is_content else (own, second)
            total = total + (first - other.detach()).square().sum() / max(inputs.counts[name], 1)
        return total

    def save(self, folder: Path) -> None:
        if self.head_weight:
            self.module.head.save(folder)


def _is_target(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (batch["items"] >= 0) & (batch["labels"] != -100)


def content_rows(maker: Any) -> list[dict[str, Any]]:
    """A row for each item with a title or a category: the item, then that text.

    Raises:
        ValueError: When no item has any.
    """
    catalogue = maker.catalogue
    texts = [" | ".join(filter(None, two)) for two in zip(catalogue.titles, catalogue.categories, strict=True)]
    rows = [maker.text_row("Describe:", item, text) for item, text in enumerate(texts) if text]
    if not rows:
        raise ValueError("loss cllm4rec: no item has a title or a category to learn from; set regularisation to 0")
    return rows


def masked_rows(maker: Any) -> list[dict[str, Any]]:
    """A row for each user with two training items or more; its prompt is drawn anew whenever it is read."""
    histories = by_user(*maker.training_interactions())
    longest = maker.next_item_prompt([])
    rows = []
    for history in histories:
        if len(set(history.tolist())) > 1:
            tokens = longest + [token for item in history[: maker.max_items] for token in maker.tokens[item]]
            rows.append(maker.unmarked(tokens, []) | {"sequence": history.tolist()})
    return rows


def masked_prompt(items: list[int], share: float, target: str, rng: np.random.Generator, maker: Any) -> dict[str, Any]:
    """A prompt of a user's items, each once, in random order, some hidden: the targets of the state at its end."""
    order = rng.permutation(sorted(set(items))).tolist()
    num_hidden = min(max(1, round(share * len(order))), len(order) - 1)
    hidden, shown = order[:num_hidden], order[num_hidden:][: maker.max_items]
    row = maker.unmarked(maker.next_item_prompt(shown), [])
    return row | {"targets": sorted(set(order if target == "all" else hidden))}
