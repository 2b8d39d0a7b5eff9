"""LambdaMART: boosted trees over the features of `rerank.baselines.features`, the bar for every re-ranker.

The number of trees comes from a cross-validation, by whole users, of the rows that it is fitted on, so that no row
that is scored has a say in it; then all these rows are fitted. Scores are means of several fits: from ten to a hundred
trees validation NDCG hardly changes, so that the last digit of a feature moves the number of trees, and with it every
score.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import lightgbm

PATIENCE = 50  # trees without a better value on the rows left out before it stops
STOPPING_FOLDS = 4  # of the cross-validation
NUM_FITS = 5
MIN_ROWS_PER_LEAF = 200
LEARNING_RATE, FAST = 0.03, 0.1  # the latter for scores out of fold
LEAST_USERS = 2  # one is left out while the others are fitted
PART = 8192  # rows that are scored together
MOST_GRADE = 30  # LightGBM has gains 2^g - 1 for no higher one

# (N, F) features and (N,) relevance of each row, NaN for a candidate that nobody has judged
Lists = tuple[Sequence[np.ndarray], Sequence[Sequence[float] | np.ndarray]]


@dataclass(frozen=True)
class LambdaMart:
    """Fits with different seeds of one number of trees each.

    Attributes:
        boosters: The fits.
        num_trees: Of each fit.
    """

    boosters: tuple[lightgbm.Booster, ...]
    num_trees: int

    def scores(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A score of each candidate, (N,) a row, the mean of all fits; higher is better."""
        return [
            of_row for of_part in self._of_parts(features) for of_row in of_part.split(of_part.of_fits.mean(axis=0))
        ]

    def scores_of_fits(self, features: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """As `scores`, by each fit alone."""
        parts = list(self._of_parts(features))
        return [
            [of_row for of_part in parts for of_row in of_part.split(of_part.of_fits[fit])]
            for fit in range(len(self.boosters))
        ]

    def _of_parts(self, features: Sequence[np.ndarray]) -> Iterator[_PartScores]:
        """The scores of PART rows at a time."""
        for start in range(0, len(features), PART):
            rows = [features[row] for row in range(start, min(start + PART, len(features)))]
            lines, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows])
            yield _PartScores(np.stack([np.asarray(booster.predict(lines)) for booster in self.boosters]), ends)


@dataclass(frozen=True)
class _PartScores:
    """Scores of the candidates of some rows, (fits, candidates), and where each row's end."""

    of_fits: np.ndarray
    ends: np.ndarray

    def split(self, scores: np.ndarray) -> list[np.ndarray]:
        return np.split(scores, self.ends[:-1])


@dataclass(frozen=True)
class Chosen(Sequence[np.ndarray]):
    """Some entries of a sequence, read when they are asked for."""

    values: Sequence[np.ndarray]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.values[self.places[index]]


def fit_lambdamart(
    train: Lists,
    users: Sequence[int],
    seed: int = 0,
    min_rows_per_leaf: int = MIN_ROWS_PER_LEAF,
    max_rounds: int = 1000,
    num_fits: int = NUM_FITS,
    stopping_folds: int = STOPPING_FOLDS,
    learning_rate: float = LEARNING_RATE,
    names: Sequence[str] = (),
) -> LambdaMart:
    """LightGBM rankers with the number of trees that is best for users left out (NDCG@5).

    The same rows in the same order give the same trees, with any number of threads.

    Args:
        train: Relevance in whole numbers, of gain 2^g - 1. Candidates that nobody has judged are left out, then rows
            without a relevant one, which teach nothing.
        users: The user of each row.
        seed: Of the cut into users, and the first of the fits' feature and row samples.
        min_rows_per_leaf: Candidates in a leaf at least; lower it for toy data.
        max_rounds: Trees at most.
        num_fits: Fits of which the scores are means.
        stopping_folds: Of the STOPPING_FOLDS parts of the users, those that have a say in the number of trees.
        learning_rate: Of each tree; a larger one needs fewer.
        names: Of the F features, where the trees are to know them.
    """
    import lightgbm

    grades = [np.asarray(of_row, dtype=float) for of_row in train[1]]
    judged = [np.flatnonzero(~np.isnan(of_row)) for of_row in grades]
    kept = [row for row, places in enumerate(judged) if max(grades[row][places], default=0) > 0]
    if not kept:
        raise ValueError(f"none of the {len(train[1])} training rows has a relevant candidate; use longer lists.")
    labels = [grades[row][judged[row]] for row in kept]
    dataset = _dataset(train[0], kept, [judged[row] for row in kept], labels, names)
    folds = user_folds([users[row] for row in kept], STOPPING_FOLDS, seed)
    owner = np.repeat(folds, [len(of_row) for of_row in labels])  # fold of each candidate
    parts = [(np.flatnonzero(owner != fold), np.flatnonzero(owner == fold)) for fold in range(folds.max() + 1)]
    if len(parts) < LEAST_USERS:
        raise ValueError(f"all {len(kept)} training rows are of one user, so that none can be left out; add data.")
    parameters = _parameters(seed, min_rows_per_leaf, learning_rate)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    found = lightgbm.cv(parameters, dataset, max_rounds, folds=parts[:stopping_folds], callbacks=[stop])
    num_trees = len(cast("list[float]", found["valid ndcg@5-mean"]))  # it ends at the best
    fits = (lightgbm.train(parameters | {"seed": seed + fit}, dataset, num_trees) for fit in range(num_fits))
    return LambdaMart(tuple(fits), num_trees)


