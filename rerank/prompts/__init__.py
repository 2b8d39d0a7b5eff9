"""Row -> chat prompt, completion -> ranking. The only code that knows the text format.

A prompt is one user message: a task line, the user and the request (where they are shown), the history (oldest first)
and the candidates in the order shown (`message` arranges them). A completion is `<think>` trace `</think>` and then
the candidates' labels, best first: semantic ids, numbers, letters or tokens of their own. `facts` words the facts on
candidate lines, `fields` writes all other texts.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

from rerank.catalogue import Catalogue
from rerank.launch.values import check_choice, check_range, option
from rerank.prompts.chat import EMPTY_TRACE as EMPTY_TRACE
from rerank.prompts.chat import THINK as THINK
from rerank.prompts.chat import THINK_END as THINK_END
from rerank.prompts.chat import completion_text as completion_text
from rerank.prompts.chat import opening as opening
from rerank.prompts.chat import prompt_ids as prompt_ids
from rerank.prompts.chat import render as render
from rerank.prompts.facts import FACTS as FACTS
from rerank.prompts.facts import check_facts
from rerank.prompts.fields import HISTORY_FIELDS, SEMANTIC_ID, UNNAMED
from rerank.prompts.fields import clean as clean
from rerank.prompts.message import LABEL_NAMES
from rerank.prompts.message import LAYOUTS as LAYOUTS
from rerank.prompts.message import rerank_prompt as rerank_prompt

FAILURES = ("no_trace_end", "empty", "junk", "foreign_item", "duplicate", "too_few", "too_many")
MAX_LETTERS = 26  # candidates that letters can name

_ID_TOKEN = re.compile(r"<s_([a-z]+)_[0-9]+>")
_TOKEN = re.compile(r"<c_[0-9]+>")
_SEPARATORS = re.compile(r"[\s,]+")
_WORDS = {"number": re.compile("[0-9]+"), "letter": re.compile("[A-Z]")}  # labels that are words between spaces


@dataclass
class PromptSettings:
    """Fields of a prompt and labels of a completion; saved as prompt.json beside every trained model."""

    item_fields: list[str] = option(
        [SEMANTIC_ID, *UNNAMED],
        "Fields on an item line: semantic_id (needed where completions write it), title, category, and any column of "
        "items that item_columns or text_columns of the data stage name. Empty: facts alone, and no history.",
    )
    user_fields: list[str] = option([], "Columns of request_fields of the data stage on a line User.")
    request_fields: list[str] = option([], "Columns of request_fields of the data stage on a line Request.")
    history_fields: list[str] = option([], "Behind an item of the history: time (its age, such as 2d), event (type).")
    max_field_tokens: int = option(0, "Tokens of a field's text (words in the traces stage); 0: all of it.")
    evidence: str = option("none", "Facts on candidate lines: none, codes (bucketed words) or words (phrases).")
    evidence_names: list[str] = option(
        list(FACTS), "Which facts stand on a candidate line, in order: any of candidates/features.json."
    )
    max_history: int = option(10, "How many of the latest history items are shown.")
    ranking: str = option(
        "semantic_id",
        "Labels of a completion: semantic_id, number, letter (26 candidates), or token: added, one each.",
    )
    knowledge_priming: bool = option(False, "Add a sentence of retail and consumption sequence knowledge to the task.")
    task: str = option("full", "Task text: full, or short for tiny models.")
    layout: str = option(
        "history_first", "history_first, or candidates_first: lists shared by many users are computed once."
    )
    top_k: int = option(0, "A completion names the best k, the others keep the order shown; 0: it names all.")

    def __post_init__(self) -> None:
        check_choice("evidence", self.evidence, ("none", "codes", "words"))
        check_choice("ranking", self.ranking, tuple(LABEL_NAMES))
        check_choice("task", self.task, ("full", "short"))
        check_choice("layout", self.layout, LAYOUTS)
        for name in ("item_fields", "user_fields", "request_fields", "history_fields", "evidence_names"):
            _check_distinct(name, getattr(self, name))
        for name in self.history_fields:
            check_choice("a name in history_fields", name, tuple(HISTORY_FIELDS))
        check_facts("evidence_names", self.evidence_names)
        if not self.item_fields and self.evidence == "none":
            raise ValueError(
                "item_fields is empty and evidence is none, so that candidates have nothing but labels; name title, "
                "or another column, or set evidence to codes."
            )
        if not self.item_fields and self.history_fields:
            raise ValueError(
                f"history_fields is {self.history_fields} but item_fields is empty, so that no history is shown; name "
                "title, or another column, or leave history_fields out."
            )
        if not self.shows_ids and self.ranking == SEMANTIC_ID:
            raise ValueError(
                f"item_fields is {self.item_fields} but must hold semantic_id; add it, or rank by number, letter or "
                "token."
            )
        if self.evidence != "none" and not self.evidence_names:
            raise ValueError(f"evidence_names is empty but evidence is {self.evidence}; name facts or use none.")
        if type(self.max_history) is not int or self.max_history < 1:
            raise ValueError(f"max_history is {self.max_history!r} but must be an integer of at least 1.")
        check_range("max_field_tokens", self.max_field_tokens, least=0)
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r} but must be an integer of at least 1, or 0 for all candidates.")

    @property
    def shows_ids(self) -> bool:
        """Whether prompts show semantic ids, which the model then has to know."""
        return SEMANTIC_ID in self.item_fields

    @property
    def row_fields(self) -> dict[str, list[str]]:
        """The options that name fields of the user and of the request, with these names."""
        return {"user_fields": self.user_fields, "request_fields": self.request_fields}

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


def candidate_labels(candidates: Sequence[int], catalogue: Catalogue, settings: PromptSettings) -> list[str]:
    """The label that a completion writes for each candidate, in the order shown.

    Raises:
        ValueError: When there are more candidates than letters.
    """
    if settings.ranking == SEMANTIC_ID:
        return [catalogue.semantic_ids[item] for item in candidates]
    return word_labels(settings.ranking, len(candidates))


def word_labels(ranking: str, num: int) -> list[str]:
    """`num` labels of one word each: from 1, A or `<c_1>` on.

    Raises:
        ValueError: When there are more candidates than letters.
    """
    if ranking == "number":
        return [str(number) for number in range(1, num + 1)]
    if ranking == "token":
        return [f"<c_{number}>" for number in range(1, num + 1)]
    if num > MAX_LETTERS:
        raise ValueError(f"{num} candidates but {MAX_LETTERS} letters to name them; set ranking: number or token")
    return list(ascii_uppercase[:num])


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
    """A label as it stands in a running text: a number or letter after a space, an id or token as it is."""
    return label if label.startswith("<") else f" {label}"


def parse_completion(text: str, labels: Sequence[str], top_k: int = 0) -> Parsed:
    """The ranking that `text` states, or the first reason in this order why it states none; never a repair.

    no_trace_end: no `</think>`. junk: something before `<think>`. empty: nothing after `</think>`. junk: something
    that is not a whole label there (another tag, words, part of an id). foreign_item: a whole label of no candidate.
    too_many, duplicate, too_few: not each candidate exactly once. White space around labels means nothing, as do
    commas between numbers or letters. Where candidates share a semantic id, its first mention is the first of them
    shown, and so on. Raises for no text, only for labels that `candidate_labels` cannot have made.

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
    pattern = next((words for words in _WORDS.values() if labels and words.fullmatch(labels[0])), None)
    is_id = pattern is None and bool(labels) and not _TOKEN.fullmatch(labels[0])
    if not labels or (len(places) < len(labels) and not is_id):
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
    tags = _whole_id(labels[0]) if is_id else _TOKEN
    written = _split_tags(answer, tags) if pattern is None else _split_words(answer, pattern)
    wanted = min(top_k or len(labels), len(labels))
    shown = {label: len(of) for label, of in places.items()}
    failure = "junk" if written is None else _failure(written, shown, wanted)
    if written is None or failure is not None:
        return Parsed(trace=trace, failure=failure)
    order = [places[label].pop() for label in written]
    return Parsed(order=[*order, *sorted(place for of in places.values() for place in of)], trace=trace)


