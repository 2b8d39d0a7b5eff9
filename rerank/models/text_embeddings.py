"""Embeddings of the items' texts: made by a sentence encoder, checked, of length one.

N items, D embedding columns.
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.models import names

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings.npy"  # of the stage that made them: semantic_ids, or candidates where there are no ids
BATCH_SIZE = 64
BLOCK = 16_384  # items worked on at once: memory does not grow with the catalogue


def read_items(run: str | Path) -> tuple[list[str], list[str]]:
    """Original ids and texts of a run's catalogue, in item order."""
    path = run_dir.stage_dir(run, "data") / "items.parquet"
    table = pq.read_table(path, columns=["item", "item_id", "text"]).sort_by("item")
    return table["item_id"].to_pylist(), table["text"].to_pylist()


def load_embeddings(run: str | Path) -> np.ndarray | None:
    """Those of the semantic_ids stage, memory-mapped; None in a run without it."""
    path = run_dir.stage_dir(run, "semantic_ids") / EMBEDDINGS
    return np.load(path, mmap_mode="r") if path.is_file() else None


def find_encoder(encoder: str) -> str:
    """The folder or hub name of a sentence encoder."""
    return names.resolve(encoder, "encoder", files=("modules.json", "config.json"))


def encode(texts: Sequence[str], encoder: str, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Embeddings (N, D) of texts by a sentence encoder."""
    num_empty = sum(not text.strip() for text in texts)
    if num_empty:
        logger.warning("%d of %d items have no text and share one embedding; give them a title", num_empty, len(texts))
    model = _load_encoder(find_encoder(encoder))
    return model.encode(list(texts), batch_size=batch_size, show_progress_bar=len(texts) > batch_size)


@functools.lru_cache(maxsize=1)  # a server encodes the new items of every request
def _load_encoder(path: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path)


def check_embeddings(embeddings: np.ndarray, item_ids: Sequence[str], source: str) -> None:
    """Refuse rows without a direction: NaN, infinity, or nothing but zeros."""
    bad: list[int] = []
    for block in blocks(len(embeddings)):
        norms = np.linalg.norm(np.asarray(embeddings[block], dtype=np.float64), axis=1)
        bad += (block.start + np.flatnonzero(~np.isfinite(norms) | (norms == 0))).tolist()
    if bad:
        named = ", ".join(f"row {row} (item_id {item_ids[row]})" for row in bad[:5])
        raise ValueError(
            f"{source}: {len(bad)} embeddings are NaN, infinite or all zeros: {named}"
            f"{', ...' if len(bad) > 5 else ''}; mend or drop those items"
        )


def save_normalised(embeddings: np.ndarray, path: Path) -> np.ndarray:
    """Write float32 embeddings of length one block by block; the result is memory-mapped."""
    parts = (np.asarray(embeddings[block], dtype=np.float64) for block in blocks(len(embeddings)))
    return save_parts(embeddings.shape, (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in parts), path)


def save_parts(shape: tuple[int, ...], parts: Iterable[np.ndarray], path: Path) -> np.ndarray:
    """Write parts to a float32 .npy file; through a file, since pages of a memory map would stay in memory."""
    with path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for rows in parts:
            file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
    return np.load(path, mmap_mode="r")


def blocks(num_items: int) -> Iterator[slice]:
    """Slices that cover the items in order."""
    return (slice(start, min(start + BLOCK, num_items)) for start in range(0, num_items, BLOCK))
