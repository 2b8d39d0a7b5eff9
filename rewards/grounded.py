"""Whether what a trace cites stands in the prompt."""

import re
from functools import lru_cache

from rerank.prompts import parse_completion

# What both prompt and trace are read for: semantic ids (a run of them is split where the first level comes again),
# facts such as `next:8`, and numbers.
_ID = r"<s_a_[0-9]+>(?:<s_(?!a_)[a-z]+_[0-9]+>)*|<s_[a-z]+_[0-9]+>"
_FACT = r"(?<![\w-])[A-Za-z_][\w-]*:[0-9]+\b"
_NUMBER = r"(?<![\w.])[0-9]+(?:\.[0-9]+)?(?!\w)"
_TOKEN = "<c_[0-9]+>"
_CITED = re.compile(f"{_ID}|{_FACT}|{_TOKEN}")
_CITED_AND_NUMBERS = re.compile(f"{_ID}|{_FACT}|{_NUMBER}")
# A title: in double quotes, or in brackets right after an id, where it may hold brackets of its own.
_TITLE = re.compile(r'"([^"]+)"|“([^”]+)”|(?<=>) \(((?:[^()]|\([^()]*\))+)\)')
# Of a prompt's item line what stands behind the id, up to facts about the item: `title | category: it ...`, and codes;
# of a line without an id what stands behind the label and a space.
_FIELDS = re.compile(r"(?:>|^ (?:[0-9]+|[A-Z]|<c_[0-9]+>)\.|^) (\S[^<\n]*)", re.MULTILINE)
_FACTS = re.compile(rf":(?= |$)| (?={_FACT})")


def grounded(
    completions: list[str], prompts: list[str], candidate_labels: list[list[str]], top_k: list[int], **columns: object
) -> list[float]:
    """Share of the trace's citations that stand in the prompt; 0 where it cites nothing, and without a ranking.

    Citations are semantic ids, labels that are tokens, titles (in double quotes, or in brackets after an id), facts as
    the prompt codes them (`next:8`), and numbers where candidates are ranked by number (a letter is too often a word
    to be a citation). An id must stand there whole, and so must a title (or another field), as a field of an item. It
    asks whether something stands there, not whether what is said of it is true. Range: 0 to 1.

    Source: GR2, arXiv:2602.07774, and its technical report ask a trace to cite ids; this check of it is the project's.
    """
    return [_grounded(*row) for row in zip(completions, prompts, candidate_labels, top_k, strict=True)]


def _grounded(completion: str, prompt: str, labels: list[str], top_k: int) -> float:
    parsed = parse_completion(completion, labels, top_k)
    if parsed.order is None or parsed.trace is None:
        return 0.0
    pattern = _CITED_AND_NUMBERS if labels[0].isdecimal() else _CITED
    known = _citations(pattern, prompt)
    titles = [next(filter(None, groups)) for groups in _TITLE.findall(parsed.trace)]
    found = [citation in known for citation in pattern.findall(parsed.trace)]
    found += [title in _fields(prompt) for title in titles]
    return sum(found) / len(found) if found else 0.0


@lru_cache(maxsize=256)  # the completions of a group share their prompt
def _citations(pattern: re.Pattern[str], prompt: str) -> frozenset[str]:
    return frozenset(pattern.findall(prompt))


@lru_cache(maxsize=256)
def _fields(prompt: str) -> frozenset[str]:
    """The titles and other fields on a prompt's item lines; of one with colons, what stands before any of them too,
    and of a further field such as `brand: Sony` its value."""
    lines = [match[1] for match in _FIELDS.finditer(prompt)]
    ends = [(line, cut.start()) for line in lines for cut in _FACTS.finditer(line)] + [(line, None) for line in lines]
    shown = [line[:end].split(" | ") for line, end in ends]
    values = {field.partition(": ")[2] for of_line in shown for field in of_line[1:]} - {""}
    return frozenset(values | {field.strip() for of_line in shown for field in of_line})
