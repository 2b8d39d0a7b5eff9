"""DAPO's soft punishment of overlong completions."""

from typing import Any

from trl.rewards import get_soft_overlong_punishment


def overlong(
    completions: list[str],
    completion_ids: list[list[int]],
    max_tokens: int = 20480,
    cache_tokens: int = 4096,
    **columns: Any,
) -> list[float]:
    """0 up to max_tokens - cache_tokens, then (max_tokens - cache_tokens - |y|)/cache_tokens, -1 beyond max_tokens.

    |y| is the number of tokens. The option `overlong_tokens` of the dapo stage does the same with the stage's own
    length limit; use this where the limit should be another, or the punishment have a weight or a condition.
    Range: -1 to 0; punishes only.

    Args:
        max_tokens: L_max, by default the paper's: 16,384 expected and 4,096 more.
        cache_tokens: L_cache, the tokens below L_max over which the punishment grows, in [0, max_tokens].

    Source: DAPO, arXiv:2503.14476, eq. 13.
    """
    if not 0 <= cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens} but must be from 0 to max_tokens, {max_tokens}")
    return get_soft_overlong_punishment(max_tokens, cache_tokens)(completion_ids)
