"""Recall@K and NDCG@K of all items held out of a user, ranked from the training items alone: CLLM4Rec's protocol.

Every user counts once, whatever the order in which items were taken; it cannot stand in one table with next items.

Letters of shapes: U users, N items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.next_item.model import NextItemModel
from rerank.next_item.recall import REFERENCE, baseline_lists, difference, filled, means_and_differences
from rerank.next_item.slices import slice_lines, slice_results
from rerank.results.intervals import LEAVES_SEEDS_OUT, Sampling
from rerank.results.slices import Slices, training_interactions
from rerank.results.tables import NO_VALUE, Results, markdown_table, number
from rerank.rows import choose_rows, training_sequences

METRICS = ("R@20", "R@40", "N@100")
LIST_LENGTH = 100
ITEMS = pa.list_(pa.int64())
LISTS = pa.schema({"user": pa.int64(), "targets": ITEMS, "ranker": pa.string(), "items": ITEMS})  # items best first


@dataclass(frozen=True)
class HeldOut:
    """Users with training items and held-out items.

    Attributes:
        users: (U,).
        histories: U arrays of training items, oldest first.
        targets: U arrays of items of the split.
    """

    users: np.ndarray
    histories: list[np.ndarray]
    targets: list[np.ndarray]

    @classmethod
    def load(cls, run: Path, split: str, max_users: int = 0) -> "HeldOut":
        """Of a run; `max_users` users drawn at random, 0 for all."""
        data_dir = run_dir.stage_dir(run, "data")
        histories, targets = training_sequences(data_dir), training_sequences(data_dir, (split,))
        users = choose_rows(sorted(targets.keys() & histories.keys()), max_users, seed=0)
        return cls(np.array(users), [histories[user] for user in users], [targets[user] for user in users])


def metrics_of_sets(lists: np.ndarray, targets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Each metric's value for each user, (U,).

    Recall@k is hits over min(k, number of distinct targets), NDCG@k that of binary relevance.

    Args:
        lists: (U, N) items, best first; -1 where a list is shorter.
        targets: Held-out items of each user.

    Source: the released code of arXiv:2311.01343.
    """
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    discounts = 1 / np.log2(np.arange(2, lists.shape[1] + 2))
    for items, wanted in zip(lists, map(np.unique, targets), strict=True):
        hits = np.isin(items, wanted) & (items >= 0)
        for cut in (20, 40):
            values[f"R@{cut}"].append(hits[:cut].sum() / min(cut, len(wanted)))
        values["N@100"].append((hits * discounts)[:100].sum() / discounts[: min(100, len(wanted))].sum())
    return {name: np.array(of_users) for name, of_users in values.items()}


def find_sets(run: Path, held_out: HeldOut, num_beams: int) -> dict[str, np.ndarray]:
    """(U, N) items of the baselines and of the sft stage's model: by its item head if it has one, else by beams.

    Training items are left out of every list; validation items are not, as in the released code.
    """
    num_items = len(Catalogue.load(run))
    length = min(LIST_LENGTH, num_items)
    _, found = baseline_lists(run, num_items, held_out.histories, length)
    model = NextItemModel.load(run_dir.stage_dir(run, "sft") / "model")
    if model.head is not None:
        return found | {"sft_head": filled(model.by_head(held_out.histories, length).items, length)}
    lists = model.by_beams(held_out.histories, length, max(num_beams, length))
    return found | {"sft": filled(lists.items, length)}


def summarise(run: Path, held_out: HeldOut, found: Mapping[str, np.ndarray], split: str, num_samples: int) -> Results:
    """Each ranker's mean metrics, and their differences to transitions with intervals; the first metric on slices."""
    values = {name: metrics_of_sets(lists, held_out.targets) for name, lists in found.items()}
    sampling = Sampling(held_out.users, num_samples)
    rows = {name: means_and_differences(own, values[REFERENCE], METRICS, sampling) for name, own in values.items()}
    lengths = np.array([len(history) for history in held_out.histories])
    slices = Slices.of_sets(training_interactions(run), held_out.targets, lengths, "held-out items")
    sliced = slice_results(values, REFERENCE, slices, held_out.users, num_samples, METRICS[0])
    return {"task": "held_out_sets", "split": split, "n": len(held_out.users), "rows": rows, "slices": sliced}


def markdown(results: Results) -> str:
    """The results as a table."""
    heads = ["ranker", *METRICS, *(f"{metric} − {REFERENCE}" for metric in METRICS)]
    cells = [
        [name, *(number(row[metric]) for metric in METRICS)]
        + [NO_VALUE if name == REFERENCE else difference(row, metric) for metric in METRICS]
        for name, row in results["rows"].items()
    ]
    lines = [
        f"# All that is held out of a user: {results['n']} users, {results['split']}",
        "",
        "Recall@k is hits over min(k, number of held-out items). Differences with intervals: 95 %, "
        f"{LEAVES_SEEDS_OUT}.",
        "",
        *markdown_table(heads, cells),
        *slice_lines(results["slices"]),
    ]
    return "\n".join(lines) + "\n"
