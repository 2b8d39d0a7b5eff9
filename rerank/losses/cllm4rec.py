"""Auxiliary loss: CLLM4Rec's multinomial item head, and its mutual regularisation of two embedding tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from rerank.launch.values import check_range
from rerank.losses import AuxiliaryLoss, Batch, LossInfo, LossInputs, Row
from rerank.next_item.encoder import NEXT_ITEMS
from rerank.next_item.item_head import ItemHead, refuse_many_items, scale_of
from rerank.prompts.fields import described
from rerank.rows import by_user
from rerank.rows.on_read import MadeOnRead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rerank.next_item.encoder import NextItemEncoder

INFO = LossInfo(
    tasks=("next_item",),
    needs="a vector for each item, a second embedding of each id token; rows: 1 per item with text, masked 1 per user",
    costs="scores of all items at each target, the extra rows' tokens",
)
NEXT_ITEM, CONTENT, MASKED = "next_item", "content", "masked"


class Parameters(nn.Module):
    """The head's item vectors, and a second embedding of each id token, which begins where the first is.

    Args:
        encoder: Of the items.
        weight: (V, H) embeddings of the model.
        has_content: Whether there are second embeddings.
    """

    places: torch.Tensor  # (V,) place of a token in `content`, else -1

    def __init__(self, encoder: "NextItemEncoder", weight: torch.Tensor, has_content: bool) -> None:
        super().__init__()
        self.head = ItemHead(encoder.tokens, weight.shape[1], is_read=encoder.item_text == "semantic_id")
        if has_content:
            ids = torch.from_numpy(encoder.index.vocabulary.astype(np.int64))
            places = torch.full((weight.shape[0],), -1)
            places[ids] = torch.arange(len(ids))
            self.register_buffer("places", places)
            self.content = nn.Parameter(weight[ids].detach().clone().float())


class cllm4rec(AuxiliaryLoss):
    """The item head's loss, and the pull between what ids mean in histories and what they mean in texts.

    Head: at each target of a next-item row, -log softmax over all items of the state before it; with `mask_share`
    instead, on prompts of a user's items of which a random share is hidden, -1/|H| sum over the hidden items H of
    log softmax (the paper sums; the mean lets users weigh alike). Both divide by their number in the optimizer step.
    Where items are written as semantic ids, the model also reads, at an item's last token, the vector of its own that
    the item has in the head, as the paper's items are tokens. Such a model is worth less without its head:
    `rerank.next_item.model.NextItemModel` loads both.

    Mutual regularisation: id tokens have a second embedding, which is read in rows of content (an item, then its
    text) in place of the model's own, which is read in histories. For each occurrence of an id token in a row of one
    kind, regularisation / 2 * |own embedding - the other's, held fixed|^2, divided by the occurrences in the step.
    The paper alternates the two sides' steps; here a batch holds both. It restricts softmaxes to items and to text:
    take `msl` as the token loss for the first; a text's softmax is over the whole vocabulary here, ids included.
    Users have no tokens of their own, and the prior of the embeddings (lambda_l) is left to weight decay.

    Args:
        regularisation: lambda_c; 0 leaves content rows and second embeddings out.
        content_weight: Of the content rows' mean token loss, beside that of the histories. The paper's steps take
            turns, which is near to 1; a small model has little room for texts. For regularisation only.
        shuffle_history: Whether the items of a next-item row are put into another random order each epoch, as the
            paper does where recommendations do not follow an order. Off, since next items do. A row of two stays as
            it is: the second may be the one that is to be found.
        mask_share: Share of a user's items that is hidden in a masked prompt (0.2 in the released code); 0 for none.

    Source: arXiv:2311.01343, sec. 3.3.3 (L-step, C-step), 3.3.4, 3.4 (L_rec).
    """

    def __init__(
        self,
        regularisation: float = 1.0,
        content_weight: float = 1.0,
        shuffle_history: bool = False,
        mask_share: float = 0.0,
    ) -> None:
        check_range("regularisation", regularisation, least=0)
        check_range("content_weight", content_weight, least=0)
        check_range("mask_share", mask_share, least=0, below=1)
        if content_weight != 1.0 and not regularisation:
            raise ValueError(
                f"content_weight is {content_weight}, but regularisation is 0, which leaves content rows out; "
                "set one of them anew"
            )
        self.regularisation, self.content_weight = regularisation, content_weight
        self.shuffle_history, self.mask_share = shuffle_history, mask_share
        self.redraws = shuffle_history or mask_share > 0

    def check_size(self, num_items: int, hidden_size: int, num_targets: int) -> None:
        refuse_many_items(num_items, hidden_size, num_targets)

    def task_weights(self) -> dict[str, float]:
        return {CONTENT: self.content_weight} if self.regularisation else {}

    def rows(self, encoder: "NextItemEncoder") -> dict[str, Sequence[Row]]:
        """Content rows, and a masked prompt of each user with two training items or more."""
        found = {}
        if self.regularisation:
            found[CONTENT] = content_rows(encoder)
        if self.mask_share:
            found[MASKED] = masked_rows(encoder)
        return found

    def redraw(self, task: str, row: Row, rng: np.random.Generator, encoder: "NextItemEncoder") -> Row:
        if task == MASKED:
            return masked_prompt(row["sequence"], self.mask_share, rng, encoder)
        if task != NEXT_ITEM or not self.shuffle_history:
            return row
        given, length = row["num_given"], len(row["sequence"])
        if given == 1 and length > 2:  # a window, whose every item is a target; else the last item is the only one
            given = length
        items = [*rng.permutation(row["sequence"][:given]).tolist(), *row["sequence"][given:]]
        return encoder.row(NEXT_ITEMS, items, row["num_given"])

    def parameters(self, model: "PreTrainedModel", encoder: "NextItemEncoder") -> nn.Module:
        """The head, which is also read, and the second embeddings."""
        embedding = cast("nn.Embedding", model.get_input_embeddings())
        self.module = Parameters(encoder, embedding.weight, has_content=self.regularisation > 0)
        if self.module.head.is_read:
            self.module.head.add_to(embedding)
        return self.module

    def _places(self, batch: Batch, is_content: bool) -> torch.Tensor:
        """(B, T) place of each id token in the second table, -1 for other tokens and rows of the other kind."""
        places = self.module.places[batch["input_ids"]]
        of_kind = (batch["task"] == self.task_numbers[CONTENT]) == is_content
        return torch.where(of_kind[:, None] & (batch["attention_mask"] > 0), places, -1)

    def embed(self, embedding: nn.Embedding, batch: Batch) -> torch.Tensor | None:
        if not self.regularisation:
            return None
        own, places = embedding(batch["input_ids"]), self._places(batch, is_content=True)
        second = self.module.content[places.clamp(min=0)].to(own.dtype)
        second = second * scale_of(embedding)
        return torch.where((places >= 0)[..., None], second, own)

    def counts(self, batch: Batch) -> dict[str, int]:
        found = {}
        if self.mask_share:
            found["masked_prompts"] = int((batch["targets"] >= 0).any(dim=1).sum()) if "targets" in batch else 0
        else:
            is_target = (batch["items"] >= 0) & (batch["labels"] != -100)
            found["head_targets"] = int(is_target[batch["task"] == self.task_numbers[NEXT_ITEM]].sum())
        if self.regularisation:
            for name, is_content in (("history_ids", False), ("content_ids", True)):
                found[name] = int((self._places(batch, is_content) >= 0).sum())
        return found

    def terms(self, inputs: LossInputs, embedding: nn.Embedding) -> dict[str, torch.Tensor]:
        head_loss = self._masked_loss if self.mask_share else self._next_loss
        found = {"item_head": head_loss(inputs, embedding)}
        if self.regularisation:
            found["mutual_regularisation"] = self.regularisation / 2 * self._distance(inputs, embedding)
        return found

    def _next_loss(self, inputs: LossInputs, embedding: nn.Embedding) -> torch.Tensor:
        # rows of other losses have items under loss, too: the related items of `iirg` are no next items
        chosen = (inputs.items >= 0) & (inputs.tasks == self.task_numbers[NEXT_ITEM])
        scores = self.module.head(inputs.hidden[chosen], embedding.weight)
        total = nn.functional.cross_entropy(scores, inputs.items[chosen], reduction="sum")
        return total / max(inputs.counts["head_targets"], 1)

    def _masked_loss(self, inputs: LossInputs, embedding: nn.Embedding) -> torch.Tensor:
        assert inputs.states is not None
        if "targets" not in inputs.batch:
            return 0.0 * inputs.states.sum()
        targets, last = inputs.batch["targets"], inputs.batch["attention_mask"].sum(dim=1) - 1
        chosen = (targets >= 0).any(dim=1)
        states = inputs.states[torch.arange(len(last), device=last.device), last][chosen]
        logps: torch.Tensor = self.module.head(states, embedding.weight).log_softmax(dim=1)
        hidden = targets[chosen]
        is_hidden = hidden >= 0
        of_rows = (logps.gather(1, hidden.clamp(min=0)) * is_hidden).sum(dim=1) / is_hidden.sum(dim=1)
        return -of_rows.sum() / max(inputs.counts["masked_prompts"], 1)

    def _distance(self, inputs: LossInputs, embedding: nn.Embedding) -> torch.Tensor:
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
        self.module.head.save(folder)


def content_rows(encoder: "NextItemEncoder") -> Sequence[Row]:
    """A row for each item with a title or a category, made when it is read: the item, then that text."""
    catalogue = encoder.catalogue
    texts = [described(catalogue, item) for item in range(len(catalogue))]
    told = [item for item, text in enumerate(texts) if text]
    if not told:
        raise ValueError("loss cllm4rec: no item has a title or a category to learn from; set regularisation to 0")
    return MadeOnRead(len(told), lambda place: encoder.text_row("Describe:", told[place], texts[told[place]]))


def masked_rows(encoder: "NextItemEncoder") -> Sequence[Row]:
    """A row for each user with two training items or more; its prompt is drawn anew whenever it is read."""
    histories = [items for items in by_user(*encoder.training_interactions()) if (items != items[0]).any()]

    def row(place: int) -> Row:
        history = histories[place].tolist()
        return encoder.unmarked(encoder.next_item_prompt(history[: encoder.max_items]), []) | {"sequence": history}

    return MadeOnRead(len(histories), row)


def masked_prompt(items: list[int], share: float, rng: np.random.Generator, encoder: "NextItemEncoder") -> Row:
    """A prompt of a user's items, each once, in random order, some hidden: the targets of the state at its end."""
    order = rng.permutation(sorted(set(items))).tolist()
    num_hidden = min(max(1, round(share * len(order))), len(order) - 1)
    shown = order[num_hidden:][: encoder.max_items]
    return encoder.unmarked(encoder.next_item_prompt(shown), []) | {"targets": sorted(order[:num_hidden])}
