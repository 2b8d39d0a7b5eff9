"""From a fitted tokenizer to unique ids: nearest, balanced or random codes, collisions resolved, and their table.

Letters of shapes: N items, n items under one prefix, M items that have ids already, D embedding columns, d latent
columns, L levels, C codes per level.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import logsumexp

from rerank.catalogue import semantic_id_text
from rerank.models.text_embeddings import check_embeddings
from rerank.semantic_ids.tokenizer import Latents, Tokenizer, members, nearest_codes, number_prefixes, quantize

FILE, ASSIGNED_CODES = "semantic_ids.parquet", "assigned_codes.npy"  # in the stage's folder
NO_TAKEN = np.empty((0, 0), dtype=np.int64)
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # in units of the typical gap between an item's two nearest codes
SWEEPS = 30  # at each temperature


@dataclass(frozen=True)
class SemanticIds:
    """The ids of a catalogue: row k of `codes` (N, L) belongs to item k."""

    codes: np.ndarray
    codebook_size: int

    def save(self, folder: str | Path) -> None:
        """Write semantic_ids.parquet, which carries its levels and codebook size."""
        codes = self.codes.tolist()
        table = {"item": range(len(codes)), "codes": codes, "semantic_id": [*map(semantic_id_text, codes)]}
        about = {"levels": str(self.codes.shape[1]), "codebook_size": str(self.codebook_size)}
        pq.write_table(pa.table(table, metadata=about), Path(folder) / FILE)


def load_semantic_ids(folder: str | Path) -> SemanticIds:
    """The ids in a finished semantic_ids folder, every item in its place."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the semantic_ids stage first")
    table = pq.read_table(path)
    items = table["item"].to_numpy()
    if len(wrong := np.flatnonzero(items != np.arange(len(items)))):
        row = wrong[0]
        raise ValueError(f"{path} row {row} holds item {items[row]}, not {row}; run the semantic_ids stage again")
    codes = np.array(table["codes"].to_pylist(), dtype=np.int64)
    return SemanticIds(codes, int(table.schema.metadata[b"codebook_size"]))


def assigned_codes(folder: Path, tokenizer: Tokenizer, embeddings: np.ndarray) -> np.ndarray:
    """Codes (N, L) before collisions were resolved: the stored ones, else assigned again."""
    stored = folder / ASSIGNED_CODES
    return np.load(stored) if stored.is_file() else assign_codes(tokenizer, embeddings)


def assign_codes(tokenizer: Tokenizer, embeddings: np.ndarray, num_taken: int = 0) -> np.ndarray:
    """Codes (N, L) of embeddings (N, D) of length one, before any collision is resolved.

    Args:
        num_taken: Number of items that have ids already; random levels then take another seed.
    """
    codes = nearest_codes(tokenizer, embeddings)
    if tokenizer.balanced_levels:
        codes = balance(codes, Latents(tokenizer, embeddings), tokenizer.codebooks, tokenizer.balanced_levels)
    if tokenizer.random_levels:
        # GR2 (arXiv:2602.07774) section 2.3; whether it draws all codes or unused ones only is UNKNOWN: all, here
        drawn = (len(codes), tokenizer.random_levels)
        rng = np.random.default_rng((tokenizer.seed, num_taken))
        codes[:, -tokenizer.random_levels :] = rng.integers(tokenizer.codebook_size, size=drawn)
    return codes


def assign(tokenizer: Tokenizer, embeddings: np.ndarray, taken: np.ndarray = NO_TAKEN) -> np.ndarray:
    """Unique codes (N, L) for embeddings (N, D), of length one or not, by a fitted tokenizer.

    Args:
        tokenizer: From `Tokenizer.load(folder)`.
        embeddings: From the same encoder that the tokenizer was fitted on.
        taken: Codes (M, L) of items that have ids already; new items get others.
    """
    num_columns = tokenizer.embedding_size - tokenizer.co_engagement_columns
    if embeddings.ndim != 2 or embeddings.shape[1] != num_columns:
        raise ValueError(
            f"embeddings have shape {embeddings.shape} but the tokenizer was fitted on {num_columns} "
            "columns; use the encoder it was fitted with"
        )
    check_embeddings(embeddings, [str(row) for row in range(len(embeddings))], "embeddings")
    if len(np.unique(taken, axis=0)) < len(taken):
        raise ValueError("taken holds an id twice; resolve the ids of the present items first")
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings = np.pad(embeddings, [(0, 0), (0, tokenizer.co_engagement_columns)])
    codes = assign_codes(tokenizer, embeddings, len(taken))
    return resolve_collisions(codes, Latents(tokenizer, embeddings), tokenizer.codebooks, taken)


