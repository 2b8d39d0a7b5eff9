"""`source: lambdamart`: lists re-ordered by boosted trees that have not seen the row, as a first stage of production.

R rows, N candidates of a row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rerank.baselines import fit_lambdamart, out_of_fold_scores, rows_per_leaf
from rerank.candidates.counting import is_by_time, times_of
from rerank.candidates.row_lists import RowLists, is_hit
from rerank.rows import TargetRows

SEED = 0
LEAST_ROWS = 200  # training rows before a window, from which trees are fitted


def reorder(run: str | Path, rows: TargetRows, lists: RowLists) -> RowLists:
    """The lists, re-ordered.

    Held-out rows are ranked by trees that were fitted on all training rows. Training rows are ranked by trees of
    other users' rows, or, with a split by time, of rows before them: those are fitted anew whenever the number of
    earlier rows has doubled, and rows before the first LEAST_ROWS stay as they are.
    """
    training = [place for place in np.flatnonzero(rows.splits == "rerank").tolist() if is_hit(lists.relevance[place])]
    held_out = np.setdiff1d(np.arange(len(rows)), training).tolist()  # training rows that teach nothing among them
    scores: list[np.ndarray] = [-of_row.astype(float) for of_row in lists.ranks]
    train = lists.take(training)
    known = train.features, [of_row.tolist() for of_row in train.relevance]
    users, least = rows.users[training].tolist(), rows_per_leaf(len(training))
    fitted = fit_lambdamart(known, users, seed=SEED, min_rows_per_leaf=least)
    for place, of_row in zip(held_out, fitted.scores(lists.take(held_out).features), strict=True):
        scores[place] = of_row
    found = (
        scores_from_before(train, users, times_of(rows)[training])
        if is_by_time(run)
        else out_of_fold_scores(known, users, seed=SEED, min_rows_per_leaf=least)
    )
    for place, scored in zip(training, found, strict=True):
        scores[place] = scores[place] if scored is None else scored
    return lists.reordered(scores)


def scores_from_before(train: RowLists, users: Sequence[int], times: np.ndarray) -> list[np.ndarray | None]:
    """(R,) scores of each training row by trees of earlier rows alone; None where there are too few.

    Args:
        train: The training rows.
        users: Of each.
        times: (R,) of each.
    """
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
            part = train.take(earlier)
            rows = part.features, [of_row.tolist() for of_row in part.relevance]
            least = rows_per_leaf(len(earlier))
            fitted = fit_lambdamart(rows, [users[row] for row in earlier], seed=SEED, min_rows_per_leaf=least)
            for row, scored in zip(later, fitted.scores(train.take(later).features), strict=True):
                found[row] = scored
        begin = end
    return found
