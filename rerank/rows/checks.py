"""Whether prompts by given settings can be written: their fields are there, labels suffice, a model can read them."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.catalogue import NO_TEXTS
from rerank.launch import run_dir
from rerank.prompts import MAX_LETTERS, PromptSettings, prompt_ids, spaced, word_labels
from rerank.prompts.facts import code_words
from rerank.prompts.fields import SEMANTIC_ID, check_item_fields, check_row_fields
from rerank.rows.histories import has_lists
from rerank.rows.prompter import PromptedRow, Prompter, read_feature_names
from rerank.rows.reading import check_top_k
from rerank.rows.row import RankingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")  # candidates tables of a run


def check_fields(run: str | Path, settings: PromptSettings) -> None:
    """Refuse fields of items, users, requests or histories that a run's data stage has not, naming those it has."""
    folder = run_dir.stage_dir(run, "data")
    items = [name for name in pq.read_schema(folder / "items.parquet").names if name not in NO_TEXTS]
    check_item_fields(settings, items, str(folder / "items.parquet"))
    if any(settings.row_fields.values()) or settings.history_fields:
        columns = pq.read_schema(folder / "rows.parquet").names
        known = "{}"
        if "fields" in columns:
            known = pq.read_table(folder / "rows.parquet", columns=["fields"])["fields"][0].as_py() or known
        check_row_fields(settings, columns, json.loads(known))


def check_log(run: str | Path, settings: PromptSettings) -> None:
    """Refuse the lists of a log as `check_lists` does those of a candidates stage, which keeps their lengths."""
    if (settings.top_k or settings.ranking == "letter") and has_lists(run):
        path = run_dir.stage_dir(run, "data") / "rows.parquet"
        check_letters([path], settings)
        check_top_k(path, settings.top_k, [("split", "=", "rerank")])


def check_lists(folder: str | Path, settings: PromptSettings) -> None:
    """Refuse lists of a candidates stage's folder that letters cannot name, and a `top_k` above those for training."""
    check_letters([Path(folder) / f"{split}.parquet" for split in SPLITS], settings)
    check_top_k(Path(folder) / "train.parquet", settings.top_k)


def check_letters(paths: Sequence[Path], settings: PromptSettings) -> None:
    """Refuse lists in these tables that are longer than the letters that are to name candidates."""
    for path in paths if settings.ranking == "letter" else ():
        table = pq.read_table(path, columns=["row_id", "candidates"])
        lengths = pc.list_value_length(table["candidates"])
        long = table.filter(pc.greater(lengths, MAX_LETTERS))
        if len(long):
            raise ValueError(
                f"{path}: row_id {long['row_id'][0]} has {len(long['candidates'][0])} candidates but ranking: letter "
                f"names at most {MAX_LETTERS}; set ranking: number or token"
            )


def token_labels(run: str | Path, settings: PromptSettings) -> list[str]:
    """The labels of the longest list of a run where they are tokens of their own; [] for other labels."""
    if settings.ranking != "token":
        return []
    folder = run_dir.stage_dir(run, "candidates")
    return word_labels("token", max(list_lengths(folder / f"{split}.parquet")[1] for split in SPLITS))


