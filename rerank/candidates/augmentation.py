"""More training lists of the rows there are: drawn anew for every epoch, from the seed alone.

List 0 of a training row is that of the first stage, as in validation and test. Every further one is drawn: a first
stage ranks the items after the history, or after its last items alone; the target and a random choice of the others
of a longer list stay, in the order of that first stage; they are shown in this order, or shuffled. The counts leave
the row's user out as for list 0.

R rows, N candidates of a list, M items of the longer list they are drawn from.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from rerank.baselines import Counts, UserContributions, feature_names, list_features
from rerank.baselines.pairs import Sequences
from rerank.candidates.counting import in_parts
from rerank.candidates.row_lists import RowLists
from rerank.launch import recipe
from rerank.launch.values import check_choice, check_range, option
from rerank.rows import Histories, TargetRows
from rerank.rows.mapped import mapped

Ranked = tuple[np.ndarray, np.ndarray]  # (R, M) items, best first, and their scores
FirstStage = Callable[[Counts, Sequence[np.ndarray], int, UserContributions, bool], Ranked]
CHUNK = 256
MOST_SCORES = 2**23  # of all items, for some rows together


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
        found = counts.regression.scores([histories[row] for row in rows.tolist()], everything, own.items_of(rows))
        return np.nan_to_num(found[0])  # 0 for an item without weights

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
    size = max(1, min(CHUNK, MOST_SCORES // counts.num_items))
    for start in range(0, len(histories), size):
        rows = np.arange(start, min(start + size, len(histories)))
        scores = np.array(score(rows), dtype=float)
        for line, row in enumerate(rows.tolist() if exclude_seen else ()):
            scores[line, histories[row]] = -np.inf
        items = order[np.argsort(-scores[:, order], axis=1, kind="stable")[:, :n]]
        found.append((items, np.take_along_axis(scores, items, axis=1)))
    items, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return items, scores


def further_lists(
    args: AugmentationArguments, size: int, rows: TargetRows, counts: Counts, sequences: Sequences, number: int
) -> Iterator[DrawnLists]:
    """List `number`, from 1, of each training row, in parts.

    Args:
        args: Which lists to draw.
        size: N.
        rows: The training rows.
        counts: With which the first stages rank.
        sequences: Of users, on which they rest: what each row's user put in is left out.
        number: Of the list; it and the seed decide every draw.
    """
    rng = np.random.default_rng([args.seed, number])
    kept = None
    if args.cut_histories:  # to a random number of the last items, at least one
        kept = np.array([rng.integers(1, length + 1) for length in rows.histories.lengths.tolist()], dtype=np.int64)
    stages = rng.integers(len(args.first_stages), size=len(rows))
    pools = _Pools(args, rows, counts, sequences, kept, stages, args.pool_size or size)
    order_rng = _after(rng, pools.num_hits * pools.items.shape[1])
    for places in in_parts(np.arange(len(rows))):
        yield pools.draw(places, size, rng, order_rng)


class _Pools:
    """The longer lists of the training rows in memory-mapped files, from which further lists are drawn.

    Attributes:
        items, scores: (R, M).
        num_hits: Rows whose target is among them.
    """

    def __init__(
        self,
        args: AugmentationArguments,
        rows: TargetRows,
        counts: Counts,
        sequences: Sequences,
        kept: np.ndarray | None,
        stages: np.ndarray,
        length: int,
    ) -> None:
        """Rank the items of every row.

        Args:
            args, rows, counts, sequences: As of `further_lists`.
            kept: (R,) last items of each history after which its items are ranked; None for all.
            stages: (R,) first stage of each row.
            length: M.
        """
        self._args, self._rows, self._counts, self._sequences, self._kept = args, rows, counts, sequences, kept
        self.items, self.scores = (mapped(None, (len(rows), length), kind) for kind in (np.int64, np.float64))
        self.num_hits = 0
        for places in in_parts(np.arange(len(rows))):
            own = counts.own(rows.users[places], sequences)
            for stage, name in enumerate(args.first_stages):
                chosen = np.flatnonzero(stages[places] == stage)
                of_stage = self._histories(places[chosen])
                if len(of_stage):
                    found = FIRST_STAGES[name](counts, of_stage, length, own.of_rows(chosen), args.exclude_seen)
                    self.items[places[chosen]], self.scores[places[chosen]] = found
            self.num_hits += int((self.items[places] == rows.targets[places, None]).any(axis=1).sum())

    def _histories(self, places: np.ndarray) -> Histories:
        histories = self._rows.histories.take(places)
        return histories if self._kept is None else histories.last(self._kept[places])

    def draw(
        self, places: np.ndarray, size: int, rng: np.random.Generator, order_rng: np.random.Generator
    ) -> DrawnLists:
        """The lists of the rows at these places, by draws of what is kept and of the order shown."""
        is_target = self.items[places] == self._rows.targets[places, None]
        hits = places[is_target.any(axis=1)]
        pool, scores = np.asarray(self.items[hits]), np.asarray(self.scores[hits])
        # the target and the N - 1 others of the smallest random keys, in first-stage order; last what a cut left out
        keys = np.where(is_target[is_target.any(axis=1)], -2.0, rng.random(pool.shape))
        if self._args.exclude_seen:
            seen = [
                np.isin(of_row, self._rows.histories[row]) for row, of_row in zip(hits.tolist(), pool, strict=True)
            ]
            keys += np.reshape(seen, keys.shape)
        chosen = np.sort(np.argsort(keys, axis=1)[:, :size], axis=1)
        candidates, chosen_scores = (np.take_along_axis(values, chosen, axis=1) for values in (pool, scores))
        histories = self._histories(hits)
        own = self._counts.own(self._rows.users[hits], self._sequences)
        names = feature_names(self._counts)
        lists = list(candidates), list(chosen_scores)
        of_rows = list_features(names, self._counts, histories, *lists, own, {})
        features = np.reshape(of_rows, (*candidates.shape, len(names)))
        shown = np.tile(np.arange(size), (len(hits), 1))
        if self._args.shuffle_candidates:
            shown = order_rng.permuted(shown, axis=1)
        columns = {"candidates": candidates, "first_stage_ranks": np.arange(1, size + 1) + 0 * shown}
        columns["first_stage_scores"] = chosen_scores
        columns = {name: np.take_along_axis(values, shown, axis=1) for name, values in columns.items()}
        features = np.take_along_axis(features, shown[:, :, None], axis=1)
        return DrawnLists(hits, histories, {**columns, "features": features})


def _after(rng: np.random.Generator, draws: int) -> np.random.Generator:
    """A generator as `rng` will be after this number of draws of `random`."""
    later = copy.deepcopy(rng)
    bits = cast(np.random.PCG64, later.bit_generator)
    half = {name: bits.state[name] for name in ("has_uint32", "uinteger")}  # a draw of which half is left
    bits.advance(draws)
    bits.state = cast(Any, {**bits.state, **half})
    return later


def shuffled_lists(lists: RowLists, rng: np.random.Generator) -> RowLists:
    """Lists of training requests with their candidates in random order, their facts unchanged."""
    return lists.shown_as([rng.permutation(len(items)).tolist() for items in lists.candidates])
