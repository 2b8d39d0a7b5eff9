"""Recall and NDCG of counting alone (`transitions`) on Beauty: the next item of every test row in the whole catalogue.

    BEAUTY_DATA=/data/beauty python -m tests.benchmarks.transitions

Makes the data stage of recipes/beauty_next and its counts. Ends with one JSON line, in which nothing may move that is
no choice: R@5, R@10 and N@10 are .0586, .0808 and .0500.
"""

import json
import sys
import tempfile
from pathlib import Path

from rerank.baselines import ItemFacts
from rerank.baselines.interactions import engine
from rerank.candidates.counting import Events
from rerank.next_item.recall import LIST_LENGTH, metrics_of_lists, transition_lists
from rerank.rows import TargetRows
from tests.benchmarks.scale_cut import data_stage

RECIPE = Path("recipes/beauty_next/1_data.yaml")


def measure(run: Path) -> dict[str, float]:
    """Of a run whose data stage is made; the counts are those of the engine."""
    rows = TargetRows.load(run)
    test = rows.of_split("test")
    with engine() as counting:
        events = Events.load(counting, run, rows)
        counts = events.counts(ItemFacts.of(events.interactions.num_items))
    found = metrics_of_lists(transition_lists(counts, test.histories, LIST_LENGTH), test.targets)
    return {"rows": len(test), **{name: round(float(values.mean()), 4) for name, values in found.items()}}


def main() -> None:
    """Print the JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(json.dumps(measure(data_stage(Path(folder), RECIPE))) + "\n")


if __name__ == "__main__":
    main()
