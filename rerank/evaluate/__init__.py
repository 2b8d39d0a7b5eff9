r"""Stage 8: rank held-out rows with every ranker and say what each is worth.

In: the folders of all stages before it. Out: `results.json`, `results.md`, `rankings.parquet` (every order and every
completion, so that anybody can compute the numbers again) and `report.html`, one page that opens from disk. With the
tasks next_item and held_out_sets the whole catalogue is ranked: `results.json`, `results.md`, `lists.parquet`, and
with next_item `pruning.parquet` where that is asked for.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.evaluate \
        --config recipes/ml100k/8_evaluate.yaml
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rerank import recipe, run_dir
from rerank.catalogue import Catalogue
from rerank.evaluate import held_out_sets, next_item, results, tables
from rerank.evaluate.generation import RankingModel, generate_answers
from rerank.evaluate.likelihood import likelihood_orders
from rerank.evaluate.results import LANGUAGE_MODELS, Ranking, Sampling
from rerank.evaluate.rows import (
    SPLITS,
    EvaluationRows,
    lambdamart_orders,
    oracle_order,
    read_rows,
    transitions_order,
)
from rerank.item_rows import SETTINGS

logger = logging.getLogger(__name__)

TASKS = ("rerank", "next_item", "held_out_sets")
ASKED_MODELS = {"next_item": ("midtrained", "sft"), "held_out_sets": ("sft",)}  # of `models`; the other task asks all
INPUTS = ("data", "semantic_ids", "midtrain", "sft")
MODEL_FOLDERS = {"sft": "sft/model", "sft_no_trace": "sft/model_no_trace", "dapo": "dapo/model"}
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

    task: str = field(
        default="rerank",
        metadata={
            "help": "rerank: lists of candidates; next_item: the whole catalogue, by sft/model; held_out_sets: "
            "likewise, all that is held out of a user at once, from training items alone (CLLM4Rec)."
        },
    )
    split: str = field(default="test", metadata={"help": "Rows to rank: test, or valid to choose between variants."})
    max_rows: int = field(default=0, metadata={"help": "Rank this many rows, drawn at random; 0 for all."})
    models: list[str] = field(
        default_factory=lambda: list(LANGUAGE_MODELS),
        metadata={"help": f"Language models to evaluate, of {', '.join(LANGUAGE_MODELS)}."},
    )
    batch_size: int = field(default=64, metadata={"help": "Rows in one forward pass of the mid-trained model."})
    num_beams: int = field(default=10, metadata={"help": "next_item: beams a row."})
    pruning: bool = field(
        default=False,
        metadata={"help": "next_item: say how many targets among the most probable items beam search prunes."},
    )
    num_bootstrap: int = field(default=2000, metadata={"help": "Bootstrap samples of an interval."})
    seed: int = field(default=0, metadata={"help": "Of the row choice, LambdaMART and the intervals."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r} but must be one of {', '.join(SPLITS)}")
        for name in self.models:
            if name not in LANGUAGE_MODELS:
                raise ValueError(f"models holds {name!r} but knows only {', '.join(LANGUAGE_MODELS)}")
        asked = ASKED_MODELS.get(self.task, LANGUAGE_MODELS)
        if self.models and not set(asked) & set(self.models):
            raise ValueError(
                f"models holds {', '.join(self.models)}, but task {self.task} asks {' and '.join(asked)} only"
            )
        for name, least in (
            ("max_rows", 0),
            ("batch_size", 1),
            ("num_bootstrap", 1),
            ("num_beams", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least {least}")


ARGUMENTS = (EvaluateArguments,)


def extra_inputs(args: EvaluateArguments) -> tuple[str, ...]:
    """Stages that are read only for a task."""
    return ("candidates", "dapo") if args.task == "rerank" else ()


def check(args: EvaluateArguments) -> None:
    """Refuse finished models that lack a file or speak other semantic ids than the catalogue beside them."""
    if args.task != "rerank":
        if run_dir.is_finished(args.run_dir, "sft"):
            refuse_ranker(run_dir.stage_dir(args.run_dir, "sft") / "model")
        return
    for name, folder in model_folders(args).items():
        if run_dir.is_finished(args.run_dir, MODEL_FOLDERS[name].split("/")[0]):
            RankingModel.load(folder).tokenizer()


def refuse_ranker(folder: Path) -> None:
    """Refuse a model that was trained to rank lists where one of next items is wanted.

    Raises:
        FileNotFoundError: Naming the file that such a model has.
    """
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}; train it with task next_item, or evaluate task rerank")


def model_folders(args: EvaluateArguments) -> dict[str, Path]:
    """The folders of the models that write their ranking; a control that was not trained is left out."""
    folders = {name: Path(args.run_dir) / MODEL_FOLDERS[name] for name in args.models if name in MODEL_FOLDERS}
    if "sft_no_trace" in folders and not folders["sft_no_trace"].is_dir():
        logger.info("no sft_no_trace row: %s was not trained", folders["sft_no_trace"])
        del folders["sft_no_trace"]
    return folders


def baseline_rankings(candidates_dir: Path, evaluated: EvaluationRows, seed: int) -> list[Ranking]:
    """The rankers that are no language model."""
    names = json.loads((candidates_dir / "features.json").read_text())["names"]
    rows = evaluated.rows
    return [
        Ranking("no_op", [list(range(len(row["candidates"]))) for row in rows]),
        Ranking("random", None),
        Ranking("oracle", [oracle_order(row) for row in rows]),
        Ranking("transitions", [transitions_order(row, names) for row in rows]),
        Ranking("lambdamart", lambdamart_orders(candidates_dir, rows, seed)),
    ]


def midtrained_ranking(args: EvaluateArguments, rows: Sequence[dict[str, Any]]) -> Ranking:
    """The mid-trained model's, from as much history as a training document holds before its last item."""
    midtrain_dir = run_dir.stage_dir(args.run_dir, "midtrain")
    max_history = yaml.safe_load((midtrain_dir / "recipe.yaml").read_text())["max_items"] - 1
    began = time.perf_counter()
    catalogue = Catalogue.load(args.run_dir)
    orders = likelihood_orders(midtrain_dir / "model", rows, catalogue, max_history, args.batch_size)
    return Ranking("midtrained", orders, seconds=time.perf_counter() - began)


