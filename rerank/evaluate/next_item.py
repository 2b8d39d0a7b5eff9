"""The evaluate stage on its task next_item: the whole catalogue is ranked after each history."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rerank import run_dir
from rerank.evaluate.full_catalogue import LIST_LENGTH, Evaluated, find_lists, markdown, summarise
from rerank.evaluate.pruning import FILE as PRUNING_FILE
from rerank.evaluate.pruning import measure_pruning
from rerank.evaluate.tables import NO_VALUE, number, percent
from rerank.next_items import NextItemModel

logger = logging.getLogger(__name__)

LISTS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("user", pa.int64()),
        ("target", pa.int64()),
        ("one_hop", pa.bool_()),
        ("ranker", pa.string()),
        ("items", pa.list_(pa.int64())),  # best first
    ]
)


def evaluate(args: Any, out_dir: Path) -> dict[str, Any]:
    """Write results.json, results.md, lists.parquet, pruning.parquet if asked for; returns the split, n, each R@10.

    Args:
        args: EvaluateArguments.
        out_dir: Folder of the stage.
    """
    run = Path(args.run_dir)
    found = find_lists([run], args.split, {}, args.num_beams, args.max_rows, args.models)
    logger.info("%d %s rows", len(found.targets), args.split)
    results = {"task": "next_item", **summarise(found, [run], args.num_beams, args.num_bootstrap, args.seed)}
    text = markdown(results)
    if args.pruning:
        model = NextItemModel.load(run_dir.stage_dir(run, "sft") / "model")
        measured = measure_pruning(model, found.histories, found.targets, args.num_beams)
        measured.write(out_dir / PRUNING_FILE, found.row_ids)
        results["pruning"] = measured.summary()
        text += pruning_table(results["pruning"], args.num_beams)
    run_dir.write_json(out_dir / "results.json", results)
    (out_dir / "results.md").write_text(text, encoding="utf-8")
    write_lists(found, out_dir / "lists.parquet")
    recall = {name: row["all"][f"R@{LIST_LENGTH}"] for name, row in results["rows"].items()}
    return {"split": args.split, "n": results["n"]["all"], f"R@{LIST_LENGTH}": recall}


def pruning_table(pruning: Mapping[str, Any], num_beams: int) -> str:
    """What is pruned, as Markdown."""
    rate = NO_VALUE if pruning["pruning_rate"] is None else percent(pruning["pruning_rate"])
    steps = " | ".join(number(value) for value in pruning["violations_by_step"])
    return "\n".join(
        [
            "",
            f"Pruning, {pruning['n']} rows, {num_beams} beams: of the {pruning['in_top']} targets among the "
            f"{num_beams} most probable items, beam search misses {rate}. A token of the target is outside of the "
            f"{num_beams} most probable legal ones in {percent(pruning['violation_rate'])} of the rows; "
            f"by step: {steps}.",
            "",
        ]
    )


def write_lists(found: Evaluated, path: Path) -> None:
    """One line a row and ranker, so that anybody can compute the numbers again."""
    lines = [
        {
            "row_id": int(found.row_ids[row]),
            "user": int(found.users[row]),
            "target": int(found.targets[row]),
            "one_hop": bool(found.groups["one_hop"][row]),
            "ranker": ranker,
            "items": [item for item in items if item >= 0],
        }
        for ranker, (lists,) in found.lists.items()
        for row, items in enumerate(lists.tolist())
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=LISTS), path)
