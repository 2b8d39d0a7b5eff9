"""LambdaMART: boosted trees over the features of `rerank.baselines.features`, the bar for every re-ranker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rerank.baselines.features import FEATURES

if TYPE_CHECKING:
    import lightgbm

PATIENCE = 50  # trees without a better validation value before it stops

Lists = tuple[Sequence[np.ndarray], Sequence[Sequence[float]]]  # (N, F) features and (N,) relevance of each row


def fit_lambdamart(
    train: Lists, valid: Lists, seed: int = 0, min_rows_per_leaf: int = 200, max_rounds: int = 1000
) -> lightgbm.Booster:
    """A LightGBM ranker stopped at its best validation NDCG@5; the same seed gives the same trees.

    Args:
        train: Relevance in whole numbers. Rows without a relevant item teach nothing and are left out.
        valid: The rows that decide when to stop.
        seed: Of the feature and row samples.
        min_rows_per_leaf: Candidates in a leaf at least; lower it for toy data.
        max_rounds: Trees at most.
    """
    import lightgbm

    dataset = _dataset("training", train)
    valid_dataset = _dataset("validation", valid, reference=dataset)
    parameters = {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [5],
        "learning_rate": 0.03,
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
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    return lightgbm.train(parameters, dataset, max_rounds, valid_sets=[valid_dataset], callbacks=[stop])


def _dataset(name: str, lists: Lists, reference: lightgbm.Dataset | None = None) -> lightgbm.Dataset:
    import lightgbm

    features, relevance = lists
    kept = [row for row, values in enumerate(relevance) if max(values) > 0]
    if not kept:
        raise ValueError(f"none of the {len(relevance)} {name} rows has a relevant candidate; use longer lists.")
    labels = np.concatenate([np.asarray(relevance[row], dtype=float) for row in kept])
    if (labels != np.rint(labels)).any():
        odd = labels[labels != np.rint(labels)][0]
        raise ValueError(f"relevance {odd} in the {name} rows is not a whole number, as LambdaMART needs; round it.")
    return lightgbm.Dataset(
        np.concatenate([features[row] for row in kept]),
        label=labels,
        group=[len(relevance[row]) for row in kept],
        feature_name=list(FEATURES),
        reference=reference,
    )


def predict_lambdamart(booster: lightgbm.Booster, features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A score of each candidate, (N,) a row; higher is better."""
    if not len(features):
        return []
    scores = np.asarray(booster.predict(np.concatenate(list(features))))
    return np.split(scores, np.cumsum([len(row) for row in features])[:-1])


def out_of_fold_scores(
    train: Lists, users: Sequence[int], valid: Lists, num_folds: int = 5, seed: int = 0, **options: int
) -> list[np.ndarray]:
    """Scores of each training row by a LambdaMART fitted on other users' rows.

    Args:
        train: The rows to score.
        users: The row's user. All rows of a user are in one fold; there is at least one user for each fold.
        valid: The rows that decide when each fold's fit stops.
        num_folds: Parts into which the users are cut.
        seed: Of the cut and of the fits.
        **options: Handed to `fit_lambdamart`.
    """
    features, relevance = train
    names, number = np.unique(np.asarray(users), return_inverse=True)
    if len(names) < num_folds:
        raise ValueError(f"{len(names)} users have training rows, fewer than num_folds {num_folds}; use fewer folds.")
    folds = (np.random.default_rng(seed).permutation(len(names)) % num_folds)[number]
    scores: list[np.ndarray] = [np.empty(0)] * len(users)
    for fold in range(num_folds):
        others, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        rest = [features[row] for row in others], [relevance[row] for row in others]
        booster = fit_lambdamart(rest, valid, seed=seed, **options)
        for row, row_scores in zip(held, predict_lambdamart(booster, [features[row] for row in held]), strict=True):
            scores[row] = row_scores
    return scores
