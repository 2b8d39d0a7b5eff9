"""Full-catalogue Recall@K and NDCG@K of the next item: models, baselines and other rankers' lists.

Every row counts, for its whole catalogue is ranked. Rows are also split by what counting could have found: a target is
one hop away when it is among the 50 most frequent direct training successors of the history's items (the memorisation
analysis of IIRG, arXiv:2606.17276), and the rest need more than memory.

R rows, N items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.baselines import Counts
from rerank.baselines.pairs import neighbours_of
from rerank.catalogue import Catalogue
from rerank.launch import run_dir as runs
from rerank.next_item.encoder import SETTINGS, NextItemEncoder
from rerank.next_item.model import NextItemModel
from rerank.next_item.one_hop import MOST_SUCCESSORS, is_one_hop
from rerank.next_item.slices import shared_texts, shared_texts_sentence, slice_lines, slice_results
from rerank.results.intervals import LEAVES_SEEDS_OUT, Sampling
from rerank.results.slices import Slices
from rerank.results.tables import NO_VALUE, Results, counted, interval, markdown_table, number
from rerank.rows import TargetRows, training_sequences
from rerank.rows.lists import read_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("R@5", "R@10", "N@5", "N@10")
COMPARED = ("R@5", "N@10")  # with differences to REFERENCE
LIST_LENGTH, NUM_BEAMS = 10, 20
SAMPLE_SEED = 0  # one sample for all seeds of a training, so that their recall can be compared
GROUPS = {"all": "all", "one_hop": "one hop", "rest": "the rest"}
REFERENCE = "transitions"
LISTS = pa.schema(  # of lists.parquet; items best first
    [(name, pa.int64()) for name in ("row_id", "user", "target")]
    + [("one_hop", pa.bool_()), ("ranker", pa.string()), ("items", pa.list_(pa.int64()))]
)


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


def baseline_lists(
    run: Path, num_items: int, histories: Sequence[np.ndarray], length: int
) -> tuple[Counts, dict[str, np.ndarray]]:
    """Counts of a run's training sequences, and the (R, length) lists of the rankers that rest on them."""
    sequences = training_sequences(runs.stage_dir(run, "data"))
    counts = Counts.fit(sequences, num_items, neighbours=neighbours_of(num_items))
    return counts, {
        "popularity": popular_lists(counts.popularity, histories, length),
        REFERENCE: transition_lists(counts, histories, length),
    }


def transition_lists(counts: Counts, histories: Sequence[np.ndarray], length: int) -> np.ndarray:
    """(R, length) best items of the counting baseline that a history does not hold; -1 where there are no more."""
    free = np.array([counts.num_items - len(np.unique(history)) for history in histories])
    lists = np.full((len(histories), length), -1)
    for wanted in np.unique(np.minimum(free, length)).tolist():
        rows = np.flatnonzero(np.minimum(free, length) == wanted)
        if wanted:
            lists[rows, :wanted] = counts.top_rows([histories[row] for row in rows], wanted)[0]
    return lists


def filled(lists: Sequence[Sequence[int]] | Sequence[np.ndarray], length: int) -> np.ndarray:
    """(R, length) lists of any lengths, -1 where one is shorter."""
    return np.array([[*items, *[-1] * (length - len(items))] for items in lists])


@dataclass(frozen=True)
class ValidationRecall:
    """Recall@10 and NDCG@10 of a model on a fixed sample of validation rows; call it with the model."""

    rows: TargetRows
    encoder: NextItemEncoder

    @classmethod
    def load(
        cls, run: Path, tokenizer: "PreTrainedTokenizerBase", num_rows: int, max_items: int
    ) -> "ValidationRecall":
        """The sample of a run, all rows where there are no more than `num_rows`."""
        rows = TargetRows.load(run).of_split("valid", num_rows, SAMPLE_SEED)
        return cls(rows, NextItemEncoder(Catalogue.load(run), tokenizer, "semantic_id", max_items))

    def __call__(self, model: "PreTrainedModel") -> dict[str, float]:
        found = NextItemModel(model, self.encoder).by_beams(self.rows.histories, LIST_LENGTH, NUM_BEAMS)
        values = metrics_of_lists(filled(found.items, LIST_LENGTH), self.rows.targets)
        return {name: float(values[name].mean()) for name in ("R@10", "N@10")}


