"""Ids made unique: items that share an id move to the nearest code that still has room.

Letters of shapes: N items, d latent columns, L levels, C codes per level.
"""

import numpy as np

from rerank.semantic_ids.distances import squared_distances
from rerank.semantic_ids.prefixes import members, number_prefixes
from rerank.semantic_ids.tokenizer import Latents, quantize, residuals

NO_TAKEN = np.empty((0, 0), dtype=np.int64)


def resolve_collisions(
    codes: np.ndarray, latents: np.ndarray | Latents, codebooks: np.ndarray, taken: np.ndarray = NO_TAKEN
) -> np.ndarray:
    """Codes (N, L) that no two items share and that `taken` does not hold.

    Goes level by level: a prefix of k codes has room for C^(L-k) items, so where more of them sit, those farthest
    from its last code move to the nearest sibling with room and are quantized anew below it. On the last level room
    is one. Whoever shares no id and no crowded prefix keeps his.

    Args:
        codes: Nearest codes (N, L).
        latents: What they were quantized from (N, d).
        codebooks: (L, C, d).
        taken: Ids (M, L) that other items already have; they stay as they are.

    Raises:
        ValueError: When there are more items than ids, naming the size that fits.
    """
    levels, size = codebooks.shape[:2]
    check_room(len(codes) + len(taken), levels, size)
    codes = codes.copy()
    for level, codebook in enumerate(codebooks):
        room = min(size ** (levels - level - 1), len(codes) + len(taken))  # no more is needed; C^L may overflow
        for items, used in _crowded_groups(codes, taken, level, room):
            rest = residuals(latents, codes, codebooks, items, level)
            moved, places = _spread(squared_distances(rest, codebook), codes[items, level], used, room)
            codes[items[moved], level] = places
            codes[items[moved], level + 1 :] = quantize(rest[moved] - codebook[places], codebooks[level + 1 :])
    return codes


def check_room(num_items: int, levels: int, codebook_size: int) -> None:
    """Refuse a catalogue that cannot have unique ids of this shape.

    Raises:
        ValueError: Naming the codebook size and the number of levels that fit.
    """
    if num_items > codebook_size**levels:
        fitting_size, fitting_levels = codebook_size, levels
        while fitting_size**levels < num_items:
            fitting_size += 1
        while codebook_size > 1 and codebook_size**fitting_levels < num_items:
            fitting_levels += 1
        more_levels = f" or levels {fitting_levels}" if codebook_size > 1 else ""
        raise ValueError(
            f"levels {levels} with codebook_size {codebook_size} hold {codebook_size**levels} ids "
            f"but there are {num_items} items; use codebook_size {fitting_size}{more_levels}"
        )


def _crowded_groups(
    codes: np.ndarray, taken: np.ndarray, level: int, room: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each parent prefix under which some code has too many items: its items, and the codes of its taken ids."""
    everyone = np.concatenate([codes, taken.reshape(-1, codes.shape[1])])
    prefixes, parents = number_prefixes(everyone, level + 1), number_prefixes(everyone, level)
    crowded = np.bincount(prefixes)[prefixes] > room
    groups = members(parents, np.unique(parents[crowded]))
    return [(group[group < len(codes)], everyone[group[group >= len(codes)], level]) for group in groups]


def _spread(distances: np.ndarray, chosen: np.ndarray, used: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items of one parent must leave their code, and where each goes.

    Args:
        distances: (items, C) to each code.
        chosen: Code of each item.
        used: Codes of the taken ids, which cannot move.
        room: How many ids each code may hold.
    """
    free = room - np.bincount(used, minlength=distances.shape[1])
    moved = []
    own = distances[np.arange(len(chosen)), chosen]
    for item in np.lexsort((own, chosen)):  # by code, nearest first: the nearest stay
        if free[chosen[item]] > 0:
            free[chosen[item]] -= 1
        else:
            moved.append(item)
    places = []
    for item in moved:
        place = int(np.where(free > 0, distances[item], np.inf).argmin())
        free[place] -= 1
        places.append(place)
    return np.array(moved, dtype=np.int64), np.array(places, dtype=np.int64)
