r"""Stage 8: rank held-out rows with every ranker and measure each.

In: the folders of all stages before it. Out: `results.json`, `results.md`, `bar.json` (every difference of two rankers
with its interval), `rankings.parquet` (every order and completion, so that anybody can compute the numbers again) and
`orders.parquet` (rankings of rows in other orders). With the tasks next_item and held_out_sets the whole catalogue is
ranked: `results.json`, `results.md`, `bar.json`, `lists.parquet`, and with next_item `pruning.parquet` if asked for.
`rerank report RUN_DIR` writes the results and the run into one page; `rerank run` does so after this stage.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.evaluate \
        --config recipes/ml100k/8_evaluate.yaml
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.catalogue import Catalogue
from rerank.evaluate import next_item
from rerank.evaluate.ranking import Questions, Ranked, answers_table, can_rank, check_lists, rank, rankers_of
from rerank.launch import recipe, run_dir, shards
from rerank.launch.files import write_json, write_text, write_whole
from rerank.launch.shards import Shard
from rerank.launch.stages import Stage
from rerank.launch.values import check_choice, check_range, option
from rerank.metrics import METRICS, compared
from rerank.models.ranker import Answer, RankingModel
from rerank.next_item.encoder import SETTINGS
from rerank.results import bar, orders, overview
from rerank.results.intervals import Sampling
from rerank.results.orders import MAX_ROWS, ShuffledRows
from rerank.results.rankers import SPLITS, TASKS, models_of_task, of_task
from rerank.results.rankings import EvaluatedRows, Ranking, difficulty, make_results, shared_ids, values_of
from rerank.results.shuffled_texts import shows_texts
from rerank.results.slices import LEAST_ROWS, MOST_VALUES, SplitLists, check_columns
from rerank.rows import RankingRow

logger = logging.getLogger(__name__)

MODELS = [ranker.name for ranker in models_of_task("rerank")]
DAPO_METRICS = (
    *("rollout_engine", "max_logp_gap", "reward_first_fifth", "reward_last_fifth", "reward_gain_interval"),
    *("reward_gain_at_equal_ranks", "reward_gain_at_equal_ranks_interval"),
)
RANKINGS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("user", pa.int64()),
        ("ranker", pa.string()),
        ("order", pa.list_(pa.int64())),  # positions into the row's candidates, best first; null: no ranking
        ("failure", pa.string()),
        ("completion", pa.string()),
        ("trace", pa.string()),
        ("num_tokens", pa.int64()),
    ]
)


@dataclass
class EvaluateArguments(recipe.StageArguments):
    """Options of the evaluate stage."""

    task: str = option(
        "rerank",
        "rerank: lists of candidates; next_item: the whole catalogue, by sft/model; held_out_sets: "
        "likewise, all that is held out of a user at once, from training items alone (CLLM4Rec).",
    )
    split: str = option("test", "Rows to rank: test, or valid to choose between variants.")
    max_rows: int = option(0, "Rank this many rows, drawn at random; 0 for all.")
    models: list[str] = option(
        lambda: [ranker.name for ranker in models_of_task("rerank")], f"Models to evaluate, of {', '.join(MODELS)}."
    )
    batch_size: int = option(64, "Rows in one forward pass of the mid-trained model.")
    lists: dict[str, str] = option(
        {},
        "next_item: other rankers to show, each NAME: FILE, a Parquet file of row_id and candidates: ten "
        "original item ids, best first, for each row of the split.",
    )
    num_beams: int = option(10, "next_item: beams of a row.")
    pruning: bool = option(
        False, "next_item: measure how many targets among the most probable items beam search prunes."
    )
    metrics: list[str] = option(
        list(METRICS),
        "Task rerank: metrics, each R@k, N@k, MRR or AUC. The first N@k and the first R@k get intervals; slices and "
        "order robustness show the first N@k.",
    )
    slices: list[str] = option(
        list,
        "Task rerank: request_fields of the data stage, or columns of items (of a row's best candidate), by whose "
        f"values rows are sliced: each of {LEAST_ROWS} rows at least, {MOST_VALUES} of a column at most, the others.",
    )
    num_bootstrap: int = option(2000, "Bootstrap samples of an interval.")
    orders: int = option(
        4,
        f"Task rerank: random orders in which the candidates of {MAX_ROWS} rows at most are shown besides, for order "
        "robustness; 0: none.",
    )
    shuffle_texts: bool = option(
        False, "Task rerank: a control row of each ranker that reads lists, with item texts shuffled among the items."
    )
    constrained: bool = option(
        False, "Task rerank: a further row of each model that writes rankings, whose every answer is made one."
    )
    one_token: bool = option(False, "Task rerank: a further row of each, by the first label's probabilities alone.")
    bypassed: bool = option(
        False, "Task rerank: a further row of each that writes traces, its reasoning cut off by an empty trace."
    )
    tensor_parallel_size: int = option(1, "Task rerank: GPUs that share each model that writes rankings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task", self.task, TASKS)
        check_choice("split", self.split, SPLITS)
        known, asked = ([ranker.name for ranker in models_of_task(task)] for task in ("rerank", self.task))
        for name in self.models:
            check_choice("a name in models", name, known)
        if self.models and not set(asked) & set(self.models):
            raise ValueError(
                f"models holds {', '.join(self.models)}, but task {self.task} asks {' and '.join(asked)} only"
            )
        names = [ranker.name for ranker in of_task("next_item")]
        if self.lists and (self.task != "next_item" or set(self.lists) & set(names)):
            raise ValueError(
                f"lists names {', '.join(self.lists)}; it goes with task next_item, and with other names than "
                f"{', '.join(names)}"
            )
        for name in ("shuffle_texts", "constrained", "one_token", "bypassed"):
            if getattr(self, name) and self.task != "rerank":
                raise ValueError(f"{name} goes with task rerank, but task is {self.task}; leave it out")
        compared(self.metrics)  # refuses what is no metric
        for name, default in (("metrics", list(METRICS)), ("slices", []), ("tensor_parallel_size", 1)):
            if self.task != "rerank" and getattr(self, name) != default:
                raise ValueError(f"{name} goes with task rerank, but task is {self.task}; leave it out")
        for name in ("max_rows", "orders"):
            check_range(name, getattr(self, name), least=0)
        for name in ("batch_size", "num_bootstrap", "num_beams", "tensor_parallel_size"):
            check_range(name, getattr(self, name), least=1)


def optional_inputs(args: EvaluateArguments) -> tuple[str, ...]:
    """Stages that are read only for a task; next items of the mid-trained model alone need no sft stage."""
    if args.task == "rerank":
        return ("sft", "candidates", "dapo")
    needs_sft = args.task == "held_out_sets" or "sft" in args.models or args.pruning
    return ("semantic_ids", "midtrain", *(("sft",) if needs_sft else ()))


def check(args: EvaluateArguments) -> None:
    """Refuse finished models that lack a file or know other semantic ids than the catalogue beside them."""
    for name, path in args.lists.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"lists: {name} is {path}, which is not there; give a Parquet file")
    if args.task != "rerank":
        if "sft" in optional_inputs(args) and run_dir.is_finished(args.run_dir, "sft"):
            refuse_ranker(run_dir.stage_dir(args.run_dir, "sft") / "model")
        return
    if run_dir.is_finished(args.run_dir, "candidates"):
        check_columns(args.run_dir, args.split, args.slices)
    for ranker in rankers_of(args):
        if ranker.kind == "generates" and run_dir.is_finished(args.run_dir, ranker.stage):
            model = RankingModel.load(ranker.model_dir(args.run_dir))
            tokenizer = model.load_tokenizer()
            if run_dir.is_finished(args.run_dir, "candidates"):
                check_lists(args, model, tokenizer)
            if args.shuffle_texts and not shows_texts(model.prompter.settings):
                raise ValueError(
                    f"shuffle_texts is true, but prompts of {model.folder} show no title, category or text fact, "
                    "so that nothing would change; leave it out, or show them by item_fields of the traces stage"
                )


def refuse_ranker(folder: Path) -> None:
    """Refuse a model that was trained to rank lists where one of next items is wanted."""
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{folder} has no {SETTINGS}; train it with task next_item, or evaluate task rerank or [midtrained]"
        )


def kept_steps(args: EvaluateArguments) -> dict[str, dict[str, Any]]:
    """The kept step of each model that validation rows chose while it trained, of how many, by how many looks."""
    sft, dapo = (
        run_dir.read_metrics(args.run_dir, stage) if run_dir.is_finished(args.run_dir, stage) else {}
        for stage in ("sft", "dapo")
    )
    metrics = {"sft_no_trace": sft.get("no_trace", {}), "sft": sft, "dapo": dapo}
    return {name: found["kept"] for name, found in metrics.items() if name in args.models and "kept" in found}


def write_rankings(rankings: Sequence[Ranking], rows: Sequence[RankingRow], path: Path) -> None:
    """A record of each row and ranker, the random one left out, since it is an expectation."""
    records = []
    for ranking in rankings:
        answers: Sequence[Answer | None] = ranking.answers or [None] * len(rows)
        for row, order, answer in zip(rows, ranking.orders or [], answers, strict=ranking.orders is not None):
            record = {"row_id": row.row_id, "user": row.user, "ranker": ranking.name, "order": order}
            if answer is not None:
                record |= {"failure": answer.failure, "completion": answer.text, "trace": answer.trace}
                record["num_tokens"] = answer.num_tokens
            records.append(record)
    table = pa.Table.from_pylist(records, schema=RANKINGS)
    write_whole(path, lambda temporary: pq.write_table(table, temporary))


def write_orders(
    ranked: Sequence[Ranked], shuffled: ShuffledRows, args: EvaluateArguments, path: Path
) -> dict[str, Any] | None:
    """Write the rankings of rows in other orders; returns each ranker's order robustness, None without orders."""
    if not shuffled.shown:
        return None
    checked = [one for one in ranked if one.again]
    records = [line for one in checked for line in shuffled.records(one.ranking.name, one.again)]
    table = pa.Table.from_pylist(records, schema=orders.TABLE)
    write_whole(path, lambda temporary: pq.write_table(table, temporary))
    found = {}
    for one in checked:
        given = [(one.ranking.orders or [])[place] for place in shuffled.places]
        found[one.ranking.name] = orders.summarize(given, one.again, shuffled, args.num_bootstrap, args.metrics)
    return {"num_orders": len(shuffled.shown), "rows": len(shuffled.rows), "rankers": found}


