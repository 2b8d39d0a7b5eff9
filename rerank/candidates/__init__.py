"""Stage 4: a first-stage ranker's list for every row, and facts about each candidate.

In: the data and semantic_ids folders, the midtrain folder too with `source: model`. Out: `train.parquet` (rows of the
split `rerank`), `valid.parquet`, `test.parquet`, `features.json` (names and bucket edges) and `evidence.npz` (counts).
A list without the target is kept with `hit` false: it counts end to end and is no training row. Training lists are out
of fold: `transitions` subtracts the user's own counts, and a model that has seen the rows' targets is refused.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.candidates \
        --config recipes/ml100k/4_candidates.yaml
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.baselines import FEATURES, Counts, ItemFacts, UserContributions, feature_rows, fit_edges
from rerank.candidates.augmentation import AugmentationArguments, further_lists
from rerank.candidates.seen_targets import refuse_seen_targets
from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.launch.stages import Stage
from rerank.launch.values import check_choice, check_range, option
from rerank.next_item.encoder import SETTINGS
from rerank.next_item.item_head import FILE as HEAD_FILE
from rerank.next_item.model import NextItemModel
from rerank.rows import FEATURES_FILE, TargetRows, training_sequences
from rerank.rows.lists import read_lists

logger = logging.getLogger(__name__)

SOURCES = ("transitions", "model", "lists")
FILES = {"rerank": "train", "valid": "valid", "test": "test"}  # split of a row -> name of its file
MAX_HISTORY = 20  # items of the history in a prompt for a model's list


@dataclass
class CandidatesArguments(AugmentationArguments):
    """Options of the candidates stage."""

    source: str = option("transitions", "transitions (counts), model (mid-trained, by beams) or lists (yours).")
    num_candidates: int = option(10, "Length of a list.")
    lists: str | None = option(
        None,
        "With source lists: a Parquet file with row_id (of data/rows.parquet), candidates (original item "
        "ids, best first) and optionally scores. Training rows must come from a ranker that has not seen them.",
    )
    model_dir: str | None = option(
        None,
        "With source model: a folder that the sft stage made with task next_item, in place of the run's "
        "mid-trained model. One that has seen the targets of the training rows is refused where its run is there.",
    )
    num_beams: int = option(
        20, "With source model: beams a row, at least num_candidates; 0: its item head, in one pass."
    )
    batch_size: int = option(64, "With source model: rows decoded together.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("source", self.source, SOURCES)
        if (self.source == "lists") != (self.lists is not None):
            raise ValueError(f"source is {self.source} and lists is {self.lists}; lists goes with source lists only")
        check_range("batch_size", self.batch_size, least=1)
        check_range("num_candidates", self.num_candidates, least=2)
        if self.pool_size is not None:
            check_range("pool_size", self.pool_size, above=self.num_candidates)
        if self.source == "model" and self.num_beams != 0:
            check_range("num_beams", self.num_beams, least=self.num_candidates)
        if self.model_dir is not None and self.source != "model":
            raise ValueError(f"model_dir is {self.model_dir} but source is {self.source}; it goes with source model")
        if self.source == "model" and self.num_beams == 0 and self.model_dir is None:
            raise ValueError("num_beams is 0 but a mid-trained model has no item head; give a model_dir that has one")


def optional_inputs(args: CandidatesArguments) -> tuple[str, ...]:
    """Lists of the mid-trained model come from its folder."""
    return ("midtrain",) if args.source == "model" and args.model_dir is None else ()


def check(args: CandidatesArguments) -> None:
    """Refuse lists that cannot be made from this data, and own lists that do not fit it."""
    if args.lists is not None and not Path(args.lists).is_file():
        raise FileNotFoundError(f"lists {args.lists} is not there; give a Parquet file of row_id and candidates")
    if args.model_dir is not None:
        check_model_dir(args, Path(args.model_dir))
    if not run_dir.is_finished(args.run_dir, "data"):
        return
    if optional_inputs(args) and run_dir.read_metrics(args.run_dir, "data")["midtrain_has_seen_rerank_targets"]:
        raise ValueError(
            "source is model but num_rerank of the data stage is all, so the mid-trained model has seen the targets "
            "of the training lists; set num_rerank to a number, or source to transitions"
        )
    if args.model_dir is not None:
        refuse_seen_targets(Path(args.model_dir), args.run_dir)
    rows, item_ids = TargetRows.load(args.run_dir), read_item_ids(args.run_dir)
    free = len(item_ids) - max(len(np.unique(history)) for history in rows.histories)
    if args.lists is not None:
        read_lists(args.lists, rows.row_ids, item_ids, args.num_candidates)
    for name in ("num_candidates", "pool_size"):
        length = getattr(args, name) or 0
        if length > free and (name == "pool_size" or args.lists is None):
            raise ValueError(
                f"{name} is {length} but the longest history leaves {free} of {len(item_ids)} items; "
                f"use at most {free}"
            )


def check_model_dir(args: CandidatesArguments, folder: Path) -> None:
    """Refuse a folder that is no model of next items, lacks the head that is asked for, or knows another catalogue."""
    for name, wanted in ((SETTINGS, True), (HEAD_FILE, args.num_beams == 0)):
        if wanted and not (folder / name).is_file():
            raise FileNotFoundError(f"model_dir {folder} has no {name}; train it with the sft stage, task next_item")
    if run_dir.is_finished(args.run_dir, "data") and run_dir.is_finished(args.run_dir, "semantic_ids"):
        if Catalogue.load(folder) != Catalogue.load(args.run_dir):
            raise ValueError(f"model_dir {folder} knows other items or ids than {args.run_dir}; use runs of one data")


def read_item_ids(run: str | Path) -> list[str]:
    """The original id of each item of a run."""
    items = pq.read_table(run_dir.stage_dir(run, "data") / "items.parquet", columns=["item", "item_id"])
    return items.sort_by("item")["item_id"].to_pylist()


def fit_counts(data_dir: Path, embeddings_path: Path, sequences: dict[int, np.ndarray]) -> Counts:
    """Counts of the training sequences with the texts' embeddings, categories, titles and (where given) brands."""
    items = pq.read_table(data_dir / "items.parquet").sort_by("item")
    brands = items["brand"].to_pylist() if "brand" in items.column_names else None
    embeddings = np.load(embeddings_path, mmap_mode="r")
    facts = ItemFacts.of(len(items), embeddings, items["category"].to_pylist(), items["title"].to_pylist(), brands)
    return Counts.fit(sequences, len(items), facts)


