"""The tags of a trace, a prompt in a model's chat template, and the tokens with which every sequence begins."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"
EMPTY_TRACE = THINK + THINK_END
TEMPLATE_FILE = "chat_template.jinja"
# A chat template without tokens of its own, for a tokenizer that has none.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content + '\\n\\n' }}{% endfor %}"


def render(tokenizer: "PreTrainedTokenizerBase", content: str, open_tag: bool = False) -> str:
    """The prompt string of one user message, up to where the completion starts.

    A beginning-of-sequence token that the tokenizer adds by itself is left out, or the model would see two. So is a
    tag that the template opens (R1 distills, Qwen3-Thinking): completions write it.

    Args:
        tokenizer: Of the model.
        content: The message.
        open_tag: Whether such a tag stays, for a model as it comes.
    """
    check_template(tokenizer)
    messages = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if not open_tag and text.rstrip().endswith(THINK):
        text = text.rstrip().removesuffix(THINK)
    return text.removeprefix(str(tokenizer.decode(opening(tokenizer))))


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot render a prompt, such as a base model's."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; save one as {TEMPLATE_FILE} in that "
            f"folder, such as {PLAIN_TEMPLATE}"
        )


def opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer writes before every text by itself, such as Gemma's and Llama 3's BOS."""
    return list(_opening(tokenizer))


@lru_cache(maxsize=4)  # asked for every row that is read
def _opening(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    return tuple(tokenizer("").input_ids)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that begin a sequence, such as `render` writes them, in every stage and engine."""
    first = opening(tokenizer)
    return [first + ids for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []


def completion_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], ends: Collection[int] = ()) -> str:
    """The text of a completion's tokens, up to its end token; other special tokens stay, being no part of a ranking.

    Args:
        tokenizer: Of the model.
        ids: Of the completion.
        ends: Tokens that end it; by default the tokenizer's end of sequence.
    """
    end = next((place for place, token in enumerate(ids) if token in (ends or [tokenizer.eos_token_id])), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False))
