"""Recall and NDCG of counting alone (`transitions`) on Beauty: the next item of every test row in the whole catalogue.

    BEAUTY_DATA=/data/beauty python -m tests.benchmarks.transitions

Makes the data stage of recipes/beauty_next and its counts. Ends with one JSON line, in which nothing may move that is
no choice: recall@5, recall@10 and ndcg@10 are .0586, .0808 and .0500.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from rerank import data
from rerank.baselines import ItemFacts
from rerank.baselines.interactions import engine
from rerank.candidates.counting import Events
from rerank.launch import recipe, run_dir
from rerank.launch.files import write_json
from rerank.rows import TargetRows

RECIPE = "recipes/beauty_next/1_data.yaml"
LENGTH = 10


def measure(run: Path) -> dict[str, float]:
    """Of a run whose data stage is made."""
    rows = TargetRows.load(run)
    test = rows.of_split("test")
    with engine() as counting:
        events = Events.load(counting, run, rows)
        counts = events.counts(ItemFacts.of(events.interactions.num_items))
    items, _ = counts.top_rows(test.histories, LENGTH)
    is_target = items == test.targets[:, None]
    found = {f"recall@{cut}": float(is_target[:, :cut].any(axis=1).mean()) for cut in (5, LENGTH)}
    gains = is_target / np.log2(np.arange(2, LENGTH + 2))
    return {"rows": len(test), **found, f"ndcg@{LENGTH}": float(gains.sum(axis=1).mean())}


def main() -> None:
    """Print the JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        made = run_dir.stage_dir(folder, "data")
        made.mkdir()
        data.main(data.DataArguments(**recipe.load(RECIPE)), made)
        write_json(made / "stage.json", {"id": "data", "given": {}, "inputs": {}})
        found = measure(Path(folder))
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main()
