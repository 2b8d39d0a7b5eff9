"""Phase one trains only the added tokens' embedding (and head) rows.

Gradient hooks on a whole table would leave the optimizer with two numbers of state for each of its weights. Here the
table is frozen and the new rows are a small parameter beside it; the two are put together once in every forward pass,
in the forward of the input embedding, so that whatever shards parameters (FSDP2, ZeRO) has gathered them by then.
TRL's fused loss reads `lm_head.weight`, which is that same tensor, or its counterpart where the head is not tied.

V vocabulary, H hidden size, N new tokens.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rerank.launch.files import write_whole
from rerank.models.base import gathered_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTTrainer

INPUT_ROWS, OUTPUT_ROWS = "rows", "head_rows"


class NewRowsEmbedding(nn.Module):
    """An input embedding whose rows `ids`, and those of the output head, are trained apart from the frozen rest."""

    def __init__(self, embedding: nn.Module, head: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)  # (N,)
        self.padding_idx = embedding.padding_idx
        self.table = embedding.weight  # (V, H), frozen
        self.rows = nn.Parameter(self.table[list(ids)].clone())  # (N, H)
        self.tied = head.weight is embedding.weight
        if not self.tied:
            self.head_table = head.weight
            self.head_rows = nn.Parameter(self.head_table[list(ids)].clone())
        self.head_weight: torch.Tensor | None = None  # of the present forward pass

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        weight = self.table.index_copy(0, self.ids, self.rows)
        self.head_weight = weight if self.tied else self.head_table.index_copy(0, self.ids, self.head_rows)
        if is_deepspeed_zero3_enabled():  # TRL asks the head's weight whether it is sharded; this one never is
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            self.head_weight.ds_status = ZeroParamStatus.AVAILABLE
        return nn.functional.embedding(input_ids, weight, self.padding_idx)


class NewRowsHead(nn.Module):
    """The output head that goes with it: `weight` is what the embedding made in this forward pass, None before."""

    def __init__(self, head: nn.Module, embedding: NewRowsEmbedding) -> None:
        super().__init__()
        self.bias = head.bias
        self._embedding = (embedding,)  # in a tuple, else its parameters would be listed here too

    @property
    def weight(self) -> torch.Tensor | None:
        return self._embedding[0].head_weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


def train_only_rows(model: "PreTrainedModel", ids: Sequence[int]) -> None:
    """Turn a model into one of which only these rows of the embedding and of its head can be trained.

    There is no way back: save the rows with `save_rows` and put them into a fresh model with `load_rows`.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    with gathered_parameters(model.get_input_embeddings().weight, head.weight):
        embedding = NewRowsEmbedding(model.get_input_embeddings(), head, ids)
    model.set_output_embeddings(NewRowsHead(head, embedding))
    model.set_input_embeddings(embedding)
    model.config.tie_word_embeddings = False  # else transformers ties weights by names that are no more
    model.all_tied_weights_keys = {}


def save_rows(trainer: "SFTTrainer", path: Path) -> None:
    """Write the trained rows to a safetensors file. Every process calls it: a sharded model is gathered on the way."""
    from safetensors.torch import save_file

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        found = {name.rsplit(".", 1)[-1]: value for name, value in state.items()}
        rows = {name: found[name].contiguous().cpu() for name in (INPUT_ROWS, OUTPUT_ROWS) if name in found}
        write_whole(path, partial(save_file, rows))
    trainer.accelerator.wait_for_everyone()


def load_rows(model: "PreTrainedModel", ids: Sequence[int], path: Path) -> None:
    """Put saved rows into a model's embedding, and into its head where that is not tied."""
    from safetensors.torch import load_file

    saved = load_file(path)
    tables = {INPUT_ROWS: model.get_input_embeddings(), OUTPUT_ROWS: model.get_output_embeddings()}
    for name, rows in saved.items():
        with torch.no_grad(), gathered_parameters(tables[name].weight):
            tables[name].weight[list(ids)] = rows.to(tables[name].weight)