def model_lists(
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
class FoundLists:
    """The rows of a split and the lists of each ranker.

    Attributes:
        rows: Of one split.
        one_hop: (R,) whether counting could have found the target.
        lists: Ranker to (R, 10) items.
        slices: Of the rows.
    """

    rows: TargetRows
    one_hop: np.ndarray
    lists: dict[str, np.ndarray]
    slices: Slices

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Name of GROUPS to (R,) bool."""
        return {"all": np.ones(len(self.rows), dtype=bool), "one_hop": self.one_hop, "rest": ~self.one_hop}

    def write(self, path: Path) -> None:
        """Write lists.parquet."""
        rows = self.rows
        columns = {"row_id": rows.row_ids, "user": rows.users, "target": rows.targets, "one_hop": self.one_hop}
        write_lists(path, LISTS, columns, self.lists)


def write_lists(
    path: Path,
    schema: pa.Schema,
    columns: Mapping[str, np.ndarray | list[np.ndarray]],
    found: Mapping[str, np.ndarray],
) -> None:
    """One line a row and ranker, so that anybody can compute the numbers again: columns of rows, ranker, its items."""
    rows = pa.table(columns).to_pylist()
    lines = [
        row | {"ranker": ranker, "items": [item for item in items if item >= 0]}
        for ranker, lists in found.items()
        for row, items in zip(rows, lists.tolist(), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), path)


def find_lists(
    run: Path,
    split: str,
    lists: Mapping[str, str],
    models: Sequence[str],
    num_beams: int = NUM_BEAMS,
    max_rows: int = 0,
) -> FoundLists:
    """The lists of a run's models of next items, of baselines and of other rankers on the rows of a split.

    Args:
        run: Folder of the run.
        split: `valid` or `test`.
        lists: Ranker to a Parquet file with row_id and candidates: ten original item ids, best first, for each row of
            the split.
        models: Those of the run to ask, of `midtrained` and `sft`.
        num_beams: Of the models' beam search.
        max_rows: Of the split, drawn at random but always the same; 0 for all.
    """
    whole, catalogue = TargetRows.load(run).of_split(split), Catalogue.load(run)
    rows = whole.of_split(split, max_rows, SAMPLE_SEED)
    counts, found = baseline_lists(run, len(catalogue), rows.histories, LIST_LENGTH)
    for name, path in lists.items():
        items = np.stack(read_lists(path, whole.row_ids, catalogue.item_ids, LIST_LENGTH)[0])
        found[name] = items[np.isin(whole.row_ids, rows.row_ids)]
    found |= model_lists(run, rows.histories, num_beams, models)
    slices = Slices.of_rows(run, whole).taken(np.searchsorted(whole.row_ids, rows.row_ids))
    return FoundLists(rows, is_one_hop(counts, rows.histories, rows.targets), found, slices)


def summarise(found: FoundLists, run: Path, num_beams: int, num_samples: int = 2000) -> Results:
    """Each ranker's metrics by group, with intervals from `num_samples` bootstrap samples."""
    values = {name: metrics_of_lists(items, found.rows.targets) for name, items in found.lists.items()}
    groups = {name: is_in for name, is_in in found.groups.items() if is_in.any()}
    samplings = {name: Sampling(found.rows.users[is_in], num_samples) for name, is_in in groups.items()}

    def of_group(ranker: str, group: str) -> Results:
        own, reference = ({m: values[r][m][groups[group]] for m in METRICS} for r in (ranker, REFERENCE))
        return means_and_differences(own, reference, COMPARED, samplings[group])

    return {
        "split": str(found.rows.splits[0]),
        "n": {name: int(is_in.sum()) for name, is_in in found.groups.items()},
        "seeds": 1,
        "num_beams": num_beams,
        "midtrain_splits": runs.midtrain_splits(run),
        "rows": {name: {group: of_group(name, group) for group in groups} for name in values},
        "slices": slice_results(values, REFERENCE, found.slices, found.rows.users, num_samples),
        "shared_texts": shared_texts(run, found.rows.targets, values),
    }


def means_and_differences(
    values: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], compared: Sequence[str], sampling: Sampling
) -> Results:
    """A ranker's mean metrics, and the differences of those compared to REFERENCE's values, with intervals."""
    row: dict[str, float | list[float]] = {name: float(of_rows.mean()) for name, of_rows in values.items()}
    for name in compared:
        row[f"{name}_minus_{REFERENCE}"], row[f"{name}_interval"] = sampling.difference(values[name], reference[name])
    return row


def difference(row: Results, metric: str) -> str:
    """A difference of `means_and_differences` with its interval, for a table."""
    return interval(row[f"{metric}_minus_{REFERENCE}"], row[f"{metric}_interval"])


def markdown(results: Results) -> str:
    """The results as a table for each group."""
    rows, seeds = f"{results['n']['all']} {results['split']} rows", counted(results["seeds"], "seed")
    lines = [
        f"# The next item among all items: {rows}, {seeds}, {results['num_beams']} beams",
        "",
        f"Differences to {REFERENCE} with intervals: 95 %, {LEAVES_SEEDS_OUT}. One hop: the target is among the "
        f"{MOST_SUCCESSORS} most frequent direct training successors of the history's items. "
        + shared_texts_sentence(results["shared_texts"]),
    ]
    if "rerank" not in results["midtrain_splits"]:
        lines += [
            "",
            "Popularity, transitions and the groups know the re-ranker's training targets; mid-training did not.",
        ]
    heads = ["ranker", *METRICS, "spread of R@5", *(f"{metric} − {REFERENCE}" for metric in COMPARED)]
    for group, words in GROUPS.items():
        if results["n"][group]:
            cells = [  # one run has no spread over seeds: `rerank compare` shows that
                [name, *(number(of[group][metric]) for metric in METRICS), NO_VALUE]
                + [difference(of[group], metric) for metric in COMPARED]
                for name, of in results["rows"].items()
            ]
            lines += ["", f"{words}, {results['n'][group]} rows:", "", *markdown_table(heads, cells)]
    return "\n".join([*lines, *slice_lines(results["slices"])]) + "\n"
