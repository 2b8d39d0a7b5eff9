"""The evaluate stage on the tasks that rank the whole catalogue: next_item and held_out_sets."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rerank.launch import run_dir
from rerank.launch.files import write_json, write_text
from rerank.next_item import held_out_sets, pruning, recall
from rerank.next_item.model import NextItemModel
from rerank.next_item.recall import LIST_LENGTH
from rerank.results import bar
from rerank.results.intervals import Sampling
from rerank.results.tables import Results

if TYPE_CHECKING:
    from rerank.evaluate import EvaluateArguments

logger = logging.getLogger(__name__)


def evaluate(args: "EvaluateArguments", out_dir: Path) -> dict[str, object]:
    """Write the results, bar.json, lists.parquet, pruning.parquet if asked for; returns the split, n, each R@10."""
    run = Path(args.run_dir)
    found = recall.find_lists(run, args.split, args.lists, args.models, args.num_beams, args.max_rows)
    logger.info("%d %s rows", len(found.rows), args.split)
    results = {"task": "next_item", **recall.summarise(found, run, args.num_beams, args.num_bootstrap)}
    text = recall.markdown(results)
    if args.pruning:
        model = NextItemModel.load(run_dir.stage_dir(run, "sft") / "model")
        measured = pruning.measure_pruning(model, found.rows.histories, found.rows.targets, args.num_beams)
        measured.write(out_dir / pruning.FILE, found.rows.row_ids)
        results["pruning"] = measured.summary()
        text += pruning.markdown(results["pruning"], args.num_beams)
    _write_results(results, text, out_dir)
    values: bar.Lines = {
        (name,): recall.metrics_of_lists(items, found.rows.targets) for name, items in found.lists.items()
    }
    bar.write(out_dir / bar.FILE, values, recall.METRICS, Sampling(found.rows.users, args.num_bootstrap), args.split)
    found.write(out_dir / "lists.parquet")
    recalls = {name: row["all"][f"R@{LIST_LENGTH}"] for name, row in results["rows"].items()}
    return {"split": args.split, "n": results["n"]["all"], f"R@{LIST_LENGTH}": recalls}


def evaluate_sets(args: "EvaluateArguments", out_dir: Path) -> dict[str, object]:
    """Write results.json, results.md, bar.json, lists.parquet; returns the split, n and each ranker's metrics."""
    run = Path(args.run_dir)
    held_out = held_out_sets.HeldOut.load(run, args.split, args.max_rows)
    found = held_out_sets.find_sets(run, held_out, args.num_beams)
    results = held_out_sets.summarise(run, held_out, found, args.split, args.num_bootstrap)
    _write_results(results, held_out_sets.markdown(results), out_dir)
    values: bar.Lines = {
        (name,): held_out_sets.metrics_of_sets(lists, held_out.targets) for name, lists in found.items()
    }
    sampling = Sampling(held_out.users, args.num_bootstrap)
    bar.write(out_dir / bar.FILE, values, held_out_sets.METRICS, sampling, args.split)
    columns: dict[str, np.ndarray | list[np.ndarray]] = {"user": held_out.users, "targets": held_out.targets}
    recall.write_lists(out_dir / "lists.parquet", held_out_sets.LISTS, columns, found)
    return {name: results[name] for name in ("split", "n", "rows")}


def _write_results(results: Results, text: str, out_dir: Path) -> None:
    write_json(out_dir / "results.json", results)
    write_text(out_dir / "results.md", text)
