"""The teacher `evidence`, which is no language model: LambdaMART ranks, and the facts of the prompt are put in words.

Its scores, noise added, fall into seven grades, each as frequent over all training candidates as the one below, or by
`grade_ratio` rarer, so that the best of a long list are told apart; a ranking goes by grade and keeps the order shown
within one. For tiny models (`task: short`) the trace grades the candidates in
the order shown and cites two facts of the best, which is all that a ranking follows from:

     1 fair 2 poor 3 strong best 3 next:9 link:8

Else it follows GR2's three steps in sentences: the broad pattern of the history, what complements it, how candidates
match. Every fact cited stands in the prompt or can be counted there.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from rerank import prompts
from rerank.catalogue import Catalogue
from rerank.grading import GRADES, Facts, by_grade, word_short
from rerank.metrics import ndcg_at_k
from rerank.prompts import PromptSettings
from rerank.rows import Prompter, RankingRow
from rerank.rows.on_read import seeded_sample
from rerank.rows.stored import HitLists, hit_keys
from rerank.rows.teacher_scores import scores_in
from rerank.traces.attempts import Draft

if TYPE_CHECKING:
    from rerank.traces import TracesArguments

logger = logging.getLogger(__name__)

NUM_FOLDS = 5
MEASURED = 20_000  # rows
LEAST_USERS = 3


def categories_of(item: int, catalogue: Catalogue, settings: PromptSettings) -> list[str]:
    """The item's categories as far as the prompt shows them."""
    if "category" not in settings.item_fields:
        return []
    parts = re.split(r"[,;|>]", catalogue.categories[item])
    return [part for part in dict.fromkeys(map(prompts.clean, parts)) if part]


def word_full(row: RankingRow, order: Sequence[int], facts: Facts, prompter: Prompter) -> str:
    """A trace in sentences that explains a ranking (positions, best first)."""
    shown = prompter.catalogue, prompter.settings
    labels = prompter.labels(row)
    history, candidates = row.history[-prompter.settings.max_history :], row.candidates
    counts = Counter(name for item in reversed(history) for name in categories_of(item, *shown))
    # the two most frequent categories, of equals the most recent
    pattern = [f"{name} in {times} of {len(history)} items" for name, times in counts.most_common(2)]
    pattern += [f"the last item is {_name(history[-1], prompter)}"] if history else ["no history is known"]
    lines = [f"Broad pattern: {'; '.join(pattern)}."]
    for name in categories_of(candidates[order[0]], *shown)[:1]:
        like = sum(name in categories_of(item, *shown) for item in candidates)
        lines.append(f"What complements it: {name}, as in {like} of {len(candidates)} candidates.")
    for fact in facts.striking(order[0], 1):
        lines.append(f"The highest among the candidates: {facts.highest(fact)}.")
    first = zip(("Best match", "Second", "Third"), order[:-1], strict=False)  # a list may be shorter
    for word, position in [*first, ("Last", order[-1])]:
        cited = facts.cited(position, 3 if word == "Best match" else 2, lowest=word == "Last")
        cited = cited or categories_of(candidates[position], *shown)[:1]
        lines.append(f"{word}: {'; '.join([_name(candidates[position], prompter, labels[position]), *cited])}.")
    return " ".join(lines)


def _name(item: int, prompter: Prompter, label: str = "") -> str:
    """An item as a trace names it: by its semantic id, or its label where prompts show no ids, and its title."""
    settings, catalogue = prompter.settings, prompter.catalogue
    title = prompter.texts.item(item, "title") if "title" in settings.item_fields else ""
    if settings.shows_ids:
        label = catalogue.semantic_ids[item]
    if not label:
        return title or prompts.clean(catalogue.item_ids[item])
    return label + (f" ({title})" if title else "")


def fit_scores(
    lists: HitLists, names: Sequence[str], seed: int, shown: Prompter | None = None
) -> dict[int, np.ndarray]:
    """Scores of each row's candidates by a LambdaMART fitted on other users' rows, by row_id, in calibrated units.

    Args:
        lists: To score.
        names: Of the columns of their features.
        seed: Of the folds and of the fits.
        shown: Of the run, where the trees are to know what its prompts show and nothing else.

    Raises:
        ValueError: When the rows are of fewer than three users.
    """
    from rerank import baselines

    users, num_rows = cast("list[int]", lists.users), len(lists.users)
    num_users = len(set(users))
    if num_users < LEAST_USERS:
        raise ValueError(
            f"the {num_rows} training rows are of {num_users} of the {LEAST_USERS} users at least that scores out of "
            "fold need: one to score, one to fit, one to choose the number of trees; add data."
        )
    features = lists.features
    if shown is not None:
        features = [shown.shown_values(of_row).astype(np.float32) for of_row in lists.features]
    names = names if shown is None else shown.settings.evidence_names
    train = features, lists.relevance
    num_folds, least = min(NUM_FOLDS, num_users), baselines.rows_per_leaf(num_rows)
    scores, folds = baselines.out_of_fold_scores(train, users, num_folds, seed, names, min_rows_per_leaf=least)
    return dict(zip(lists.row_ids, calibrated(scores, lists.relevance, folds), strict=True))


