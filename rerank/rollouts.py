"""What a rollout is, written and read: one Parquet row per sampled completion, and its printed view.

The dapo stage writes `RUN_DIR/dapo/rollouts/part-<step>-<rank>.parquet`. A part gets its name only when it is whole,
so a crash at any moment leaves readable files. `rerank inspect RUN_DIR` prints what `inspect` shows.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from rerank import rollout_view
from rerank.catalogue import Catalogue

logger = logging.getLogger(__name__)

SCHEMA_VERSION = "2"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step that the rollout was sampled for
        ("round", pa.int64()),
        ("group", pa.int64()),  # rollouts of one step and one group answer the same prompt
        ("row_id", pa.int64()),
        ("user", pa.int64()),
        ("target", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("policy_logps", pa.list_(pa.float32())),  # log-probability of each token, by the model in training
        ("sampling_logps", pa.list_(pa.float32())),  # the same, by the engine that sampled
        ("reward_components", pa.map_(pa.string(), pa.float64())),  # each reward after its gate, before its weight
        ("reward_gates", pa.map_(pa.string(), pa.bool_())),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("truncated", pa.bool_()),
        ("failure", pa.string()),  # null for a ranking, else one of prompts.FAILURES
        ("order", pa.list_(pa.int64())),  # positions into candidates, best first; null for no ranking
        ("candidates", pa.list_(pa.int64())),  # items in the order shown
        ("relevance", pa.list_(pa.float64())),  # of each shown candidate
        ("first_stage_ranks", pa.list_(pa.int64())),  # 1-based, of each shown candidate
        ("target_rank_before", pa.int64()),
        ("target_rank_after", pa.int64()),  # null for no ranking
        ("kept", pa.bool_()),  # whether it was trained on
        ("discard_reason", pa.string()),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)
_SHOWN = [
    *("step", "group", "row_id", "user", "prompt", "completion", "reward_components", "reward", "advantage"),
    *("truncated", "failure", "order", "candidates", "relevance", "first_stage_ranks", "target_rank_before"),
    *("target_rank_after", "kept", "discard_reason"),
]


class RolloutWriter:
    """Collects the rollouts of one process and writes each step as one part.

    Args:
        folder: Where parts go; made when absent.
        rank: Number of the process, so that no two write one file.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[int, list[dict[str, Any]]] = {}
        self._num_parts: dict[int, int] = {}

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep records, each with exactly the columns of SCHEMA, until `flush`."""
        for record in records:
            _check_columns(record)
            self._records.setdefault(record["step"], []).append(_storable(record))

    def flush(self) -> list[Path]:
        """Write what was added, one part a step; a resumed run overwrites the parts of the steps it repeats."""
        paths = []
        for step in sorted(self._records):
            table = pa.Table.from_pylist(self._records[step], schema=SCHEMA)
            number = self._num_parts.get(step, 0)
            path = self.folder / f"part-{step:08d}-{self.rank}{f'-{number}' if number else ''}.parquet"
            temporary = path.with_suffix(".tmp")
            pq.write_table(table, temporary, compression="zstd")
            temporary.replace(path)
            self._num_parts[step] = number + 1
            paths.append(path)
        self._records.clear()
        return paths

    def discard_from(self, step: int) -> None:
        """Delete this process's parts of `step` and later, which a run resumed from a checkpoint samples anew."""
        for path in self.folder.glob(f"part-*-{self.rank}*.parquet"):
            _, written_step, rank = path.stem.split("-")[:3]
            if int(rank) == self.rank and int(written_step) >= step:
                path.unlink()


