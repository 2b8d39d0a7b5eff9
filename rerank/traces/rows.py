"""The rows a trace can be written for: training rows whose list holds a relevant item, parted between SFT and DAPO."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank.prompts import PromptSettings

COLUMNS = ("row_id", "user", "history", "candidates", "relevance")
Row = Mapping[str, Any]


def read_hit_rows(path: str | Path, with_features: bool) -> list[dict[str, Any]]:
    """The rows of a candidates table whose list holds a relevant item, by row_id.

    Args:
        path: Such as RUN_DIR/candidates/train.parquet.
        with_features: Also read `features`.

    Raises:
        ValueError: When no row is a hit, or a row has no features and they are asked for.
    """
    columns = [*COLUMNS, *(["features"] if with_features else [])]
    check_features(path, with_features)
    table = pq.read_table(path, columns=[*columns, "hit"])
    rows = table.filter(pc.field("hit")).select(columns).sort_by("row_id").to_pylist()
    if not rows:
        raise ValueError(f"{path}: none of its {len(table)} rows lists a relevant item; use longer candidate lists.")
    return rows


def check_features(path: str | Path, with_features: bool) -> None:
    """Refuse a candidates table without features where they are needed.

    Raises:
        ValueError: Naming the file and the first row that lacks them.
    """
    if not with_features:
        return
    cure = "let the candidates stage compute them, or use evidence: none and a teacher that is a language model"
    if "features" not in pq.read_schema(path).names:
        raise ValueError(f"{path} has no column features, which evidence rests on; {cure}.")
    table = pq.read_table(path, columns=["row_id", "features"])
    lacking = table.filter(pc.or_kleene(pc.is_null(table["features"]), pc.equal(pc.list_value_length(table[1]), 0)))
    if len(lacking):
        raise ValueError(f"{path}: row_id {lacking['row_id'][0]} has no features, which evidence rests on; {cure}.")


def read_feature_names(folder: str | Path) -> tuple[list[str], dict[str, list[float]]]:
    """Names of the feature columns and the bucket edges of each in `folder`/features.json; none without the file."""
    path = Path(folder) / "features.json"
    if not path.is_file():
        return [], {}
    stored = json.loads(path.read_text())
    return stored["names"], stored["edges"]


def check_edges(folder: str | Path, settings: PromptSettings) -> None:
    """Refuse facts for the prompt that `folder`/features.json lacks.

    Raises:
        ValueError: Naming the fact and those there are.
    """
    names, edges = read_feature_names(folder)
    known = [name for name in names if name in edges]
    for name in settings.evidence_names if settings.evidence != "none" else []:
        if name not in known:
            raise ValueError(
                f"evidence_names holds {name!r} but {Path(folder) / 'features.json'} has "
                f"{', '.join(known) or 'none'}; run the candidates stage again or leave the fact out."
            )


def best_position(row: Row) -> int:
    """Position of the first candidate of the highest relevance."""
    return int(np.argmax(row["relevance"]))


def users_for_sft(users: Sequence[int], share: float, seed: int) -> set[int]:
    """Users, in a seeded order, until their rows make up `share` of all; at least one.

    Args:
        users: The user of each row.
        share: In (0, 1].
    """
    names, counts = np.unique(np.asarray(users), return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    rows_before = np.cumsum(counts[order]) - counts[order]
    return {int(name) for name in names[order][rows_before < share * len(users)]}


def choose(rows: Sequence[Row], max_rows: int, seed: int) -> list[Row]:
    """A seeded choice of `max_rows` rows in their order; all for 0."""
    if not 0 < max_rows < len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), max_rows, replace=False)
    return [rows[place] for place in sorted(chosen)]


def write_split(path: str | Path, rows: Sequence[Row], sft_users: set[int]) -> None:
    """Write row_split.parquet: for every hit training row whether it is for "sft" or "dapo"."""
    used_for = ["sft" if row["user"] in sft_users else "dapo" for row in rows]
    pq.write_table(pa.table({"row_id": [row["row_id"] for row in rows], "used_for": used_for}), path)