def calibrated(
    scores: Sequence[np.ndarray], relevance: Sequence[Sequence[float] | np.ndarray], folds: np.ndarray
) -> list[np.ndarray]:
    """Scores in units that all folds share: each fold's times its `calibrate`, less their mean over its candidates."""
    found = list(scores)
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold).tolist()
        factor = calibrate([scores[row] for row in rows], [relevance[row] for row in rows])
        mean = np.concatenate([scores[row] for row in rows]).mean()
        for row in rows:
            found[row] = factor * (scores[row] - mean)
    return found


def calibrate(scores: Sequence[np.ndarray], relevance: Sequence[Sequence[float] | np.ndarray]) -> float:
    """The factor in [0.01, 100] that makes softmax(factor * scores) likeliest to draw, of each row's judged
    candidates, one of the highest grade.

    The scale of LambdaMART's scores means nothing; with it, noise of temperature 1 draws a candidate first about as
    often as it is one of the best.

    Args:
        scores: (N,) of the candidates of each row.
        relevance: (N,) grades of each row, nan for one that was not seen.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    grades = [np.asarray(of_row, dtype=float) for of_row in relevance]
    pairs = [(of[~np.isnan(row)], of[row == np.nanmax(row)]) for of, row in zip(scores, grades, strict=True)]

    def nll(log_factor: float) -> float:
        factor = np.exp(log_factor)
        return sum(logsumexp(factor * all_seen) - logsumexp(factor * best) for all_seen, best in pairs)

    return float(np.exp(minimize_scalar(nll, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


def grade_places(ratio: float) -> np.ndarray:
    """Share of all candidates below each grade but the lowest, where each grade holds `ratio` times the one below."""
    below: np.ndarray = np.cumsum(ratio ** np.arange(len(GRADES)))
    return below[:-1] / below[-1]


def grade_edges(scores: Mapping[int, Sequence[float] | np.ndarray], ratio: float) -> np.ndarray:
    """(grades - 1,) the scores that part the grades."""
    every = np.concatenate([np.asarray(of_row, dtype=float) for of_row in scores.values()])
    edges: np.ndarray = np.quantile(every, grade_places(ratio))
    return edges


def teacher_ndcg(args: "TracesArguments", path: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Mean NDCG@10 of the teacher's scores, each of trees that know no row of its user, and of the grades they become.

    Between the two lies what the grades lose, whichever model learns from them; trees of all facts (`shown_facts:
    false`) tell what those of the prompt lose. Of a seeded sample of the hit training rows, MEASURED at most.

    Args:
        args: Of the stage.
        path: Of the training lists.
        folder: With the scores.

    Returns:
        `teacher_ndcg`: `shown` (the input order), `scores` and `grades`; nothing of another teacher.
    """
    if args.teacher != "evidence":
        return {}
    hits, scores = hit_keys(path, ["row_id", "relevance"]), scores_in(folder)
    edges, values = grade_edges(scores, args.grade_ratio), []
    for hit in hits.take(seeded_sample(len(hits), min(MEASURED, len(hits)))).to_pylist():
        of_row, relevance = np.asarray(scores[hit["row_id"]]), np.asarray(hit["relevance"], dtype=float)
        orders = range(len(of_row)), by_grade(of_row), by_grade(np.searchsorted(edges, of_row))
        values.append([ndcg_at_k(relevance[list(order)], 10) or 0.0 for order in orders])
    found = dict(zip(("shown", "scores", "grades"), np.mean(values, axis=0).tolist(), strict=True))
    logger.info(
        "NDCG@10 of the training lists as shown %.4f, by the trees, each user's by those of others, %.4f, by their "
        "grades %.4f", *found.values(),
    )  # fmt: skip
    return {"teacher_ndcg": found}


class EvidenceTeacher:
    """Adds Gumbel noise to the scores, grades and ranks by them, and words its reasons.

    Draws depend on seed, row and attempt alone. `told` gives the candidates of the highest grade, and them alone, the
    top grade of the trace.
    """

    def __init__(
        self,
        scores: Mapping[int, np.ndarray],
        prompter: Prompter,
        temperature: float,
        seed: int,
        told: bool,
        grade_ratio: float = 1.0,
    ) -> None:
        self.scores, self.prompter = scores, prompter
        self.temperature, self.seed, self.told = temperature, seed, told
        self.grade_edges = grade_edges(scores, grade_ratio)

    def __call__(self, rows: Sequence[RankingRow], attempt: int) -> list[Draft]:
        return [self._draft(row, attempt) for row in rows]

    def _draft(self, row: RankingRow, attempt: int) -> Draft:
        grades = self._grades(row, attempt)
        order, facts, labels = by_grade(grades), self.prompter.facts(row), self.prompter.labels(row)
        is_short = self.prompter.settings.task == "short"
        trace = word_short(labels, grades, facts) if is_short else word_full(row, order, facts, self.prompter)
        return Draft(prompts.completion(trace, order, labels, self.prompter.settings.top_k))

    def _grades(self, row: RankingRow, attempt: int) -> np.ndarray:
        noise = np.random.default_rng((self.seed, row.row_id, attempt)).gumbel(size=len(row.candidates))
        grades = np.searchsorted(self.grade_edges, self.scores[row.row_id] + self.temperature * noise)
        if self.told:
            grades = np.minimum(grades, len(GRADES) - 2)
            grades[list(row.best)] = len(GRADES) - 1
        return grades
