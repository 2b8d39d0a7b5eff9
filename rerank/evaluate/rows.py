"""The rows of an evaluation, and the orders of the rankers that are no language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank.baselines import fit_lambdamart, predict_lambdamart
from rerank.baselines.counts import RECENCY
from rerank.baselines.pairs import UNIT

SPLITS = ("test", "valid")
_STEPS = ("from_last", "from_second", "from_third", "from_fourth", "from_fifth")


@dataclass(frozen=True)
class EvaluationRows:
    """The rows that are ranked, and how many there are in all."""

    rows: list[dict[str, Any]]  # lists that hold a relevant item
    hit_share: float  # of all rows of the split: what turns a hit-only mean into an end-to-end one
    num_all: int

    @property
    def relevance(self) -> list[list[float]]:
        return [row["relevance"] for row in self.rows]

    @property
    def users(self) -> list[int]:
        return [row["user"] for row in self.rows]


def read_rows(candidates_dir: Path, split: str, max_rows: int = 0, seed: int = 0) -> EvaluationRows:
    """The split's rows whose list holds a relevant item, in order; `max_rows` of them drawn at random, 0 for all."""
    path = candidates_dir / f"{split}.parquet"
    hit = pq.read_table(path, columns=["hit"])["hit"].to_numpy()
    if not hit.any():
        raise ValueError(f"{path}: none of its {len(hit)} lists holds a relevant item; make longer lists.")
    chosen = np.flatnonzero(hit)
    if 0 < max_rows < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, max_rows, replace=False))
    return EvaluationRows(pq.read_table(path).take(chosen).to_pylist(), float(hit.mean()), len(hit))


def best_first(scores: Sequence[float]) -> list[int]:
    """Positions by falling score; what ties keeps its place."""
    return np.argsort(-np.asarray(scores), kind="stable").tolist()


def oracle_order(row: Mapping[str, Any]) -> list[int]:
    """The best order there is."""
    return best_first(row["relevance"])


def transitions_order(row: Mapping[str, Any], feature_names: Sequence[str]) -> list[int]:
    """The order of the counting baseline, whoever made the list: its score, then popularity, then item.

    The features hold its parts, T from each of the last five items, in whole sixtieths. Summed as integers they tie
    exactly where the first stage's own scores tie.
    """
    features = np.asarray(row["features"], dtype=np.float64)
    columns = [feature_names.index(name) for name in _STEPS]
    scores = np.rint(features[:, columns] * UNIT).astype(np.int64) @ np.array(RECENCY)
    popularity = features[:, feature_names.index("popularity")]
    return np.lexsort((row["candidates"], -popularity, -scores)).tolist()


def lambdamart_orders(candidates_dir: Path, rows: Sequence[Mapping[str, Any]], seed: int) -> list[list[int]]:
    """The order of LambdaMART fitted on all training lists that hold a relevant item, stopped on validation lists."""
    train, valid = (_features(candidates_dir / f"{split}.parquet") for split in ("train", "valid"))
    booster = fit_lambdamart(*train, *valid, seed=seed)
    scores = predict_lambdamart(booster, [np.asarray(row["features"], dtype=np.float32) for row in rows])
    return [best_first(row_scores) for row_scores in scores]


def _features(path: Path) -> tuple[list[np.ndarray], list[list[float]]]:
    """Features and relevance of a file's hit rows."""
    columns = pq.read_table(path, columns=["features", "relevance"], filters=[("hit", "==", True)]).to_pydict()
    return [np.asarray(values, dtype=np.float32) for values in columns["features"]], columns["relevance"]