def balance(codes: np.ndarray, latents: np.ndarray | Latents, codebooks: np.ndarray, num_levels: int) -> np.ndarray:
    """Codes (N, L) of which, on each of the last `num_levels`, a prefix gives none to more than ceil(n / C) items.

    On the last level this mostly means a unique id. Items under prefixes without a crowded code keep their nearest
    codes. Equal latents stay together: no deterministic rule can part them.

    Source: the uniform semantic mapping of LC-Rec (arXiv:2311.09049) section 3.1, which demands equal use of all
    codes on the last level. Chosen here: at most ceil(n / C) instead of equal use, which few items cannot give to 256
    codes and which costs reconstruction; all items of a prefix at once instead of a training batch.
    """
    codes, (levels, size) = codes.copy(), codebooks.shape[:2]
    for level in range(levels - num_levels, levels):
        parents = number_prefixes(codes, level)
        for items in _crowded(codes, level, parents, -(-np.bincount(parents) // size)[parents]):
            rest = _residuals(latents, codes, codebooks, items, level)
            chosen = sinkhorn(_squared_distances(rest, codebooks[level]), -(-len(items) // size))
            moved = chosen != codes[items, level]
            _move(codes, items[moved], level, chosen[moved], rest[moved], codebooks)
    return codes


def _residuals(
    latents: np.ndarray | Latents, codes: np.ndarray, codebooks: np.ndarray, items: np.ndarray, level: int
) -> np.ndarray:
    """Latents of `items` minus their codes above `level`."""
    rest = latents[items].astype(np.float32)
    for above in range(level):
        rest -= codebooks[above][codes[items, above]]
    return rest


def _squared_distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """||v - e||² for every vector and code."""
    return (vectors**2).sum(axis=1, keepdims=True) + (codebook**2).sum(axis=1) - 2 * vectors @ codebook.T


def _crowded(codes: np.ndarray, level: int, parents: np.ndarray, room: np.ndarray | int) -> list[np.ndarray]:
    """The items of each parent prefix (numbered above `level`) that has a code with more items than its room."""
    prefixes = number_prefixes(codes, level + 1)
    return members(parents, np.unique(parents[np.bincount(prefixes)[prefixes] > room]))


def _move(
    codes: np.ndarray, items: np.ndarray, level: int, chosen: np.ndarray, rest: np.ndarray, codebooks: np.ndarray
) -> None:
    """Give items other codes on a level, and quantize what these leave of their residuals on the levels below."""
    codes[items, level] = chosen
    codes[items, level + 1 :] = quantize(rest - codebooks[level][chosen], codebooks[level + 1 :])


def sinkhorn(costs: np.ndarray, room: int) -> np.ndarray:
    """A code (n,) for each item, cheap in all by costs (n, C), and none for more than `room` items of unequal costs.

    Entropic optimal transport in the logarithmic domain (Cuturi, arXiv:1306.0895) with rows that sum to one and
    columns that sum to at most `room`: crowded codes get a price, each item takes the cheapest code with it.
    """
    nearest_two = np.partition(costs, 1, axis=1)[:, :2]
    gap = max(float((nearest_two[:, 1] - nearest_two[:, 0]).mean()), 1e-12)
    prices = np.zeros(costs.shape[1])
    chosen = costs.argmin(axis=1)
    for temperature in gap * np.array(TEMPERATURES):
        for _ in range(SWEEPS):
            if np.bincount(chosen).max() <= room:
                return chosen
            scores = -(costs + prices) / temperature
            shares = scores - logsumexp(scores, axis=1, keepdims=True)
            prices = np.maximum(prices + temperature * (logsumexp(shares, axis=0) - np.log(room)), 0)
            chosen = (costs + prices).argmin(axis=1)
    return chosen


def resolve_collisions(
    codes: np.ndarray, latents: np.ndarray | Latents, codebooks: np.ndarray, taken: np.ndarray = NO_TAKEN
) -> np.ndarray:
    """Codes (N, L) that no two items share and that `taken` (M, L) does not hold.

    Level by level: a prefix of k codes has room for C^(L-k) items; of more items, those farthest from its last code
    move to the nearest sibling with room and are quantized anew below it. On the last level room is one. Items with a
    unique id and no crowded prefix keep their codes.

    Args:
        codes: Nearest codes (N, L) of `latents` (N, d).
        codebooks: (L, C, d).
        taken: Ids of other items, which keep them.
    """
    levels, size = codebooks.shape[:2]
    num_items, codes = len(codes), codes.copy()
    check_room(num_items + len(taken), levels, size)
    for level, codebook in enumerate(codebooks):
        room = min(size ** (levels - level - 1), num_items + len(taken))  # no more is needed; C^L may overflow
        everyone = np.concatenate([codes, taken.reshape(-1, levels)])
        for group in _crowded(everyone, level, number_prefixes(everyone, level), room):
            items, used = group[group < num_items], everyone[group[group >= num_items], level]
            rest = _residuals(latents, codes, codebooks, items, level)
            moved, places = _spread(_squared_distances(rest, codebook), codes[items, level], used, room)
            _move(codes, items[moved], level, places, rest[moved], codebooks)
    return codes


def check_room(num_items: int, levels: int, codebook_size: int) -> None:
    """Refuse a catalogue with more items than ids of this shape, naming sizes that fit."""
    if num_items > codebook_size**levels:
        cure = f"codebook_size {next(size for size in count(codebook_size) if size**levels >= num_items)}"
        if codebook_size > 1:
            cure += f" or levels {next(n for n in count(levels) if codebook_size**n >= num_items)}"
        raise ValueError(
            f"levels {levels} with codebook_size {codebook_size} hold {codebook_size**levels} ids "
            f"but there are {num_items} items; use {cure}"
        )


def _spread(distances: np.ndarray, chosen: np.ndarray, used: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The items of one parent that must leave their code, and the code that each gets.

    Args:
        distances: (n, C) to each code.
        chosen: (n,) the code of each item.
        used: Codes of the taken ids, which cannot move.
        room: Number of ids that a code may hold.
    """
    free = room - np.bincount(used, minlength=distances.shape[1])
    moved, places = [], []
    own = distances[np.arange(len(chosen)), chosen]
    for item in np.lexsort((own, chosen)):  # by code, nearest first: the nearest stay
        if free[chosen[item]] > 0:
            free[chosen[item]] -= 1
        else:
            moved.append(item)
    for item in moved:
        places.append(int(np.where(free > 0, distances[item], np.inf).argmin()))
        free[places[-1]] -= 1
    return np.array(moved, dtype=np.int64), np.array(places, dtype=np.int64)