def make_lists(
    args: CandidatesArguments, rows: TargetRows, counts: Counts, own: UserContributions
) -> tuple[np.ndarray, np.ndarray]:
    """(R, N) items in first-stage order and (R, N) scores."""
    if args.lists is not None:
        logger.info("own lists: that training lists are out of fold is for %s to ensure", args.lists)
        return read_lists(args.lists, rows.row_ids, read_item_ids(args.run_dir), args.num_candidates)
    if args.source == "model":
        return model_lists(args, rows)
    return counts.top_rows(rows.histories, args.num_candidates, own)


def model_lists(args: CandidatesArguments, rows: TargetRows) -> tuple[np.ndarray, np.ndarray]:
    """A model's most likely items and their log-probabilities, items of the history left out."""
    folder = args.model_dir
    model = NextItemModel.load(Path(folder)) if folder else NextItemModel.load_midtrained(Path(args.run_dir))
    model = model.with_max_history(MAX_HISTORY)
    if args.num_beams:
        found = model.by_beams(rows.histories, args.num_candidates, args.num_beams, args.batch_size)
    else:
        found = model.by_head(rows.histories, args.num_candidates, args.batch_size)
    for row, items in enumerate(found.items):
        if len(items) < args.num_candidates:
            cure = "raise num_beams" if args.num_beams else "lower num_candidates"
            raise ValueError(f"row {row}: found {len(items)} items, but a list needs {args.num_candidates}; {cure}")
    return np.array(found.items), np.array(found.logps)


def _nested(values: np.ndarray) -> pa.Array:
    """A two- or three-dimensional array as an Arrow column of lists."""
    column = pa.array(values.reshape(-1))
    for width in values.shape[:0:-1]:
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, len(column) + 1, width, dtype=np.int32)), column)
    return column