def _parameters(seed: int, min_rows_per_leaf: int, learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    return {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [5],
        "learning_rate": learning_rate,
        "num_leaves": 15,
        "min_data_in_leaf": min_rows_per_leaf,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,  # else LightGBM times both layouts and picks one, which changes the sums
        "num_threads": int(os.environ.get("OMP_NUM_THREADS", "2")),
        "verbosity": -1,
    }


def _dataset(
    features: Sequence[np.ndarray],
    rows: Sequence[int],
    judged: Sequence[np.ndarray],
    grades: Sequence[np.ndarray],
    names: Sequence[str],
) -> lightgbm.Dataset:
    """The judged candidates of some rows, with their grades."""
    import lightgbm

    from rerank.baselines.tree_rows import Candidates

    labels = np.concatenate(grades)
    if (labels != np.rint(labels)).any():
        odd = labels[labels != np.rint(labels)][0]
        raise ValueError(f"relevance {odd} in the training rows is not a whole number, as LambdaMART needs; round it.")
    if labels.max() > MOST_GRADE:
        raise ValueError(f"relevance {labels.max():g} in the training rows is above {MOST_GRADE}; use lower grades.")
    return lightgbm.Dataset(
        Candidates(features, rows, judged),
        label=labels,
        group=[len(of_row) for of_row in grades],
        feature_name=list(names) or "auto",
    )


def rows_per_leaf(num_rows: int) -> int:
    """`min_rows_per_leaf` for training rows of this number: less than the default for toy data."""
    return min(MIN_ROWS_PER_LEAF, max(1, num_rows // 10))


def user_folds(users: Sequence[int], num_folds: int, seed: int) -> np.ndarray:
    """(R,) the fold of each row, from 0: all rows of a user in one, users in random folds of equal size.

    There are fewer folds than `num_folds` where there are fewer users.
    """
    names, number = np.unique(np.asarray(users), return_inverse=True)
    folds: np.ndarray = (np.random.default_rng(seed).permutation(len(names)) % num_folds)[number]
    return folds


def out_of_fold_scores(
    train: Lists,
    users: Sequence[int],
    num_folds: int = 5,
    seed: int = 0,
    names: Sequence[str] = (),
    **options: Any,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of each training row by a LambdaMART fitted, and its number of trees chosen, on other users' rows; and
    the fold of each row, (R,). Scores of two folds have neither scale nor zero in common.

    Args:
        train: The rows to score, those without a relevant candidate too.
        users: The row's user. All rows of a user are in one fold; each fold has a user with a relevant candidate.
        num_folds: Parts into which the users are cut.
        seed: Of the cuts and of the fits.
        names: Of the F features, where the trees are to know them.
        **options: Handed to `fit_lambdamart`.
    """
    features, relevance = train
    teach = [user for user, of_row in zip(users, relevance, strict=True) if np.nanmax(of_row, initial=0) > 0]
    if (num_users := len(set(teach))) < num_folds:
        problem = f"{num_users} users have training rows with a relevant candidate, fewer than num_folds {num_folds}"
        raise ValueError(f"{problem}; use fewer folds.")
    fold_of = dict(zip(teach, user_folds(teach, num_folds, seed).tolist(), strict=True))
    folds = np.array([fold_of.get(user, 0) for user in users])  # who teaches nothing is left out anyway
    scores: list[np.ndarray] = [np.empty(0)] * len(users)
    for fold in range(num_folds):
        others, held = np.flatnonzero(folds != fold).tolist(), np.flatnonzero(folds == fold).tolist()
        rest = Chosen(features, others), [relevance[row] for row in others]
        # there are num_folds of them, and no figure rests on one
        few = {"num_fits": 1, "stopping_folds": 1, "learning_rate": FAST} | options
        fitted = fit_lambdamart(rest, [users[row] for row in others], seed=seed, names=names, **few)
        for row, row_scores in zip(held, fitted.scores(Chosen(features, held)), strict=True):
            scores[row] = row_scores
    return scores, folds
