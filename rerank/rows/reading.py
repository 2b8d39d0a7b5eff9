"""The rows of a candidates table, read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.rows.on_read import read_parts
from rerank.rows.row import RankingRow
from rerank.rows.sequences import HISTORY, history_columns, read_histories

T = TypeVar("T")
COLUMNS = ("row_id", "user", "candidates", "relevance")  # of a candidates table, with its histories; others optional
OPTIONAL = (
    *("first_stage_ranks", "list_number", "features", "fields"),
    *("request_id", "time", "history_times", "history_events"),
)
USES = ("sft", "dapo", "all")


def read_rows(path: str | Path, needs_features: bool = False) -> list[RankingRow]:
    """The rows of a candidates table that are hits (`RankingRow.is_hit`), by row_id.

    Args:
        path: Parquet with COLUMNS and histories (`rows.sequences`), such as RUN_DIR/candidates/train.parquet.
        needs_features: Refuse rows without features.

    Raises:
        ValueError: When a column is missing, no row is left, or a row lacks the features that are needed.
    """
    if needs_features:
        check_features(path)
    records = read_records(path)
    rows = [row for row in map(RankingRow.of, records) if row.is_hit]
    if not rows:
        refuse_no_hits(path, len(records))
    return rows


def read_records(path: str | Path, optional: Sequence[str] = OPTIONAL) -> list[dict[str, Any]]:
    """The rows of a candidates table by row_id, for `RankingRow.of`, each with its history as a list.

    Args:
        path: Parquet with COLUMNS and histories; those that are in the users' sequences are read from the data folder
            of the same run.
        optional: Further columns, as far as the table has them.

    Raises:
        ValueError: When a column of COLUMNS is missing.
    """
    return records_of(pq.read_table(path, columns=columns_of(path, optional)).sort_by("row_id"), path)


def records_of(table: pa.Table, path: str | Path) -> list[dict[str, Any]]:
    """`read_records` of some rows of the candidates table at `path`, in their order."""
    histories = read_histories(table, data_dir_of(path), Path(path))
    return [
        {**record, HISTORY: history.tolist()} for record, history in zip(table.to_pylist(), histories, strict=True)
    ]


def data_dir_of(path: str | Path) -> Path:
    """The folder of the data stage of the run that a candidates table is in."""
    return run_dir.stage_dir(Path(path).absolute().parents[1], "data")


def columns_of(path: str | Path, optional: Sequence[str] = OPTIONAL) -> list[str]:
    """Those of COLUMNS and of optional columns that a candidates table has, and those that tell its histories.

    Raises:
        ValueError: When one of COLUMNS is missing.
    """
    names = pq.read_schema(path).names
    for name in COLUMNS:
        if name not in names:
            raise ValueError(
                f"{path} has no column {name!r}; it has {', '.join(names)}; run the candidates stage again"
            )
    return [*COLUMNS, *history_columns(names), *(name for name in optional if name in names)]


def refuse_no_hits(path: str | Path, num_rows: int) -> NoReturn:
    """Say that no row of a candidates table can be ranked well or badly."""
    raise ValueError(f"{path}: none of its {num_rows} rows lists a relevant item; use longer candidate lists")


def check_features(path: str | Path) -> None:
    """Refuse a candidates table without features.

    Raises:
        ValueError: Naming the file and the first row that lacks them.
    """
    cure = "let the candidates stage compute them, or use evidence: none and a teacher that is a language model"
    if "features" not in pq.read_schema(path).names:
        raise ValueError(f"{path} has no column features, which evidence rests on; {cure}.")
    for table in read_parts(path, ["row_id", "features"]):
        lacking = table.filter(
            pc.or_kleene(pc.is_null(table["features"]), pc.equal(pc.list_value_length(table["features"]), 0))
        )
        if len(lacking):
            raise ValueError(
                f"{path}: row_id {lacking['row_id'][0]} has no features, which evidence rests on; {cure}."
            )


def check_top_k(path: str | Path, top_k: int, filters: list[tuple[str, str, str]] | None = None) -> None:
    """Refuse a `top_k` above every list of a table.

    Args:
        path: Of the table.
        top_k: Of the prompt.
        filters: Of the rows that count, as `pyarrow.parquet.read_table` has them.

    Raises:
        ValueError: Naming the file and its longest list.
    """
    if not top_k:
        return
    lists = pq.read_table(path, columns=["candidates"], filters=filters)["candidates"]
    longest = pc.max(pc.list_value_length(lists)).as_py() or 0
    if top_k > longest:
        raise ValueError(
            f"top_k is {top_k} but the longest list of {path} has {longest} candidates; lower it, or set it to 0, "
            "so that a completion names all"
        )


def training_rows(run: str | Path, use: str, needs_features: bool = False) -> list[RankingRow]:
    """The hit rows of the training lists that the traces stage assigned to `sft` or `dapo`, or `all` of them.

    Raises:
        ValueError: When none is left.
    """
    check_use(use)
    split = pq.read_table(run_dir.stage_dir(run, "traces") / "row_split.parquet").to_pydict()
    used_for = dict(zip(split["row_id"], split["used_for"], strict=True))
    rows = read_rows(run_dir.stage_dir(run, "candidates") / "train.parquet", needs_features)
    chosen = [row for row in rows if row.row_id in used_for and use in ("all", used_for[row.row_id])]
    if not chosen:
        refuse_no_rows(use)
    return chosen


def check_use(use: str) -> None:
    """Refuse what rows cannot be used for."""
    if use not in USES:
        raise ValueError(f"rows is {use!r}; choose one of {', '.join(USES)}")


def refuse_no_rows(use: str) -> NoReturn:
    """Say that the traces stage assigned no rows to a use."""
    raise ValueError(f"no training rows are left for {use}; lower rows_for_sft of the traces stage, or set rows: all")


def choose_rows(rows: Sequence[T], max_rows: int, seed: int) -> list[T]:
    """A seeded choice of `max_rows` rows in their order; all for 0."""
    if not 0 < max_rows < len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), max_rows, replace=False)
    return [rows[place] for place in sorted(chosen)]