def read_rollouts(run_dir: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rollouts of a run, by step.

    Args:
        run_dir: A run, its dapo folder (finished or partial), or the folder of the parts.
        columns: Those to read; all when None.

    Raises:
        ValueError: When there is no readable part, or one of another schema version.
    """
    parts = sorted(_parts_folder(Path(run_dir)).glob("part-*.parquet"), key=lambda path: path.stem)
    tables, unreadable = [], []
    for path in parts:
        table = _read_part(path, columns)
        (unreadable if table is None else tables).append(path if table is None else table)
    if unreadable:
        logger.warning(
            "%d of %d rollout files are cut off or damaged and left out, the first is %s; delete what is damaged",
            len(unreadable),
            len(parts),
            unreadable[0],
        )
    if not tables:
        raise ValueError(f"{run_dir} holds no readable rollouts; run the dapo stage, or give the folder of such a run")
    return pa.concat_tables(tables)


def inspect(
    run_dir: str | Path,
    limit: int = 5,
    step: int | None = None,
    row_id: int | None = None,
    console: Console | None = None,
) -> None:
    """Print groups of rollouts, the latest step first.

    Args:
        run_dir: As in `read_rollouts`.
        limit: How many groups.
        step: Only groups of this step.
        row_id: Only groups of this row.
        console: A rich console; one on standard output when None.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit} but must be at least 1")
    table = read_rollouts(run_dir, _SHOWN)
    steps = pc.min_max(table["step"]).as_py()
    for name, value in (("step", step), ("row_id", row_id)):
        if value is not None:
            table = table.filter(pc.equal(table[name], value))
    if table.num_rows == 0:
        asked = ", ".join(f"{n} {v}" for n, v in (("step", step), ("row", row_id)) if v is not None)
        raise ValueError(f"{run_dir} has no rollout of {asked}; its steps are {steps['min']} to {steps['max']}")
    rollout_view.print_groups(_groups(table, limit), _catalogue(Path(run_dir)), console or Console())


def _groups(table: pa.Table, limit: int) -> list[list[dict[str, Any]]]:
    """The first `limit` groups, latest step first, each a list of rollouts."""
    keys = table.select(["step", "group"]).group_by(["step", "group"]).aggregate([])
    keys = keys.sort_by([("step", "descending"), ("group", "ascending")]).slice(0, limit).to_pylist()
    groups = []
    for key in keys:
        chosen = pc.and_(pc.equal(table["step"], key["step"]), pc.equal(table["group"], key["group"]))
        groups.append(table.filter(chosen).to_pylist(maps_as_pydicts="strict"))
    return groups


def _catalogue(run_dir: Path) -> Catalogue | None:
    """The catalogue of the run, None for rollouts kept without one."""
    if (run_dir / "dapo/model/catalogue.parquet").is_file():
        return Catalogue.load(run_dir / "dapo/model")
    return Catalogue.load(run_dir) if (run_dir / "semantic_ids/semantic_ids.parquet").is_file() else None


def _parts_folder(run_dir: Path) -> Path:
    for folder in ("dapo/rollouts", "dapo.partial/rollouts", "rollouts", "."):
        if any((run_dir / folder).glob("part-*.parquet")):
            return run_dir / folder
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder of a run")
    raise ValueError(f"{run_dir} holds no rollouts; run the dapo stage, or give the folder of a run that did")


def _read_part(path: Path, columns: Sequence[str] | None) -> pa.Table | None:
    """The rollouts of one part, None when the file is cut off or damaged."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    version = metadata.get(b"schema_version", b"none").decode()
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has rollout schema version {version} but this code reads {SCHEMA_VERSION}; "
            "read it with the version of rerank that wrote it"
        )
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError):
        return None


def _check_columns(record: Mapping[str, Any]) -> None:
    missing = [name for name in SCHEMA.names if name not in record]
    unknown = [name for name in record if name not in SCHEMA.names]
    if missing or unknown:
        raise ValueError(f"a rollout must have the columns of rollouts.SCHEMA; missing {missing}, unknown {unknown}")


def _storable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as Arrow takes it: maps as pairs, and text without lone surrogates, which are not UTF-8."""
    texts = {name: _utf8(record[name]) for name in ("prompt", "completion")}
    return {
        **record,
        **texts,
        "reward_components": list(record["reward_components"].items()),
        "reward_gates": list(record["reward_gates"].items()),
    }


def _utf8(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
