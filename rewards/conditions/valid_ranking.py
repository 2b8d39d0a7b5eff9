"""The condition of rewards that should pay only a ranking."""

from rerank.prompts import parse_completion


def valid_ranking(
    completions: list[str], candidate_labels: list[list[str]], top_k: list[int], **columns: object
) -> list[bool]:
    """True when the completion names each candidate once, with `top_k` that number of them, after a trace that may be
    empty.

    R = R_rank only when Omega(o) = 1: an invalid list earns no credit for the part that can be read.

    Source: GR2 technical report, arXiv:2606.31984, section 4.
    """
    return [parse_completion(*row).order is not None for row in zip(completions, candidate_labels, top_k, strict=True)]
