"""How far a ranking moves the target up: the main reward of GR2."""

from rerank.prompts import parse_completion


def rank_promotion(
    completions: list[str],
    candidate_labels: list[list[str]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    **columns: object,
) -> list[float]:
    """R_rank = (rank_D(target) - rank_o(target)) / |D|, or -1 for a completion that is no ranking.

    rank_D is the target's first-stage rank, rank_o its rank in the completion, |D| the number of candidates. Of
    several relevant candidates the most relevant is the target, of equals the one that the first stage ranks best.
    Range: -1 to 1; a ranking of N from -(N - 1)/N to (N - 1)/N, with ten candidates -0.9 to 0.9.

    Source: GR2, arXiv:2602.07774, section on RL rewards; -1 for an invalid completion as in arXiv:2607.01170.
    """
    rows = zip(completions, candidate_labels, first_stage_ranks, target_rank, strict=True)
    return [_promotion(*row) for row in rows]


def _promotion(completion: str, labels: list[str], ranks: list[int], target_rank: int) -> float:
    target = ranks.index(target_rank)  # raises for a row without a relevant candidate
    order = parse_completion(completion, labels).order
    return -1.0 if order is None else (target_rank - (order.index(target) + 1)) / len(labels)