def most_labels(ranking: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Candidates that a model has labels for; None for no limit."""
    if ranking == "token":
        known = tokenizer.get_vocab()
        return next(number for number in itertools.count() if word_labels(ranking, number + 1)[-1] not in known)
    return MAX_LETTERS if ranking == "letter" else None


def list_lengths(path: str | Path) -> tuple[int, int]:
    """Candidates of the shortest and of the longest list of a candidates table."""
    lengths = pc.min_max(pc.list_value_length(pq.read_table(path, columns=["candidates"])["candidates"])).as_py()
    return lengths["min"], lengths["max"]


def longest_list(path: str | Path) -> RankingRow:
    """The row of the longest list of a candidates table, without its history."""
    table = pq.read_table(path, columns=["row_id", "candidates"])
    longest = int(pc.list_value_length(table["candidates"]).to_numpy().argmax())
    (row,) = table.slice(longest, 1).to_pylist()
    return RankingRow(row["row_id"], (), tuple(row["candidates"]))


def split_labels(tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> dict[str, int]:
    """The labels that are more than one token to a model, with their tokens, said in a warning.

    Args:
        tokenizer: The model's.
        labels: Numbers or letters.
    """
    tokens = {label: len(tokenizer(spaced(label), add_special_tokens=False).input_ids) for label in labels}
    split = {label: number for label, number in tokens.items() if number > 1}
    if split:
        longest = max(split, key=split.__getitem__)
        logger.warning(
            "%d of %d labels are more than one token to the model (%r is %d), and a ranking of all takes %d%s",
            len(split), len(labels), spaced(longest), split[longest], sum(tokens.values()),
            "; with `ranking: letter` a label is often one token" if len(labels) <= MAX_LETTERS
            else "; with `ranking: token` a label is one",
        )  # fmt: skip
    return split


def warn_of_split_labels(tokenizer: "PreTrainedTokenizerBase", folder: Path, settings: PromptSettings) -> None:
    """`split_labels` of the longest training list of a candidates stage's folder; semantic ids are several tokens."""
    if settings.ranking in ("number", "letter"):
        _, longest = list_lengths(folder / "train.parquet")
        split_labels(tokenizer, word_labels(settings.ranking, longest))


def warn_of_split_codes(tokenizer: "PreTrainedTokenizerBase", folder: Path, settings: PromptSettings) -> None:
    """Say which words of `evidence: codes` a small model was not taught as one token each."""
    if settings.evidence != "codes":
        return
    _, edges = read_feature_names(folder)
    num_buckets = {name: len(edges[name]) + 1 for name in settings.evidence_names}
    words = [f" {word}" for name, number in num_buckets.items() for word in code_words([name], number)]
    split = [word for word, ids in zip(words, tokenizer(words).input_ids, strict=True) if len(ids) > 1]
    if split:
        logger.warning(
            "%d of %d words of facts, such as%s, are more than one token to the mid-trained model; name the facts in "
            "list_facts of the midtrain stage, raise its vocab_size, and give it the num_buckets of the candidates",
            len(split), len(words), split[0],
        )  # fmt: skip


def tokens_of_fields(prompter: Prompter, row: RankingRow) -> dict[str, int]:
    """Tokens that each field takes in the prompt of a row, and the facts."""
    assert prompter.tokenizer is not None
    settings, texts = prompter.settings, prompter.texts
    items = [*row.history[-settings.max_history :], *row.candidates]
    found: dict[str, list[str]] = {}
    for name in settings.item_fields:
        of_items = prompter.catalogue.semantic_ids if name == SEMANTIC_ID else None
        shown = [texts.item(item, name) if of_items is None else of_items[item] for item in items]
        found[f"item_fields: {name}"] = shown
    for key, names in settings.row_fields.items():
        found |= {f"{key}: {name}": [texts.row_field(row, name, key)] for name in names}
    found["evidence"] = prompter.facts(row).lines
    tokenized = {name: prompter.tokenizer(shown, add_special_tokens=False).input_ids for name, shown in found.items()}
    return {name: sum(map(len, of_texts)) for name, of_texts in tokenized.items()}


def prompt_lengths(tokenizer: "PreTrainedTokenizerBase", asked: Sequence[PromptedRow]) -> list[int]:
    """Tokens of each row's prompt."""
    return [len(ids) for ids in prompt_ids(tokenizer, [row.prompt for row in asked])]


def longest_field(prompter: Prompter, row: RankingRow) -> str:
    """In words, the option whose texts take most tokens in a row's prompt."""
    of_fields = tokens_of_fields(prompter, row)
    longest = max(of_fields, key=of_fields.__getitem__)
    return f"in row_id {row.row_id}, of {len(row.candidates)} candidates, {longest} takes {of_fields[longest]}"


def shorter(limit: str) -> str:
    """The cure for rows that are longer than a limit, `the context of FOLDER` or an option."""
    longer = "raise it"
    if limit.startswith("the context of "):
        longer = "take a longer one, or raise context_length of the midtrain stage that made this one"
    return f"{longer}, or set max_field_tokens, lower max_history, or leave the field out in the traces recipe"


def check_context(
    prompter: Prompter,
    asked: Sequence[PromptedRow],
    lengths: Sequence[int],
    limit: str,
    max_length: int | None,
    max_completion_tokens: int,
) -> None:
    """Refuse prompts that leave no room for their completion, naming rows, and the longest field of the longest.

    Args:
        prompter: Wrote them, with a tokenizer.
        asked: The rows.
        lengths: Tokens of each prompt.
        limit: The name of the limit, such as `the context of FOLDER`.
        max_length: Tokens of prompt and completion at most; None for no limit.
        max_completion_tokens: Of a completion.
    """
    room = (1 << 60 if max_length is None else max_length) - max_completion_tokens
    long = [row.row.row_id for row, length in zip(asked, lengths, strict=True) if length > room]
    if not long:
        return
    shown = ", ".join(map(str, long[:3])) + (", ..." if len(long) > 3 else "")
    longest = longest_field(prompter, asked[max(range(len(asked)), key=lengths.__getitem__)].row)
    raise ValueError(
        f"{len(long)} of {len(lengths)} prompts (row_id {shown}) have more than {room} tokens, the longest "
        f"{max(lengths)}: {limit} is {max_length} and a completion takes up to {max_completion_tokens} ({longest}); "
        f"{shorter(limit)}"
    )
