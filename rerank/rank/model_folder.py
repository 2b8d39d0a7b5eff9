"""Trained folders kept up to date: new items for good, and newer counts.

Both write a whole new folder and then give it the name: `add_items` and `refresh` leave MODEL_DIR as it was under
MODEL_DIR.old, or write elsewhere with an `out`. To undo them, rename the old folder back. A second one of the same
folder is refused while the first works.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rerank.baselines import Counts
from rerank.baselines.features import FEEDBACK_FEATURES
from rerank.baselines.interactions import Interactions, engine
from rerank.baselines.times import unit_of
from rerank.catalogue import check_vocabulary
from rerank.launch import run_dir
from rerank.launch.files import delete_folder
from rerank.models.ranker import EVIDENCE_FILE, RankingModel
from rerank.models.saving import SOURCES_FILE, ItemSources
from rerank.next_item.encoder import SETTINGS, NextItemEncoder
from rerank.rank.items import read_new_items, with_new_items

logger = logging.getLogger(__name__)

Change = Callable[[Path], object]


def old_folder(folder: Path) -> Path:
    """Where the folder lies as it was before an update in place."""
    return folder.with_name(f"{folder.name}.old")


def find(model_dir: str | Path) -> Path:
    """A model folder; one that is missing beside its old folder is refused with what to do."""
    folder = Path(model_dir).resolve()
    if not folder.exists() and old_folder(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist but {old_folder(folder)}, from before its last update, does; to use that one, "
            f"rename it back: mv {old_folder(folder)} {folder}"
        )
    return folder


@contextmanager
def locked(model_dir: str | Path) -> Iterator[Path]:
    """A model folder locked against a second update, one whose update was cut off between two renames put back.

    Raises:
        ValueError: Naming the process that updates it.
    """
    folder = Path(model_dir).resolve()
    if not os.access(folder.parent, os.W_OK):  # there can be no update in place
        yield find(folder)
        return
    lock = folder.with_name(f"{folder.name}.lock")
    with run_dir.lock(lock):
        try:
            if not folder.exists() and old_folder(folder).is_dir():
                old_folder(folder).rename(folder)
                logger.warning("%s was missing; %s is renamed back to it", folder, old_folder(folder))
            yield folder
        finally:
            shutil.rmtree(lock, ignore_errors=True)


def update(folder: Path, out: str | Path | None, change: Change) -> Path:
    """Change a copy of a folder, and give it the name of `out`, or that of the folder.

    Args:
        folder: Of a model.
        out: A folder that is not there yet; None to update in place, with the old folder beside.
        change: Works on the copy.

    Returns:
        The folder that is changed.
    """
    target = folder if out is None else check_out(out)
    copy = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial.", dir=target.parent))
    try:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        change(copy)
        copy.chmod(folder.stat().st_mode)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    if out is None:
        delete_folder(old_folder(folder))
        folder.rename(old_folder(folder))
    return copy.rename(target)


def check_out(out: str | Path) -> Path:
    """A folder to write; one that is there, or whose parent is not, is refused."""
    target = Path(out).resolve()
    if target.exists():
        raise ValueError(f"--out {out} is there already; choose another name, or leave --out away to update in place")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: {target.parent} is not a folder; make it first")
    return target


def add_items(
    model_dir: str | Path, items_path: str | Path, embeddings_path: str | Path | None, out: str | Path | None
) -> tuple[Path, int, int]:
    """Append the items of a file to a trained folder: catalogue, counts of zero, ids, and the item head if it has one.

    Args:
        model_dir: Of the sft or dapo stage.
        items_path: File of items that the model does not know.
        embeddings_path: Their embeddings, where the model's were given, too.
        out: As of `update`.

    Returns:
        The folder, its number of items and how many of these are new.
    """
    with locked(model_dir) as folder:
        if out is not None:
            check_out(out)
        if (folder / SETTINGS).is_file():
            change, before, after = _more_next_items(folder, items_path, embeddings_path)
        else:
            change, before, after = _more_candidates(folder, items_path, embeddings_path)
        return update(folder, out, change), after, after - before


def _more_candidates(
    folder: Path, items_path: str | Path, embeddings_path: str | Path | None
) -> tuple[Change, int, int]:
    """The change of a re-ranker's folder, and its numbers of items before and after."""
    model = RankingModel.load(folder)
    counts = Counts.load(folder / EVIDENCE_FILE) if (folder / EVIDENCE_FILE).is_file() else None
    bigger, more = with_new_items(model, counts, items_path, embeddings_path)
    bigger.load_tokenizer()  # refuses ids that the model does not know
    catalogue = bigger.prompter.catalogue

    def change(copy: Path) -> None:
        catalogue.save(copy, list(catalogue.fields))
        if more is not None:
            more.save(copy / EVIDENCE_FILE)

    return change, len(model.prompter.catalogue), len(catalogue)


