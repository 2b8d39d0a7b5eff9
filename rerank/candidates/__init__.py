"""Stage 4: a first-stage ranker's list for every row, and facts about each candidate.

In: the data and semantic_ids folders, the midtrain folder too with `source: model`. Out: `train.parquet` (rows of the
split `rerank`), `valid.parquet`, `test.parquet`, `features.json` (names and bucket edges) and `evidence.npz` (counts);
with `encoder` also `embeddings.npy` (float32, length one, row = item).
A list without the target is kept with `hit` false: it counts end to end and is no training row. Training lists are out
of fold: `transitions` subtracts the user's own counts, and a model that has seen the rows' targets is refused.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.candidates \
        --config recipes/ml100k/4_candidates.yaml
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rerank.baselines import NUM_BUCKETS, Counts, feature_names
from rerank.baselines.interactions import engine
from rerank.baselines.pairs import neighbours_of
from rerank.candidates.augmentation import AugmentationArguments
from rerank.candidates.counting import CountedRows, Events, check_numbers, counted_rows, item_facts
from rerank.candidates.making import edges_of, fill, read_item_ids, stored_lists
from rerank.candidates.model_lists import make_shard
from rerank.candidates.reordering import reorder
from rerank.candidates.seen_targets import refuse_seen_targets
from rerank.candidates.writing import further_tables, write_split
from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.launch.disk import told_of_full_disk
from rerank.launch.engines import check_backend
from rerank.launch.files import write_json
from rerank.launch.stages import Stage
from rerank.launch.values import BACKENDS, check_choice, check_range, option
from rerank.models.text_embeddings import (
    EMBEDDINGS,
    check_embeddings,
    encode,
    find_encoder,
    load_embeddings,
    read_items,
    save_normalised,
)
from rerank.next_item.encoder import SETTINGS
from rerank.next_item.item_head import FILE as HEAD_FILE
from rerank.rows import FEATURES_FILE, TargetRows, has_lists
from rerank.rows.lists import read_lists

logger = logging.getLogger(__name__)

SOURCES = ("transitions", "model", "lists", "requests", "lambdamart")
FILES = {"rerank": "train", "valid": "valid", "test": "test"}  # split of a row -> name of its file


@dataclass
class CandidatesArguments(AugmentationArguments):
    """Options of the candidates stage."""

    source: str = option(
        "transitions",
        "transitions (counts), model (mid-trained, by beams), lists (yours), requests (those of the log), or "
        "lambdamart: the lists of requests, lists, model_dir or transitions, re-ordered by trees fitted on other "
        "users' or earlier rows.",
    )
    num_candidates: int = option(10, "Length of a list.")
    lists: str | None = option(
        None,
        "With source lists: a Parquet file with row_id (of data/rows.parquet), candidates (original item "
        "ids, best first) and optionally scores. Training rows must come from a ranker that has not seen them.",
    )
    model_dir: str | None = option(
        None,
        "With source model or lambdamart: a folder that the sft stage made with task next_item, in place of the "
        "run's mid-trained model. One that has seen the targets of the training rows is refused where its run is "
        "there.",
    )
    num_beams: int = option(
        20, "With source model: beams a row, at least num_candidates; 0: its item head, in one pass."
    )
    batch_size: int = option(64, "With source model: rows decoded together.")
    item_numbers: list[str] = option([], "Item columns of numbers that become facts about a candidate.")
    encoder: str | None = option(
        None,
        "In a run without semantic ids, whose stage has one: a sentence encoder of the items' texts, for the facts of "
        "their similarity.",
    )
    num_buckets: int = option(
        NUM_BUCKETS, "Buckets of a fact with evidence: codes; mid-training teaches its own num_buckets."
    )
    count_window: float = option(
        86400.0, "Requests split by time: seconds of a window; a training row is counted on what lies before its own."
    )
    backend: str = option("duckdb", "What counts: duckdb, in this process, or pyspark, where it is not enough.")
    neighbours: int | None = option(
        None,
        "Largest entries of each item that the tables of which item follows which keep; a value that is cut counts "
        "0. By default all, and 200 from 50,000 items on.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours is not None:
            check_range("neighbours", self.neighbours, least=1)
        check_choice("source", self.source, SOURCES)
        check_choice("backend", self.backend, BACKENDS)
        if (self.source == "lists" and self.lists is None) or (
            self.lists is not None and self.source not in ("lists", "lambdamart")
        ):
            raise ValueError(f"source is {self.source} and lists is {self.lists}; lists goes with source lists only")
        check_range("num_buckets", self.num_buckets, least=2)
        check_range("count_window", self.count_window, above=0)
        check_range("batch_size", self.batch_size, least=1)
        check_range("num_candidates", self.num_candidates, least=2)
        if self.pool_size is not None:
            check_range("pool_size", self.pool_size, above=self.num_candidates)
        if self.by_model and self.num_beams != 0:
            check_range("num_beams", self.num_beams, least=self.num_candidates)
        if self.model_dir is not None and not self.by_model:
            raise ValueError(
                f"model_dir is {self.model_dir} but source is {self.source}; it goes with source model or lambdamart"
            )
        if self.model_dir is not None and self.lists is not None:
            raise ValueError(f"model_dir is {self.model_dir} and lists is {self.lists}; leave one out")
        if self.source == "model" and self.num_beams == 0 and self.model_dir is None:
            raise ValueError("num_beams is 0 but a mid-trained model has no item head; give a model_dir that has one")

    @property
    def by_model(self) -> bool:
        """Whether a model makes the lists."""
        return self.source == "model" or (self.source == "lambdamart" and self.model_dir is not None)


def optional_inputs(args: CandidatesArguments) -> tuple[str, ...]:
    """Lists of a model come from its folder, and by semantic ids."""
    if not args.by_model:
        return ()
    return ("semantic_ids",) if args.model_dir is not None else ("semantic_ids", "midtrain")


def check(args: CandidatesArguments) -> None:
    """Refuse lists that cannot be made from this data, and own lists that do not fit it."""
    check_backend(args.backend)
    if args.lists is not None and not Path(args.lists).is_file():
        raise FileNotFoundError(f"lists {args.lists} is not there; give a Parquet file of row_id and candidates")
    if args.model_dir is not None:
        check_model_dir(args, Path(args.model_dir))
    if args.encoder is not None:
        find_encoder(args.encoder)
        if run_dir.is_finished(args.run_dir, "semantic_ids"):
            raise ValueError(f"encoder is {args.encoder} but the stage semantic_ids has made embeddings; leave it out")
    if not run_dir.is_finished(args.run_dir, "data"):
        return
    reads_midtrain = "midtrain" in optional_inputs(args)
    if reads_midtrain and run_dir.read_metrics(args.run_dir, "data")["midtrain_has_seen_rerank_targets"]:
        raise ValueError(
            "source is model but num_rerank of the data stage is all, so the mid-trained model has seen the targets "
            "of the training lists; set num_rerank to a number, or source to transitions"
        )
    if args.model_dir is not None:
        refuse_seen_targets(Path(args.model_dir), args.run_dir)
    check_numbers(args.run_dir, args.item_numbers)
    if check_requests(args):
        return
    rows, item_ids = TargetRows.load(args.run_dir), read_item_ids(args.run_dir)
    if args.lists is not None:
        read_lists(args.lists, rows.row_ids, item_ids)
    for name in ("num_candidates", "pool_size"):
        length = getattr(args, name) or 0
        too_long = np.flatnonzero(rows.histories.lengths > len(item_ids) - length) if args.exclude_seen else ()
        seen = max((len(np.unique(rows.histories[place])) for place in too_long), default=0)
        free = len(item_ids) - seen
        if length > free and (name == "pool_size" or args.lists is None):
            cure = f"use at most {free}" + (", or exclude_seen: false" if seen else "")
            raise ValueError(
                f"{name} is {length} but the longest history leaves {free} of {len(item_ids)} items; {cure}"
            )


def check_shard(args: CandidatesArguments) -> None:
    """Refuse shards of lists that no model makes."""
    if not args.by_model:
        raise ValueError(f"--shard parts the rows for a model, but source is {args.source}; leave it out")


def check_requests(args: CandidatesArguments) -> bool:
    """Whether the rows are requests; refuses what `check_kind` does."""
    is_log = has_lists(args.run_dir)
    check_kind(args, is_log)
    return is_log


def check_kind(args: CandidatesArguments, is_log: bool) -> None:
    """Refuse a source that does not go with the rows, requests or not, and lists of another kind."""
    if is_log != (args.source == "requests") and not (is_log and args.source == "lambdamart"):
        rows = "are requests, which bring their lists" if is_log else "are no requests"
        cure = "requests or lambdamart" if is_log else "transitions, or name requests in the data recipe"
        raise ValueError(f"source is {args.source} but the rows of the data stage {rows}; set source to {cure}")
    for name in ("lists", "model_dir"):
        if is_log and getattr(args, name) is not None:
            raise ValueError(
                f"{name} is {getattr(args, name)} but the rows of the data stage are requests; leave it out"
            )
    if is_log and (args.pool_size or args.cut_histories or args.first_stages != ["transitions"]):
        raise ValueError(
            "pool_size, cut_histories and first_stages draw lists from a first stage, but the rows are requests, "
            "which bring their lists; set shuffle_candidates alone"
        )


def check_model_dir(args: CandidatesArguments, folder: Path) -> None:
    """Refuse a folder that is no model of next items, lacks the head that is asked for, or knows another catalogue."""
    for name, wanted in ((SETTINGS, True), (HEAD_FILE, args.num_beams == 0)):
        if wanted and not (folder / name).is_file():
            raise FileNotFoundError(f"model_dir {folder} has no {name}; train it with the sft stage, task next_item")
    if run_dir.is_finished(args.run_dir, "data") and run_dir.is_finished(args.run_dir, "semantic_ids"):
        if Catalogue.load(folder) != Catalogue.load(args.run_dir):
            raise ValueError(f"model_dir {folder} knows other items or ids than {args.run_dir}; use runs of one data")


def log_counts(counts: Counts) -> None:
    """Say what the counts do not hold."""
    if counts.neighbours is not None:
        logger.info("counts keep the %d best neighbours of each item (neighbours)", counts.neighbours)
    if unknown := counts.regression.num_unknown:
        known = len(counts.popularity) - unknown
        logger.info("fit_history and fit_recent are of the %d most popular items; %d have no weights", known, unknown)


def _embeddings(args: CandidatesArguments, out_dir: Path) -> np.ndarray | None:
    """Those of the semantic_ids stage, or of a run without it by `encoder`."""
    if args.encoder is None:
        return load_embeddings(args.run_dir)
    item_ids, texts = read_items(args.run_dir)
    found = encode(texts, args.encoder)
    check_embeddings(found, item_ids, f"encoder {args.encoder}")
    return save_normalised(found, out_dir / EMBEDDINGS)


def main(args: CandidatesArguments, out_dir: Path) -> dict[str, object]:
    """Make the lists, look up facts about each candidate, and write them by split, a part of the rows at a time."""
    started = time.perf_counter()
    rows = TargetRows.load(args.run_dir)
    facts = item_facts(args.run_dir, args.item_numbers, _embeddings(args, out_dir))
    if not facts.has_embeddings:
        logger.info("the texts have no embeddings, for which encoder is: no facts of their similarity")
    with told_of_full_disk(out_dir), engine(args.backend) as counting:
        events = Events.load(counting, args.run_dir, rows)
        begun = time.perf_counter()
        counts = events.counts(facts, neighbours_of(len(facts.brands), args.neighbours))
        counts_seconds = time.perf_counter() - begun
        log_counts(counts)
        names = feature_names(counts, [] if rows.lists is None else list(rows.lists.columns))
        lists = stored_lists(args, rows, out_dir)

        def counted() -> Iterator[CountedRows]:
            return counted_rows(args.run_dir, rows, counts, events, args.count_window, args.seed)

        fill(args, counting, lists, names, counted())
        if args.source == "lambdamart":
            reorder(args.run_dir, rows, lists)
            fill(args, counting, lists, names, counted())
        edges, constant = edges_of(names, lists, np.flatnonzero(rows.splits == "rerank"), args.num_buckets)
        counts.save(out_dir / "evidence.npz")
        write_json(out_dir / FEATURES_FILE, {"names": list(names), "edges": edges})
        written = {
            name: write_split(out_dir / f"{name}.parquet", lists, split, further_tables(args, lists, counts, events))
            for split, name in FILES.items()
        }
    splits = {name: of_split for name, (of_split, _) in written.items()}
    sizes = {"source": args.source, "num_candidates": int(lists.lengths.max())}
    sizes["further_lists"] = sum(num_further for _, num_further in written.values())
    found = {} if rows.lists is None else {"constant_features": constant}
    seconds = {"counts_seconds": counts_seconds, "seconds": time.perf_counter() - started}
    return {**sizes, **found, "splits": splits, **seconds}


STAGE = Stage(
    name="candidates",
    arguments=(CandidatesArguments,),
    main=main,
    check=check,
    main_of_shard=make_shard,
    check_shard=check_shard,
    inputs=("data",),
    optional_inputs=optional_inputs,
    inputs_if_made=("semantic_ids",),
    files=("lists", "model_dir", "encoder"),
)
