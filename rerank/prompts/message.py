"""The user message of a row: the task line, and the parts of the prompt in the order that `layout` asks for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rerank.prompts.fields import SEMANTIC_ID, FieldTexts

if TYPE_CHECKING:
    from rerank.prompts import PromptSettings
    from rerank.rows.row import RankingRow

LAYOUTS = ("history_first", "candidates_first")

_TASK = (
    "You are an expert re-ranker of recommendations. Below are {given}. Reorder the {n} candidates so that the one "
    "the user takes next comes first."
)
_GIVEN = {
    "history_first": "the items a user took, oldest first, and {n} candidates",
    "candidates_first": "{n} candidates and the items a user took, oldest first",
}
_PRIMING = (
    "Use what is known of how people buy and consume: an item calls for what completes it (shampoo, then conditioner, "
    "then styling), a series for its next part, a used-up product for its replacement."
)
_ANSWER = (
    "Write your reasoning between <think> and </think>: the broad pattern of the history, the kind of item that "
    "complements it, how each candidate matches; name items by their {names}. After </think> write the {label} "
    "of {named} candidates, best first, and nothing else."
)
_AGES = "Behind an item of the history stands how long before the request it was taken, such as 2d for two days."
LABEL_NAMES = {"semantic_id": "ids", "number": "numbers", "letter": "letters", "token": "labels"}


def rerank_prompt(row: "RankingRow", labels: Sequence[str], facts: Sequence[str], texts: FieldTexts) -> str:
    """The user message for one row.

    Args:
        row: Its history and its candidates in the order shown.
        labels: Of these candidates.
        facts: Those of each candidate (`grading.Facts.lines`).
        texts: Writes items and fields.
    """
    settings = texts.settings
    context = [*texts.row_lines(row), *texts.history_lines(row)]
    items = [texts.item_line(item) for item in row.candidates]
    return arranged(settings.layout, task_line(len(row.candidates), settings), context, labels, items, facts)


def arranged(
    layout: str, task: str, context: Sequence[str], labels: Sequence[str], items: Sequence[str], facts: Sequence[str]
) -> str:
    """The parts of a message in the order of a layout.

    With `candidates_first` whatever depends on the user stands behind the candidates, so that prompts that rank the
    same items for many users share their beginning (GR2 2606.31984: system, candidates, user context); facts then
    follow the history, one line a candidate.

    Args:
        layout: One of `LAYOUTS`.
        task: The first line.
        context: Lines of user, request and history.
        labels: Of the candidates.
        items: Text of each; where labels are ids it begins with its own.
        facts: Those of each, as they stand behind its text; empty for none.
    """
    heads = ["" if _is_id(label) else f" {label}." for label in labels]
    lines = [head + item for head, item in zip(heads, items, strict=True)]
    if layout == "history_first":
        return "\n".join([task, *context, "Candidates:", *map(str.__add__, lines, facts)])
    named = [label if _is_id(label) else head for label, head in zip(labels, heads, strict=True)]
    stated = [f"{head} {fact.lstrip(': ')}" for head, fact in zip(named, facts, strict=True) if fact]
    return "\n".join([task, "Candidates:", *lines, *context, *(["Facts:", *stated] if stated else [])])


def _is_id(label: str) -> bool:
    return label.startswith("<s_")


def task_line(num_candidates: int, settings: "PromptSettings") -> str:
    """The task, in a sentence or two: the same for all rows of one number of candidates."""
    names_some = 0 < settings.top_k < num_candidates
    named = f"the best {settings.top_k}" if names_some else f"all {num_candidates}"
    sentences = [f"Rank {named}:" if names_some else "Rank:"]
    if settings.task == "full":
        task = _TASK.replace("{given}", _GIVEN[settings.layout])
        sentences = [task, *([_AGES] if "time" in settings.history_fields else []), _ANSWER]
    if settings.knowledge_priming:
        sentences.insert(1, _PRIMING)
    names = {"label": LABEL_NAMES[settings.ranking], "names": LABEL_NAMES[settings.ranking]}
    if settings.shows_ids:
        names["names"] = LABEL_NAMES[SEMANTIC_ID]
    if settings.ranking in ("number", "letter"):
        names["label"] += ", separated by spaces,"
    return " ".join(sentences).format(n=num_candidates, named=named, **names)
