"""NDCG of the ranking a completion states."""

from typing import Any

from rerank.metrics import ndcg_at_k
from rerank.prompts import parse_completion


def ndcg(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    k: int = 10,
    **columns: Any,
) -> list[float | None]:
    """NDCG@k, 0 for a completion that is no ranking, None for a row in which nothing is relevant. Range: 0 to 1."""
    rows = zip(completions, candidate_labels, relevance, strict=True)
    return [_ndcg(*row, k) for row in rows]


def _ndcg(completion: str, labels: list[str], relevance: list[float], k: int) -> float | None:
    order = parse_completion(completion, labels).order
    if order is None:
        return 0.0 if any(relevance) else None
    return ndcg_at_k([relevance[position] for position in order], k)
