"""The teacher `evidence`, which is no language model: LambdaMART ranks, and the facts of the prompt are put in words.

Its scores, noise added, fall into seven grades, each as frequent as any other over all training candidates; a ranking
goes by grade and keeps the order shown within one. For tiny models (`task: short`) the trace grades the candidates in
the order shown and cites two facts of the best, which is all that a ranking follows from:

     1 fair 2 poor 3 strong best 3 next:9 link:8

Else it follows GR2's three steps in sentences: the broad pattern of the history, what complements it, how candidates
match. Every fact cited stands in the prompt or can be counted there.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rerank import prompts
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings
from rerank.traces.attempts import Draft
from rerank.traces.rows import Row, best_position, read_hit_rows

# The fixed words of a short trace; with `prompts.evidence_words` all that a small tokenizer needs beside ids.
GRADES = ("bad", "poor", "weak", "fair", "good", "strong", "top")
EVIDENCE_WORDS: tuple[str, ...] = (*GRADES, "best", *map(str, range(1, 11)))
NUM_FOLDS = 5
MIN_ROWS_PER_LEAF = 200


@dataclass(frozen=True)
class Facts:
    """The facts on the candidate lines of one row's prompt."""

    texts: list[list[str]]  # (N, facts) as the prompt words them
    values: np.ndarray  # (N, facts) what orders them: buckets for codes, values for words

    @classmethod
    def of(
        cls, row: Row, settings: PromptSettings, edges: Mapping[str, Sequence[float]], feature_names: Sequence[str]
    ) -> "Facts":
        """The facts that `prompts.rerank_prompt` shows for the row."""
        if settings.evidence == "none":
            return cls([[] for _ in row["candidates"]], np.zeros((len(row["candidates"]), 0)))
        from rerank import baselines

        columns = [feature_names.index(name) for name in settings.evidence_names]
        values = np.asarray(row["features"], dtype=float)[:, columns]
        if settings.evidence == "words":
            phrases = [prompts.FACTS[name][1] for name in settings.evidence_names]
            texts = [[p.format(v) for p, v in zip(phrases, line, strict=True)] for line in values]
            return cls(texts, values)
        names = settings.evidence_names
        buckets = [[baselines.bucket(v, edges[n]) for n, v in zip(names, line, strict=True)] for line in values]
        texts = [[f"{prompts.FACTS[n][0]}:{b}" for n, b in zip(names, line, strict=True)] for line in buckets]
        return cls(texts, np.array(buckets, dtype=float))

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


def categories_of(item: int, catalogue: Catalogue, settings: PromptSettings) -> list[str]:
    """The item's categories as far as the prompt shows them."""
    if "category" not in settings.item_fields:
        return []
    parts = re.split(r"[,;|>]", catalogue.categories[item])
    return [part for part in dict.fromkeys(" ".join(p.replace("<", "‹").split()) for p in parts) if part]


def common_categories(items: Sequence[int], catalogue: Catalogue, settings: PromptSettings) -> list[tuple[str, int]]:
    """The two most frequent categories of the items with their counts, of equals the most recent first."""
    counts = Counter(name for item in reversed(items) for name in categories_of(item, catalogue, settings))
    return counts.most_common(2)


def by_grade(grades: Sequence[int]) -> list[int]:
    """Positions, the highest grade first, in the order shown within a grade."""
    return [int(position) for position in np.argsort(-np.asarray(grades), kind="stable")]


def word_grades(labels: Sequence[str], grades: Sequence[int]) -> str:
    """Each candidate's grade, in the order shown."""
    return "".join(f"{prompts.spaced(label)} {GRADES[grade]}" for label, grade in zip(labels, grades, strict=True))


def word_short(labels: Sequence[str], grades: Sequence[int], facts: Facts) -> str:
    """A trace of two words a candidate, and the best one with its most striking facts."""
    best = by_grade(grades)[0]
    return " ".join([word_grades(labels, grades), "best" + prompts.spaced(labels[best]), *facts.cited(best, 2)])


def word_full(row: Row, order: Sequence[int], facts: Facts, catalogue: Catalogue, settings: PromptSettings) -> str:
    """A trace in sentences."""
    history, candidates = row["history"][-settings.max_history :], row["candidates"]
    pattern = [f"{n} in {k} of {len(history)} items" for n, k in common_categories(history, catalogue, settings)]
    lines = [f"Broad pattern: {'; '.join([*pattern, f'the last item is {_name(history[-1], catalogue, settings)}'])}."]
    for name in categories_of(candidates[order[0]], catalogue, settings)[:1]:
        like = sum(name in categories_of(item, catalogue, settings) for item in candidates)
        lines.append(f"What complements it: {name}, as in {like} of {len(candidates)} candidates.")
    for fact in facts.striking(order[0], 1):
        lines.append(f"The highest among the candidates: {facts.highest(fact)}.")
    for word, position in _places(("Best match", "Second", "Third", "Last"), order):
        cited = facts.cited(position, 3 if word == "Best match" else 2, lowest=word == "Last")
        cited = cited or categories_of(candidates[position], catalogue, settings)[:1]
        lines.append(f"{word}: {'; '.join([_name(candidates[position], catalogue, settings), *cited])}.")
    return " ".join(lines)


