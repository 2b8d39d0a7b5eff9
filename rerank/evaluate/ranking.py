"""Lists of candidates, ranked by each ranker: as given, in other orders, and with other texts."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from rerank.catalogue import Catalogue
from rerank.launch import run_dir, shards
from rerank.launch.shards import ALL_ROWS, Shard
from rerank.models.one_token import check_labels
from rerank.models.ranker import Answer, Batch, RankingModel, generate_batches, grammars_of
from rerank.next_item.model import NextItemModel, likelihood_orders
from rerank.results.orders import Order, ShuffledRows
from rerank.results.rankers import FittedOrders, Ranker, bypassed, constrained, control, of_task, one_token
from rerank.results.rankings import Ranking
from rerank.results.shuffled_texts import ShuffledTexts
from rerank.rows import PromptedRow, RankingRow, read_feature_names
from rerank.rows.checks import longest_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rerank.evaluate import EvaluateArguments

logger = logging.getLogger(__name__)

Answered = tuple[list[Answer], float]  # of a batch, and the seconds that they took
ANSWERS = pa.schema(
    [("batch", pa.int64()), ("seconds", pa.float64()), ("order", pa.list_(pa.int64())), ("failure", pa.string())]
    + [("trace", pa.string()), ("text", pa.string()), ("num_tokens", pa.int64()), ("truncated", pa.bool_())]
)


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
        if args.tensor_parallel_size > 1:  # before the baselines rank
            from rerank.models.engine import check_gpus

            check_gpus(args.tensor_parallel_size)
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


def rankers_of(args: "EvaluateArguments") -> Iterator[Ranker]:
    """The baselines and the models that are asked for; a control that was not trained is left out.

    So is a baseline whose feature the candidates do not have.
    """
    features = read_feature_names(run_dir.stage_dir(args.run_dir, "candidates"))[0]
    for ranker in of_task("rerank"):
        if ranker.repeats or (ranker.needs_feature and ranker.needs_feature not in features):
            continue
        if ranker.is_optional and ranker.name in args.models and not ranker.model_dir(args.run_dir).is_dir():
            logger.info("no %s row: %s was not trained", ranker.name, ranker.model_dir(args.run_dir))
        elif ranker.is_baseline or ranker.name in args.models:
            yield ranker


def can_rank(ranker: Ranker, args: "EvaluateArguments", catalogue: Catalogue) -> bool:
    """Whether there is what a ranker rests on: the mid-trained model scores items by their semantic ids."""
    if ranker.kind != "likelihood" or (catalogue.has_ids and ranker.model_dir(args.run_dir).is_dir()):
        return True
    logger.info("no %s row: this run has no model that knows semantic ids", ranker.name)
    return False


def check_lists(args: "EvaluateArguments", model: RankingModel, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a model that cannot rank lists by one token, or write the longest as a ranking, where that is asked for.

    Raises:
        ValueError: Naming the row or the label.
    """
    path, prompter = run_dir.stage_dir(args.run_dir, "candidates") / f"{args.split}.parquet", model.prompter
    if args.one_token or model.one_token:
        check_labels(tokenizer, prompter, path)
    if args.constrained and not model.one_token:
        row, top_k = longest_list(path), prompter.settings.top_k
        asked = PromptedRow(row, "", prompter.labels(row), model.max_completion_tokens, top_k, prompter.begun)
        grammars_of(model, [asked], tokenizer)


def rank(ranker: Ranker, args: "EvaluateArguments", asked: Questions) -> Ranked:
    """The rows ranked by one ranker."""
    if ranker.orders is not None:
        return _rank_by_features(ranker, run_dir.stage_dir(args.run_dir, "candidates"), asked)
    made = shards.merged(args.run_dir, "evaluate", ranker.name)
    if ranker.kind == "likelihood":
        ((answers, seconds),) = ask(ranker, args, asked) if made is None else from_table(made, 1)
        return Ranked(Ranking(ranker.name, [answer.order for answer in answers], seconds=seconds))
    further = further_batches(ranker, RankingModel.load(ranker.model_dir(args.run_dir)), asked)
    answered = ask(ranker, args, asked) if made is None else from_table(made, 2 + len(further))
    return _of_answers(ranker, asked, answered, list(further))


def ask(ranker: Ranker, args: "EvaluateArguments", asked: Questions, shard: Shard = ALL_ROWS) -> list[Answered]:
    """The answers of a model to a shard of the rows as given, in other orders, and of each further batch."""
    if ranker.kind == "likelihood":  # which reads no list
        began, model = time.perf_counter(), NextItemModel.load_midtrained(Path(args.run_dir), "float32")
        orders = likelihood_orders(model, shard.of(asked.rows), args.batch_size)
        seconds = time.perf_counter() - began
        return [([Answer(order, None, None, "", 0, False) for order in orders], seconds)]
    ranking_model = RankingModel.load(ranker.model_dir(args.run_dir))
    further = further_batches(ranker, ranking_model, asked).values()
    batches = [Batch(asked.rows), Batch(asked.shuffled.all_shown), *further]
    shares = [replace(batch, rows=shard.of(batch.rows)) for batch in batches]
    return generate_batches(ranking_model, shares, args.tensor_parallel_size)


def answers_table(ranker: Ranker, args: "EvaluateArguments", asked: Questions, shard: Shard) -> pa.Table:
    """The answers of `ask`, a line each; the seconds of a batch are shared out over them."""
    lines = [
        {"batch": number, "seconds": seconds / len(answers), **vars(answer)}
        for number, (answers, seconds) in enumerate(ask(ranker, args, asked, shard))
        for answer in answers
    ]
    return pa.Table.from_pylist(lines, schema=ANSWERS)


def from_table(table: pa.Table, num_batches: int) -> list[Answered]:
    """The answers of `answers_table`, of several shards one after the other.

    Args:
        table: Those of the shards.
        num_batches: That were asked for, empty ones too.
    """
    answers: list[list[Answer]] = [[] for _ in range(num_batches)]
    seconds = [0.0] * num_batches
    for line in table.to_pylist():
        number = line.pop("batch")
        seconds[number] += line.pop("seconds")
        answers[number].append(Answer(**line))
    return list(zip(answers, seconds, strict=True))


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


def further_batches(ranker: Ranker, model: RankingModel, asked: Questions) -> dict[str, Batch]:
    """Rankings that are asked for besides those of the rows as given and in other orders: name -> batch."""
    found = {}
    if asked.constrained and not model.one_token:  # which ranks by one token as it is
        found[constrained(ranker).name] = Batch(asked.rows, constrained=True)
    if asked.one_token and not model.one_token:
        found[one_token(ranker).name] = Batch(asked.rows, one_token=True)
    if asked.bypassed and model.has_trace:
        found[bypassed(ranker).name] = Batch(asked.rows, bypass_reasoning=True)
    if asked.texts:
        catalogue = asked.texts.catalogue(model.prompter.catalogue)
        found[control(ranker).name] = Batch(asked.texts.rows, catalogue)
    return found


def _of_answers(ranker: Ranker, asked: Questions, answered: Sequence[Answered], names: Sequence[str]) -> Ranked:
    (answers, seconds), (again, seconds_again), *others = answered
    for what, spent, number in (("as given", seconds, answers), ("in other orders", seconds_again, again)):
        logger.info("%s: %.0f s for %d completions of rows %s", ranker.name, spent, len(number), what)
    return Ranked(
        Ranking.of_answers(ranker.name, answers, seconds),
        asked.shuffled.as_given([answer.order for answer in again]),
        [Ranking.of_answers(name, *of_batch) for name, of_batch in zip(names, others, strict=True)],
    )
