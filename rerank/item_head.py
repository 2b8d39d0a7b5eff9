"""A multinomial head over all items: the whole catalogue is ranked in one forward pass, without decoding.

Letters of shapes: J items, H hidden size, M states, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

FILE = "item_head.safetensors"


class ItemHead(nn.Module):
    """Scores of all items from a hidden state: an item's vector is the mean of its tokens' embeddings plus its own.

    Where an item is one token and its own part is zero, this is the head of CLLM4Rec (arXiv:2311.01343 sec. 3.4),
    f_rec, tied to the item embeddings. With semantic ids, which items share, the own part tells items apart.

    Args:
        tokens: Token sequence of each item.
        hidden_size: H.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], hidden_size: int) -> None:
        super().__init__()
        lengths = torch.tensor([0, *(len(sequence) for sequence in tokens)])
        self.register_buffer("tokens", torch.tensor([token for sequence in tokens for token in sequence]))
        self.register_buffer("offsets", lengths.cumsum(0)[:-1])  # (J,)
        self.own = nn.Parameter(torch.zeros(len(tokens), hidden_size))  # (J, H)

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores (M, J) of states (M, H), given the model's input embeddings (V, H)."""
        with torch.autocast(states.device.type, enabled=False):
            items = nn.functional.embedding_bag(self.tokens, embeddings.float(), self.offsets, mode="mean") + self.own
            return states.float() @ items.T

    def save(self, folder: Path) -> None:
        """Write item_head.safetensors."""
        from safetensors.torch import save_file

        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, folder / FILE
        )

    @classmethod
    def load(cls, folder: Path) -> "ItemHead":
        """The head beside a model.

        Raises:
            FileNotFoundError: When the model has none.
        """
        from safetensors.torch import load_file

        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}; train it with the loss cllm4rec and head_weight above 0")
        state = load_file(folder / FILE)
        head = cls([], state["own"].shape[1])
        head.tokens, head.offsets, head.own = state["tokens"], state["offsets"], nn.Parameter(state["own"])
        return head