def _places(words: Sequence[str], order: Sequence[int]) -> list[tuple[str, int]]:
    """The first words with the first positions of an order, the last word with its last position."""
    if len(order) == 1:
        return [(words[0], order[0])]
    first = zip(words[:-1], order[:-1], strict=False)  # a list may be shorter than the words
    return [*first, (words[-1], order[-1])]


def _name(item: int, catalogue: Catalogue, settings: PromptSettings) -> str:
    title = " ".join(catalogue.titles[item].split()).replace("<", "‹").replace(">", "›")
    return catalogue.semantic_ids[item] + (f" ({title})" if title and "title" in settings.item_fields else "")


def fit_scores(rows: Sequence[Row], valid_path: str | Path, seed: int) -> dict[int, np.ndarray]:
    """Scores of each row's candidates by a LambdaMART fitted on other users' rows, by row_id, in calibrated units.

    Raises:
        ValueError: When the rows are of one user only.
    """
    from rerank import baselines

    num_users = len({row["user"] for row in rows})
    if num_users < 2:
        raise ValueError(
            f"all {len(rows)} training rows are of one user, so that none can be scored out of fold; add data."
        )
    valid = read_hit_rows(valid_path, with_features=True)
    features, valid_features = ([np.asarray(r["features"], dtype=np.float32) for r in part] for part in (rows, valid))
    scores = baselines.out_of_fold_scores(
        features,
        [row["relevance"] for row in rows],
        [row["user"] for row in rows],
        valid_features,
        [row["relevance"] for row in valid],
        num_folds=min(NUM_FOLDS, num_users),
        seed=seed,
        min_rows_per_leaf=min(MIN_ROWS_PER_LEAF, max(1, len(rows) // 10)),
    )
    scale = calibrate(scores, [best_position(row) for row in rows])
    return {row["row_id"]: scale * row_scores for row, row_scores in zip(rows, scores, strict=True)}


def calibrate(scores: Sequence[np.ndarray], best: Sequence[int]) -> float:
    """The factor in [0.01, 100] that makes softmax(factor * scores) likeliest to draw the best positions.

    The scale of LambdaMART's scores means nothing; with it, noise of temperature 1 draws a candidate first about as
    often as it is the best.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    def nll(log_factor: float) -> float:
        scaled = [np.exp(log_factor) * row for row in scores]
        return sum(logsumexp(row) - row[place] for row, place in zip(scaled, best, strict=True))

    return float(np.exp(minimize_scalar(nll, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


class EvidenceTeacher:
    """Adds Gumbel noise to the scores, grades and ranks by them, and words its reasons.

    Draws depend on seed, row and attempt alone. `told` gives the most relevant candidate, and it alone, the top grade.
    """

    def __init__(
        self,
        scores: Mapping[int, np.ndarray],
        catalogue: Catalogue,
        settings: PromptSettings,
        edges: Mapping[str, Sequence[float]],
        feature_names: Sequence[str],
        temperature: float,
        seed: int,
        told: bool,
    ) -> None:
        self.scores, self.catalogue, self.settings = scores, catalogue, settings
        self.edges, self.feature_names = edges, list(feature_names)
        self.temperature, self.seed, self.told = temperature, seed, told
        places = np.arange(1, len(GRADES)) / len(GRADES)
        self.grade_edges = np.quantile(np.concatenate(list(scores.values())), places)

    def __call__(self, rows: Sequence[Row], attempt: int, batch_seed: int) -> list[Draft]:
        return [self._draft(row, attempt) for row in rows]

    def _draft(self, row: Row, attempt: int) -> Draft:
        grades = self._grades(row, attempt)
        order = by_grade(grades)
        facts = Facts.of(row, self.settings, self.edges, self.feature_names)
        labels = prompts.candidate_labels(row, self.catalogue, self.settings)
        if self.settings.task == "short":
            return Draft(prompts.completion(word_short(labels, grades, facts), order, labels))
        return Draft(prompts.completion(word_full(row, order, facts, self.catalogue, self.settings), order, labels))

    def _grades(self, row: Row, attempt: int) -> np.ndarray:
        noise = np.random.default_rng((self.seed, row["row_id"], attempt)).gumbel(size=len(row["candidates"]))
        scores = np.asarray(self.scores[row["row_id"]], dtype=float)
        grades = np.searchsorted(self.grade_edges, scores + self.temperature * noise)
        if self.told:
            grades = np.minimum(grades, len(GRADES) - 2)
            grades[best_position(row)] = len(GRADES) - 1
        return grades
