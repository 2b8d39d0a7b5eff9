"""The condition of GR2's conditional reward, as its equation is printed."""

from rewards.rank_promotion import ranks_of_target


def promoted_or_first(
    completions: list[str],
    candidate_labels: list[list[str]],
    relevance: list[list[float]],
    first_stage_ranks: list[list[int]],
    target_rank: list[int],
    top_k: list[int],
    **columns: object,
) -> list[bool]:
    """True when R_rank > 0 or rank_D(target) = 1: the target moves up, or the first stage had it first.

    R = R_rank + alpha R_fmt where it holds, else R = R_rank. Read so, the format is also paid to a ranking that
    demotes a target that was first; `promoted_or_kept_first` is the reading that does not. A completion that is no
    ranking gets False.

    Source: GR2, arXiv:2602.07774, the conditional reward of its section on reinforcement learning.
    """
    rows = zip(completions, candidate_labels, relevance, first_stage_ranks, target_rank, top_k, strict=True)
    ranks = [ranks_of_target(*row) for row in rows]
    return [after is not None and (after < before or before == 1) for before, after in ranks]
