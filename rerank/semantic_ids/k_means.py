"""k-means on residuals, level by level: a tokenizer of its own, and the initial codebooks of an RQ-VAE.

Letters of shapes: N items, D embedding columns, d latent columns, L levels.
"""

import numpy as np

from rerank.semantic_ids.tokenizer import Tokenizer, nearest

SAMPLES_PER_CODE = 256  # more changes the centres little and costs time and memory
NUM_ITERATIONS = 25
FIT_SAMPLE = 65_536  # items that the mean, the scale and k-means are fitted on


def draw_sample(rows: np.ndarray, rng: np.random.Generator, most: int = FIT_SAMPLE) -> np.ndarray:
    """At most `most` of the rows, drawn, in their order; a memory-mapped catalogue need not fit in memory."""
    if len(rows) <= most:
        return np.asarray(rows)
    return np.asarray(rows[np.sort(rng.choice(len(rows), most, replace=False))])


def fit_k_means(vectors: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """Centres (num_codes, d) by k-means++ and Lloyd's iterations, the same for the same seed."""
    import faiss
    from sklearn.cluster import kmeans_plusplus

    vectors = draw_sample(vectors, np.random.default_rng(seed), SAMPLES_PER_CODE * num_codes)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    start, _ = kmeans_plusplus(vectors, num_codes, random_state=seed)
    # faiss warns below 39 points a centre; a small catalogue is no mistake here
    k_means = faiss.Kmeans(vectors.shape[1], num_codes, niter=NUM_ITERATIONS, seed=seed + 1, min_points_per_centroid=1)
    k_means.train(vectors, init_centroids=start)
    return np.asarray(k_means.centroids)


def fit_residual_k_means(vectors: np.ndarray, levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codebooks (L, num_codes, d), each fitted on the residuals of the levels before it.

    Source: GR2 (arXiv:2602.07774) section 2.3, initialisation by k-means++ on the residuals.
    """
    residuals = np.array(vectors, dtype=np.float32)
    codebooks = np.empty((levels, num_codes, residuals.shape[1]), dtype=np.float32)
    for level in range(levels):
        codebooks[level] = fit_k_means(residuals, num_codes, seed + level)
        residuals -= codebooks[level][nearest(residuals, codebooks[level])]
    return codebooks


def fit_k_means_tokenizer(embeddings: np.ndarray, levels: int, num_codes: int, seed: int) -> Tokenizer:
    """A tokenizer fitted to embeddings (N, D), which may be memory-mapped, without an autoencoder around the codes."""
    sample = draw_sample(embeddings, np.random.default_rng(seed))
    mean = sample.mean(axis=0)
    return Tokenizer(fit_residual_k_means(sample - mean, levels, num_codes, seed), mean)
