"""Lists of candidates, ranked by each ranker: as given, in other orders, and with other texts."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.launch import run_dir
from rerank.models.ranker import Batch, RankingModel, generate_batches
from rerank.next_item.model import NextItemModel, likelihood_orders
from rerank.results.orders import Order, ShuffledRows
from rerank.results.rankers import FittedOrders, Ranker, bypassed, constrained, control, one_token
from rerank.results.rankings import Ranking
from rerank.results.shuffled_texts import ShuffledTexts
from rerank.rows import RankingRow

if TYPE_CHECKING:
    from rerank.evaluate import EvaluateArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """The rows that every ranker ranks, and those that rankers which read lists rank besides.

    Attributes:
        rows: As given.
        shuffled: In other orders; without any order where none is asked for.
        texts: With other items' texts; None where the control is not asked for.
        constrained: Whether models that write rankings rank the rows once more, each answer made a ranking.
        one_token: Whether they rank them once more by the probabilities of the first label.
        bypassed: Whether those that write traces rank them once more with their reasoning cut off.
    """

    rows: Sequence[RankingRow]
    shuffled: ShuffledRows
    texts: ShuffledTexts | None
    constrained: bool = False
    one_token: bool = False
    bypassed: bool = False

    @classmethod
    def of(cls, args: "EvaluateArguments", rows: Sequence[RankingRow]) -> "Questions":
        """By the options `orders`, `shuffle_texts`, `constrained`, `one_token` and `bypassed`."""
        candidates_dir = run_dir.stage_dir(args.run_dir, "candidates")
        texts = ShuffledTexts.of(candidates_dir, rows) if args.shuffle_texts else None
        ways = args.constrained, args.one_token, args.bypassed
        return cls(rows, ShuffledRows.of(rows, args.orders), texts, *ways)


@dataclass(frozen=True)
class Ranked:
    """The rankings of one ranker.

    Attributes:
        ranking: Of the rows as given.
        again: Of the rows in other orders, as `ShuffledRows.as_given`; empty for a ranker that reads no list.
        repeated: Of the rows with other texts, with constrained answers, by one token and without reasoning, where
            asked for.
    """

    ranking: Ranking
    again: Sequence[Sequence[Order]] = ()
    repeated: Sequence[Ranking] = ()


def rank(ranker: Ranker, args: "EvaluateArguments", asked: Questions) -> Ranked:
    """The rows ranked by one ranker."""
    if ranker.orders is not None:
        return _rank_by_features(ranker, run_dir.stage_dir(args.run_dir, "candidates"), asked)
    if ranker.kind == "likelihood":
        began, model = time.perf_counter(), NextItemModel.load_midtrained(Path(args.run_dir), "float32")
        orders = likelihood_orders(model, asked.rows, args.batch_size)
        return Ranked(Ranking(ranker.name, orders, seconds=time.perf_counter() - began))
    return _generate(ranker, RankingModel.load(ranker.model_dir(args.run_dir)), asked)


def _rank_by_features(ranker: Ranker, candidates_dir: Path, asked: Questions) -> Ranked:
    assert ranker.orders is not None
    if not ranker.is_fitted:
        return Ranked(Ranking.of_baseline(ranker.name, ranker.orders(candidates_dir, asked.rows)))
    parts = [asked.rows, asked.shuffled.all_shown, asked.texts.rows if asked.texts else []]
    found = ranker.orders(candidates_dir, [row for part in parts for row in part])  # one fit for all
    assert isinstance(found, FittedOrders)
    ends = len(parts[0]), len(parts[0]) + len(parts[1])
    return Ranked(
        Ranking(ranker.name, found.orders[: ends[0]], of_fits=[orders[: ends[0]] for orders in found.of_fits]),
        asked.shuffled.as_given(found.orders[ends[0] : ends[1]]),
        [Ranking(control(ranker).name, found.orders[ends[1] :])] if asked.texts else [],
    )


def _generate(ranker: Ranker, model: RankingModel, asked: Questions) -> Ranked:
    batches, names = [Batch(asked.rows), Batch(asked.shuffled.all_shown)], []
    if asked.constrained and not model.one_token:  # which ranks by one token as it is
        batches.append(Batch(asked.rows, constrained=True))
        names.append(constrained(ranker).name)
    if asked.one_token and not model.one_token:
        batches.append(Batch(asked.rows, one_token=True))
        names.append(one_token(ranker).name)
    if asked.bypassed and model.has_trace:
        batches.append(Batch(asked.rows, bypass_reasoning=True))
        names.append(bypassed(ranker).name)
    if asked.texts:
        batches.append(Batch(asked.texts.rows, asked.texts.catalogue(model.prompter.catalogue)))
        names.append(control(ranker).name)
    (answers, seconds), (again, seconds_again), *others = generate_batches(model, batches)
    for what, spent, number in (("as given", seconds, answers), ("in other orders", seconds_again, again)):
        logger.info("%s: %.0f s for %d completions of rows %s", ranker.name, spent, len(number), what)
    return Ranked(
        Ranking.of_answers(ranker.name, answers, seconds),
        asked.shuffled.as_given([answer.order for answer in again]),
        [Ranking.of_answers(name, *answered) for name, answered in zip(names, others, strict=True)],
    )
