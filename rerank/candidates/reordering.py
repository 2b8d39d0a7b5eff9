"""`source: lambdamart`: lists re-ordered by boosted trees that have not seen the row, as a first stage of production.

R rows, H of them hits (which trees learn from), N candidates of a row.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rerank.baselines import fit_lambdamart, out_of_fold_scores, rows_per_leaf
from rerank.baselines.lambdamart import Chosen
from rerank.candidates.counting import first_held_out, in_parts, is_by_time
from rerank.candidates.row_lists import is_hit
from rerank.candidates.stored_lists import StoredLists
from rerank.rows import LoggedLists, TargetRows
from rerank.rows.histories import grades_before

SEED = 0
NOTHING = np.empty(0)  # grades of a row that teaches nothing
LEAST_ROWS = 200  # training rows that are known before a window, from which trees are fitted

logger = logging.getLogger(__name__)


def reorder(run: str | Path, rows: TargetRows, lists: StoredLists) -> None:
    """Give the lists another order.

    Held-out rows are ranked by trees that were fitted on all training rows. Training rows are ranked by trees of
    other users' rows, or, with a split by time, of rows before them: those are fitted anew whenever the number of
    earlier hits has doubled, and rows before the first LEAST_ROWS stay as they are, with scores nan. With a split by
    time no tree is fitted on feedback that came after a row that it ranks.
    """
    features, training = lists.by_row("features"), np.flatnonzero(rows.splits == "rerank")
    of_time = rows.take(training) if rows.lists is not None and is_by_time(run) else None
    if of_time is not None and of_time.lists is not None:
        hits, relevance = _hits(training, of_time.lists.grades_before(first_held_out(rows)))
    else:
        parts = (lists.part(part).relevance for part in in_parts(training))
        hits, relevance = _hits(training, (of_row for part in parts for of_row in part))
    users, least = rows.users[hits].tolist(), rows_per_leaf(len(hits))
    known = Chosen(features, hits.tolist()), relevance
    fitted = fit_lambdamart(known, users, seed=SEED, min_rows_per_leaf=least)
    for places in in_parts(np.flatnonzero(rows.splits != "rerank")):
        lists.put("tree_scores", places, fitted.scores(Chosen(features, places.tolist())))
    all_of_training = Chosen(features, training.tolist())
    found: Sequence[np.ndarray | None]
    if of_time is None:
        grades = dict(zip(hits.tolist(), relevance, strict=True))
        taught = [grades.get(place, NOTHING) for place in training.tolist()]
        of_users = rows.users[training].tolist()
        found, _ = out_of_fold_scores((all_of_training, taught), of_users, seed=SEED, min_rows_per_leaf=least)
    else:
        found = scores_from_before(all_of_training, of_time)
        _say_what_stays(sum(of_row is None for of_row in found), len(found))
    unknown = [np.full(lists.lengths[place], np.nan) for place in training.tolist()]
    scores = [none if of_row is None else of_row for none, of_row in zip(unknown, found, strict=True)]
    lists.put("tree_scores", training, scores)


def _say_what_stays(num_as_shown: int, num_rows: int) -> None:
    if num_as_shown:
        logger.log(
            logging.WARNING if num_as_shown == num_rows else logging.INFO,
            "source lambdamart: %d of %d training lists stay in the order shown, and their scores are unknown: with "
            "split: by_time trees are fitted on earlier lists, from %d on that hold relevant and other items",
            num_as_shown, num_rows, LEAST_ROWS,
        )  # fmt: skip


def _hits(places: np.ndarray, relevance: Iterable[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The places of rows that are hits, and the grades of these."""
    found = [(place, grades) for place, grades in zip(places.tolist(), relevance, strict=True) if is_hit(grades)]
    return np.array([place for place, _ in found], dtype=np.int64), [grades for _, grades in found]


def scores_from_before(features: Sequence[np.ndarray], rows: TargetRows) -> list[np.ndarray | None]:
    """(R,) scores of each training row by trees of what was known before it; None where that is too little.

    Args:
        features: R arrays (N, F) of the rows.
        rows: The training rows, requests with a time.
    """
    assert rows.lists is not None
    order = np.argsort(rows.lists.times, kind="stable")
    users, lists = rows.users[order], rows.lists.take(order)
    known_at = np.sort(_hit_times(lists))
    known_at = known_at[known_at < np.inf]
    found: list[np.ndarray | None] = [None] * len(order)
    begin = LEAST_ROWS
    while begin < len(known_at):
        until = known_at[2 * begin] if 2 * begin < len(known_at) else np.inf
        first, last = np.searchsorted(lists.times, [known_at[begin], until])  # a moment is never divided
        before = np.arange(first)
        earlier, relevance = _hits(before, lists.take(before).grades_before(known_at[begin]))
        later = order[first:last].tolist()
        if len(earlier) and later:
            known, least = (Chosen(features, order[earlier].tolist()), relevance), rows_per_leaf(len(earlier))
            fitted = fit_lambdamart(known, users[earlier].tolist(), seed=SEED, min_rows_per_leaf=least)
            for row, scored in zip(later, fitted.scores(Chosen(features, later)), strict=True):
                found[row] = scored
        begin *= 2
    return found


def _hit_times(lists: LoggedLists) -> np.ndarray:
    """(R,) when each list became a hit, inf for one that never did."""
    found = np.full(len(lists.feedback), np.inf)
    for row, (relevance, feedback) in enumerate(zip(lists.relevance, lists.feedback, strict=True)):
        for time in np.unique(feedback[:, 2]).tolist():
            if is_hit(grades_before(np.nextafter(time, np.inf), relevance, feedback)):
                found[row] = time
                break
    return found
