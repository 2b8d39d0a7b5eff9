"""Whether a completion keeps the format."""

from rerank.prompts import parse_completion


def well_formed(
    completions: list[str], candidate_labels: list[list[str]], top_k: list[int], **columns: object
) -> list[float]:
    """R_fmt = 1 when trace and ranking can be read and the ranking names each candidate once, else 0.

    With `top_k` it names that number of candidates, or all where there are fewer. The trace may be empty.
    Range: 0 to 1, nothing between.

    Source: GR2, arXiv:2602.07774 (whether its format reward is graded is not published; this one is binary, as in
    arXiv:2606.31984, section 4).
    """
    rows = zip(completions, candidate_labels, top_k, strict=True)
    return [float(parse_completion(*row).order is not None) for row in rows]
