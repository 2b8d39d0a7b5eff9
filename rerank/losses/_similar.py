"""Items of similar texts, by the cosine of their embeddings: mined once for a run and stored beside the embeddings.

Up to MOST_EXACT items every two are compared, in blocks. Beyond, faiss searches a graph (HNSW; Malkov and Yashunin,
arXiv:1603.09320), and its recall is measured on a sample against the exact search.

Letters of shapes: N items, K neighbours, R rows, D columns of an embedding, G different embeddings.
"""

import logging
from pathlib import Path

import filelock
import numpy as np

from rerank.launch.files import fingerprint, write_whole
from rerank.losses._relations import check_number

logger = logging.getLogger(__name__)

FILE = "neighbours.npz"
MOST_EXACT = 300_000
SIMILARITIES_AT_ONCE = 2**22  # what one step holds fits in a cache
LINKS, EF_CONSTRUCTION, EF_SEARCH = 32, 80, 128  # of HNSW: M, and the candidates kept while it is built and searched
BLOCK = 2**14
SAMPLE = 1000  # embeddings that the recall is measured on


def stored_neighbours(folder: Path, num_neighbours: int) -> np.ndarray:
    """`similar_items` of the embeddings of a semantic_ids folder, mined by the first process that asks for them.

    Args:
        folder: With embeddings.npy; gets FILE, which counts for these embeddings and this number only.
        num_neighbours: K.
    """
    source, path = folder / "embeddings.npy", folder / FILE
    with filelock.FileLock(folder / f"{FILE}.lock"):  # every process of a training wants the same rows
        made_of = f"{fingerprint(source)} {num_neighbours}"
        found = _read(path, made_of)
        if found is None:
            found = similar_items(np.load(source, mmap_mode="r"), num_neighbours)
            arrays = {"neighbours": found[0], "recall": np.array(found[1]), "made_of": np.array(made_of)}
            write_whole(path, lambda temporary: _write(temporary, arrays))
    neighbours, recall = found
    how = "exact" if len(neighbours) <= MOST_EXACT else f"by HNSW, with a recall of {recall:.4f} on {SAMPLE} items"
    logger.info("similar items: %s of each of %s, %s, in %s", neighbours.shape[1], len(neighbours), how, path)
    return neighbours.astype(np.int64)


def _read(path: Path, made_of: str) -> tuple[np.ndarray, float] | None:
    """The stored neighbours and their recall, None where there are none or they are of others."""
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return (arrays["neighbours"], float(arrays["recall"])) if str(arrays["made_of"]) == made_of else None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]


def similar_items(embeddings: np.ndarray, num_neighbours: int) -> tuple[np.ndarray, float]:
    """Items of highest cosine similarity to each item but itself, (N, K) int32, and the share of them that is found.

    Args:
        embeddings: (N, D).
        num_neighbours: K, below N.

    Returns:
        Best first, ties by item; -1 where a search in the graph ends early. The share is 1 up to MOST_EXACT items.

    Raises:
        ValueError: When K is not below N, or an embedding has no direction.
    """
    if len(embeddings) <= MOST_EXACT:
        return semantic_neighbours(embeddings, num_neighbours).astype(np.int32), 1.0
    check_number(len(embeddings), num_neighbours)
    return _by_graph(embeddings, _lengths(embeddings), num_neighbours)