def write_bar(rankings: Sequence[Ranking], evaluated: EvaluatedRows, num_bootstrap: int, path: Path) -> None:
    """Write every difference of two rankers."""
    values: bar.Lines = {(name,): of_ranker for name, of_ranker in values_of(rankings, evaluated).items()}
    sampling = Sampling(evaluated.users, num_bootstrap)
    bar.write(path, values, evaluated.metrics, sampling, evaluated.split)


def read_rows(args: EvaluateArguments) -> EvaluatedRows:
    """The rows that are ranked."""
    candidates_dir = run_dir.stage_dir(args.run_dir, "candidates")
    evaluated = EvaluatedRows.load(candidates_dir, args.split, args.max_rows, args.metrics)
    logger.info("%d %s rows", len(evaluated.rows), args.split)
    return evaluated


def check_shard(args: EvaluateArguments) -> None:
    """Refuse shards of the tasks that rank the whole catalogue."""
    if args.task != "rerank":
        raise ValueError(f"--shard goes with task rerank, but task is {args.task}; leave it out")


def make_shard(args: EvaluateArguments, shard: Shard, folder: Path) -> None:
    """Have every model rank a shard of the rows; a model that has done so is not asked again."""
    asked, catalogue = Questions.of(args, read_rows(args).rows), Catalogue.load(args.run_dir)
    for ranker in rankers_of(args):
        if ranker.orders is None and can_rank(ranker, args, catalogue):
            shards.make(folder, ranker.name, partial(answers_table, ranker, args, asked, shard))


