"""Whether a model of next items was trained on the targets of the training lists that it is to make."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.launch.run_dir import StageRecord
from rerank.rows.histories import TRAINING

logger = logging.getLogger(__name__)

KEYS = ["user_id", "item_id"]


def refuse_seen_targets(folder: Path, run: str | Path) -> None:
    """Refuse a model folder of the sft stage whose run trained on targets of this run's training lists.

    Its lists of these rows would hold their targets more often than those of held-out rows. A target that its user
    took before, too, tells nothing. A folder that is in no run with its data is not known to have seen any.
    """
    source = _run_of(folder)
    if source is None:
        warning = "model_dir %s is in no run with its data: whether it has seen the training targets is not known"
        logger.warning(warning, folder)
        return
    targets = _pairs(run, ("rerank",)).join(_pairs(run, ("train",)), KEYS, join_type="left anti")
    seen = targets.join(_pairs(source, TRAINING), KEYS, join_type="left semi").sort_by("user_id")
    if seen.num_rows:
        first = seen.slice(0, 1).to_pylist()[0]
        raise ValueError(
            f"model_dir {folder} was trained on {seen.num_rows} of {targets.num_rows} targets of the training lists, "
            f"such as item {first['item_id']!r} of user {first['user_id']!r}, so that these lists would not be like "
            "those of test; leave model_dir out, or name a model of a run whose num_valid holds these targets out"
        )


def _run_of(folder: Path) -> Path | None:
    """The run of a model folder STAGE/model, if the data that the stage was made from is still there."""
    stage = folder.resolve().parent
    record = stage / "stage.json"
    if not record.is_file() or not run_dir.is_finished(stage.parent, "data"):
        return None
    made_from = StageRecord.load(record).inputs.get("data")
    return stage.parent if made_from == run_dir.read_record(stage.parent, "data").id else None


def _pairs(run: str | Path, splits: Sequence[str]) -> pa.Table:
    """Each user and item of interactions of these splits once, by their original ids."""
    data = run_dir.stage_dir(run, "data")
    table = pq.read_table(data / "interactions.parquet", columns=["user", "item", "split"])
    table = table.filter(pc.field("split").isin(splits))
    for name in ("user", "item"):
        originals = pq.read_table(data / f"{name}s.parquet", columns=[name, f"{name}_id"])
        table = table.join(originals, name)
    return table.group_by(KEYS).aggregate([])