def _more_next_items(
    folder: Path, items_path: str | Path, embeddings_path: str | Path | None
) -> tuple[Change, int, int]:
    """The change of the folder of a model of next items, and its numbers of items before and after."""
    from rerank.next_item.item_head import FILE, ItemHead  # imports torch

    encoder = NextItemEncoder.load(folder)
    by_ids, known = encoder.item_text == "semantic_id", encoder.catalogue
    new = read_new_items(folder, known, items_path, embeddings_path, by_ids, by_ids)
    check_vocabulary(encoder.tokenizer, new.catalogue.semantic_ids, folder)
    bigger = replace(encoder, catalogue=known.extended(new.catalogue), folder=None)
    head = ItemHead.load(folder).extended(bigger.tokens) if (folder / FILE).is_file() else None

    def change(copy: Path) -> None:
        bigger.save(copy)
        if head is not None:
            head.save(copy)

    return change, len(known), len(bigger.catalogue)


def refresh(
    model_dir: str | Path, interactions_path: str | Path, columns: Mapping[str, str] | None, out: str | Path | None
) -> tuple[Path, Counts]:
    """Count the interactions of a file in place of those that a re-ranker's facts rest on; bucket edges stay.

    They are read as the run's recipe reads its own: by `where`, `dedupe`, `on_bad_rows` and `min_user_interactions`,
    the latter of known items.

    Args:
        model_dir: Of the sft or dapo stage.
        interactions_path: All interactions that the counts may know, those of before too.
        columns: Of the file, where they differ from those of the run's and from user, item, time.
        out: As of `update`.

    Returns:
        The folder and its counts.
    """
    with locked(model_dir) as folder:
        if out is not None:
            check_out(out)
        counts = _count_anew(folder, interactions_path, columns)
        return update(folder, out, lambda copy: counts.save(copy / EVIDENCE_FILE)), counts


def _count_anew(folder: Path, interactions_path: str | Path, columns: Mapping[str, str] | None) -> Counts:
    """Counts of the interactions of a file, with the facts of a folder."""
    from rerank.rank.tables import read_interactions

    path = folder / EVIDENCE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so there are no counts to renew; give a folder of a re-ranker")
    model, old = RankingModel.load(folder), Counts.load(path)
    item_ids = pa.array(model.prompter.catalogue.item_ids, pa.string())
    reading = ItemSources.load(folder).reading if (folder / SOURCES_FILE).is_file() else {}
    table = read_interactions(interactions_path, reading, columns)
    items = pc.fill_null(pc.index_in(table["item_id"].cast(pa.string()), item_ids), -1).to_numpy()
    users = table["user_id"].dictionary_encode().combine_chunks().indices.to_numpy()
    num_users = int(users.max(initial=-1)) + 1
    kept = (items >= 0) & _frequent(reading.get("min_user_interactions") or 0, num_users, users[items >= 0])[users]
    _check_known(items, kept, old, model, interactions_path)
    times = table["time"].to_numpy().astype(float)[kept]
    until = float(np.nanmax(times)) if np.isfinite(times).any() else None
    _check_unit(until, old, folder, interactions_path)
    known = {"user": users[kept], "item": items[kept].astype(np.int64), "position": np.arange(kept.sum())}
    with engine() as counting:
        interactions = Interactions(counting, counting.stored(ibis.memtable(pa.table(known))), old.num_items)
        return Counts.of(interactions, old.facts, old.feedback, until, old.neighbours)


def _frequent(least: int, num_users: int, users: np.ndarray) -> np.ndarray:
    """(U,) whether a user has the fewest interactions of known items that a run's data asks for.

    Args:
        least: That number.
        num_users: U.
        users: Number of the user of each interaction of a known item.
    """
    frequent = np.bincount(users, minlength=num_users) >= least
    if not frequent.all():
        logger.warning(
            "%d of %d users are left out, who have fewer than %d interactions of known items "
            "(min_user_interactions of the run's data)", (~frequent).sum(), num_users, least,
        )  # fmt: skip
    return frequent


def _check_unit(until: float | None, old: Counts, folder: Path, path: str | Path) -> None:
    """Refuse times in another unit than those of the counts."""
    if until is None or old.until is None:
        return
    new, before = unit_of(until), unit_of(old.until)
    if new != before:
        raise ValueError(f"{path} has times in {new} but those of {folder} are in {before}; write them in {before}")


def _check_known(items: np.ndarray, kept: np.ndarray, old: Counts, model: RankingModel, path: str | Path) -> None:
    """Refuse interactions of which none counts; say how many do not, and that the file may lack older ones."""
    num_known, shown = int((items >= 0).sum()), set(model.prompter.settings.evidence_names)
    folder, of_lists = model.folder, shown.intersection(FEEDBACK_FEATURES)
    if not num_known:
        cure = "check the columns, or give these items by `rerank add-items` first"
        raise ValueError(f"{path}: none of its {len(items)} interactions is of an item that {folder} knows; {cure}")
    if not kept.any():
        cure = "check the columns, or give the older interactions too"
        raise ValueError(f"{path}: none of its users has the min_user_interactions of the run's data; {cure}")
    if num_known < len(items):
        logger.warning(
            "%d of %d interactions are of items that the model does not know, and are left out; `rerank add-items` "
            "adds such items", len(items) - num_known, len(items),
        )  # fmt: skip
    if kept.sum() < old.popularity.sum():
        logger.warning(
            "%s has %d interactions of known items but the counts of before rest on %d: they are replaced, so give "
            "the older ones too", path, kept.sum(), old.popularity.sum(),
        )  # fmt: skip
    if of_lists:
        logger.warning("%s of the prompts rest on lists that were shown, and stay as they are", ", ".join(of_lists))