def as_table(rows: TargetRows, lists: Mapping[str, np.ndarray], number: int = 0) -> pa.Table:
    """Rows with their lists, and the number of the list among those of the row."""
    relevance = (lists["candidates"] == rows.targets[:, None]).astype(float)
    return pa.table(
        {
            "row_id": rows.row_ids,
            "list_number": pa.array([number] * len(rows), pa.int64()),
            "user": rows.users,
            "history": pa.array(rows.histories, pa.list_(pa.int64())),
            "candidates": _nested(lists["candidates"]),
            "relevance": _nested(relevance),
            **{name: _nested(lists[name]) for name in ("first_stage_scores", "first_stage_ranks")},
            "target": rows.targets,
            "hit": relevance.any(axis=1),
            "features": _nested(lists["features"]),
        }
    )


def further_tables(
    args: CandidatesArguments, rows: TargetRows, counts: Counts, own: UserContributions, first_id: int
) -> Iterator[pa.Table]:
    """The further lists of the training rows, with row ids of their own from `first_id` on."""
    for number in range(1, args.lists_per_row):
        drawn = further_lists(args, args.num_candidates, rows, counts, own, number)
        chosen = replace(rows.take(drawn.rows), histories=drawn.histories)
        chosen = replace(chosen, row_ids=chosen.row_ids + number * first_id)
        yield as_table(chosen, drawn.columns, number)


def measure(lists: Mapping[str, np.ndarray], rows: TargetRows) -> dict[str, float]:
    """Counts and recall of the lists of a split."""
    relevance = lists["candidates"] == rows.targets[:, None]
    hit = relevance.any(axis=1)
    cuts = sorted({1, min(5, relevance.shape[1]), relevance.shape[1]})
    recall = {f"recall@{cut}": float(relevance[:, :cut].any(axis=1).mean()) for cut in cuts}
    return {"rows": len(rows), "hits": int(hit.sum()), "missed": int((~hit).sum()), **recall}


def main(args: CandidatesArguments, out_dir: Path) -> dict[str, object]:
    """Make the lists, look up facts about each candidate, and write them by split."""
    started = time.perf_counter()
    data_dir = run_dir.stage_dir(args.run_dir, "data")
    rows, sequences = TargetRows.load(args.run_dir), training_sequences(data_dir)
    counts = fit_counts(data_dir, run_dir.stage_dir(args.run_dir, "semantic_ids") / "embeddings.npy", sequences)
    # Only training rows were counted: -1, no user, subtracts nothing.
    own = counts.own(np.where(rows.splits == "rerank", rows.users, -1), sequences)
    candidates, scores = make_lists(args, rows, counts, own)
    lists = {
        "candidates": candidates,
        "first_stage_ranks": np.tile(np.arange(1, candidates.shape[1] + 1), (len(candidates), 1)),
        "first_stage_scores": scores,
        "features": feature_rows(counts, rows.histories, candidates, scores, own),
    }
    train = lists["features"][rows.splits == "rerank"]
    edges = {name: fit_edges(train[:, :, number].ravel()) for number, name in enumerate(FEATURES)}
    counts.save(out_dir / "evidence.npz")
    write_json(out_dir / FEATURES_FILE, {"names": list(FEATURES), "edges": edges})
    splits, num_further = {}, 0
    for split, name in FILES.items():
        chosen = np.flatnonzero(rows.splits == split)
        of_split = {column: values[chosen] for column, values in lists.items()}
        of_rows = rows.take(chosen)
        tables, splits[name] = [as_table(of_rows, of_split)], measure(of_split, of_rows)
        if split == "rerank":
            first_id = int(rows.row_ids.max()) + 1
            tables += further_tables(args, of_rows, counts, own.of_rows(chosen), first_id)
            num_further = sum(map(len, tables[1:]))
        pq.write_table(pa.concat_tables(tables), out_dir / f"{name}.parquet")
        logger.info("%s: %s of %s lists hold the target", name, splits[name]["hits"], splits[name]["rows"])
    seconds = time.perf_counter() - started
    sizes = {"source": args.source, "num_candidates": args.num_candidates, "further_lists": num_further}
    return {**sizes, "splits": splits, "seconds": seconds}


STAGE = Stage(
    name="candidates",
    arguments=(CandidatesArguments,),
    main=main,
    check=check,
    inputs=("data", "semantic_ids"),
    optional_inputs=optional_inputs,
    files=("lists", "model_dir"),
)
