"""Stage 4: a first-stage ranker's list for every row, and facts about each candidate.

In: the data and semantic_ids folders, the midtrain folder too with `source: model`. Out: `train.parquet` (rows of the
split `rerank`), `valid.parquet`, `test.parquet`, `features.json` (names and bucket edges) and `evidence.npz` (counts).
A list without the target is kept with `hit` false: it counts end to end and is no training row. Training lists are out
of fold: `transitions` subtracts the user's own counts, the mid-trained model must not have seen the rows' targets.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.candidates \
        --config recipes/ml100k/4_candidates.yaml
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.baselines import FEATURES, Counts, ItemFacts, UserContributions, feature_rows, fit_edges
from rerank.catalogue import Catalogue
from rerank.launch import recipe, run_dir
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
class CandidatesArguments(recipe.StageArguments):
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
        "mid-trained model. It must not have seen the targets of the training rows.",
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
    rows, item_ids = TargetRows.load(args.run_dir), read_item_ids(args.run_dir)
    free = len(item_ids) - max(map(len, rows.histories))
    if args.lists is not None:
        read_lists(args.lists, rows.row_ids, item_ids, args.num_candidates)
    elif free < args.num_candidates:
        raise ValueError(
            f"num_candidates is {args.num_candidates} but the longest history leaves {free} of {len(item_ids)} items; "
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


def write_split(path: Path, rows: TargetRows, lists: dict[str, np.ndarray]) -> dict[str, float]:
    """Write the rows of a split with their lists and return their counts and recall."""
    relevance = lists["relevance"]
    hit = relevance.any(axis=1)
    columns = {
        "row_id": rows.row_ids,
        "user": rows.users,
        "history": pa.array(rows.histories, pa.list_(pa.int64())),
        **{name: _nested(lists[name]) for name in ("candidates", "relevance", "first_stage_scores")},
        "target": rows.targets,
        "hit": hit,
        "features": _nested(lists["features"]),
    }
    pq.write_table(pa.table(columns), path)
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
        "relevance": (candidates == rows.targets[:, None]).astype(float),
        "first_stage_scores": scores,
        "features": feature_rows(counts, rows.histories, candidates, scores, own),
    }
    train = lists["features"][rows.splits == "rerank"]
    edges = {name: fit_edges(train[:, :, number].ravel()) for number, name in enumerate(FEATURES)}
    counts.save(out_dir / "evidence.npz")
    write_json(out_dir / FEATURES_FILE, {"names": list(FEATURES), "edges": edges})
    splits = {}
    for split, name in FILES.items():
        chosen = np.flatnonzero(rows.splits == split)
        of_split = {column: values[chosen] for column, values in lists.items()}
        splits[name] = write_split(out_dir / f"{name}.parquet", rows.take(chosen), of_split)
        logger.info("%s: %s of %s lists hold the target", name, splits[name]["hits"], splits[name]["rows"])
    seconds = time.perf_counter() - started
    return {"source": args.source, "num_candidates": args.num_candidates, "splits": splits, "seconds": seconds}


STAGE = Stage(
    name="candidates",
    arguments=(CandidatesArguments,),
    main=main,
    check=check,
    inputs=("data", "semantic_ids"),
    optional_inputs=optional_inputs,
)
