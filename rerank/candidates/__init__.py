"""Stage 4: a first-stage ranker's list for every row, and what is known about each candidate.

In: the data and semantic_ids folders, the midtrain folder too with `source: model`. Out: `train.parquet` (rows of the
split `rerank`), `valid.parquet`, `test.parquet`, `features.json` (names and bucket edges) and `evidence.npz` (counts).
A list without the target is kept with `hit` false: it counts end to end and is no training row. Training lists are out
of fold: `transitions` subtracts the user's own counts, the mid-trained model must not have seen the rows' targets.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.candidates \
        --config recipes/ml100k/4_candidates.yaml
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank import recipe, run_dir
from rerank.baselines import FEATURES, Counts, ItemFacts, OwnCounts, fit_edges
from rerank.candidates.model_lists import load_model, model_lists
from rerank.candidates.own_lists import read_lists
from rerank.catalogue import Catalogue
from rerank.item_head import FILE as HEAD_FILE
from rerank.item_rows import SETTINGS
from rerank.sequences import by_user, training_items

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids")
SOURCES = ("transitions", "model", "lists")
FILES = {"rerank": "train", "valid": "valid", "test": "test"}  # split of a row -> name of its file


@dataclass
class CandidatesArguments(recipe.StageArguments):
    """Options of the candidates stage."""

    source: str = field(
        default="transitions",
        metadata={
            "help": "Who makes the lists: transitions (directed counts), model (the mid-trained model by beam search "
            "over the catalogue) or lists (your own)."
        },
    )
    num_candidates: int = field(default=10, metadata={"help": "Length of a list."})
    lists: str | None = field(
        default=None,
        metadata={
            "help": "With source lists: a Parquet file with row_id (of data/rows.parquet), candidates (original item "
            "ids, best first) and optionally scores. Training rows must come from a ranker that has not seen them."
        },
    )
    model_dir: str | None = field(
        default=None,
        metadata={
            "help": "With source model: a folder that the sft stage made with task next_item, in place of the run's "
            "mid-trained model. It must not have seen the targets of the training rows."
        },
    )
    num_beams: int = field(
        default=20,
        metadata={
            "help": "With source model: beams a row, at least num_candidates; 0: one forward pass of its item head."
        },
    )
    max_history: int = field(default=20, metadata={"help": "With source model: items of the history in a prompt."})
    batch_size: int = field(default=64, metadata={"help": "With source model: rows decoded together."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; use one of {', '.join(SOURCES)}")
        if (self.source == "lists") != (self.lists is not None):
            raise ValueError(f"source is {self.source} and lists is {self.lists}; lists goes with source lists only")
        for name in ("max_history", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates is {self.num_candidates} but a list to re-rank has at least 2")
        if self.source == "model" and self.num_beams < self.num_candidates and self.num_beams != 0:
            raise ValueError(
                f"num_beams is {self.num_beams} but must be at least num_candidates, {self.num_candidates}"
            )
        if self.model_dir is not None and self.source != "model":
            raise ValueError(f"model_dir is {self.model_dir} but source is {self.source}; it goes with source model")
        if self.source == "model" and self.num_beams == 0 and self.model_dir is None:
            raise ValueError("num_beams is 0 but a mid-trained model has no item head; give a model_dir that has one")


ARGUMENTS = (CandidatesArguments,)


def extra_inputs(args: CandidatesArguments) -> tuple[str, ...]:
    """Lists of the mid-trained model come from its folder."""
    return ("midtrain",) if args.source == "model" and args.model_dir is None else ()


def check(args: CandidatesArguments) -> None:
    """Refuse lists that cannot be made from this data, and own lists that do not fit it."""
    if args.lists is not None and not Path(args.lists).is_file():
        raise FileNotFoundError(f"lists {args.lists} is not there; give a Parquet file of row_id and candidates")
    if args.model_dir is not None:
        check_model_dir(args)
    if not run_dir.is_finished(args.run_dir, "data"):
        return
    if (
        args.source == "model"
        and args.model_dir is None
        and run_dir.read_metrics(args.run_dir, "data")["midtrain_has_seen_rerank_targets"]
    ):
        raise ValueError(
            "source is model but num_rerank of the data stage is all, so the mid-trained model has seen the targets "
            "of the training lists; set num_rerank to a number, or source to transitions"
        )
    data_dir = run_dir.stage_dir(args.run_dir, "data")
    rows = pq.read_table(data_dir / "rows.parquet", columns=["row_id", "history"])
    num_items = pq.read_metadata(data_dir / "items.parquet").num_rows
    free = num_items - pc.max(pc.list_value_length(rows["history"])).as_py()
    if args.source != "lists" and free < args.num_candidates:
        raise ValueError(
            f"num_candidates is {args.num_candidates} but the longest history leaves {free} of {num_items} items; "
            f"use at most {free}"
        )
    if args.lists is not None:
        item_ids = pq.read_table(data_dir / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
        read_lists(args.lists, rows["row_id"].to_numpy(), item_ids, args.num_candidates)


def check_model_dir(args: CandidatesArguments) -> None:
    """Refuse a folder that is no model of next items, lacks the head that is asked for, or knows another catalogue.

    Raises:
        FileNotFoundError: When a file is not there.
        ValueError: When its items are not those of the run.
    """
    folder = Path(args.model_dir)
    for name, wanted in ((SETTINGS, True), (HEAD_FILE, args.num_beams == 0)):
        if wanted and not (folder / name).is_file():
            raise FileNotFoundError(f"model_dir {folder} has no {name}; train it with the sft stage, task next_item")
    if run_dir.is_finished(args.run_dir, "data") and run_dir.is_finished(args.run_dir, "semantic_ids"):
        if Catalogue.load(folder) != Catalogue.load(args.run_dir):
            raise ValueError(f"model_dir {folder} knows other items or ids than {args.run_dir}; use runs of one data")


@dataclass(frozen=True)
class Rows:
    """The rows of data/rows.parquet as arrays."""

    table: pa.Table
    histories: list[np.ndarray]
    users: np.ndarray
    targets: np.ndarray
    splits: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "Rows":
        table = pq.read_table(path, columns=["row_id", "user", "split", "history", "target"]).combine_chunks()
        history = pc.list_flatten(table["history"]).to_numpy()
        ends = np.cumsum(pc.list_value_length(table["history"]).to_numpy())
        splits = table["split"].to_numpy()
        return cls(table, np.split(history, ends[:-1]), table["user"].to_numpy(), table["target"].to_numpy(), splits)


def training_sequences(data_dir: Path) -> dict[int, np.ndarray]:
    """User to items before validation, oldest first: what counts may know."""
    users, items = training_items(data_dir)
    return dict(zip(np.unique(users).tolist(), by_user(users, items), strict=True))


def fit_counts(data_dir: Path, embeddings_path: Path, sequences: dict[int, np.ndarray]) -> Counts:
    """Counts of the training sequences with the texts' embeddings, categories, titles and (where given) brands."""
    items = pq.read_table(data_dir / "items.parquet").sort_by("item")
    brands = items["brand"].to_pylist() if "brand" in items.column_names else None
    facts = ItemFacts.of(
        len(items),
        np.load(embeddings_path, mmap_mode="r"),
        items["category"].to_pylist(),
        items["title"].to_pylist(),
        brands,
    )
    return Counts.fit(sequences, len(items), facts)


