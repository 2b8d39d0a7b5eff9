"""The rankers of an evaluation: a new one is a line of RANKERS, and its function if it is a baseline.

The evaluate stage ranks with them in this order, its option `models` takes the names of those that have a model, and
`rerank compare` and the report show them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rerank.baselines import fit_lambdamart, predict_lambdamart
from rerank.baselines.counts import RECENCY
from rerank.baselines.features import TRANSITIONS
from rerank.baselines.pairs import UNIT
from rerank.metrics import best_first
from rerank.rows import RankingRow, read_feature_names, read_rows

TASKS = ("rerank", "next_item", "held_out_sets")  # of the evaluate stage
SPLITS = ("test", "valid")
LAMBDAMART_SEED = 0  # one fit for every run, so that variants share the baseline
_RERANK, _CATALOGUE = TASKS[:1], TASKS[1:]

Orders = list[list[int]]  # positions into each row's candidates, best first
Baseline = Callable[[Path, Sequence[RankingRow]], Orders | None]  # from the folder of the candidates stage and rows


@dataclass(frozen=True)
class Ranker:
    """A ranker that a table can hold.

    Attributes:
        name: Of its line in tables.
        description: What it ranks by.
        tasks: Tasks of the evaluate stage in which it takes part.
        kind: `baseline`; `likelihood`, a model that scores candidates; `generates`, a model that writes its ranking;
            `head`, a further way to ask the model of the line above.
        orders: Ranks lists of candidates; None for a model.
        stage: That trains its model.
        folder: Of its model, in that of the stage.
        is_optional: Whether the stage may leave it out.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    kind: Literal["baseline", "likelihood", "generates", "head"] = "baseline"
    orders: Baseline | None = None
    stage: str = ""
    folder: str = "model"
    is_optional: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether it has no trained model."""
        return self.kind == "baseline"

    def model_dir(self, run: str | Path) -> Path:
        """The folder of its model in a run."""
        return Path(run) / self.stage / self.folder


def no_op(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
    """The order shown."""
    return [list(range(len(row.candidates))) for row in rows]


def expectation(candidates_dir: Path, rows: Sequence[RankingRow]) -> None:
    """No order: its metrics are expected values over all orders."""


def oracle(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
    """The best order there is."""
    return [best_first(row.relevance) for row in rows]


def transitions(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
    """The order of the counting baseline, whatever made the list: its score, then popularity, then item.

    The features hold its parts, T from each of the last five items, in whole sixtieths. Summed as integers they tie
    exactly where the first stage's own scores tie.
    """
    names, _ = read_feature_names(candidates_dir)
    columns, popularity = [names.index(name) for name in TRANSITIONS], names.index("popularity")
    orders = []
    for row in rows:
        features = np.asarray(row.features, dtype=np.float64)  # (N, F)
        scores = np.rint(features[:, columns] * UNIT).astype(np.int64) @ np.array(RECENCY)
        orders.append(np.lexsort((np.array(row.candidates), -features[:, popularity], -scores)).tolist())
    return orders


def lambdamart(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
    """The order of LambdaMART fitted on all training lists that hold a relevant item, stopped on validation lists."""
    files = (candidates_dir / f"{split}.parquet" for split in ("train", "valid"))
    read = [read_rows(file, needs_features=True) for file in files]
    train, valid = ((_features(part), [row.relevance for row in part]) for part in read)
    booster = fit_lambdamart(train, valid, seed=LAMBDAMART_SEED)
    return [best_first(scores) for scores in predict_lambdamart(booster, _features(rows))]


def _features(rows: Sequence[RankingRow]) -> list[np.ndarray]:
    """(N, F) features of each row."""
    return [np.asarray(row.features) for row in rows]


RANKERS: tuple[Ranker, ...] = (
    Ranker("no_op", "input order, as the first stage gave it", _RERANK, orders=no_op),
    Ranker("random", "expected value over all orders", _RERANK, orders=expectation),
    Ranker("oracle", "relevant items first: what no ranker can exceed", _RERANK, orders=oracle),
    Ranker("popularity", "counts of the training sequences", _CATALOGUE),
    Ranker("transitions", "counts of who follows whom in the training sequences", TASKS, orders=transitions),
    Ranker("lambdamart", "boosted trees over the same evidence", _RERANK, orders=lambdamart),
    Ranker(
        "midtrained", "likelihood of each candidate under the mid-trained model", TASKS[:2], "likelihood",
        stage="midtrain",
    ),
    Ranker("sft", "fine-tuned on accepted traces", TASKS, "generates", stage="sft"),
    Ranker("sft_head", "scores of its item head", _CATALOGUE, "head", stage="sft"),
    Ranker("sft_both", "its item head and the tokens of its best items", _CATALOGUE[:1], "head", stage="sft"),
    Ranker(
        "sft_no_trace", "fine-tuned on the same rows and steps without a trace", _RERANK, "generates", stage="sft",
        folder="model_no_trace", is_optional=True,
    ),
    Ranker("dapo", "fine-tuned, then reinforced", _RERANK, "generates", stage="dapo"),
)  # fmt: skip
COMPARISONS = (("dapo", "sft"), ("sft", "sft_no_trace"), ("dapo", "lambdamart"))  # what results.json compares


def of_task(task: str) -> list[Ranker]:
    """The rankers of a task of the evaluate stage, in the order of tables."""
    return [ranker for ranker in RANKERS if task in ranker.tasks]


def models_of_task(task: str) -> list[Ranker]:
    """Those of `of_task` that the option `models` names."""
    return [ranker for ranker in of_task(task) if ranker.kind in ("likelihood", "generates")]


_STAGES = [ranker.stage for ranker in RANKERS]
_WRITERS = [ranker for ranker in RANKERS if ranker.kind == "generates"]
# Names, those of the last stage first.
GENERATING = tuple(ranker.name for ranker in sorted(_WRITERS, key=lambda ranker: -_STAGES.index(ranker.stage)))
