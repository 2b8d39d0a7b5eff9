"""A multinomial head over all items: the whole catalogue is ranked in one forward pass, without decoding.

Letters of shapes: J items, H hidden size, M states, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

FILE = "item_head.safetensors"
MOST_ITEMS = 100_000
GB = 1e9


def scale_of(embedding: nn.Module) -> torch.Tensor | float:
    """The factor that a model's input embedding puts on what it looks up, sqrt(H) in Gemma."""
    return getattr(embedding, "embed_scale", 1.0)


def refuse_many_items(num_items: int, hidden_size: int, num_targets: int) -> None:
    """Refuse to train a head of more than MOST_ITEMS items, with the memory that it would take beside the model.

    In float32: 16 bytes for each number of an item's own part (value, gradient, Adam's two moments), 8 for one of its
    vector in a forward pass (value, gradient), 12 for each score (value, log-softmax, gradient).

    Args:
        num_items: J.
        hidden_size: H, 0 where it is not known: then scores alone are counted.
        num_targets: Next items that a micro-batch predicts, at most.

    Raises:
        ValueError: With the cure.
    """
    if num_items > MOST_ITEMS:
        size = num_items * ((16 + 8) * hidden_size + 12 * num_targets)
        raise ValueError(
            f"the item head would score {num_items} items at up to {num_targets} targets at once, which takes "
            f"{'at least ' * (not hidden_size)}{size / GB:.1f} GB beside the model, and is for {MOST_ITEMS} items at "
            "most; take cllm4rec out of losses: next items are then found by beams over semantic ids"
        )


class ItemHead(nn.Module):
    """Scores of all items from a hidden state: an item's vector is the mean of its tokens' embeddings plus its own.

    Where an item is one token and its own part is zero, this is the head of CLLM4Rec (arXiv:2311.01343 sec. 3.4),
    f_rec, tied to the item embeddings. With semantic ids, which items share, the own part tells items apart. The
    paper's items are tokens, so its model also reads what its head is tied to: see `add_to`.

    Args:
        tokens: Token sequence of each item.
        hidden_size: H.
        is_read: Whether the model that it belongs to reads the own parts, too.

    Raises:
        ValueError: When the model is to read them and sequences differ in length, or two items have the same.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    is_read: torch.Tensor
    vocabulary: torch.Tensor
    of_number: torch.Tensor

    def __init__(self, tokens: Sequence[Sequence[int]], hidden_size: int, is_read: bool = False) -> None:
        super().__init__()
        lengths = torch.tensor([0, *(len(sequence) for sequence in tokens)])
        self.register_buffer("tokens", torch.tensor([token for sequence in tokens for token in sequence]))
        self.register_buffer("offsets", lengths.cumsum(0)[:-1])  # (J,)
        self.register_buffer("is_read", torch.tensor(is_read))
        self.own = nn.Parameter(torch.zeros(len(tokens), hidden_size))  # (J, H)
        if is_read:
            self._number_prefixes(tokens)

    def _number_prefixes(self, tokens: Sequence[Sequence[int]]) -> None:
        if len({len(sequence) for sequence in tokens}) != 1:
            raise ValueError("items are read by ids of one length; run the semantic_ids stage again")
        vocabulary, places = torch.tensor(tokens).unique(return_inverse=True)
        numbers = torch.zeros(len(tokens), dtype=torch.long)  # of each item's prefix among those of its length
        self.num_levels = places.shape[1]
        for level in range(self.num_levels):
            prefixes, numbers = (numbers * len(vocabulary) + places[:, level]).unique(return_inverse=True)
            self.register_buffer(f"prefixes_{level}", prefixes, persistent=False)
        if len(prefixes) < len(tokens):
            raise ValueError("two items have one id, so neither can be read; make the ids unique")
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.register_buffer("of_number", numbers.argsort(), persistent=False)  # number of a whole id -> item

    def items_read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) the item whose last token stands at each place of (B, T) tokens, -1 where there is none."""
        items = torch.full_like(input_ids, -1)
        width = input_ids.shape[1] - self.num_levels + 1  # places at which an id may begin
        if width < 1:
            return items
        places = torch.searchsorted(self.vocabulary, input_ids).clamp(max=len(self.vocabulary) - 1)
        is_id = self.vocabulary[places] == input_ids
        numbers, found = torch.zeros_like(places[:, :width]), torch.ones_like(is_id[:, :width])
        for level in range(self.num_levels):
            prefixes, part = getattr(self, f"prefixes_{level}"), slice(level, level + width)
            keys = numbers * len(self.vocabulary) + places[:, part]
            numbers = torch.searchsorted(prefixes, keys).clamp(max=len(prefixes) - 1)
            found &= is_id[:, part] & (prefixes[numbers] == keys)
        items[:, self.num_levels - 1 :] = torch.where(found, self.of_number[numbers], -1)
        return items

    def add_to(self, embedding: nn.Module) -> None:
        """From now on, let a model's input embedding add each item's own vector at the item's last token.

        A model that scales its embeddings reads the vector scaled alike. What a beam writes is never read as an item:
        its last token is not given back to the model.
        """

        def add(module: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            items = self.items_read(given[0])
            vectors = scale_of(module) * nn.functional.embedding(items.clamp(min=0), self.own)
            return output + torch.where((items >= 0)[..., None], vectors, 0.0).to(output.dtype)

        embedding.register_forward_hook(add, prepend=True)  # before dropout, if there is any

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores (M, J) of states (M, H), given the model's input embeddings (V, H)."""
        with torch.autocast(states.device.type, enabled=False):
            items = nn.functional.embedding_bag(self.tokens, embeddings.float(), self.offsets, mode="mean") + self.own
            return states.float() @ items.T

    def extended(self, tokens: Sequence[Sequence[int]]) -> "ItemHead":
        """The same head with items behind its own, which are known by their tokens alone.

        Args:
            tokens: Token sequence of each item, those of this head first.
        """
        head = ItemHead(tokens, self.own.shape[1], bool(self.is_read))
        with torch.no_grad():
            head.own[: len(self.own)] = self.own
        return head

    def save(self, folder: Path) -> None:
        """Write item_head.safetensors."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "ItemHead":
        """The head beside a model that has one."""
        from safetensors.torch import load_file

        state = load_file(folder / FILE)
        tokens = [part.tolist() for part in state["tokens"].tensor_split(state["offsets"][1:])]
        head = cls(tokens, state["own"].shape[1], bool(state["is_read"]))
        head.load_state_dict(state)
        return head
