"""What a rollout is, written and read: one Parquet row per sampled completion.

The dapo stage writes `RUN_DIR/dapo/rollouts/part-<step>-<rank>.parquet`. A part gets its name only when it is whole,
so a crash at any moment leaves readable files. `rerank inspect RUN_DIR` shows them.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

SCHEMA_VERSION = "2"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step that the rollout was sampled for
        ("run", pa.string()),
        ("round", pa.int64()),  # sampling round
        ("group", pa.int64()),  # rollouts of one step and one group answer the same prompt
        ("row_id", pa.int64()),
        ("user", pa.int64()),
        ("target", pa.int64()),  # item
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("policy_logps", pa.list_(pa.float32())),  # log-probability of each token, by the model in training
        ("sampling_logps", pa.list_(pa.float32())),  # the same, by the engine that sampled
        ("reward_components", pa.map_(pa.string(), pa.float64())),  # each reward after its gate, before its weight
        ("reward_gates", pa.map_(pa.string(), pa.bool_())),  # whether the condition of each gated reward held
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


def _parts_folder(run_dir: Path) -> Path:
    for folder in ("dapo/rollouts", "dapo.partial/rollouts", "rollouts", "."):
        if any((run_dir / folder).glob("part-*.parquet")):
            return run_dir / folder
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder of a run")
    raise ValueError(f"{run_dir} holds no rollouts; run the dapo stage, or give the folder of a run that did")


def _read_part(path: Path, columns: Sequence[str] | None) -> pa.Table | None:
    """The rollouts of one part, None when the file is cut off or damaged."""
    if not is_whole(path):
        return None
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError):
        return None


def is_whole(path: Path) -> bool:
    """Whether a part has its end, where Parquet keeps the schema; one of another schema version is refused."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return False
    version = metadata.get(b"schema_version", b"none").decode()
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has rollout schema version {version} but this code reads {SCHEMA_VERSION}; "
            "read it with the version of rerank that wrote it"
        )
    return True


def _check_columns(record: Mapping[str, Any]) -> None:
    missing = [name for name in SCHEMA.names if name not in record]
    unknown = [name for name in record if name not in SCHEMA.names]
    if missing or unknown:
        raise ValueError(f"a rollout must have the columns of rollouts.SCHEMA; missing {missing}, unknown {unknown}")


def _storable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as Arrow takes it: maps as pairs, and text without lone surrogates, which are not UTF-8."""
    texts = {name: _utf8(record[name]) for name in ("prompt", "completion")}
    return {**record, **texts, **{name: list(record[name].items()) for name in ("reward_components", "reward_gates")}}


def _utf8(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
