"""Quality of a catalogue's ids. Letters of shapes: N items, D embedding columns, L levels, P pairs."""

import numpy as np

from rerank.models.text_embeddings import blocks
from rerank.semantic_ids.tokenizer import Tokenizer, members, number_prefixes, reconstruction_error


def ids_metrics(
    tokenizer: Tokenizer, embeddings: np.ndarray, copies: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, object]:
    """The metrics of the stage: ids (N, L) before and after collisions were resolved.

    Args:
        copies: Number of items with each item's embedding, from `embedding_copies`.
    """
    unique_before, unique_after = uniqueness(before), uniqueness(after)
    errors = [reconstruction_error(tokenizer, embeddings, codes) for codes in (before, after)]
    return {
        "num_items": len(after),
        "levels": tokenizer.levels,
        "codebook_size": tokenizer.codebook_size,
        "embedding_size": tokenizer.embedding_size,
        "uniqueness_before": unique_before["alone"],
        "uniqueness_after": unique_after["alone"],
        "distinct_before": unique_before["distinct"],
        "distinct_after": unique_after["distinct"],
        "num_sharing_an_embedding": int((copies > 1).sum()),
        "uniqueness_before_of_other_embeddings": uniqueness_where(before, copies == 1),
        "num_moved": int((before != after).any(axis=1).sum()),
        "code_use": code_use(before, tokenizer.codebook_size),
        "perplexity": perplexity(before),
        "reconstruction_error_before": errors[0],
        "reconstruction_error_after": errors[1],
        "unexplained_variance": errors[0] / _variance(embeddings),
    }


def _variance(embeddings: np.ndarray) -> float:
    """Variance of all columns together, E||x||² - ||E x||², block by block."""
    squares, total = 0.0, np.zeros(embeddings.shape[1])
    for block in blocks(len(embeddings)):
        rows = np.asarray(embeddings[block], dtype=np.float64)
        squares, total = squares + (rows**2).sum(), total + rows.sum(axis=0)
    return float(squares / len(embeddings) - ((total / len(embeddings)) ** 2).sum())


def _is_alone(codes: np.ndarray) -> np.ndarray:
    numbers = number_prefixes(codes, codes.shape[1])
    return np.bincount(numbers)[numbers] == 1


def uniqueness(codes: np.ndarray) -> dict[str, float]:
    """Both definitions in use, for codes (N, L).

    Returns:
        `distinct`: distinct ids / items. `alone`: share of items whose id nobody shares; a pair that shares one id
        counts half in the first and not at all in the second.
    """
    num_distinct = number_prefixes(codes, codes.shape[1]).max() + 1
    return {"distinct": float(num_distinct / len(codes)), "alone": float(_is_alone(codes).mean())}


def uniqueness_where(codes: np.ndarray, counted: np.ndarray) -> float | None:
    """Share of the counted items (mask) whose id no item shares; None when none is counted."""
    return float(_is_alone(codes)[counted].mean()) if counted.any() else None


def code_use(codes: np.ndarray, codebook_size: int) -> list[float]:
    """Share of each level's codes that any item uses."""
    return [len(np.unique(level)) / codebook_size for level in codes.T]


def perplexity(codes: np.ndarray) -> list[float]:
    """exp(entropy) of each level's codes."""
    shares = [np.unique(level, return_counts=True)[1] / len(level) for level in codes.T]
    return [float(np.exp(-(of_level * np.log(of_level)).sum())) for of_level in shares]


def embedding_copies(embeddings: np.ndarray) -> np.ndarray:
    """Number of rows (itself included) that have each row's embedding, to five digits.

    No deterministic rule can part equal embeddings. The encoder's last digits depend on the rest of its batch.
    """
    keys = np.empty(len(embeddings), dtype=np.int64)
    for block in blocks(len(embeddings)):
        rounded = np.round(np.asarray(embeddings[block], dtype=np.float32), 5) + 0.0  # -0.0 becomes 0.0
        keys[block] = [hash(row.tobytes()) for row in rounded]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse]


def items_per_prefix(codes: np.ndarray) -> list[np.ndarray]:
    """Number of items of each prefix in use, most first, for each depth 1..L."""
    return [np.sort(np.bincount(number_prefixes(codes, depth)))[::-1] for depth in range(1, codes.shape[1] + 1)]


def collisions(codes: np.ndarray) -> list[np.ndarray]:
    """The items of each id that several items share, in the order of the ids."""
    numbers = number_prefixes(codes, codes.shape[1])
    return members(numbers, np.flatnonzero(np.bincount(numbers) > 1))


def prefix_lift(codes: np.ndarray, pairs: np.ndarray) -> list[float | None]:
    """Share of pairs (P, 2) whose items have one prefix, over the share expected by chance, for each depth 1..L.

    Chance is the pairs' first and second items shuffled against each other, so that popular items are as frequent;
    pairs of an item with itself are left out. None where chance never shares a prefix.
    """
    first, second = (np.bincount(column, minlength=len(codes)) / max(len(pairs), 1) for column in pairs.T)
    same_item = float((first * second).sum())
    lifts = []
    for depth in range(1, codes.shape[1] + 1):
        numbers = number_prefixes(codes, depth)
        together = np.bincount(numbers, weights=first) * np.bincount(numbers, weights=second)
        chance = (float(together.sum()) - same_item) / (1 - same_item) if same_item < 1 else 0.0
        shared = float((numbers[pairs[:, 0]] == numbers[pairs[:, 1]]).mean()) if len(pairs) else 0.0
        lifts.append(shared / chance if chance > 1e-12 else None)
    return lifts
