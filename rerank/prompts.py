"""Row -> chat prompt, completion -> ranking. The only code that knows the text format.

A prompt is one user message: a task line, the history (oldest first) and the candidates in the order shown.
A completion is `<think>` trace `</think>` and then the candidates' labels, best first: semantic ids, or numbers.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.catalogue import Catalogue
from rerank.launch.values import check_choice, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"
FAILURES = ("no_trace_end", "empty", "junk", "foreign_item", "duplicate", "too_few", "too_many")
ITEM_FIELDS = ("semantic_id", "title", "category")

# Fact -> (the short word of "codes", the phrase of "words"). Each value comes from other users' training sequences.
FACTS: dict[str, tuple[str, str]] = {
    "direct_last": ("next", "chosen next by {:.0f} others after the last item"),
    "direct_second": ("skip", "chosen next by {:.0f} others after the last item but one"),
    "from_last": ("link", "follows the last item with weight {:.2f}"),
    "sum_counts": ("sum", "follows the recent items with weight {:.2f}"),
    "popularity": ("pop", "chosen {:.0f} times by others"),
    "cosine_last": ("like", "similarity {:.2f} to the last item"),
    "cosine_max": ("near", "similarity {:.2f} to the nearest item of the history"),
    "lift": ("lift", "follows the recent items {:.2f} strong for its popularity"),
    "near": ("soon", "others take it within ten places of the recent items with share {:.2f}"),
    "fit_history": ("fit", "fits the whole history with score {:.2f}"),
    "fit_recent": ("now", "fits the recent items with score {:.2f}"),
}

_TASK = (
    "You are an expert re-ranker of recommendations. Below are the items a user took, oldest first, and {n} "
    "candidates. Reorder the {n} candidates so that the one the user takes next comes first."
)
_PRIMING = (
    "Use what is known of how people buy and consume: an item calls for what completes it (shampoo, then conditioner, "
    "then styling), a series for its next part, a used-up product for its replacement."
)
_ANSWER = (
    "Write your reasoning between <think> and </think>: the broad pattern of the history, the kind of item that "
    "complements it, how each candidate matches; name items by their ids. After </think> write the {label} of {named} "
    "candidates, best first, and nothing else."
)
_LABEL_NAMES = {"semantic_id": "ids", "number": "numbers, separated by spaces,"}

_ID_TOKEN = re.compile(r"<s_([a-z]+)_[0-9]+>")
_SEPARATORS = re.compile(r"[\s,]+")
_NUMBER = re.compile("[0-9]+")


@dataclass
class PromptSettings:
    """Fields of a prompt and labels of a completion; saved as prompt.json beside every trained model."""

    item_fields: list[str] = option(
        list(ITEM_FIELDS), "Fields on an item line: semantic_id (needed where completions write it), title, category."
    )
    evidence: str = option("none", "Facts on candidate lines: none, codes (bucketed words) or words (phrases).")
    evidence_names: list[str] = option(list(FACTS), "Which facts stand on a candidate line, in order.")
    max_history: int = option(10, "How many of the latest history items are shown.")
    ranking: str = option("semantic_id", "Labels of a completion: semantic_id or number.")
    knowledge_priming: bool = option(False, "Add a sentence of retail and consumption sequence knowledge to the task.")
    task: str = option("full", "Task text: full, or short for tiny models.")
    top_k: int = option(0, "A completion names the best k, the others keep the order shown; 0: it names all.")

    def __post_init__(self) -> None:
        check_choice("evidence", self.evidence, ("none", "codes", "words"))
        check_choice("ranking", self.ranking, ("semantic_id", "number"))
        check_choice("task", self.task, ("full", "short"))
        _check_names("item_fields", self.item_fields, ITEM_FIELDS)
        _check_names("evidence_names", self.evidence_names, tuple(FACTS))
        if "semantic_id" not in self.item_fields and self.ranking == "semantic_id":
            raise ValueError(
                f"item_fields is {self.item_fields} but must hold semantic_id; add it, or rank by number."
            )
        if self.evidence != "none" and not self.evidence_names:
            raise ValueError(f"evidence_names is empty but evidence is {self.evidence}; name facts or use none.")
        if type(self.max_history) is not int or self.max_history < 1:
            raise ValueError(f"max_history is {self.max_history!r} but must be an integer of at least 1.")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r} but must be an integer of at least 1, or 0 for all candidates.")

    def save(self, folder: str | Path) -> None:
        """Write `folder`/prompt.json."""
        (Path(folder) / "prompt.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "PromptSettings":
        """The settings that `save` wrote into `folder`."""
        path = Path(folder) / "prompt.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give the folder of a model trained by the sft or dapo stage.")
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Parsed:
    """A parsed completion: exactly one of `order` (positions into the labels, best first) and `failure`.

    `trace` is the text between the tags, None where they are not in place.
    """

    order: list[int] | None = None
    trace: str | None = None
    failure: str | None = None


def rerank_prompt(
    history: Sequence[int],
    candidates: Sequence[int],
    facts: Sequence[str],
    catalogue: Catalogue,
    settings: PromptSettings,
) -> str:
    """The user message for one row.

    Args:
        history: Items, oldest first.
        candidates: Items in the order shown.
        facts: What stands behind each candidate's item (`grading.Facts.lines`).
    """
    lines = [_task_line(len(candidates), settings), *_history_lines(history, catalogue, settings), "Candidates:"]
    for number, (item, fact) in enumerate(zip(candidates, facts, strict=True), start=1):
        prefix = f" {number}." if settings.ranking == "number" else ""
        lines.append(prefix + _item_line(item, catalogue, settings) + fact)
    return "\n".join(lines)


def candidate_labels(candidates: Sequence[int], catalogue: Catalogue, settings: PromptSettings) -> list[str]:
    """The label that a completion writes for each candidate, in the order shown."""
    if settings.ranking == "number":
        return [str(number) for number in range(1, len(candidates) + 1)]
    return [catalogue.semantic_ids[item] for item in candidates]


def completion(trace: str | None, order: Sequence[int], labels: Sequence[str], top_k: int = 0) -> str:
    """The text that ranks the candidates in `order` (positions into `labels`, best first); `trace` None is empty.

    Args:
        top_k: How many of them it names, the best; 0 for all.
    """
    if trace is not None and THINK_END in trace:
        raise ValueError(f"the trace holds {THINK_END}, which would end it early; remove it: {trace[:80]!r}")
    written = [labels[position] for position in order[: top_k or None]]
    return f"{THINK}{trace or ''}{THINK_END}" + "".join(map(spaced, written))


def spaced(label: str) -> str:
    """A label as it stands in a running text: a number after a space, an id as it is."""
    return f" {label}" if label.isdecimal() else label


def parse_completion(text: str, labels: Sequence[str], top_k: int = 0) -> Parsed:
    """The ranking that `text` states, or the first reason in this order why it states none; never a repair.

    no_trace_end: no `</think>`. junk: something before `<think>`. empty: nothing after `</think>`. junk: something
    that is not a whole label there (another tag, words, part of an id). foreign_item: a whole label of no candidate.
    too_many, duplicate, too_few: not each candidate exactly once. White space around labels means nothing, as do
    commas between numbers. Where candidates share a semantic id, its first mention is the first of them shown, and so
    on. Raises for no text, only for labels that `candidate_labels` cannot have made.

    Args:
        text: The completion.
        labels: Of the N candidates, in the order shown.
        top_k: Of the candidates, min(top_k, N) are to be named, the best; the others follow in the order shown, so
            that `order` has all N. 0: all are to be named.
    """
    parsed = _parse(text, tuple(labels), top_k)
    return parsed if parsed.order is None else Parsed(list(parsed.order), parsed.trace)  # a list that is the caller's


@lru_cache(maxsize=8192)  # every reward and condition of a batch reads the same completions
def _parse(text: str, labels: tuple[str, ...], top_k: int) -> Parsed:
    places: dict[str, list[int]] = {}  # of the candidates of each label, the last one first
    for place in reversed(range(len(labels))):
        places.setdefault(labels[place], []).append(place)
    if not labels or (len(places) < len(labels) and labels[0].isdecimal()):
        raise ValueError(
            f"candidates need distinct numbers, and at least one, but have {list(labels)}; check the row."
        )
    head, end, answer = text.partition(THINK_END)
    if not end:
        return Parsed(failure="no_trace_end")
    if not head.lstrip().startswith(THINK):
        return Parsed(failure="junk")
    trace = head.lstrip()[len(THINK) :]
    if not answer.strip():
        return Parsed(trace=trace, failure="empty")
    written = _split_numbers(answer) if labels[0].isdecimal() else _split_ids(answer, labels[0])
    wanted = min(top_k or len(labels), len(labels))
    shown = {label: len(of) for label, of in places.items()}
    failure = "junk" if written is None else _failure(written, shown, wanted)
    if written is None or failure is not None:
        return Parsed(trace=trace, failure=failure)
    order = [places[label].pop() for label in written]
    return Parsed(order=[*order, *sorted(place for of in places.values() for place in of)], trace=trace)


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


def _task_line(num_candidates: int, settings: PromptSettings) -> str:
    names_some = 0 < settings.top_k < num_candidates
    named = f"the best {settings.top_k}" if names_some else f"all {num_candidates}"
    sentences = [f"Rank {named}:" if names_some else "Rank:"]
    if settings.task == "full":
        sentences = [_TASK, _ANSWER]
    if settings.knowledge_priming:
        sentences.insert(1, _PRIMING)
    return " ".join(sentences).format(n=num_candidates, named=named, label=_LABEL_NAMES[settings.ranking])


def _history_lines(history: Sequence[int], catalogue: Catalogue, settings: PromptSettings) -> list[str]:
    shown = [_item_line(item, catalogue, settings) for item in history[-settings.max_history :]]
    if settings.item_fields == ["semantic_id"]:
        return ["History:" + "".join(shown)]
    return ["History:", *shown]


def _item_line(item: int, catalogue: Catalogue, settings: PromptSettings) -> str:
    """The semantic id, if it is shown, then the other fields that are not empty; an item without any by its id."""
    texts = {"title": catalogue.titles[item], "category": catalogue.categories[item]}
    shown = [clean(texts[name]) for name in settings.item_fields if name != "semantic_id" and texts[name].strip()]
    if "semantic_id" in settings.item_fields:
        return catalogue.semantic_ids[item] + (" " + " | ".join(shown) if shown else "")
    return " " + (" | ".join(shown) or clean(catalogue.item_ids[item]))


def clean(text: str) -> str:
    """`text` on one line and without anything a tokenizer could take for an id, a tag or the end of a turn."""
    return " ".join(text.split()).replace("<", "‹").replace(">", "›")


def _split_numbers(answer: str) -> list[str] | None:
    """The numbers written, None when anything else stands there."""
    written = [word for word in _SEPARATORS.split(answer) if word]
    return written if written and all(_NUMBER.fullmatch(word) for word in written) else None


def _split_ids(answer: str, label: str) -> list[str] | None:
    """The semantic ids written, each with the levels of `label`, None when anything else stands there."""
    tokens = list(_ID_TOKEN.finditer(answer))
    levels = _ID_TOKEN.findall(label)
    if not levels:
        raise ValueError(f"candidate label {label!r} is neither a number nor a semantic id; check the row.")
    if _ID_TOKEN.sub("", answer).strip() or len(tokens) % len(levels):
        return None
    groups = [tokens[start : start + len(levels)] for start in range(0, len(tokens), len(levels))]
    if any([token[1] for token in group] != levels for group in groups):  # letters name levels
        return None
    return ["".join(token[0] for token in group) for group in groups]


def _failure(written: Sequence[str], shown: Mapping[str, int], wanted: int) -> str | None:
    """The first failure of the labels written, given how many candidates bear each and the number to be written."""
    if any(label not in shown for label in written):
        return "foreign_item"
    if len(written) > wanted:
        return "too_many"
    if any(number > shown[label] for label, number in Counter(written).items()):
        return "duplicate"
    return "too_few" if len(written) < wanted else None


def _check_names(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(values, str) or len(set(values)) != len(values):
        raise ValueError(f"{name} is {values!r} but must be a list that names each of its entries once.")
    for value in values:
        if value not in known:
            raise ValueError(f"{name} holds {value!r} but knows only {', '.join(known)}.")
