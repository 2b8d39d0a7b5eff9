"""Rankings from one token: the probabilities of a ranking's first label order all candidates, in one forward pass.

The prompt ends with the tags of an empty trace, as a model is trained that ranks without traces. Nothing is generated,
so no vLLM is needed. Every label must be one token there.

Source: FIRST (arXiv:2406.15657), which ranks by the logits of the first identifier.
Letters of shapes: B rows of a batch, T tokens, K positions with logits, V vocabulary, N candidates of a row.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rerank.models.base import with_exact_attention
from rerank.prompts import EMPTY_TRACE, THINK_END, completion, prompt_ids, spaced, word_labels
from rerank.prompts.fields import SEMANTIC_ID
from rerank.rows.checks import list_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from rerank.rows import PromptedRow, Prompter

ANSWER_TOKENS = 3  # two tags and a label
MOST_LABELS = 128  # whose log-probabilities vLLM gives for one position (its MAX_LOGPROB_TOKEN_IDS)
MAX_ROWS, MAX_TOKENS = 16, 16384  # of a forward pass, padding with them


def label_tokens(tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> list[int]:
    """(N,) the token of each label as the first one of a ranking.

    Raises:
        ValueError: When a label is not one token, or two labels are the same one.
    """
    texts = [THINK_END + spaced(label) for label in labels]
    begun: list[list[int]] = tokenizer([THINK_END, *texts], add_special_tokens=False).input_ids
    opening, *rows = begun
    bearers: dict[int, str] = {}
    for label, ids in zip(labels, rows, strict=True):
        tokens = ids[len(opening) :] if ids[: len(opening)] == opening else ids
        if len(tokens) != 1 or bearers.setdefault(tokens[0], label) != label:
            same = f"{len(tokens)} tokens" if len(tokens) != 1 else f"the same token as {bearers[tokens[0]]!r}"
            cure = "" if label.isalpha() else "set ranking: letter or token in the traces recipe, or "
            raise ValueError(
                f"one-token ranking needs a token for each label, but {label!r} is {same} to "
                f"{tokenizer.name_or_path or 'the model'}; {cure}rank by generation (losses without soft_targets and "
                "ranknet, no one_token)"
            )
    return [ids[-1] for ids in rows]


def tokens_of(asked: Sequence["PromptedRow"], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """`label_tokens` of each row.

    Raises:
        ValueError: Naming the row.
    """
    made: dict[tuple[str, ...], list[int]] = {}
    for row in asked:
        if tuple(row.labels) not in made:
            try:
                made[tuple(row.labels)] = label_tokens(tokenizer, row.labels)
            except ValueError as error:
                raise ValueError(f"row {row.row.row_id}: {error}") from None
    return [made[tuple(row.labels)] for row in asked]


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[int]:
    """Tokens of a prompt with the tags of an empty trace at its end, where the first label comes next."""
    tags: list[int] = tokenizer(EMPTY_TRACE, add_special_tokens=False).input_ids
    return [*ids] if list(ids[-len(tags) :]) == tags else [*ids, *tags]


def check_labels(tokenizer: "PreTrainedTokenizerBase", prompter: "Prompter", path: Path) -> None:
    """Refuse a model to which a label of the lists of a candidates table is not one token.

    Args:
        tokenizer: Of the model.
        prompter: Names the labels.
        path: The table.
    """
    ranking = prompter.settings.ranking
    is_word = ranking != SEMANTIC_ID
    label_tokens(
        tokenizer, word_labels(ranking, list_lengths(path)[1]) if is_word else prompter.catalogue.semantic_ids
    )


def first_label_logps(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence["PromptedRow"],
    max_tokens: float = MAX_TOKENS,
) -> list[np.ndarray]:
    """(N,) per row, the log-probability of each candidate's label as the first one, over the row's labels alone.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        asked: Rows of any lengths; rows of like length share a batch.
        max_tokens: Of a forward pass.
    """
    tokens = tokens_of(asked, tokenizer)
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompt_ids(tokenizer, [row.prompt for row in asked])]
    found = [np.empty(0)] * len(ids)
    for places in _by_length([len(row) for row in ids], max_tokens):
        for place, logits in zip(places, _last_logits(model, [ids[place] for place in places]), strict=True):
            found[place] = logits[tokens[place]].log_softmax(dim=0).numpy()
    return found


def _by_length(lengths: Sequence[int], max_tokens: float) -> Iterator[list[int]]:
    """Places of rows of like lengths, of MAX_ROWS and `max_tokens` at most, or of one row."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == MAX_ROWS or (len(batch) + 1) * lengths[place] > max_tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _last_logits(model: "PreTrainedModel", ids: Sequence[list[int]]) -> "torch.Tensor":
    """(B, V) float32 logits behind the last token of each row; those of other positions are not computed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(row) for row in ids])
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)  # (B, T), on the right
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    ends, of_row = torch.unique(lengths - 1, return_inverse=True)
    device = model.device
    with torch.no_grad():
        logits = model(
            input_ids=padded.to(device), attention_mask=mask.to(device), use_cache=False,
            logits_to_keep=ends.to(device),
        ).logits  # (B, K, V)  # fmt: skip
    return logits[torch.arange(len(ids)), of_row.to(device)].float().cpu()


def orders_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence["PromptedRow"],
    max_tokens: float = MAX_TOKENS,
) -> list[list[int]]:
    """The ranking of each row, positions, best first; of equals the one shown first."""
    found = first_label_logps(model, tokenizer, asked, max_tokens)
    return [np.argsort(-logps, kind="stable").tolist() for logps in found]


def load_folder(
    folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[Sequence["PromptedRow"]], list[list[int]]]:
    """`orders_of` by the model of a folder, in the number format of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = with_exact_attention(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return partial(orders_of, model, tokenizer)


def free_memory() -> None:
    """Give back the memory of a model that nothing refers to."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def complete(trainer: "Trainer", asked: Sequence["PromptedRow"]) -> list[str]:
    """The ranking of each row by a model in training, written as a completion without a trace.

    Every process has the same number of rows and, where a sharded model is gathered for each forward pass, must make
    the same number of passes: lengths do not cut the batches.
    """
    from transformers import PreTrainedTokenizerBase
    from trl.models.utils import unwrap_model_for_generation

    tokenizer = trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        orders = orders_of(model, tokenizer, asked, max_tokens=math.inf)
    return [completion(None, order, row.labels, row.top_k) for order, row in zip(orders, asked, strict=True)]
