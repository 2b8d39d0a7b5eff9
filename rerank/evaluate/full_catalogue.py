"""How often the item a user takes next is among the first 5 or 10 of all items: the mid-trained model and baselines.

Every row counts, for its whole catalogue is ranked. Rows are also split by what counting could have found: a target is
one hop away when it is among the 50 most frequent direct training successors of the history's items (the memorisation
analysis of IIRG, arXiv:2606.17276), and the rest need more than memory.

R rows, N items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.baselines import Counts
from rerank.candidates import Rows, training_sequences
from rerank.candidates.own_lists import read_lists
from rerank.catalogue import Catalogue
from rerank.evaluate.results import Sampling
from rerank.evaluate.rows import SPLITS
from rerank.evaluate.tables import counted, interval, number
from rerank.item_rows import SETTINGS, ItemRows
from rerank.next_items import NextItemModel

METRICS = ("R@5", "R@10", "N@5", "N@10")
LIST_LENGTH, NUM_BEAMS = 10, 20
MOST_SUCCESSORS = 50
SAMPLE_SEED = 0  # one sample for all seeds of a training, so that their recall can be compared
GROUPS = {"all": "all", "one_hop": "one hop", "rest": "the rest"}
REFERENCE = "transitions"
MODELS = ("midtrained", "sft")


def metrics_of_lists(lists: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric's value on each row, (R,).

    Args:
        lists: (R, N) items, best first; -1 where a list is shorter.
        targets: (R,) the one relevant item of each row.
    """
    hits = lists == targets[:, None]
    places = np.where(hits.any(axis=1), hits.argmax(axis=1), np.inf)
    gains = 1 / np.log2(places + 2)  # with one relevant item the ideal gain is 1
    recalls = {f"R@{cut}": (places < cut).astype(float) for cut in (5, 10)}
    return recalls | {f"N@{cut}": np.where(places < cut, gains, 0.0) for cut in (5, 10)}


def popular_lists(popularity: np.ndarray, histories: Sequence[np.ndarray], length: int) -> np.ndarray:
    """(R, length) the most popular items that a history does not hold, ties by item; -1 where there are no more."""
    order = np.argsort(-popularity, kind="stable")
    heads = [order[: length + len(history)] for history in histories]
    return filled([h[~np.isin(h, own)][:length] for h, own in zip(heads, histories, strict=True)], length)