def write_rankings(rankings: Sequence[Ranking], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a row and ranker, the random one left out, since it is an expectation."""
    records = []
    for ranking in rankings:
        answers = ranking.answers or [None] * len(rows)
        for row, order, answer in zip(rows, ranking.orders or [], answers, strict=ranking.orders is not None):
            record = {"row_id": row["row_id"], "user": row["user"], "ranker": ranking.name, "order": order}
            if answer is not None:
                record |= {"failure": answer.failure, "completion": answer.text, "trace": answer.trace}
                record["num_tokens"] = answer.num_tokens
            records.append(record)
    pq.write_table(pa.Table.from_pylist(records, schema=RANKINGS), path)


def main(args: EvaluateArguments, out_dir: Path) -> dict:
    """Rank, measure, write the tables and the report; returns the split, n and N@5 of each ranker."""
    if args.task == "next_item":
        return next_item.evaluate(args, out_dir)
    if args.task == "held_out_sets":
        return held_out_sets.evaluate(args, out_dir)
    from rerank import report  # here, because the report reads this stage's tables

    candidates_dir = run_dir.stage_dir(args.run_dir, "candidates")
    evaluated = read_rows(candidates_dir, args.split, args.max_rows, args.seed)
    logger.info("%d %s rows", len(evaluated.rows), args.split)
    rankings = baseline_rankings(candidates_dir, evaluated, args.seed)
    if "midtrained" in args.models:
        rankings.append(midtrained_ranking(args, evaluated.rows))
    for name, folder in model_folders(args).items():
        answers, seconds = generate_answers(RankingModel.load(folder), evaluated.rows, args.seed)
        rankings.append(Ranking.of_answers(name, answers, seconds))
        logger.info("%s: %.0f s for %d completions", name, seconds, len(answers))

    sampling = Sampling(evaluated.users, args.num_bootstrap, args.seed)
    found = results.make_results(
        rankings, evaluated.relevance, args.split, evaluated.hit_share, evaluated.num_all, sampling
    )
    if run_dir.is_finished(args.run_dir, "dapo"):
        dapo = run_dir.read_metrics(args.run_dir, "dapo")
        found["dapo"] = {name: dapo[name] for name in DAPO_METRICS if name in dapo}
    run_dir.write_json(out_dir / "results.json", found)
    (out_dir / "results.md").write_text(tables.markdown(found), encoding="utf-8")
    write_rankings(rankings, evaluated.rows, out_dir / "rankings.parquet")
    report.write_report(args.run_dir, out_dir, out_dir / "report.html")
    return {"split": args.split, "n": found["n"], "N@5": {name: row["N@5"] for name, row in found["rows"].items()}}
