"""The condition of GR2's conditional reward, as its equation is printed."""

from rerank.prompts import parse_completion


def promoted_or_first(
    completions: list[str],
    candidate_labels: list[list[str]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    **columns: object,
) -> list[bool]:
    """True when R_rank > 0 or rank_D(target) = 1: the target moves up, or the first stage had it first.

    R = R_rank + alpha R_fmt where it holds, else R = R_rank. Read so, the format is also paid to a ranking that
    demotes a target that was first; `promoted_or_kept_first` is the reading that does not. A completion that is no
    ranking gets False.

    Source: GR2, arXiv:2602.07774, the conditional reward of its section on reinforcement learning.
    """
    rows = zip(completions, candidate_labels, first_stage_ranks, target_rank, strict=True)
    return [_promoted_or_first(*row) for row in rows]


def _promoted_or_first(completion: str, labels: list[str], ranks: list[int], target_rank: int) -> bool:
    target = ranks.index(target_rank)  # raises for a row without a relevant candidate
    order = parse_completion(completion, labels).order
    return order is not None and (target_rank == 1 or order.index(target) + 1 < target_rank)