def main(args: EvaluateArguments, out_dir: Path) -> dict[str, Any]:
    """Rank, measure and write the tables; returns the split, n and the first N@k of each ranker."""
    if args.task == "next_item":
        return next_item.evaluate(args, out_dir)
    if args.task == "held_out_sets":
        return next_item.evaluate_sets(args, out_dir)
    lists, catalogue = SplitLists.load(args.run_dir, args.split, args.slices), Catalogue.load(args.run_dir)
    evaluated = read_rows(args)
    asked = Questions.of(args, evaluated.rows)
    ranked = [rank(ranker, args, asked) for ranker in rankers_of(args) if can_rank(ranker, args, catalogue)]
    rankings = [one.ranking for one in ranked] + [ranking for one in ranked for ranking in one.repeated]
    results = make_results(rankings, evaluated, args.num_bootstrap)
    results |= difficulty(rankings, evaluated, lists, args.num_bootstrap)
    if catalogue.has_ids:
        results["shared_ids"] = shared_ids(catalogue, evaluated.rows)
    results["orders"] = write_orders(ranked, asked.shuffled, args, out_dir / "orders.parquet")
    if run_dir.is_finished(args.run_dir, "dapo"):
        dapo = run_dir.read_metrics(args.run_dir, "dapo")
        results["dapo"] = {name: dapo[name] for name in DAPO_METRICS if name in dapo}
    results["kept"] = kept_steps(args)
    write_json(out_dir / "results.json", results)
    write_text(out_dir / "results.md", overview.markdown(results))
    write_bar(rankings, evaluated, args.num_bootstrap, out_dir / bar.FILE)
    write_rankings(rankings, evaluated.rows, out_dir / "rankings.parquet")
    logger.info("`rerank report %s` writes the page of this run", args.run_dir)
    main_metric = evaluated.compared[0]
    values = {name: row[main_metric] for name, row in results["rows"].items()}
    return {"split": args.split, "n": results["n"], main_metric: values}


STAGE = Stage(
    name="evaluate",
    arguments=(EvaluateArguments,),
    main=main,
    check=check,
    main_of_shard=make_shard,
    check_shard=check_shard,
    inputs=("data",),
    optional_inputs=optional_inputs,
    inputs_if_made=("semantic_ids", "midtrain"),
    files=("lists",),
)
