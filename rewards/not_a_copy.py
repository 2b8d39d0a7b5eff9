"""Whether a ranking is more than the order it was shown."""

from rerank import metrics
from rerank.prompts import parse_completion


def not_a_copy(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    top_k: list[int],
    max_tau: float = 0.8,
    **columns: object,
) -> list[float]:
    """R_copy = min(1, (1 - tau)/(1 - max_tau)), tau being Kendall's between the ranking and the order shown.

    So 0 for an exact copy, and the less the nearer a ranking comes to one. Whoever has reason to stay near loses
    nothing: the value is 1 for a ranking of higher AUC than the order shown, and for every ranking of a row whose
    order shown has an AUC of 1 or none. Both orders are taken without candidates that were not seen. 0 for a
    completion that is no ranking. Range: 0 to 1.

    Args:
        max_tau: The highest tau that is paid in full, in [-1, 1]. At 1 only the exact copy gets 0. Of ten candidates
            a swap of two neighbours has a tau of 1 - 2/45, and 0.8 asks for five such swaps.

    Source: at max_tau 1 the identity check of the GR2 technical report, arXiv:2606.31984, section 4; the graded form,
    which near-copies cannot pass by one swap, is this project's.
    """
    if not -1 <= max_tau <= 1:
        raise ValueError(f"max_tau is {max_tau} but must be in [-1, 1]")
    return [_not_a_copy(*row, max_tau) for row in zip(completions, candidate_labels, relevance, top_k, strict=True)]


def _not_a_copy(completion: str, labels: list[str], relevance: list[float], top_k: int, max_tau: float) -> float:
    order = parse_completion(completion, labels, top_k).order
    if order is None:
        return 0.0
    shown, stated = metrics.auc(relevance), metrics.auc([relevance[position] for position in order])
    if shown is None or stated is None or shown == 1.0 or stated > shown:
        return 1.0
    distance = 1 - metrics.kendall_tau(metrics.judged_order(order, relevance))
    return min(1.0, distance / (1 - max_tau)) if max_tau < 1 else float(distance > 0)