def make_lists(
    args: CandidatesArguments, rows: Rows, counts: Counts, own: OwnCounts, data_dir: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(R, N) items in first-stage order and (R, N) scores."""
    if args.source == "lists":
        logger.info("own lists: that training lists are out of fold is for %s to ensure", args.lists)
        item_ids = pq.read_table(data_dir / "items.parquet").sort_by("item")["item_id"].to_pylist()
        return read_lists(args.lists, rows.table["row_id"].to_numpy(), item_ids, args.num_candidates)
    if args.source == "model":
        model = load_model(Path(args.run_dir), args.model_dir, args.max_history)
        return model_lists(model, rows.histories, args.num_candidates, args.num_beams, args.batch_size)
    return counts.top_rows(rows.histories, args.num_candidates, own)


def _nested(values: np.ndarray) -> pa.Array:
    """A two- or three-dimensional array as an Arrow column of lists."""
    column = pa.array(values.reshape(-1))
    for width in values.shape[:0:-1]:
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, len(column) + 1, width, dtype=np.int32)), column)
    return column


def write_split(path: Path, rows: Rows, chosen: np.ndarray, lists: dict[str, np.ndarray]) -> dict[str, float]:
    """Write the chosen rows and return their counts and recall."""
    table = rows.table.take(pa.array(chosen)).select(["row_id", "user", "history", "target"])
    relevance = lists["relevance"][chosen]
    hit = relevance.any(axis=1)
    columns = {name: _nested(lists[name][chosen]) for name in ("candidates", "relevance", "first_stage_scores")}
    for name, column in {**columns, "hit": pa.array(hit), "features": _nested(lists["features"][chosen])}.items():
        table = table.append_column(name, column)
    order = ["row_id", "user", "history", *columns, "target", "hit", "features"]
    pq.write_table(table.select(order), path)
    cuts = sorted({1, min(5, relevance.shape[1]), relevance.shape[1]})
    recall = {f"recall@{cut}": float(relevance[:, :cut].any(axis=1).mean()) for cut in cuts}
    return {"rows": len(chosen), "hits": int(hit.sum()), "missed": int((~hit).sum()), **recall}


def main(args: CandidatesArguments, out_dir: Path) -> dict:
    """Make the lists, look up what is known about each candidate, and write them by split."""
    started = time.perf_counter()
    data_dir = run_dir.stage_dir(args.run_dir, "data")
    rows, sequences = Rows.load(data_dir / "rows.parquet"), training_sequences(data_dir)
    embeddings_path = run_dir.stage_dir(args.run_dir, "semantic_ids") / "embeddings.npy"
    counts = fit_counts(data_dir, embeddings_path, sequences)
    # Only training rows were counted: -1, no user, subtracts nothing.
    own = counts.own(np.where(rows.splits == "rerank", rows.users, -1), sequences)
    items, scores = make_lists(args, rows, counts, own, data_dir)
    lists = {
        "candidates": items,
        "relevance": (items == rows.targets[:, None]).astype(float),
        "first_stage_scores": scores,
        "features": counts.feature_rows(rows.histories, items, scores, own),
    }
    train = lists["features"][rows.splits == "rerank"]
    edges = {name: fit_edges(train[:, :, number].ravel()) for number, name in enumerate(FEATURES)}
    counts.save(out_dir / "evidence.npz")
    run_dir.write_json(out_dir / "features.json", {"names": list(FEATURES), "edges": edges})
    splits = {
        name: write_split(out_dir / f"{name}.parquet", rows, np.flatnonzero(rows.splits == split), lists)
        for split, name in FILES.items()
    }
    for name, found in splits.items():
        logger.info("%s: %s of %s lists hold the target", name, found["hits"], found["rows"])
    seconds = time.perf_counter() - started
    return {"source": args.source, "num_candidates": args.num_candidates, "splits": splits, "seconds": seconds}
