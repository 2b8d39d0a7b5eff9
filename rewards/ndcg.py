"""NDCG of the ranking a completion states."""

from rerank.metrics import ndcg_at_k
from rerank.prompts import parse_completion


def ndcg(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    top_k: list[int],
    k: int = 10,
    **columns: object,
) -> list[float | None]:
    """R_NDCG@k of graded relevance, 0 for a completion that is no ranking, None for a row without a relevant item.

    The sum over the first k places i of (2^g - 1) / log2(i + 1), over its greatest value; g is the grade of the item
    at place i, such as 1 for a click and 2 for a purchase. Places are counted without candidates that were not seen.
    Range: 0 to 1.

    Source: the technical report of GR2, arXiv:2606.31984, its ranking rewards.
    """
    return [_ndcg(*row, k) for row in zip(completions, candidate_labels, relevance, top_k, strict=True)]


def _ndcg(completion: str, labels: list[str], relevance: list[float], top_k: int, k: int) -> float | None:
    order = parse_completion(completion, labels, top_k).order
    if order is None:
        return 0.0 if any(grade > 0 for grade in relevance) else None
    return ndcg_at_k([relevance[position] for position in order], k)
