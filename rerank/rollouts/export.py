"""Stored rollouts in the files of another tool.

    rerank export RUN_DIR --format trl

TRL's GRPOTrainer with `log_completions` writes `completions/completions_<step>.parquet`: the columns `step`, `prompt`,
`completion`, one a reward, what rewards log beside it, and `advantage` (trl/templates/completions_dataset_card.md and
`GRPOTrainer.log` of TRL 1.16). So does the export, with a few columns of the store in place of what rewards log. Steps
are TRL's: the first is 1, which is 0 in the store. Discarded rollouts are there too, without an advantage.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch.files import write_whole
from rerank.rollouts.schema import SCHEMA, Rollout
from rerank.rollouts.store import OpenRollouts, open_rollouts

ADDED = ("row_id", "group", "round", "reward", "outcome", "kept", "discard_reason")  # columns of the store
OWN_OF_TRL = ("step", "prompt", "completion", "advantage")


def export_trl(run_dir: str | Path, out: str | Path) -> list[Path]:
    """Write a run's rollouts as TRL writes completions, a file a step, into `out`/completions; returns the files.

    Args:
        run_dir: A run, its dapo folder, or the folder of its rollouts.
        out: A folder that is there.

    Raises:
        FileNotFoundError: When a folder is missing.
        ValueError: When there are no rollouts, a reward is called like a column, or files of other steps are there.
    """
    opened = open_rollouts(run_dir)
    if not Path(out).is_dir():
        raise FileNotFoundError(f"--out {out} is not a folder; make it first")
    schema = _schema(_reward_names(opened))
    steps = opened.query("SELECT DISTINCT step FROM rollouts ORDER BY step")["step"].to_pylist()
    folder = Path(out) / "completions"
    paths = {step: folder / f"completions_{step + 1:05d}.parquet" for step in steps}
    for path in sorted(folder.glob("completions_*.parquet")):
        if path not in paths.values():
            raise ValueError(f"{path} is of a step that {run_dir} lacks; delete {folder}, or give another --out")
    folder.mkdir(exist_ok=True)
    for step, path in paths.items():
        table = _completions(opened.records(f"SELECT * FROM rollouts WHERE step = {step}"), schema)
        write_whole(path, partial(pq.write_table, table))
    return [*paths.values()]


def _reward_names(opened: OpenRollouts) -> list[str]:
    """The rewards of a run, those that never applied included, in the order of its recipe."""
    found: dict[str, None] = {}
    for column in ("conditions", "reward_components"):  # older stores lack conditions
        keys = opened.query(f"SELECT DISTINCT map_keys({column}) AS names FROM rollouts ORDER BY len(names) DESC")
        found |= dict.fromkeys(name for names in keys["names"].to_pylist() for name in names or ())
    for name in found:
        if name in (*OWN_OF_TRL, *ADDED):
            raise ValueError(f"a reward is called {name}, and so is a column of the export; give it another name")
    return [*found]


def _schema(rewards: Sequence[str]) -> pa.Schema:
    """TRL's columns in TRL's order, and ADDED where TRL has what rewards log."""
    *before, last = (SCHEMA.field(name) for name in OWN_OF_TRL)
    values = (pa.field(name, pa.float64()) for name in rewards)
    return pa.schema([*before, *values, *(SCHEMA.field(name) for name in ADDED), last])


def _completions(rollouts: Sequence[Rollout], schema: pa.Schema) -> pa.Table:
    """A step's rollouts, group by group."""
    in_order = sorted(rollouts, key=lambda rollout: (rollout["round"], rollout["group"]))
    rows = [{**of, **(of["reward_components"] or {}), "step": of["step"] + 1} for of in in_order]
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
