"""The condition on the ranking reward of GR2's technical report: its identity check."""

from rerank import metrics
from rerank.prompts import parse_completion


def not_a_suboptimal_copy(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    top_k: list[int],
    **columns: object,
) -> list[bool]:
    """False for a completion that is no ranking, and for the order shown where its AUC is below 1.

    R = alpha R_fmt if pi = [1..K] and R_AUC([1..K]) < 1, else R = R_rank + alpha R_fmt; and R_rank only for a valid
    permutation: the condition of the ranking reward. It is False for the exact copy alone: one swap passes. Candidates
    that were not seen count in neither: to move them alone is to copy.

    Source: GR2 technical report, arXiv:2606.31984, section 4 (eq. 5 to 7).
    """
    return [_not_a_suboptimal_copy(*row) for row in zip(completions, candidate_labels, relevance, top_k, strict=True)]


def _not_a_suboptimal_copy(completion: str, labels: list[str], relevance: list[float], top_k: int) -> bool:
    order = parse_completion(completion, labels, top_k).order
    if order is None:
        return False
    seen = metrics.judged_order(order, relevance)
    return seen != sorted(seen) or metrics.auc(relevance) in (None, 1.0)
