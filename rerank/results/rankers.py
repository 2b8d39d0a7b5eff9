"""The rankers of an evaluation: a new one is a line of RANKERS, and its function if it is a baseline.

The evaluate stage ranks with them in this order, its option `models` takes the names of those that have a model, and
`rerank compare` and the report show them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pyarrow.parquet as pq

from rerank.baselines import fit_lambdamart
from rerank.baselines.counts import RECENCY
from rerank.baselines.features import TRANSITIONS
from rerank.baselines.pairs import UNIT
from rerank.metrics import best_first, gains_of
from rerank.rows import RankingRow, read_feature_names
from rerank.rows.stored import HitLists

TASKS = ("rerank", "next_item", "held_out_sets")  # of the evaluate stage
SPLITS = ("test", "valid")
LAMBDAMART_SEED = 0  # one fit for every run, so that variants share the baseline
CLICK_RATE = "click_rate"  # a feature of candidates of requests alone
_RERANK, _CATALOGUE = TASKS[:1], TASKS[1:]

Orders = list[list[int]]  # positions into each row's candidates, best first


@dataclass(frozen=True)
class FittedOrders:
    """The orders of a baseline whose scores are means of several fits.

    Attributes:
        orders: By the means.
        of_fits: By each fit alone.
    """

    orders: Orders
    of_fits: list[Orders]


# From the folder of the candidates stage and rows to their orders.
Baseline = Callable[[Path, Sequence[RankingRow]], Orders | FittedOrders | None]


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
        is_fitted: Of a baseline: whether it has learned to rank lists of candidates.
        needs_feature: Of a baseline: without this feature of the candidates it has no line.
        repeats: The ranker that it repeats with something changed; empty for a ranker of its own.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    kind: Literal["baseline", "likelihood", "generates", "head"] = "baseline"
    orders: Baseline | None = None
    stage: str = ""
    folder: str = "model"
    is_optional: bool = False
    is_fitted: bool = False
    needs_feature: str = ""
    repeats: str = ""

    @property
    def reads_lists(self) -> bool:
        """Whether it reads a list of candidates: other orders of the list, or other texts, may change its ranking."""
        return self.kind == "generates" or self.is_fitted

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


def position(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
    """By the mean gain of the candidates at each place of the training lists, ties by place.

    Lists without a relevant item count too; of a training row with several lists only the first counts. A place that
    no training list has comes after those that one has.
    """
    path = candidates_dir / "train.parquet"
    names = [name for name in pq.read_schema(path).names if name in ("relevance", "list_number")]
    lists = pq.read_table(path, columns=names).to_pylist()
    gains = [gains_of(row["relevance"] or []) for row in lists if not row.get("list_number")]
    gains = [of_row for of_row in gains if len(of_row)]
    length = max([*(len(of_row) for of_row in gains), *(len(row.candidates) for row in rows)])
    by_place = np.full((len(gains), length), np.nan)
    for line, of_row in zip(by_place, gains, strict=True):
        line[: len(of_row)] = of_row
    shown = (~np.isnan(by_place)).sum(axis=0)
    means = np.where(shown > 0, np.nansum(by_place, axis=0) / np.maximum(shown, 1), -1.0)
    return [best_first(means[: len(row.candidates)]) for row in rows]


def _by_feature(name: str) -> Baseline:
    """By a feature, highest first, ties in the order of the first stage."""

    def orders(candidates_dir: Path, rows: Sequence[RankingRow]) -> Orders:
        column = read_feature_names(candidates_dir)[0].index(name)
        return _best_first(rows, [features[:, column] for features in _features(rows)])

    return orders


def lambdamart(candidates_dir: Path, rows: Sequence[RankingRow]) -> FittedOrders:
    """The order of LambdaMART fitted on all training lists that hold a relevant item, and on nothing else."""
    train, names = HitLists.read(candidates_dir / "train.parquet"), read_feature_names(candidates_dir)
    lists, users = (train.features, train.relevance), cast("list[int]", train.users)
    fitted = fit_lambdamart(lists, users, seed=LAMBDAMART_SEED, names=names[0])
    by_fits = [_best_first(rows, scores) for scores in fitted.scores_of_fits(_features(rows))]
    return FittedOrders(_best_first(rows, fitted.scores(_features(rows))), by_fits)


def _best_first(rows: Sequence[RankingRow], scores: Sequence[np.ndarray]) -> Orders:
    """Ties by first-stage rank, in whatever order the candidates are shown."""
    return [np.lexsort((np.array(row.ranks), -of_row)).tolist() for row, of_row in zip(rows, scores, strict=True)]


def _features(rows: Sequence[RankingRow]) -> list[np.ndarray]:
    """(N, F) features of each row."""
    return [np.asarray(row.features) for row in rows]


RANKERS: tuple[Ranker, ...] = (
    Ranker("no_op", "input order, as the first stage gave it", _RERANK, orders=no_op),
    Ranker("random", "expected value over all orders", _RERANK, orders=expectation),
    Ranker("oracle", "relevant items first: what no ranker can exceed", _RERANK, orders=oracle),
    Ranker(
        "position", "mean gain of each place of the training lists", _RERANK, orders=position, needs_feature=CLICK_RATE
    ),
    Ranker(
        "popularity", "counts of the training sequences", TASKS, orders=_by_feature("popularity"),
        needs_feature=CLICK_RATE,
    ),
    Ranker(
        "click_rate", "smoothed share of an item's training impressions with feedback, ties in the order shown",
        _RERANK, orders=_by_feature(CLICK_RATE), needs_feature=CLICK_RATE,
    ),
    Ranker("transitions", "counts of who follows whom in the training sequences", TASKS, orders=transitions),
    Ranker("lambdamart", "boosted trees over the same evidence", _RERANK, orders=lambdamart, is_fitted=True),
    Ranker(
        "midtrained", "likelihood of each candidate under the mid-trained model", TASKS[:2], "likelihood",
        stage="midtrain",
    ),
    Ranker("sft", "fine-tuned by the sft stage", TASKS, "generates", stage="sft"),
    Ranker("sft_head", "scores of its item head", _CATALOGUE, "head", stage="sft"),
    Ranker("sft_both", "its item head and the tokens of its best items", _CATALOGUE[:1], "head", stage="sft"),
    Ranker(
        "sft_no_trace", "fine-tuned on the same rows and steps without a trace", _RERANK, "generates", stage="sft",
        folder="model_no_trace", is_optional=True,
    ),
    Ranker("dapo", "fine-tuned, then reinforced", _RERANK, "generates", stage="dapo"),
)  # fmt: skip
CONTROL, CONSTRAINED, ONE_TOKEN, BYPASSED = "_shuffled_texts", "_constrained", "_one_token", "_bypassed"
COMPARISONS = (  # what results.json compares
    *(("dapo", "sft"), ("sft", "sft_no_trace"), ("dapo", "lambdamart")),
    *((name, name + CONTROL) for name in ("dapo", "sft", "lambdamart")),
    *((name + CONSTRAINED, name) for name in ("dapo", "sft")),
    *((name + ONE_TOKEN, name) for name in ("dapo", "sft", "sft_no_trace")),
    *((name + BYPASSED, name) for name in ("dapo", "sft")),
)


def of_task(task: str) -> list[Ranker]:
    """The rankers of a task of the evaluate stage, in the order of tables; those that repeat one come last."""
    found = [ranker for ranker in RANKERS if task in ranker.tasks]
    if task != "rerank":
        return found
    writers = [ranker for ranker in found if ranker.kind == "generates"]
    asked_again = [way(ranker) for way in (constrained, one_token, bypassed) for ranker in writers]
    return [*found, *asked_again, *(control(ranker) for ranker in found if ranker.reads_lists)]


def control(ranker: Ranker) -> Ranker:
    """The line of a ranker that is asked with the items' texts shuffled among the items."""
    described = f"{ranker.name} with the items' texts shuffled among the items: a control"
    name = ranker.name + CONTROL
    return replace(ranker, name=name, description=described, tasks=_RERANK, orders=None, repeats=ranker.name)