def _split_words(answer: str, pattern: re.Pattern[str]) -> list[str] | None:
    """The numbers or letters written, None when anything else stands there."""
    written = [word for word in _SEPARATORS.split(answer) if word]
    return written if written and all(pattern.fullmatch(word) for word in written) else None


@lru_cache
def _whole_id(label: str) -> re.Pattern[str]:
    """A semantic id with the levels of `label`."""
    levels = _ID_TOKEN.findall(label)  # letters name them
    if not levels:
        raise ValueError(f"candidate label {label!r} is neither a number nor a semantic id; check the row.")
    return re.compile(r"\s*".join(f"<s_{level}_[0-9]+>" for level in levels))


def _split_tags(answer: str, whole: re.Pattern[str]) -> list[str] | None:
    """The labels written, None when anything else stands there."""
    if whole.sub("", answer).strip():
        return None
    return ["".join(found.split()) for found in whole.findall(answer)]


def _failure(written: Sequence[str], shown: Mapping[str, int], wanted: int) -> str | None:
    """The first failure of the labels written, given how many candidates bear each and the number to be written."""
    if any(label not in shown for label in written):
        return "foreign_item"
    if len(written) > wanted:
        return "too_many"
    if any(number > shown[label] for label, number in Counter(written).items()):
        return "duplicate"
    return "too_few" if len(written) < wanted else None


def _check_distinct(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str) or len(set(values)) != len(values):
        raise ValueError(f"{name} is {values!r} but must be a list that names each of its entries once.")