def semantic_neighbours(embeddings: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Items of highest cosine similarity to each item of embeddings (N, D) but itself, (N, K) int64; ties by item."""
    num_items = len(embeddings)
    check_number(num_items, num_neighbours)
    unit = _unit(embeddings, _lengths(embeddings))
    # one column for equal embeddings: a matrix product may round two equal columns differently, and they must tie
    different, column = np.unique(unit, axis=0, return_inverse=True)
    parts, rows_at_once = [], max(SIMILARITIES_AT_ONCE // num_items, 1)
    for start in range(0, num_items, rows_at_once):
        similarity = (unit[start : start + rows_at_once] @ different.T)[:, column]  # (R, N)
        own = np.arange(len(similarity))
        similarity[own, start + own] = -np.inf
        parts.append(_highest(similarity, num_neighbours))
    return np.concatenate(parts)


def _lengths(embeddings: np.ndarray) -> np.ndarray:
    """(N,) refusing an embedding without a direction."""
    lengths: np.ndarray = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        raise ValueError(f"the embedding in row {wrong[0]} is zero or not finite; embed that item again.")
    return lengths


def _unit(embeddings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    empty = np.empty(embeddings.shape, np.float32)
    np.divide(embeddings, lengths[:, None], out=empty, casting="same_kind")
    return empty


def _highest(values: np.ndarray, number: int) -> np.ndarray:
    """Columns of the highest values of each row, highest first, ties by lower column."""
    least = np.partition(values, values.shape[1] - number, axis=1)[:, values.shape[1] - number]
    places = np.flatnonzero(values >= least[:, None])  # twice as fast as nonzero
    rows, columns = np.divmod(places, values.shape[1])
    order = np.lexsort((columns, -values.ravel()[places], rows))
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    highest: np.ndarray = columns[order][place < number].reshape(-1, number)
    return highest


def _by_graph(embeddings: np.ndarray, lengths: np.ndarray, num_neighbours: int) -> tuple[np.ndarray, float]:
    """`similar_items` by HNSW: different embeddings are searched, and each found one stands for all its items."""
    import faiss

    def unit(items: np.ndarray) -> np.ndarray:
        return _unit(embeddings[items], lengths[items])

    keys = np.empty(len(embeddings), dtype=np.int64)
    for start in range(0, len(embeddings), BLOCK):
        items = np.arange(start, min(start + BLOCK, len(embeddings)))
        keys[items] = [hash(row.tobytes()) for row in unit(items) + 0.0]  # -0.0 becomes 0.0
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)  # (G,), (G,), (N,)
    index = faiss.IndexHNSWFlat(embeddings.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
    parts = [first[start : start + BLOCK] for start in range(0, len(first), BLOCK)]
    for part in parts:
        index.add(unit(part))
    width = min(num_neighbours + 1, len(first))  # an embedding finds itself too
    copies, best, found = _copies(group, num_neighbours + 1), [], []
    for part in parts:
        similarity, groups = index.search(unit(part), width)
        best.append(_items_of(copies, groups, similarity, num_neighbours + 1))
        found.append(groups)
    chosen = np.random.default_rng(0).choice(len(first), min(SAMPLE, len(first)), replace=False)
    exact = faiss.downcast_index(index.storage).search(unit(first[chosen]), width)[1]
    recall = _recall(np.concatenate(found)[chosen], exact, chosen)
    return _without_itself(np.concatenate(best)[group]), recall


def _copies(group: np.ndarray, number: int) -> np.ndarray:
    """(G, number) the first items of each group of equal embeddings, -1 where there are no more."""
    order = np.argsort(group, kind="stable")
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    copies = np.full((int(group.max()) + 1, number), -1, dtype=np.int32)
    copies[group[order][place < number], place[place < number]] = order[place < number]
    return copies


def _items_of(copies: np.ndarray, groups: np.ndarray, similarity: np.ndarray, number: int) -> np.ndarray:
    """(R, number) the items of the groups found for each row, by similarity, ties by item; -1 for none."""
    items = np.where(groups[:, :, None] >= 0, copies[groups], -1)
    keys = np.where(items >= 0, -similarity[:, :, None], np.inf).reshape(len(items), -1)
    items = items.reshape(len(items), -1)
    order = np.lexsort((items, keys), axis=-1)[:, :number]
    return np.asarray(np.take_along_axis(items, order, axis=1))


def _recall(found: np.ndarray, exact: np.ndarray, own: np.ndarray) -> float:
    """Share of the exact numbers of each row, without its own, that are found."""
    is_found = (exact[:, :, None] == found[:, None, :]).any(axis=2)
    others = exact != own[:, None]
    return float(is_found[others].mean()) if others.any() else 1.0


def _without_itself(items: np.ndarray) -> np.ndarray:
    """(N, K) from the K + 1 items found for each item, itself taken out, else the last."""
    is_own = items == np.arange(len(items))[:, None]
    is_own[:, -1] |= ~is_own.any(axis=1)
    return np.asarray(items[~is_own].reshape(len(items), -1))
