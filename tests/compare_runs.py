"""Finished runs for `rerank compare`, made by hand, and the cells of its tables."""

from pathlib import Path

import pyarrow as pa
from toy_run import finish

from rerank import compare
from rerank.evaluate import RANKINGS
from rerank.launch import pipeline, run_dir
from rerank.launch.files import write_json

NUM_ROWS = 4
# The relevant item stands second in every list: NDCG@5 is 1/log2(3) = 0.6309 in the given order, 1 in the right one.
RELEVANCE = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
GIVEN, RIGHT = [0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]
SHA256 = "0" * 64
NUM_ITEMS = 9
# Item 1 has nine training interactions, item 3 has two, item 7 one; what is held out counts for none.
INTERACTIONS = [
    {"user": number, "item": item, "position": 0, "split": split}
    for number, (item, split) in enumerate([(1, "train")] * 8 + [(1, "rerank"), (3, "train"), (3, "train"),
                                           (7, "train"), (7, "test"), (3, "valid"), (1, "test")])
]  # fmt: skip


def list_records(first_row_id: int) -> list[dict]:
    """Four rows whose list holds their target, item 1 or 3, second, and three of a target that no list holds.

    Histories of 1, 2, ... 7 items.
    """
    lists = {1: [0, 1, 2, 4, 5, 6], 3: [0, 3, 2, 4, 5, 6], 7: [0, 1, 2, 3, 4, 5]}
    return [
        {
            "row_id": first_row_id + number,
            "user": (first_row_id + number) // 2,
            "history": [8] * (number + 1),
            "candidates": lists[target],
            "target": target,
        }
        | {"relevance": [float(item == target) for item in lists[target]]}
        for number, target in enumerate((1, 1, 3, 3, 7, 7, 7))
    ]


def finish_step(step: pipeline.Step, inputs: tuple[str, ...] = (), metrics: dict | None = None, **tables) -> None:
    """Finish the folder of a step."""
    finish(run_dir.stage_dir(step.run_dir, step.stage), metrics, step.keys, inputs, **tables)


def finish_run(recipe_dir: Path, run: Path, first: Path, orders: dict[str, list], first_row_id: int = 0) -> None:
    """A run in which the ranker `sft` (and whichever) wrote the same order, or none, on every row."""
    data, ids, candidates, evaluate = compare.variant_steps(compare.Variant("", str(recipe_dir)), run, 0, None)
    if run == first:
        sources = {"sources": {"toy.csv": SHA256}}
        tables = {"items": pa.table({"item": range(NUM_ITEMS)}), "interactions": pa.Table.from_pylist(INTERACTIONS)}
        finish_step(data, metrics=sources, **tables)
    else:
        compare.share_stage(first, run, "data")
    finish_step(ids, ("data",))
    row_ids = list(range(first_row_id, first_row_id + NUM_ROWS))
    finish_step(candidates, ("data", "semantic_ids"), test=pa.Table.from_pylist(list_records(first_row_id)))
    lines = [
        {"row_id": row_id, "user": row_id // 2, "ranker": name, "order": order}
        for name, order in {"no_op": GIVEN, "oracle": RIGHT, **orders}.items()
        for row_id in row_ids
    ]
    rankings = pa.Table.from_pylist(lines, schema=RANKINGS)
    (run / "evaluate").mkdir()
    write_json(run / "evaluate/results.json", {"split": "test", "n": NUM_ROWS, "n_all": 7, "hit_share": 4 / 7})
    (run / "evaluate/report.html").touch()
    finish_step(evaluate, ("data", "semantic_ids", "candidates"), rankings=rankings)


def cells(text: str, number: int = 0, heading: str = "") -> dict[tuple[str, str], list[str]]:
    """The rows of one of the tables, or of those after a heading, by variant and ranker."""
    text = text[text.index(heading) :]
    table = [block for block in text.split("\n\n") if block.startswith("|")][number]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}
