"""Item embeddings: from a sentence encoder or a file, checked, of length one.

Letters of shapes: N items, D embedding columns.
"""

import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rerank.semantic_ids.tokenizer import blocks

logger = logging.getLogger(__name__)

PACKAGE = "package:"
ID_EMBEDDINGS = "id_embeddings.npy"  # beside embeddings.npy where ids know more than the text
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_encoder(encoder: str) -> str:
    """The folder or hub name to load a sentence encoder from.

    Args:
        encoder: A folder, a hub name, or `package:NAME` for a model inside an installed Python package.

    Raises:
        FileNotFoundError: When the folder, the package or its model is not there.
    """
    if encoder.startswith(PACKAGE):
        return str(_model_inside_package(encoder.removeprefix(PACKAGE)))
    folder = Path(encoder).expanduser()
    if encoder and folder.is_dir():
        if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
            raise FileNotFoundError(f"encoder {encoder} holds no modules.json or config.json; give a model's folder")
        return str(folder)
    # `models/minilm` beside an existing folder `models` is a misspelt path, not a hub name
    if (
        HUB_NAME.fullmatch(encoder)
        and encoder[0] != "."
        and (folder.parent == Path(".") or not folder.parent.is_dir())
    ):
        return encoder
    raise FileNotFoundError(
        f"encoder {encoder} is not there; give a sentence-transformers folder, a hub name, or package:NAME"
    )


def _model_inside_package(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"encoder {PACKAGE}{package}: no such package is installed; pip install it first")
    root = Path(spec.submodule_search_locations[0])
    for name in ("modules.json", "config.json"):
        found = sorted(root.rglob(name), key=lambda path: (len(path.parts), str(path)))
        if found:
            return found[0].parent
    raise FileNotFoundError(f"encoder {PACKAGE}{package}: {root} holds no modules.json or config.json, so no model")


def encode(texts: Sequence[str], encoder: str, batch_size: int) -> np.ndarray:
    """Embeddings (N, D) of texts by a sentence encoder."""
    from sentence_transformers import SentenceTransformer

    num_empty = sum(not text.strip() for text in texts)
    if num_empty:
        logger.warning("%d of %d items have no text and share one embedding; give them a title", num_empty, len(texts))
    model = SentenceTransformer(find_encoder(encoder))
    return model.encode(list(texts), batch_size=batch_size, show_progress_bar=True)


def read_embeddings(path: str | Path, item_ids: Sequence[str]) -> np.ndarray:
    """Given embeddings (N, D) in item order, memory-mapped when the file is .npy.

    Raises:
        FileNotFoundError: When the file is not there.
        ValueError: When it is of another kind, or does not fit the catalogue.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"embeddings {path} does not exist; give a .npy or .parquet file")
    if path.suffix == ".npy":
        return _read_npy(path, len(item_ids))
    if path.suffix == ".parquet":
        return _read_parquet(path, item_ids)
    raise ValueError(f"embeddings {path} ends in {path.suffix or 'nothing'}; give a .npy or .parquet file")


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


def check_embeddings(embeddings: np.ndarray, item_ids: Sequence[str], source: str) -> None:
    """Refuse rows without a direction.

    Raises:
        ValueError: Naming the first rows that hold NaN, infinity, or nothing but zeros.
    """
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

    def normalised(block: slice) -> np.ndarray:
        rows = np.asarray(embeddings[block], dtype=np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return _save_blocks(embeddings.shape, normalised, path)


def _save_blocks(shape: tuple[int, int], rows_of: Callable[[slice], np.ndarray], path: Path) -> np.ndarray:
    """Write a float32 .npy file; through a file, since pages written through a memory map would stay in memory."""
    with path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for block in blocks(shape[0]):
            file.write(np.ascontiguousarray(rows_of(block), dtype="<f4").tobytes())
    return np.load(path, mmap_mode="r")


def save_with_co_engagement(embeddings: np.ndarray, vectors: np.ndarray, weight: float, path: Path) -> np.ndarray:
    """Write embeddings (N, D) with weighted co-engagement vectors (N, E) beside them; the result is memory-mapped."""

    def beside(block: slice) -> np.ndarray:
        return np.concatenate([embeddings[block], weight * vectors[block]], axis=1)

    return _save_blocks((len(embeddings), embeddings.shape[1] + vectors.shape[1]), beside, path)


def load_id_embeddings(folder: Path) -> np.ndarray:
    """What the ids of a semantic_ids folder were made from, memory-mapped."""
    with_co_engagement = folder / ID_EMBEDDINGS
    path = with_co_engagement if with_co_engagement.is_file() else folder / "embeddings.npy"
    return np.load(path, mmap_mode="r")
