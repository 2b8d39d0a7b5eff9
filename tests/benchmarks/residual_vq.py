"""How long vector-quantize-pytorch's ResidualVQ takes to a reconstruction error; `semantic_ids.py` runs it.

    python -m tests.benchmarks.residual_vq EMBEDDINGS.npy ERROR LEVELS CODEBOOK_SIZE SECONDS

Codebooks start from its own k-means and follow by its moving averages, without an autoencoder. Measuring the error is
not timed. Several batch sizes are tried, each for at most SECONDS; prints one JSON line with the fastest that
reached the error, else with the one that came nearest.
"""

import json
import sys
import time

import numpy as np
import torch
from vector_quantize_pytorch import ResidualVQ


def squared_error(quantizer: ResidualVQ, vectors: torch.Tensor) -> float:
    """Mean squared distance between vectors and what their codes stand for."""
    quantizer.eval()
    quantized, _, _ = quantizer(vectors)
    quantizer.train()
    return float(((quantized - vectors) ** 2).sum(dim=1).mean())


@torch.no_grad()
def fit(vectors: torch.Tensor, batch_size: int, error: float, levels: int, codes: int, limit: float) -> dict:
    """Epochs until the error or the time limit is reached."""
    torch.manual_seed(0)
    quantizer = ResidualVQ(dim=vectors.shape[1], num_quantizers=levels, codebook_size=codes, kmeans_init=True)
    seconds, best = 0.0, float("inf")
    while seconds < limit and best > error:
        begin = time.perf_counter()
        for batch in torch.randperm(len(vectors)).split(batch_size):
            quantizer(vectors[batch])
        seconds += time.perf_counter() - begin
        best = min(best, squared_error(quantizer, vectors))
    return {"batch_size": batch_size, "seconds": seconds, "error": best, "reached": best <= error}


if __name__ == "__main__":
    path, error, levels, codes, limit = sys.argv[1:]
    vectors = torch.from_numpy(np.load(path))
    runs = [
        fit(vectors, size, float(error), int(levels), int(codes), float(limit)) for size in (len(vectors), 4096, 1024)
    ]
    reached = [run for run in runs if run["reached"]]
    print(json.dumps(min(reached or runs, key=lambda run: run["seconds" if reached else "error"])))
