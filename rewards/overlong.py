"""DAPO's soft punishment of overlong completions."""


def overlong(
    completions: list[str],
    completion_ids: list[list[int]],
    max_completion_tokens: list[int],
    cache_tokens: int = 4096,
    **columns: object,
) -> list[float]:
    """0 up to L_max - L_cache tokens, then (L_max - L_cache - |y|) / L_cache, -1 beyond L_max.

    |y| is the number of tokens of the completion, L_max the token limit that it was sampled with.
    Range: -1 to 0; punishes only.

    Args:
        cache_tokens: L_cache, the tokens below the limit over which the punishment grows, from 0 to L_max; by default
            the paper's, whose L_max is 20,480.

    Source: DAPO, arXiv:2503.14476, eq. 13.
    """
    rows = zip(completion_ids, max_completion_tokens, strict=True)
    return [_overlong(len(ids), limit, cache_tokens) for ids, limit in rows]


def _overlong(length: int, limit: int, cache: int) -> float:
    if not 0 <= cache <= limit:
        raise ValueError(f"cache_tokens is {cache} but must be from 0 to the token limit of a completion, {limit}")
    if length <= limit - cache:
        return 0.0
    return (limit - cache - length) / cache if length <= limit else -1.0
