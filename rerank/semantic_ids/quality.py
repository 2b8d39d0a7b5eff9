"""How good a catalogue's ids are, in numbers. Letters of shapes: N items, D embedding columns, L levels."""

import numpy as np

from rerank.semantic_ids.tokenizer import blocks


def uniqueness(codes: np.ndarray) -> dict[str, float]:
    """Both definitions in use, for codes (N, L).

    Returns:
        `distinct`: distinct ids / items. `alone`: share of items whose id nobody shares; a pair that shares one id
        counts half in the first and not at all in the second.
    """
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return {"distinct": len(counts) / len(codes), "alone": float((counts[inverse.ravel()] == 1).mean())}


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
