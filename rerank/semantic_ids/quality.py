"""How good a catalogue's ids are, in numbers. Letters of shapes: N items, D embedding columns, L levels, P pairs."""

from typing import Any

import numpy as np

from rerank.semantic_ids.prefixes import members, number_prefixes
from rerank.semantic_ids.tokenizer import Tokenizer, blocks, reconstruction_error


def ids_metrics(
    tokenizer: Tokenizer, embeddings: np.ndarray, copies: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, Any]:
    """The metrics of the stage: ids (N, L) before and after collisions were resolved.

    Args:
        copies: How many items have each item's embedding, from `embedding_copies`.
    """
    unique_before, unique_after = uniqueness(before), uniqueness(after)
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
        "perplexity": perplexity(before, tokenizer.codebook_size),
        **reconstruction(tokenizer, embeddings, before, after),
    }


def reconstruction(
    tokenizer: Tokenizer, embeddings: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, float]:
    """Mean squared error of what the ids stand for, and the first one's share of the embeddings' variance."""
    errors = [reconstruction_error(tokenizer, embeddings, codes) for codes in (before, after)]
    return {
        "reconstruction_error_before": errors[0],
        "reconstruction_error_after": errors[1],
        "unexplained_variance": errors[0] / _variance(embeddings),
    }


def _variance(embeddings: np.ndarray) -> float:
    """Of all columns together, E||x||² - ||E x||², block by block."""
    squares, total = 0.0, np.zeros(embeddings.shape[1])
    for block in blocks(len(embeddings)):
        rows = np.asarray(embeddings[block], dtype=np.float64)
        squares, total = squares + (rows**2).sum(), total + rows.sum(axis=0)
    return float(squares / len(embeddings) - ((total / len(embeddings)) ** 2).sum())


def uniqueness(codes: np.ndarray) -> dict[str, float]:
    """Both definitions in use, for codes (N, L).

    Returns:
        `distinct`: distinct ids / items. `alone`: share of items whose id nobody shares; a pair that shares one id
        counts half in the first and not at all in the second.
    """
    numbers = number_prefixes(codes, codes.shape[1])
    counts = np.bincount(numbers)
    return {"distinct": len(counts) / len(codes), "alone": float((counts[numbers] == 1).mean())}


def uniqueness_where(codes: np.ndarray, counted: np.ndarray) -> float | None:
    """Share of the counted items (mask) whose id no item shares; None when none is counted."""
    numbers = number_prefixes(codes, codes.shape[1])
    alone = np.bincount(numbers)[numbers] == 1
    return float(alone[counted].mean()) if counted.any() else None


def code_use(codes: np.ndarray, codebook_size: int) -> list[float]:
    """Share of each level's codes that any item uses."""
    return [len(np.unique(level)) / codebook_size for level in codes.T]


def perplexity(codes: np.ndarray, codebook_size: int) -> list[float]:
    """exp(entropy) of each level's codes: as many equally used codes would be as unpredictable."""
    values = []
    for level in codes.T:
        shares = np.bincount(level, minlength=codebook_size) / len(level)
        shares = shares[shares > 0]
        values.append(float(np.exp(-(shares * np.log(shares)).sum())))
    return values


def embedding_copies(embeddings: np.ndarray) -> np.ndarray:
    """How many rows (itself included) have each row's embedding, to five digits.

    No deterministic rule can part equal embeddings. The encoder's last digits depend on what else was in the batch.
    """
    keys = np.empty(len(embeddings), dtype=np.int64)
    for block in blocks(len(embeddings)):
        rounded = np.round(np.asarray(embeddings[block], dtype=np.float32), 5) + 0.0  # -0.0 becomes 0.0
        keys[block] = [hash(row.tobytes()) for row in rounded]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse]


def items_per_prefix(codes: np.ndarray) -> list[np.ndarray]:
    """For each depth 1..L, how many items each prefix in use holds, most first."""
    return [np.sort(np.bincount(number_prefixes(codes, depth)))[::-1] for depth in range(1, codes.shape[1] + 1)]


def collisions(codes: np.ndarray) -> list[np.ndarray]:
    """The items of each id that several items share, in the order of the ids."""
    numbers = number_prefixes(codes, codes.shape[1])
    return members(numbers, np.flatnonzero(np.bincount(numbers) > 1))


def prefix_lift(codes: np.ndarray, pairs: np.ndarray) -> list[float | None]:
    """How many times as often as by chance the items of pairs (P, 2) share a prefix, for each depth 1..L.

    Chance is the pairs' first and second items shuffled against each other, so that popular items are as frequent;
    what pairs an item with itself is left out. None where chance never shares a prefix.
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
