"""Item embeddings: from a sentence encoder or a file, checked, of length one.

Letters of shapes: N items, D embedding columns, E co-engagement columns.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import run_dir, shards
from rerank.launch.shards import Shard
from rerank.models import names
from rerank.models.text_embeddings import (
    EMBEDDINGS,
    blocks,
    check_embeddings,
    encode,
    read_items,
    save_normalised,
    save_parts,
)
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.co_engagement import co_engagement_vectors

logger = logging.getLogger(__name__)

ID_EMBEDDINGS = "id_embeddings.npy"  # beside embeddings.npy where ids know more than the text


def embed(args: SemanticIdsArguments, out_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the items' text and those to make ids from, both float32, saved and memory-mapped.

    They are the same without co-engagement, whose columns follow those of the text.
    """
    item_ids, texts = read_items(args.run_dir)
    if args.embeddings is not None:
        found = read_embeddings(args.embeddings, item_ids)
    else:
        made = shards.merged(args.run_dir, "semantic_ids", "embeddings")
        found = _encode(args, texts) if made is None else _from_table(made)
    check_embeddings(found, item_ids, args.source)
    of_text = save_normalised(found, out_dir / EMBEDDINGS)
    del found  # pages that were read of a memory map count as memory until it is closed
    if not args.co_engagement_weight or args.extends is not None:  # which has those of the other run
        return of_text, of_text
    vectors = co_engagement_vectors(run_dir.stage_dir(args.run_dir, "data"), len(item_ids), args.seed)
    return of_text, save_with_co_engagement(of_text, vectors, args.co_engagement_weight, out_dir / ID_EMBEDDINGS)


def make_shard(args: SemanticIdsArguments, shard: Shard, folder: Path) -> None:
    """Encode the texts of a shard of the items."""
    _, texts = read_items(args.run_dir)
    shards.make(folder, "embeddings", lambda: _as_table(_encode(args, shard.of(texts))))


def _encode(args: SemanticIdsArguments, texts: Sequence[str]) -> np.ndarray:
    assert args.encoder is not None, "one of encoder and embeddings is given"
    return encode(texts, args.encoder, args.encoder_batch_size)


def _as_table(embeddings: np.ndarray) -> pa.Table:
    """A table of embeddings (N, D), one a row."""
    values = pa.array(np.ascontiguousarray(embeddings).ravel())
    return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])})


def _from_table(table: pa.Table) -> np.ndarray:
    """The embeddings (N, D) of `_as_table`."""
    parts = table["embedding"].chunks
    return np.concatenate([part.flatten().to_numpy().reshape(len(part), -1) for part in parts])


def find_embeddings(path: str) -> Path:
    """The file of given embeddings, as .npy or .parquet."""
    found = Path(names.locate(path, "embeddings"))
    if not found.is_file():
        raise FileNotFoundError(f"embeddings {found} does not exist; give a .npy or .parquet file")
    if found.suffix not in (".npy", ".parquet"):
        raise ValueError(f"embeddings {found} ends in {found.suffix or 'nothing'}; give a .npy or .parquet file")
    return found


def read_embeddings(path: str, item_ids: Sequence[str]) -> np.ndarray:
    """Given embeddings (N, D) in item order, memory-mapped when the file is .npy.

    Raises:
        ValueError: When they do not fit the catalogue.
    """
    found = find_embeddings(path)
    return _read_npy(found, len(item_ids)) if found.suffix == ".npy" else _read_parquet(found, item_ids)


def _read_npy(path: Path, num_items: int) -> np.ndarray:
    found = np.load(path, mmap_mode="r")
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(
            f"{path} holds {found.dtype} of shape {found.shape}; it must be a table of floats, row = item"
        )
    if len(found) != num_items:
        raise ValueError(
            f"{path} has {len(found)} rows but the catalogue {num_items} items; "
            "give one row per item in the order of items.parquet, or a .parquet file with item_id and embedding"
        )
    return found


def _read_parquet(path: Path, item_ids: Sequence[str]) -> np.ndarray:
    for column in ("item_id", "embedding"):
        if column not in pq.read_schema(path).names:
            raise ValueError(f"{path} lacks the column {column}; it needs item_id and embedding")
    table = pq.read_table(path, columns=["item_id", "embedding"])
    row_of: dict[str, int] = {}
    for row, item_id in enumerate(table["item_id"].to_pylist()):
        if row_of.setdefault(str(item_id), row) != row:
            raise ValueError(f"{path} rows {row_of[str(item_id)]} and {row} are both item_id {item_id}; keep one")
    missing = [item_id for item_id in item_ids if item_id not in row_of]
    if missing:
        raise ValueError(
            f"{path} has {len(row_of)} rows but no embedding for {len(missing)} of {len(item_ids)} items, "
            f"such as item_id {missing[0]}; add them"
        )
    column = table["embedding"].combine_chunks()
    widths = np.unique(column.value_lengths().fill_null(0).to_numpy())
    if len(widths) > 1 or widths[0] == 0:
        raise ValueError(f"{path} has embeddings of {', '.join(map(str, widths))} columns; all must be of one length")
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), widths[0])
    return values[[row_of[item_id] for item_id in item_ids]]


def save_with_co_engagement(embeddings: np.ndarray, vectors: np.ndarray, weight: float, path: Path) -> np.ndarray:
    """Write embeddings (N, D) with weighted co-engagement vectors (N, E) beside them; the result is memory-mapped."""
    pairs = ((embeddings[block], weight * vectors[block]) for block in blocks(len(embeddings)))
    shape = (len(embeddings), embeddings.shape[1] + vectors.shape[1])
    return save_parts(shape, (np.concatenate(pair, axis=1) for pair in pairs), path)


def load_id_embeddings(folder: Path) -> np.ndarray:
    """The embeddings that the ids of a semantic_ids folder were made from, memory-mapped."""
    path = folder / ID_EMBEDDINGS
    return np.load(path if path.is_file() else folder / EMBEDDINGS, mmap_mode="r")
