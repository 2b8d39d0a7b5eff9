"""More training lists of the rows there are: drawn anew for every epoch, from the seed alone.

List 0 of a training row is that of the first stage, as in validation and test. Every further one is drawn: a first
stage ranks the items after the history, or after its last items alone; the target and a random choice of the others
of a longer list stay, in the order of that first stage; they are shown in this order, or shuffled. The counts leave
the row's user out as for list 0.

R rows, N candidates of a list, M items of the longer list they are drawn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rerank.baselines import Counts, UserContributions, feature_rows
from rerank.candidates.row_lists import RowLists
from rerank.launch import recipe
from rerank.launch.values import check_choice, check_range, option
from rerank.rows import Histories, TargetRows

Ranked = tuple[np.ndarray, np.ndarray]  # (R, M) items, best first, and their scores
FirstStage = Callable[[Counts, Sequence[np.ndarray], int, UserContributions, bool], Ranked]
CHUNK = 256


@dataclass
class AugmentationArguments(recipe.StageArguments):
    """Options of the further lists of training rows."""

    lists_per_row: int = option(1, "Lists of a training row; epoch e of dapo trains on list e, then the first again.")
    pool_size: int | None = option(None, "Draw further lists from first-stage lists of this length.")
    cut_histories: bool = option(False, "Draw the further lists after a random number of the history's last items.")
    first_stages: list[str] = option(["transitions"], "First stages to draw from, each as often as the others.")
    shuffle_candidates: bool = option(False, "Show further lists in random order; facts keep first-stage ranks.")
    exclude_seen: bool = option(
        True, "Leave items of the history out of lists of a first stage; false where users take items again."
    )
    seed: int = option(0, "Of the draws of further lists.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lists_per_row", self.lists_per_row, least=1)
        for name in self.first_stages:
            check_choice("first_stages", name, tuple(FIRST_STAGES))
        if not self.first_stages:
            raise ValueError(f"first_stages is empty; name some of {', '.join(FIRST_STAGES)}")
        settings = {name: getattr(self, name) for name in ("pool_size", "cut_histories", "shuffle_candidates")}
        given = [name for name, value in settings.items() if value]
        given += ["first_stages"] if self.first_stages != ["transitions"] else []
        if given and self.lists_per_row == 1:
            raise ValueError(f"{given[0]} changes the further lists of a training row, of which there are none; raise "
                             "lists_per_row")  # fmt: skip
        if not given and self.lists_per_row > 1:
            raise ValueError(f"lists_per_row is {self.lists_per_row} but all lists of a row would be the same; set "
                             "pool_size, cut_histories, first_stages or shuffle_candidates")  # fmt: skip


@dataclass(frozen=True)
class DrawnLists:
    """One further list of each training row whose target is among the M items.

    Attributes:
        rows: (R,) place of the row in the training rows.
        histories: R arrays of items, oldest first.
        columns: (R, N) candidates, first_stage_ranks (from 1) and first_stage_scores, (R, N, F) features, as shown.
    """

    rows: np.ndarray
    histories: Histories
    columns: dict[str, np.ndarray]

    def lists(self, rows: TargetRows) -> RowLists:
        """Of the training rows `rows`."""
        chosen = rows.take(self.rows)
        made = RowLists.of_first_stage(
            chosen, list(self.columns["candidates"]), list(self.columns["first_stage_scores"])
        )
        return replace(made, ranks=list(self.columns["first_stage_ranks"]), features=list(self.columns["features"]))


def by_transitions(
    counts: Counts, histories: Sequence[np.ndarray], n: int, own: UserContributions, exclude_seen: bool
) -> Ranked:
    """As the source `transitions`."""
    return counts.top_rows(histories, n, own, exclude_seen)


def by_ease(
    counts: Counts, histories: Sequence[np.ndarray], n: int, own: UserContributions, exclude_seen: bool
) -> Ranked:
    """By the linear model of the whole history (`baselines.regression`)."""

    def score(rows: np.ndarray) -> np.ndarray:
        everything = np.broadcast_to(np.arange(counts.num_items), (len(rows), counts.num_items))
        return counts.regression.scores([histories[row] for row in rows.tolist()], everything, own.items_of(rows))[0]

    return _best(counts, histories, n, score, exclude_seen)


def by_popularity(
    counts: Counts, histories: Sequence[np.ndarray], n: int, own: UserContributions, exclude_seen: bool
) -> Ranked:
    """By the number of interactions of other users."""

    def score(rows: np.ndarray) -> np.ndarray:
        return counts.popularity - own.items_of(rows).toarray()

    return _best(counts, histories, n, score, exclude_seen)


FIRST_STAGES: dict[str, FirstStage] = {"transitions": by_transitions, "ease": by_ease, "popularity": by_popularity}


def _best(
    counts: Counts,
    histories: Sequence[np.ndarray],
    n: int,
    score: Callable[[np.ndarray], np.ndarray],
    exclude_seen: bool,
) -> Ranked:
    """The n best items, without those of the history by `exclude_seen`; ties by popularity, then by item."""
    order = np.lexsort((np.arange(counts.num_items), -counts.popularity))
    found = []
    for start in range(0, len(histories), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(histories)))
        scores = np.array(score(rows), dtype=float)
        for line, row in enumerate(rows.tolist() if exclude_seen else ()):
            scores[line, histories[row]] = -np.inf
        items = order[np.argsort(-scores[:, order], axis=1, kind="stable")[:, :n]]
        found.append((items, np.take_along_axis(scores, items, axis=1)))
    items, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return items, scores


def further_lists(
    args: AugmentationArguments, size: int, rows: TargetRows, counts: Counts, own: UserContributions, number: int
) -> DrawnLists:
    """List `number`, from 1, of each training row.

    Args:
        args: Which lists to draw.
        size: N.
        rows: The training rows.
        counts: With which the first stages rank.
        own: What each row's user put into them.
        number: Of the list; it and the seed decide every draw.
    """
    rng = np.random.default_rng([args.seed, number])
    histories = rows.histories
    if args.cut_histories:  # to a random number of the last items, at least one
        histories = histories.last([rng.integers(1, length + 1) for length in histories.lengths.tolist()])
    stages = rng.integers(len(args.first_stages), size=len(rows))
    pool = np.zeros((len(rows), args.pool_size or size), dtype=np.int64)
    scores = np.zeros(pool.shape)
    for stage, name in enumerate(args.first_stages):
        chosen = np.flatnonzero(stages == stage)
        of_stage = [histories[row] for row in chosen.tolist()]
        pool[chosen], scores[chosen] = FIRST_STAGES[name](
            counts, of_stage, pool.shape[1], own.of_rows(chosen), args.exclude_seen
        )
    is_target = pool == rows.targets[:, None]
    hits = np.flatnonzero(is_target.any(axis=1))
    # the target and the N - 1 others of the smallest random keys, in first-stage order; last what a cut left out
    keys = np.where(is_target[hits], -2.0, rng.random((len(hits), pool.shape[1])))
    if args.exclude_seen:
        keys += [np.isin(pool[row], rows.histories[row]) for row in hits]
    places = np.sort(np.argsort(keys, axis=1)[:, :size], axis=1)
    candidates, chosen_scores = (np.take_along_axis(of_pool[hits], places, axis=1) for of_pool in (pool, scores))
    kept = histories.take(hits)
    features = feature_rows(counts, kept, candidates, chosen_scores, own.of_rows(hits))
    shown = np.tile(np.arange(size), (len(hits), 1))
    if args.shuffle_candidates:
        shown = rng.permuted(shown, axis=1)
    columns = {"candidates": candidates, "first_stage_ranks": np.arange(1, size + 1) + 0 * shown}
    columns["first_stage_scores"] = chosen_scores
    columns = {name: np.take_along_axis(values, shown, axis=1) for name, values in columns.items()}
    features = np.take_along_axis(features, shown[:, :, None], axis=1)
    return DrawnLists(hits, kept, {**columns, "features": features})


def shuffled_lists(args: AugmentationArguments, lists: RowLists, number: int) -> RowLists:
    """List `number`, from 1, of each training request: its candidates in random order, their facts unchanged."""
    rng = np.random.default_rng([args.seed, number])
    return lists.shown_as([rng.permutation(len(items)).tolist() for items in lists.candidates])