def constrained(ranker: Ranker) -> Ranker:
    """The line of a model that is made to write a ranking: after its trace only labels that it has not written."""
    described = f"{ranker.name}, each of whose answers is made a ranking"
    return replace(ranker, name=ranker.name + CONSTRAINED, description=described, tasks=_RERANK, repeats=ranker.name)


def one_token(ranker: Ranker) -> Ranker:
    """The line of a model that ranks by the probabilities of the first label behind an empty trace."""
    described = f"{ranker.name}, by the probabilities of its first label, in one forward pass"
    return replace(ranker, name=ranker.name + ONE_TOKEN, description=described, tasks=_RERANK, repeats=ranker.name)


def bypassed(ranker: Ranker) -> Ranker:
    """The line of a model whose reasoning is cut off: its prompts end in the tags of an empty trace."""
    described = f"{ranker.name}, its reasoning cut off: prompts end in an empty trace"
    return replace(ranker, name=ranker.name + BYPASSED, description=described, tasks=_RERANK, repeats=ranker.name)


def models_of_task(task: str) -> list[Ranker]:
    """Those of `of_task` that the option `models` names."""
    return [ranker for ranker in of_task(task) if ranker.kind in ("likelihood", "generates") and not ranker.repeats]


_STAGES = [ranker.stage for ranker in RANKERS]
_WRITERS = [ranker for ranker in RANKERS if ranker.kind == "generates"]
# Names, those of the last stage first.
GENERATING = tuple(ranker.name for ranker in sorted(_WRITERS, key=lambda ranker: -_STAGES.index(ranker.stage)))
