"""k-means on residuals, level by level: where the codebooks of a residual quantizer start."""

import numpy as np

SAMPLES_PER_CODE = 256  # more changes the centres little and costs time and memory
NUM_ITERATIONS = 25


def fit_k_means(vectors: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """Centres (num_codes, d) by k-means++ and Lloyd's iterations, the same for the same seed."""
    import faiss
    from sklearn.cluster import kmeans_plusplus

    rng = np.random.default_rng(seed)
    if len(vectors) > SAMPLES_PER_CODE * num_codes:
        vectors = vectors[np.sort(rng.choice(len(vectors), SAMPLES_PER_CODE * num_codes, replace=False))]
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    start, _ = kmeans_plusplus(vectors, num_codes, random_state=seed)
    # faiss warns below 39 points a centre; a small catalogue is no mistake here
    k_means = faiss.Kmeans(
        vectors.shape[1], num_codes, niter=NUM_ITERATIONS, seed=seed + 1, min_points_per_centroid=1, verbose=False
    )
    k_means.train(vectors, init_centroids=start)
    return k_means.centroids


def fit_residual_k_means(vectors: np.ndarray, levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codebooks (L, num_codes, d), each fitted on what the levels before it leave unexplained.

    Source: GR2 (arXiv:2602.07774) section 2.3, initialisation by k-means++ on the residuals.
    """
    residuals = np.array(vectors, dtype=np.float32)
    codebooks = np.empty((levels, num_codes, residuals.shape[1]), dtype=np.float32)
    for level in range(levels):
        codebooks[level] = fit_k_means(residuals, num_codes, seed + level)
        residuals -= codebooks[level][nearest(residuals, codebooks[level])]
    return codebooks


def nearest(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Index of the nearest row of `codebook` for each vector; the lower index on ties."""
    # ||v - e||² without ||v||², which is the same for every code
    return ((codebook**2).sum(axis=1) - 2 * vectors @ codebook.T).argmin(axis=1)


def squared_distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """||v - e||² for every vector and code."""
    return (vectors**2).sum(axis=1, keepdims=True) + (codebook**2).sum(axis=1) - 2 * vectors @ codebook.T
