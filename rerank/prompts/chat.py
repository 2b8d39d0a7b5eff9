"""The tags of a trace, a prompt in a model's chat template, and the tokens with which every sequence begins."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"


def render(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    """The prompt string of one user message, up to where the completion starts.

    A beginning-of-sequence token that the tokenizer adds by itself is left out, or the model would see two. So is a
    tag that the template opens (R1 distills, Qwen3-Thinking): completions write it.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template; save one as its chat_template.jinja.")
    messages = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if text.rstrip().endswith(THINK):
        text = text.rstrip().removesuffix(THINK)
    return text.removeprefix(tokenizer.bos_token) if opening(tokenizer) else text


def opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The beginning-of-sequence token, where the tokenizer adds it by itself (Gemma, Llama 3)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that begin a sequence, such as `render` writes them, in every stage and engine."""
    first = opening(tokenizer)
    return [first + ids for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []
