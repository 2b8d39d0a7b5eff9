"""What the cut of counts to the largest entries of each item changes, against counts of all entries.

    python -m tests.benchmarks.scale_cut --interactions 1000000 --items 100000

On the synthetic log of `scale`, or on the data stage of --run: lists of ten of 10,000 test rows by either counts, and
the facts that either tells of the candidates of the uncut lists. `places` is the share of list places that hold
another item, `facts` that of facts with another value, `told` the latter without facts that are 0 for both. `scale`
calls it for sizes at which counts of all entries fit into memory. Ends with one JSON line.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from rerank import data
from rerank.baselines import ItemFacts, feature_rows
from rerank.baselines.interactions import engine
from rerank.baselines.pairs import NEIGHBOURS
from rerank.candidates.counting import Events
from rerank.launch import recipe, run_dir
from rerank.launch.files import write_json
from rerank.rows import TargetRows
from tests.benchmarks.scale_log import write_log

LENGTH, ROWS = 10, 10_000


def data_stage(run: Path, keys: Path) -> Path:
    """A run whose data stage is made by the keys of a recipe file, in this process."""
    made = run_dir.stage_dir(run, "data")
    made.mkdir(parents=True)
    data.main(data.DataArguments(**recipe.load(keys)), made)
    write_json(made / "stage.json", {"id": "data", "given": {}, "inputs": {}})
    return run


def differs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether facts differ, elementwise; one that is absent (nan) in both does not."""
    return (first != second) & ~(np.isnan(first) & np.isnan(second))


def changes(run: Path, neighbours: int) -> dict[str, float]:
    """The shares of a run."""
    rows = TargetRows.load(run)
    test = rows.of_split("test", ROWS)
    histories = list(test.histories)
    with engine() as counting:
        events = Events.load(counting, run, rows)
        facts = ItemFacts.of(events.interactions.num_items)
        found = {}
        for name, kept in (("whole", None), ("cut", neighbours)):
            counts = events.counts(facts, kept)
            lists, scores = counts.top_rows(histories, LENGTH)
            shown = found["whole"][:2] if found else (lists, scores)
            found[name] = lists, scores, feature_rows(counts, histories, *shown, None)
            del counts
    lists, values = ([of[place] for of in found.values()] for place in (0, 2))
    is_other = differs(*values)
    return {
        "rows": len(test),
        "places": float((lists[0] != lists[1]).mean()),
        "facts": float(is_other.mean()),
        "told": float(is_other.sum() / max(1, ((values[0] != 0) | (values[1] != 0)).sum())),
    }


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--items", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS, help="entries of each item (%(default)s)")
    parser.add_argument("--run", type=Path, help="a run whose data stage is taken")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            write_log(Path(folder), args.interactions, args.items)
        run = args.run or data_stage(Path(folder) / "run", Path(folder) / "recipe/1_data.yaml")
        found = changes(run, args.neighbours)
    sys.stdout.write(json.dumps({name: round(value, 6) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main()
