"""Facts on candidate lines, and how they become grades and words: the teacher `evidence` and list exercises share it.

N candidates of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rerank.prompts import spaced

GRADES = ("bad", "poor", "weak", "fair", "good", "strong", "top")
LONGEST_LIST = 10  # candidates whose numbers a small tokenizer knows, unless told otherwise


def trace_words(longest: int = LONGEST_LIST, labels: Sequence[str] = ()) -> list[str]:
    """The fixed words of a short trace: with the words of facts all that a small tokenizer needs beside ids.

    Args:
        longest: Candidates of the longest list, whose numbers are among the words.
        labels: Further ones.
    """
    return [*GRADES, "best", *map(str, range(1, longest + 1)), *labels]


@dataclass(frozen=True)
class Facts:
    """The facts on the candidate lines of one row's prompt.

    Attributes:
        texts: (N, facts) wording of each.
        values: (N, facts) what orders them: buckets with `evidence: codes`, values with `words`.
        lines: (N,) what stands behind each candidate's item.
    """

    texts: list[list[str]]
    values: np.ndarray
    lines: list[str]

    def striking(self, position: int, number: int, lowest: bool = False) -> list[int]:
        """The facts by which a candidate stands out most from the list, `lowest` for what speaks against it."""
        spread = self.values.std(axis=0)
        above = (self.values[position] - self.values.mean(axis=0)) / np.where(spread > 0, spread, 1)
        return [int(fact) for fact in np.argsort(above if lowest else -above, kind="stable")[:number]]

    def cited(self, position: int, number: int, lowest: bool = False) -> list[str]:
        """Wording of a candidate's most striking facts."""
        return [self.texts[position][fact] for fact in self.striking(position, number, lowest)]

    def highest(self, fact: int) -> str:
        """Wording of the list's highest value of a fact."""
        return self.texts[int(np.argmax(self.values[:, fact]))][fact]


def by_grade(grades: Sequence[int] | np.ndarray) -> list[int]:
    """Positions, the highest grade first, in the order shown within a grade."""
    return [int(position) for position in np.argsort(-np.asarray(grades), kind="stable")]


def word_grades(labels: Sequence[str], grades: Sequence[int] | np.ndarray) -> str:
    """Each candidate's grade, in the order shown."""
    return "".join(f"{spaced(label)} {GRADES[grade]}" for label, grade in zip(labels, grades, strict=True))


def word_short(labels: Sequence[str], grades: Sequence[int] | np.ndarray, facts: Facts) -> str:
    """A trace of two words a candidate, and the best one with its most striking facts."""
    best = by_grade(grades)[0]
    return " ".join([word_grades(labels, grades), "best" + spaced(labels[best]), *facts.cited(best, 2)])
