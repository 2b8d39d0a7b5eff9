"""Exercises of mid-training for small models: lists to read, to grade and to sort."""

from collections.abc import Iterator, Sequence

import numpy as np

from rerank.catalogue import Catalogue
from rerank.grading import GRADES, LONGEST_LIST, Facts, by_grade, word_grades, word_short
from rerank.midtrain.documents import Document, Documents
from rerank.prompts import THINK, completion, word_labels
from rerank.prompts.facts import NUM_BUCKETS, coded
from rerank.prompts.fields import SEMANTIC_ID
from rerank.prompts.message import LAYOUTS, arranged

SORT_SHARE = 0.4  # of the lists, unless told otherwise
NORMAL_EDGES = (-1.07, -0.57, -0.18, 0.18, 0.57, 1.07)  # cut a normal distribution into sevenths
MOST_PERMUTED = 100_000  # items; of a larger catalogue a permutation takes longer than all else
TOKENS_OF_LINE = 6  # of a candidate, about


def list_labels(ranking: str, size: int, catalogue: Catalogue, rng: np.random.Generator) -> list[str]:
    """The labels of a made-up list: words or tokens, or the ids of random items."""
    if ranking == SEMANTIC_ID:
        num = len(catalogue)
        items = rng.permutation(num)[:size] if num <= MOST_PERMUTED else rng.choice(num, size, replace=False)
        return [catalogue.semantic_ids[item] for item in items]
    return word_labels(ranking, size)


def list_documents(
    num: int,
    facts: Sequence[str],
    ranking: str,
    catalogue: Catalogue,
    rng: np.random.Generator,
    longest: int = LONGEST_LIST,
    num_buckets: int = NUM_BUCKETS,
    layout: str = LAYOUTS[0],
    shortest: int = 1,
    sort_share: float = SORT_SHARE,
) -> Iterator[Document]:
    """Exercises for re-ranking on made-up lists: find a candidate's facts, grade them, sort by grade.

    Lists grow from at most two to at most `longest` candidates in the first half: read in this order, short ones
    teach to read long ones. In the second half they have `shortest` at least. They show facts in random buckets, and
    the grade is that of their mean; `sort_share` of them begin with the grades and are only to be sorted, at a
    fraction of the tokens.

    Args:
        num: Exercises.
        facts: Names of facts, as in `prompts.facts`.
        ranking: `number`, `letter` or `token`; or `semantic_id`: lines then begin with ids of random items.
        catalogue: Of these ids.
        rng: Draws it all.
        longest: Candidates of a list at most.
        num_buckets: Of a fact.
        layout: Of the prompts, as `PromptSettings` has it.
        shortest: Candidates of a list in the second half at least.
        sort_share: Of the lists, those that begin with the grades.
    """
    for least, most in zip(*bounds(num, shortest, longest), strict=True):
        size = min(_most(longest, ranking, catalogue), int(rng.integers(least, most + 1)))
        yield list_document(size, facts, ranking, catalogue, rng, num_buckets, layout, sort_share)


def bounds(num: int, shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(num,) candidates that the list at each place has at least and at most."""
    grown = np.minimum(1, 2 * np.arange(num) / max(num, 1))
    return np.where(grown < 1, 1, shortest), 2 + (grown * (longest - 2)).astype(int)


def _most(longest: int, ranking: str, catalogue: Catalogue) -> int:
    return min(longest, len(catalogue)) if ranking == SEMANTIC_ID else longest


def lists_on_read(
    num: int,
    facts: Sequence[str],
    ranking: str,
    catalogue: Catalogue,
    seed: int,
    longest: int,
    num_buckets: int,
    layout: str,
    shortest: int,
    sort_share: float,
) -> Documents:
    """Exercises as those of `list_documents`, each from a seed of its own and made when it is read."""
    least, most = bounds(num, shortest, longest)
    sizes = np.random.default_rng(seed).integers(least, most + 1)
    sizes = np.minimum(sizes, _most(longest, ranking, catalogue))

    def make(place: int) -> Document:
        rng = np.random.default_rng([seed, place])
        return list_document(int(sizes[place]), facts, ranking, catalogue, rng, num_buckets, layout, sort_share)

    return Documents(sizes * TOKENS_OF_LINE, make)


def list_document(
    size: int,
    facts: Sequence[str],
    ranking: str,
    catalogue: Catalogue,
    rng: np.random.Generator,
    num_buckets: int,
    layout: str,
    sort_share: float,
) -> Document:
    """An exercise on a list of `size` candidates; the rest as `list_documents` takes it."""
    labels = list_labels(ranking, size, catalogue, rng)
    if rng.random() < sort_share:
        grades = rng.integers(0, len(GRADES), size)
        order = by_grade(grades)
        trace = word_grades(labels, grades)
        _, given, answer = completion(trace, order, labels).partition(trace)
        return Document("lists", "Rank:", answer, given=THINK + given)
    chosen = rng.permutation(len(facts))  # one fact in half of the lists, else any number of them
    num_shown = 1 if rng.random() < 0.5 else int(rng.integers(1, len(facts) + 1))
    shown = [facts[fact] for fact in sorted(chosen[:num_shown])]
    buckets = rng.integers(0, num_buckets, (size, len(shown)))
    texts = [[coded(name, bucket) for name, bucket in zip(shown, line, strict=True)] for line in buckets.tolist()]
    # the mean of n uniform buckets in units of its standard deviation: each grade about equally frequent
    above = (buckets.mean(axis=1) - (num_buckets - 1) / 2) * np.sqrt(len(shown) / ((num_buckets**2 - 1) / 12))
    grades = np.searchsorted(NORMAL_EDGES, above)
    lines = [" " + " ".join(line) for line in texts]
    trace = word_short(labels, grades, Facts(texts, buckets.astype(float), lines))
    items = labels if ranking == SEMANTIC_ID else [""] * size
    prompt = arranged(layout, "Rank:", ["History:"], labels, items, lines)
    return Document("lists", prompt, completion(trace, by_grade(grades), labels))
