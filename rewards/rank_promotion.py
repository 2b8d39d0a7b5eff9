"""How far a ranking moves the target up: the main reward of GR2."""

from rerank.metrics import judged_order
from rerank.prompts import parse_completion


def rank_promotion(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    top_k: list[int],
    **columns: object,
) -> list[float]:
    """R_rank = (rank_D(target) - rank_o(target)) / |D|, or -1 for a completion that is no ranking.

    rank_D is the target's first-stage rank, rank_o its rank in the completion, |D| the number of candidates, all three
    without candidates that were not seen. Of several relevant candidates the most relevant is the target, of equals
    the one that the first stage ranks best.
    Range: -1 to 1; a ranking of N from -(N - 1)/N to (N - 1)/N, with ten candidates -0.9 to 0.9.

    Source: GR2, arXiv:2602.07774, section on RL rewards; -1 for an invalid completion as in arXiv:2607.01170.
    """
    rows = zip(completions, candidate_labels, relevance, first_stage_ranks, target_rank, top_k, strict=True)
    return [_promotion(*row) for row in rows]


def _promotion(
    completion: str, labels: list[str], relevance: list[float], ranks: list[int], target_rank: int, top_k: int
) -> float:
    before, after = ranks_of_target(completion, labels, relevance, ranks, target_rank, top_k)
    return -1.0 if after is None else (before - after) / len(judged_order(range(len(labels)), relevance))


def ranks_of_target(
    completion: str, labels: list[str], relevance: list[float], ranks: list[int], target_rank: int, top_k: int
) -> tuple[int, int | None]:
    """rank_D(target) and rank_o(target) of one completion; rank_o is None for one that is no ranking."""
    target = ranks.index(target_rank)  # raises for a row without a relevant candidate
    seen = judged_order(range(len(labels)), relevance)
    order = parse_completion(completion, labels, top_k).order
    before = sum(ranks[place] <= target_rank for place in seen)
    return before, None if order is None else judged_order(order, relevance).index(target) + 1
