"""The condition of GR2's conditional reward, in its safe reading."""

from rewards.rank_promotion import ranks_of_target


def promoted_or_kept_first(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    top_k: list[int],
    **columns: object,
) -> list[bool]:
    """True when the target's rank falls below its first-stage rank, or is 1 in both.

    Two readings are published. GR2 (arXiv:2602.07774): R = R_rank + alpha R_fmt if R_rank > 0 or rank_D(target) = 1.
    Read literally, that still pays for the format when a target that was first is demoted. arXiv:2607.01170 asks that
    it was first and stays first; this function follows it. A completion that is no ranking gets False.
    """
    rows = zip(completions, candidate_labels, relevance, first_stage_ranks, target_rank, top_k, strict=True)
    ranks = [ranks_of_target(*row) for row in rows]
    return [after is not None and (after < before or before == after == 1) for before, after in ranks]
