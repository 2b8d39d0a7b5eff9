"""`source: lambdamart`: lists re-ordered by boosted trees that have not seen the row, as a first stage of production.

R rows, N candidates of a row.
"""

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
LEAST_ROWS = 200  # training rows before a window, from which trees are fitted


def reorder(run: str | Path, rows: TargetRows, lists: StoredLists) -> None:
    """Give the lists another order.

    Held-out rows are ranked by trees that were fitted on all training rows. Training rows are ranked by trees of
    other users' rows, or, with a split by time, of rows before them: those are fitted anew whenever the number of
    earlier rows has doubled, and rows before the first LEAST_ROWS stay as they are.
    """
    training, relevance = _hits(lists, np.flatnonzero(rows.splits == "rerank"))
    held_out = np.setdiff1d(np.arange(len(rows)), training)  # training rows that teach nothing among them
    features, users, least = lists.by_row("features"), rows.users[training].tolist(), rows_per_leaf(len(training))
    known = Chosen(features, training.tolist()), relevance
    fitted = fit_lambdamart(known, users, seed=SEED, min_rows_per_leaf=least)
    found = (
        scores_from_before(known, users, times_of(rows)[training])
        if is_by_time(run)
        else out_of_fold_scores(known, users, seed=SEED, min_rows_per_leaf=least)
    )
    for places in in_parts(held_out):
        lists.put("tree_scores", places, fitted.scores(Chosen(features, places.tolist())))
    as_shown = [-np.arange(1.0, 1 + lists.lengths[place]) for place in training.tolist()]
    scores = [own if of_row is None else of_row for own, of_row in zip(as_shown, found, strict=True)]
    lists.put("tree_scores", training, scores)


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


def scores_from_before(train: Lists, users: Sequence[int], times: np.ndarray) -> list[np.ndarray | None]:
    """(R,) scores of each training row by trees of earlier rows alone; None where there are too few.

    Args:
        train: The training rows.
        users: Of each.
        times: (R,) of each.
    """
    features, relevance = train
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    found: list[np.ndarray | None] = [None] * len(order)
    begin = LEAST_ROWS
    while begin < len(order):
        first = int(np.searchsorted(ordered, ordered[begin]))  # a moment is never divided
        end = min(2 * begin, len(order))
        last = int(np.searchsorted(ordered, ordered[end])) if end < len(order) else len(order)
        earlier, later = order[:first].tolist(), order[first:last].tolist()
        if earlier and later:
            rows = Chosen(features, earlier), [relevance[row] for row in earlier]
            least = rows_per_leaf(len(earlier))
            fitted = fit_lambdamart(rows, [users[row] for row in earlier], seed=SEED, min_rows_per_leaf=least)
            for row, scored in zip(later, fitted.scores(Chosen(features, later)), strict=True):
                found[row] = scored
        begin = end
    return found
