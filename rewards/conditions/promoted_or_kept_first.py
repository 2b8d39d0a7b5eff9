"""The condition of GR2's conditional reward, in its safe reading."""

from rerank.prompts import parse_completion


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
    rows = zip(completions, candidate_labels, first_stage_ranks, target_rank, strict=True)
    return [_promoted_or_kept_first(*row) for row in rows]


def _promoted_or_kept_first(completion: str, labels: list[str], ranks: list[int], target_rank: int) -> bool:
    target = ranks.index(target_rank)  # raises for a row without a relevant candidate
    order = parse_completion(completion, labels).order
    if order is None:
        return False
    rank = order.index(target) + 1
    return rank < target_rank or rank == target_rank == 1
