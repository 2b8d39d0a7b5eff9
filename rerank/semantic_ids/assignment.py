"""Ids by a fitted tokenizer, in blocks of items.

Letters of shapes: N items, M items that have ids already, D embedding columns, L levels.
"""

from pathlib import Path

import numpy as np

from rerank.semantic_ids.balance import balance
from rerank.semantic_ids.collisions import NO_TAKEN, resolve_collisions
from rerank.semantic_ids.embeddings import check_embeddings
from rerank.semantic_ids.tokenizer import Latents, Tokenizer, nearest_codes

ASSIGNED_CODES = "assigned_codes.npy"  # in the stage's folder


def assigned_codes(folder: Path, tokenizer: Tokenizer, embeddings: np.ndarray) -> np.ndarray:
    """Codes (N, L) as the stage assigned them; assigned again where its folder does not have them."""
    stored = folder / ASSIGNED_CODES
    return np.load(stored) if stored.is_file() else assign_codes(tokenizer, embeddings)


def assign_codes(tokenizer: Tokenizer, embeddings: np.ndarray, num_taken: int = 0) -> np.ndarray:
    """Codes (N, L) of embeddings (N, D) of length one, before any collision is resolved.

    Args:
        num_taken: How many items have ids already; random levels are then drawn anew.
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
    """Unique codes (N, L) for embeddings (N, D) of length one or not, by a fitted tokenizer.

    Args:
        tokenizer: From `Tokenizer.load(folder)`.
        embeddings: From the same encoder that the tokenizer was fitted on.
        taken: Codes (M, L) of items that have ids already; new items get others.

    Raises:
        ValueError: When the embeddings are unfit, or ids have run out.
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
