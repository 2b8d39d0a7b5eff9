"""All that is held out of a user at once, ranked from the training items alone: the protocol of CLLM4Rec.

Every user counts once, whatever the order in which items were taken; it cannot stand in one table with next items.

Letters of shapes: U users, N items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank import run_dir
from rerank.baselines import Counts
from rerank.candidates import training_sequences
from rerank.catalogue import Catalogue
from rerank.evaluate.full_catalogue import REFERENCE, filled, popular_lists
from rerank.evaluate.results import Sampling
from rerank.evaluate.tables import NO_VALUE, interval, number
from rerank.next_items import NextItemModel

METRICS = ("R@20", "R@40", "N@100")
LIST_LENGTH = 100
LISTS = pa.schema(
    [
        ("user", pa.int64()),
        ("targets", pa.list_(pa.int64())),
        ("ranker", pa.string()),
        ("items", pa.list_(pa.int64())),  # best first
    ]
)


@dataclass(frozen=True)
class HeldOut:
    """Users with something held out and something to go by.

    Attributes:
        users: (U,).
        histories: Of each user the training items, oldest first.
        targets: Of each user the items of the split.
    """

    users: np.ndarray
    histories: list[np.ndarray]
    targets: list[np.ndarray]

    @classmethod
    def load(
        cls, data_dir: Path, histories: dict[int, np.ndarray], split: str, max_users: int = 0, seed: int = 0
    ) -> "HeldOut":
        """Of a data folder and its training sequences; `max_users` users drawn at random, 0 for all."""
        table = pq.read_table(data_dir / "interactions.parquet", filters=[("split", "==", split)]).to_pandas()
        targets = {user: group.to_numpy() for user, group in table.groupby("user")["item"]}
        users = np.array(sorted(targets.keys() & histories.keys()))
        if 0 < max_users < len(users):
            users = np.sort(np.random.default_rng(seed).choice(users, max_users, replace=False))
        return cls(users, [histories[user] for user in users], [targets[user] for user in users])


def metrics_of_sets(lists: np.ndarray, targets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Each metric's value for each user, (U,).

    Recall@k is hits over min(k, number of targets), NDCG@k that of binary relevance.

    Args:
        lists: (U, N) items, best first; -1 where a list is shorter.
        targets: Of each user.

    Source: the released code of arXiv:2311.01343.
    """
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    discounts = 1 / np.log2(np.arange(2, lists.shape[1] + 2))
    for items, wanted in zip(lists, targets, strict=True):
        hits = np.isin(items, wanted) & (items >= 0)
        for cut in (20, 40):
            values[f"R@{cut}"].append(hits[:cut].sum() / min(cut, len(wanted)))
        values["N@100"].append((hits * discounts)[:100].sum() / discounts[: min(100, len(wanted))].sum())
    return {name: np.array(of_users) for name, of_users in values.items()}


def ranked_sets(run: Path, found: HeldOut, num_beams: int) -> dict[str, np.ndarray]:
    """(U, N) items of the baselines and of the sft stage's model: by its item head if it has one, else by beams.

    Training items are left out of every list; validation items are not, as in the released code.
    """
    catalogue = Catalogue.load(run)
    sequences = training_sequences(run_dir.stage_dir(run, "data"))
    counts = Counts.fit(sequences, len(catalogue))
    length = min(LIST_LENGTH, len(catalogue))
    fewest_free = len(catalogue) - max(len(np.unique(history)) for history in found.histories)
    model = NextItemModel.load(run_dir.stage_dir(run, "sft") / "model")
    if model.head is None:
        name, lists = "sft", model.by_beams(found.histories, length, max(num_beams, length)).items
    else:
        name, lists = "sft_head", model.by_head(found.histories, length).items
    return {
        "popularity": popular_lists(counts.popularity, found.histories, length),
        REFERENCE: filled(counts.top_rows(found.histories, min(length, fewest_free))[0].tolist(), length),
        name: filled(lists, length),
    }


def summarise(found: HeldOut, ranked: Mapping[str, np.ndarray], sampling: Sampling) -> dict[str, dict[str, Any]]:
    """Of each ranker the metrics' means, and their differences to transitions with intervals."""
    values = {name: metrics_of_sets(lists, found.targets) for name, lists in ranked.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, of_users in values.items():
        rows[name] = {metric: float(of_users[metric].mean()) for metric in METRICS}
        for metric in METRICS:
            pair = sampling.difference(of_users[metric], values[REFERENCE][metric])
            rows[name][f"{metric}_minus_{REFERENCE}"], rows[name][f"{metric}_interval"] = pair
    return rows


def evaluate(args: Any, out_dir: Path) -> dict[str, Any]:
    """Write results.json, results.md and lists.parquet; returns the split, n and each ranker's metrics."""
    run = Path(args.run_dir)
    data_dir = run_dir.stage_dir(run, "data")
    found = HeldOut.load(data_dir, training_sequences(data_dir), args.split, args.max_rows, args.seed)
    ranked = ranked_sets(run, found, args.num_beams)
    rows = summarise(found, ranked, Sampling(found.users, args.num_bootstrap, args.seed))
    results = {"task": "held_out_sets", "split": args.split, "n": len(found.users), "rows": rows}
    run_dir.write_json(out_dir / "results.json", results)
    (out_dir / "results.md").write_text(markdown(results), encoding="utf-8")
    write_lists(found, ranked, out_dir / "lists.parquet")
    return {"split": args.split, "n": results["n"], "rows": rows}


def write_lists(found: HeldOut, ranked: Mapping[str, np.ndarray], path: Path) -> None:
    """One line a user and ranker, so that anybody can compute the numbers again."""
    lines = [
        {"user": int(user), "targets": targets, "ranker": name, "items": items[items >= 0]}
        for name, lists in ranked.items()
        for user, targets, items in zip(found.users, found.targets, lists, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=LISTS), path)


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    heads = [*METRICS, *(f"{metric} − {REFERENCE}" for metric in METRICS)]
    lines = [
        f"# All that is held out of a user: {results['n']} users, {results['split']}",
        "",
        "Recall@k is hits over min(k, number of held-out items). Differences with 95 % intervals, paired bootstrap.",
        "",
        f"| ranker | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for name, row in results["rows"].items():
        cells = [number(row[metric]) for metric in METRICS]
        for metric in METRICS:
            pair = row[f"{metric}_minus_{REFERENCE}"], row[f"{metric}_interval"]
            cells.append(NO_VALUE if name == REFERENCE else interval(*pair))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
