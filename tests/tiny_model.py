"""A model of two layers and its tokenizer, made in memory, and one of a single weight."""

import copy
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM
from trl import SFTConfig

from rerank.models import base as base_model
from rerank.prompts import THINK, THINK_END

SHAPE = base_model.SmallModelArguments(hidden_size=32, num_layers=2, num_heads=1, num_kv_heads=1, context_length=256)
ID_TOKENS = ["<s_a_0>", "<s_a_1>", "<s_b_0>", "<s_b_1>"]


class Line(torch.nn.Module):
    """y = w x, with a loss as transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


def tiny_tokenizer():
    """A tokenizer without id tokens."""
    return base_model.train_tokenizer(["Rank: History: Candidates: the title of a drama"], 300)


def tiny_model(tokenizer, tied: bool = True, seed: int = 0):
    """A model with random weights for the tokenizer."""
    model = base_model.make_small_model(SHAPE, tokenizer, seed)
    if tied:
        return model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def model_with_ids(tied: bool = True):
    """A model that knows a few id tokens, its tokenizer, and the ids of these tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tied)
    return model, tokenizer, base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)


def sft_config(folder: Path, **options) -> SFTConfig:
    """Training on the CPU, of rows that are token ids already, without checkpoints and reports."""
    settings = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    return SFTConfig(**{**settings, **options})


def save_tiny_model(folder: Path, tied: bool = True, id_tokens: bool = True) -> Path:
    """A folder of such a model, with a few id tokens unless told otherwise."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tied)
    if id_tokens:
        base_model.add_tokens(model, tokenizer, [*ID_TOKENS, THINK, THINK_END], seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
