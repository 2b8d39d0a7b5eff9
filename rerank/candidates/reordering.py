"""`source: lambdamart`: lists re-ordered by boosted trees that have not seen the row, as a first stage of production.

R rows, H of them hits (which trees learn from), N candidates of a row.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rerank.baselines import fit_lambdamart, out_of_fold_scores, rows_per_leaf
from rerank.baselines.lambdamart import Chosen, Lists
from rerank.candidates.counting import in_parts, is_by_time, times_of
from rerank.candidates.row_lists import is_hit
from rerank.candidates.stored_lists import StoredLists
from rerank.rows import TargetRows

SEED = 0
LEAST_ROWS = 200  # hits before a window, from which trees are fitted

logger = logging.getLogger(__name__)


def reorder(run: str | Path, rows: TargetRows, lists: StoredLists) -> None:
    """Give the lists another order.

    Held-out rows are ranked by trees that were fitted on all training rows. Training rows are ranked by trees of
    other users' rows (those that are no hits, and teach nothing, by trees of all), or, of requests split by time, of
    rows before them: those are fitted anew whenever the number of earlier hits has doubled, and rows before the first
    LEAST_ROWS stay as they are, with scores nan.
    """
    training = np.flatnonzero(rows.splits == "rerank")
    hits, relevance = _hits(lists, training)
    features, users, least = lists.by_row("features"), rows.users[hits].tolist(), rows_per_leaf(len(hits))
    known = Chosen(features, hits.tolist()), relevance
    fitted = fit_lambdamart(known, users, seed=SEED, min_rows_per_leaf=least)
    if rows.lists is not None and is_by_time(run):
        own, times = training, times_of(rows)
        asked = Chosen(features, training.tolist())
        found = scores_from_before(known, users, times[hits], asked, times[training])
        _say_what_stays(sum(of_row is None for of_row in found), len(training))
    else:
        own, found = hits, [*out_of_fold_scores(known, users, seed=SEED, min_rows_per_leaf=least)]
    for places in in_parts(np.setdiff1d(np.arange(len(rows)), own)):
        lists.put("tree_scores", places, fitted.scores(Chosen(features, places.tolist())))
    unknown = [np.full(lists.lengths[place], np.nan) for place in own.tolist()]
    scores = [none if of_row is None else of_row for none, of_row in zip(unknown, found, strict=True)]
    lists.put("tree_scores", own, scores)


def _say_what_stays(num_as_shown: int, num_rows: int) -> None:
    if num_as_shown:
        logger.log(
            logging.WARNING if num_as_shown == num_rows else logging.INFO,
            "source lambdamart: %d of %d training lists stay in the order shown, and their scores are unknown: with "
            "split: by_time trees are fitted on earlier lists, from %d on that hold relevant and other items",
            num_as_shown, num_rows, LEAST_ROWS,
        )  # fmt: skip


def _hits(lists: StoredLists, training: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The places of training rows that are hits, and the grades of these."""
    places: list[int] = []
    relevance: list[np.ndarray] = []
    for part in in_parts(training):
        for place, grades in zip(part.tolist(), lists.part(part).relevance, strict=True):
            if is_hit(grades):
                places.append(place)
                relevance.append(grades)
    return np.array(places, dtype=np.int64), relevance


def scores_from_before(
    train: Lists, users: Sequence[int], times: np.ndarray, asked: Sequence[np.ndarray], asked_times: np.ndarray
) -> list[np.ndarray | None]:
    """(R,) scores of rows by trees of earlier hits alone; None where there are too few.

    Args:
        train: The hits.
        users: Of each.
        times: (H,) of each.
        asked: (N, F) features of each of the R rows.
        asked_times: (R,) of each.
    """
    features, relevance = train
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    found: list[np.ndarray | None] = [None] * len(asked)
    begin = LEAST_ROWS
    while begin < len(order):
        since, end = ordered[begin], min(2 * begin, len(order))  # a moment is never divided
        until = ordered[end] if end < len(order) else np.inf
        earlier = order[: np.searchsorted(ordered, since)].tolist()
        later = np.flatnonzero((asked_times >= since) & (asked_times < until)).tolist()
        if earlier and later:
            rows = Chosen(features, earlier), [relevance[row] for row in earlier]
            least = rows_per_leaf(len(earlier))
            fitted = fit_lambdamart(rows, [users[row] for row in earlier], seed=SEED, min_rows_per_leaf=least)
            for row, scored in zip(later, fitted.scores(Chosen(asked, later)), strict=True):
                found[row] = scored
        begin = end
    return found
