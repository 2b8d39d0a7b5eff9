"""The condition of rewards that should pay only a ranking."""

from rerank.prompts import parse_completion


def valid_ranking(completions: list[str], candidate_labels: list[list[str]], **columns: object) -> list[bool]:
    """True when the completion names each candidate once, after a trace that may be empty.

    R = R_rank only when Omega(o) = 1: an invalid list earns no credit for the part that can be read.

    Source: GR2 technical report, arXiv:2606.31984, section 4.
    """
    rows = zip(completions, candidate_labels, strict=True)
    return [parse_completion(completion, labels).order is not None for completion, labels in rows]
