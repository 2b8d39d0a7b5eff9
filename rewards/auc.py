"""AUC of the ranking a completion states: the ranking reward of GR2's technical report."""

from rerank import metrics
from rerank.prompts import parse_completion


def auc(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    top_k: list[int],
    **columns: object,
) -> list[float | None]:
    """R_AUC = 1/(|M| |N|) sum_{i in M} sum_{j in N} 1[rank(i) < rank(j)], 0 for a completion that is no ranking.

    M are the candidates of any grade above 0, N those of grade 0; None for a row in which either is empty. Candidates
    that were not seen are in neither. With one relevant candidate of N it is (N - its rank)/(N - 1), so the input
    order earns much of it: see `conditions/not_a_suboptimal_copy`. Range: 0 to 1.

    Source: GR2 technical report, arXiv:2606.31984, eq. 5.
    """
    return [_auc(*row) for row in zip(completions, candidate_labels, relevance, top_k, strict=True)]


def _auc(completion: str, labels: list[str], relevance: list[float], top_k: int) -> float | None:
    order = parse_completion(completion, labels, top_k).order
    if order is None:
        return None if metrics.auc(relevance) is None else 0.0
    return metrics.auc([relevance[position] for position in order])