def is_one_hop(counts: Counts, histories: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Whether each target is among the most frequent direct successors of its history's items, (R,).

    Frequencies are summed over the distinct items of the history; ties go by popularity, then by item.
    """
    found = np.zeros(len(targets), dtype=bool)
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        followers = counts.successors[np.unique(history)].sum(axis=0)
        if followers[target]:
            items = np.flatnonzero(followers)
            order = items[np.lexsort((items, -counts.popularity[items], -followers[items]))]
            found[row] = target in order[:MOST_SUCCESSORS]
    return found


def filled(lists: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """(R, length) lists of any lengths, -1 where one is shorter."""
    return np.array([[*items, *[-1] * (length - len(items))] for items in lists])


@dataclass(frozen=True)
class ValidationRecall:
    """A fixed sample of validation rows; called with a model, its metrics on them."""

    histories: list[np.ndarray]
    targets: np.ndarray
    asked: ItemRows

    @classmethod
    def load(cls, run: Path, tokenizer: Any, num_rows: int, max_items: int) -> "ValidationRecall":
        """The sample of a run, all rows where there are no more than `num_rows`."""
        rows = Rows.load(runs.stage_dir(run, "data") / "rows.parquet")
        chosen = np.flatnonzero(rows.splits == "valid")
        if num_rows < len(chosen):
            chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(chosen, num_rows, replace=False))
        histories = [rows.histories[row] for row in chosen]
        return cls(histories, rows.targets[chosen], ItemRows(Catalogue.load(run), tokenizer, "semantic_id", max_items))

    def __call__(self, model: Any) -> dict[str, float]:
        found = NextItemModel(model, self.asked).by_beams(self.histories, LIST_LENGTH, NUM_BEAMS)
        values = metrics_of_lists(filled(found.items, LIST_LENGTH), self.targets)
        return {name: float(values[name].mean()) for name in ("R@10", "N@10")}

    def dataset(self) -> Any:
        """The targets as a data set: transformers wants one where it is to evaluate."""
        from datasets import Dataset

        return Dataset.from_dict({"target": self.targets.tolist()})


def model_lists_of(
    run: Path, histories: Sequence[np.ndarray], num_beams: int, models: Sequence[str]
) -> dict[str, np.ndarray]:
    """(R, 10) items that a run's models of next items find: mid-trained, of the sft stage, by its head, by both."""
    found = {}
    if "midtrained" in models:
        found["midtrained"] = NextItemModel.load_midtrained(run).by_beams(histories, LIST_LENGTH, num_beams)
    folder = runs.stage_dir(run, "sft") / "model"
    if "sft" in models and (folder / SETTINGS).is_file():
        model = NextItemModel.load(folder)
        found["sft"] = model.by_beams(histories, LIST_LENGTH, num_beams)
        if model.head is not None:
            found["sft_head"] = model.by_head(histories, LIST_LENGTH)
            found["sft_both"] = model.by_both(histories, LIST_LENGTH)
    return {name: filled(lists.items, LIST_LENGTH) for name, lists in found.items()}


@dataclass(frozen=True)
class Evaluated:
    """The rows of a split and what each ranker finds for them.

    Attributes:
        split: `valid` or `test`.
        row_ids: (R,) of data/rows.parquet.
        users: (R,).
        histories: Of each row, oldest first.
        targets: (R,).
        groups: Name to (R,) bool.
        lists: Ranker to its (R, 10) items, one array for each run; baselines have one.
    """

    split: str
    row_ids: np.ndarray
    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray
    groups: dict[str, np.ndarray]
    lists: dict[str, list[np.ndarray]]


def find_lists(
    run_dirs: Sequence[Path],
    split: str,
    lists: Mapping[str, Path],
    num_beams: int = NUM_BEAMS,
    max_rows: int = 0,
    models: Sequence[str] = MODELS,
) -> Evaluated:
    """What the runs' models of next items, baselines and other rankers find on the rows of a split.

    Args:
        run_dirs: Runs of one data folder that differ in the seed.
        split: `valid` or `test`.
        lists: Ranker to a Parquet file with row_id and candidates: ten original item ids, best first.
        num_beams: Of the models' beam search.
        max_rows: Of the split, drawn at random but always the same; 0 for all.
        models: Of the runs' models those to ask.

    Raises:
        ValueError: When there is no such split, runs differ in their data, or lists do not fit.
        FileNotFoundError: When a run has no mid-trained model.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r} but must be one of {', '.join(SPLITS)}")
    data_dir = runs.stage_dir(run_dirs[0], "data")
    _check_same_rows(run_dirs)
    rows = Rows.load(data_dir / "rows.parquet")
    chosen = np.flatnonzero(rows.splits == split)
    if 0 < max_rows < len(chosen):
        chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(chosen, max_rows, replace=False))
    histories, targets = [rows.histories[row] for row in chosen], rows.targets[chosen]
    catalogue, row_ids = Catalogue.load(run_dirs[0]), rows.table["row_id"].to_numpy()[chosen]
    counts = Counts.fit(training_sequences(data_dir), len(catalogue))
    fewest_free = len(catalogue) - max(len(np.unique(history)) for history in histories)
    found = {
        "popularity": [popular_lists(counts.popularity, histories, LIST_LENGTH)],
        REFERENCE: [filled(counts.top_rows(histories, min(LIST_LENGTH, fewest_free))[0].tolist(), LIST_LENGTH)],
    }
    for name, path in lists.items():
        found[name] = [read_lists(path, row_ids, catalogue.item_ids, LIST_LENGTH)[0]]
    of_runs = [model_lists_of(run, histories, num_beams, models) for run in run_dirs]
    found |= {name: [models[name] for models in of_runs] for name in of_runs[0]}
    one_hop = is_one_hop(counts, histories, targets)
    groups = {"all": np.ones(len(chosen), dtype=bool), "one_hop": one_hop, "rest": ~one_hop}
    return Evaluated(split, row_ids, rows.users[chosen], histories, targets, groups, found)


def evaluate_full_catalogue(
    run_dirs: Sequence[Path],
    split: str,
    lists: Mapping[str, Path],
    num_samples: int = 2000,
    seed: int = 0,
    num_beams: int = NUM_BEAMS,
) -> dict[str, Any]:
    """Metrics of what `find_lists` finds on every row of a split; a row's value is its mean over the runs.

    Args:
        run_dirs, split, lists, num_beams: As of `find_lists`.
        num_samples: Bootstrap samples of an interval.
        seed: Of the intervals.
    """
    return summarise(find_lists(run_dirs, split, lists, num_beams), run_dirs, num_beams, num_samples, seed)


def summarise(
    found: Evaluated, run_dirs: Sequence[Path], num_beams: int, num_samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Each ranker's metrics by group, with intervals."""
    values = {name: [metrics_of_lists(items, found.targets) for items in of] for name, of in found.lists.items()}
    return {
        "split": found.split,
        "n": {name: int(group.sum()) for name, group in found.groups.items()},
        "seeds": len(run_dirs),
        "num_beams": num_beams,
        "midtrain_splits": runs.midtrain_splits(run_dirs[0]),
        "rows": {
            name: _summary(of_runs, values[REFERENCE][0], found.groups, found.users, num_samples, seed)
            for name, of_runs in values.items()
        },
    }


def _check_same_rows(run_dirs: Sequence[Path]) -> None:
    first, *others = (pq.read_table(runs.stage_dir(run, "data") / "rows.parquet") for run in run_dirs)
    for run, table in zip(run_dirs[1:], others, strict=True):
        if not table.equals(first):
            raise ValueError(f"{run} has other data than {run_dirs[0]}; give runs of one data folder")


def _summary(
    of_runs: Sequence[Mapping[str, np.ndarray]],
    reference: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    users: np.ndarray,
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    """One ranker's metrics by group, their spread over runs, and the difference to the reference in R@5 and N@10."""
    summary: dict[str, Any] = {}
    for group, is_in in groups.items():
        if not is_in.any():
            continue
        mean = {name: np.mean([values[name][is_in] for values in of_runs], axis=0) for name in METRICS}
        row: dict[str, Any] = {name: float(mean[name].mean()) for name in METRICS}
        if len(of_runs) > 1:
            seeds = [values["R@5"][is_in].mean() for values in of_runs]
            row["R@5_spread"] = float(np.std(seeds, ddof=1))
        sampling = Sampling(users[is_in], num_samples, seed)
        for name in ("R@5", "N@10"):
            row[f"{name}_minus_{REFERENCE}"], row[f"{name}_interval"] = sampling.difference(
                mean[name], reference[name][is_in]
            )
        summary[group] = row
    return summary


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a table for each group."""
    rows, seeds = f"{results['n']['all']} {results['split']} rows", counted(results["seeds"], "seed")
    lines = [
        f"# The next item among all items: {rows}, {seeds}, {results['num_beams']} beams",
        "",
        f"Differences to {REFERENCE} with 95 % intervals, paired bootstrap, whole users drawn. One hop: the target is "
        f"among the {MOST_SUCCESSORS} most frequent direct training successors of the history's items.",
    ]
    if "rerank" not in results["midtrain_splits"]:
        lines += [
            "",
            "Popularity, transitions and the groups know the re-ranker's training targets; mid-training did not.",
        ]
    head = f"| ranker | {' | '.join(METRICS)} | spread of R@5 | R@5 − {REFERENCE} | N@10 − {REFERENCE} |"
    for group, words in GROUPS.items():
        if not results["n"][group]:
            continue
        lines += ["", f"{words}, {results['n'][group]} rows:", "", head, "|---|" + "---:|" * (len(METRICS) + 3)]
        for name, by_group in results["rows"].items():
            row = by_group[group]
            cells = [*(number(row[metric]) for metric in METRICS), number(row.get("R@5_spread"))]
            for metric in ("R@5", "N@10"):
                cells.append(interval(row[f"{metric}_minus_{REFERENCE}"], row[f"{metric}_interval"]))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
