"""The condition of GR2's conditional reward, in its safe reading."""

from rewards.rank_promotion import rank_promotion


def promoted_or_kept_first(
    completions: list[str],
    candidate_labels: list[list[str]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    **columns: object,
) -> list[bool]:
    """True when the target's rank falls below its first-stage rank, or is 1 in both.

    Two readings are published. GR2 (arXiv:2602.07774): R = R_rank + alpha R_fmt if R_rank > 0 or rank_D(target) = 1.
    Read literally, that still pays for the format when a target that was first is demoted. arXiv:2607.01170 asks that
    it was first and stays first; this function follows it. A completion that is no ranking gets False.
    """
    gains = rank_promotion(completions, candidate_labels, first_stage_ranks, target_rank)
    return [gain > 0 or (rank == 1 and gain == 0) for gain, rank in zip(gains, target_rank, strict=True)]
