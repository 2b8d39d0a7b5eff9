"""Small models, each with quirks of a family that users bring, made without a network: `MODELS`.

A model has random weights, its tokenizer knows the id tokens of the toy catalogue and the tags of a trace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_model import ID_TOKENS as TINY_IDS
from tiny_model import tiny_tokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from toy_run import ID_TOKENS as TOY_IDS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rerank.models import base as base_model
from rerank.prompts import THINK, THINK_END, word_labels

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "initializer_range": 0.1,  # so that attention and distributions are far from uniform
}  # fmt: skip
DATE = "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}Day {{ date }}."
OPENED = "{% if add_generation_prompt %}<think>\n{% endif %}"
OTHER_SAMPLING = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.5}
LABELS = word_labels("token", 4)
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


def with_bos(tokenizer, eos: bool = False):
    """The tokenizer of Gemma and Llama 3: it writes BOS before a text, some EOS behind it."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    text = "<|begin|> $A <|end|>" if eos else "<|begin|> $A"
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin|>", "<|end|>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=specials)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def that_prepends(tokenizer):
    """Llama 2's: a word at the start of a text, and behind an added token, gets the space before it."""
    inner = tokenizer._tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return tokenizer


def without_pad(tokenizer):
    """Llama's and Mistral's: no token for padding."""
    tokenizer.pad_token = None
    return tokenizer


def with_date(tokenizer):
    """Llama 3.1's chat template, which prints the day."""
    tokenizer.chat_template = DATE + tokenizer.chat_template
    return tokenizer


def that_opens(tokenizer):
    """The template of R1 distills and Qwen3-Thinking, which opens the trace."""
    tokenizer.chat_template += OPENED
    return tokenizer


@dataclass(frozen=True)
class Quirk:
    """A model to be made.

    Attributes:
        family: transformers' name of the architecture.
        options: Of its configuration, beside SHAPE.
        changes: Of the tokenizer, one after the other.
        unused: Rows of the vocabulary behind those of the tokenizer, all zero.
        generation: The model's own generation_config.
        obstacle: Part of the reason why it cannot compute a group as one row; None where it can.
    """

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[Callable, ...] = ()
    unused: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str | None = None


TIED = {"tie_word_embeddings": True}
MODELS = {
    "qwen3_padded_tied": Quirk("qwen3", TIED, unused=200, generation=OTHER_SAMPLING),
    "qwen3_padded_untied": Quirk("qwen3", unused=200, generation={"top_k": 1, "do_sample": True}),
    "qwen2_thinking": Quirk("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}, (that_opens,)),
    "llama3": Quirk("llama", {}, (with_date, with_bos, without_pad), generation=OTHER_SAMPLING),
    "llama2": Quirk("llama", {"num_key_value_heads": 4}, (that_prepends, with_bos, without_pad)),
    "mistral": Quirk("mistral", {"sliding_window": 64}, (with_bos, without_pad), obstacle="sliding_window is 64"),
    "gemma1": Quirk("gemma", TIED, (with_bos,)),
    "gemma2": Quirk(
        "gemma2", {**TIED, **WINDOWS, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 8.0,
                   "query_pre_attn_scalar": 32}, (with_bos,), obstacle="attn_logit_softcapping is 0.5"
    ),
    "gemma3": Quirk(
        "gemma3_text", {**TIED, **WINDOWS, "query_pre_attn_scalar": 32}, (with_bos,),
        obstacle="it has layers of type sliding_attention",
    ),
}  # fmt: skip
FEW = ("qwen3_padded_tied", "llama3", "gemma2")  # of them in `make test`; all in `make matrix`


def make_tokenizer(quirk: Quirk):
    """The tokenizer of a quirk, without the ids of a catalogue."""
    made = tiny_tokenizer()
    for change in quirk.changes:
        made = change(made)
    return made


def make_model(quirk: Quirk, tokenizer, seed: int = 0):
    """The model of a quirk with random weights."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ends |= {"bos_token_id": tokenizer.bos_token_id, "vocab_size": len(tokenizer) + quirk.unused}
    config = CONFIG_MAPPING[quirk.family](**{**SHAPE, **ends, **quirk.options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[len(tokenizer) :] = 0
    model.generation_config.update(**quirk.generation)
    return model


def save_pretrained(name: str, folder: Path) -> Path:
    """The folder of a model as a user brings it, without ids and tags."""
    quirk = MODELS[name]
    tokenizer = make_tokenizer(quirk)
    make_model(quirk, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_extended(folder: str | Path):
    """The model and tokenizer of a folder as stages load them, with the toy's ids, labels and the tags added."""
    model, tokenizer = base_model.load_pretrained(str(folder))
    base_model.add_tokens(model, tokenizer, sorted({*TINY_IDS, *TOY_IDS, *LABELS, THINK, THINK_END}), seed=0)
    return model, tokenizer
