"""The tags of a trace, and a prompt in a model's chat template."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"


def render(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    """The prompt string of one user message, up to where the completion starts.

    A beginning-of-sequence token that the tokenizer adds by itself is left out, or the model would see two.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template; save one as its chat_template.jinja.")
    messages = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if text.rstrip().endswith(THINK):
        raise ValueError(f"the chat template of {tokenizer.name_or_path} opens {THINK} itself; end it before the tag.")
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text
