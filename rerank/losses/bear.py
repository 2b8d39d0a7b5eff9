"""Token loss: BEAR, which weighs tokens by how safely a beam search would keep them."""

import math

import torch

from rerank.losses import LossInputs
from rerank.losses.msl import with_plain

TASKS = ("next_item",)
REACHES = "legal"
NEEDS = "what msl needs"
COSTS = "msl and a top-k over the legal tokens"
NORMALISERS = ("positions", "weights")


def bear(
    inputs: LossInputs,
    num_beams: int = 10,
    xi: float = 2.75,
    lambda_c: float | None = None,
    lambda_paper: float | None = None,
    temperature: float = 1.0,
    normalise: str = "positions",
) -> torch.Tensor:
    """-w log P(label), (P,), where w = 1 + lambda_c sigmoid((log P(label) - log beta) / xi), P over the legal tokens.

    beta is the num_beams-th largest P of the position, or its smallest where there are fewer; w has no gradient. The
    gradient is exactly that of the paper's L_SFT + lambda L_reg with beta held fixed, where lambda = xi * lambda_c.
    The paper writes a generic P; as in the released code, P and beta are over legal tokens here. The plain loss where
    the label is no token of an item. With a weight of 0 it is `msl`.

    Args:
        inputs: Of a micro-batch.
        num_beams: Of the beam search that the model is trained for (K in the code, B in the paper).
        xi: Temperature of the sigmoid.
        lambda_c: The code's weight; 0.25, as published for the Toy set, unless either is given.
        lambda_paper: The paper's weight, in place of lambda_c.
        temperature: Of the masked softmax.
        normalise: `positions`, or the released code's `weights`: the micro-batch's sum is divided by its sum of
            weights, which makes a step depend on how its batch is cut.

    Raises:
        ValueError: When a value is out of range, or both weights are given.

    Source: arXiv:2601.22925, eq. for L_BEAR and sigma_xi; Tiny-Snow/BEAR-SIGIR-2026 for w.
    """
    weight = _code_weight(lambda_c, lambda_paper, xi)
    if not isinstance(num_beams, int) or num_beams < 1:
        raise ValueError(f"num_beams is {num_beams} but must be a whole number of at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be above 0")
    if normalise not in NORMALISERS:
        raise ValueError(f"normalise is {normalise!r}; use one of {', '.join(NORMALISERS)}")
    logps, num_legal, places = inputs.legal_logps(temperature)
    label_logps = logps.gather(1, places[:, None])[:, 0]
    weights = token_weights(logps.detach(), num_legal, label_logps.detach(), num_beams, xi, weight)
    if normalise == "weights":
        weights = weights * len(weights) / weights.sum().clamp(min=1)
    return with_plain(inputs, -weights * label_logps)


def token_weights(
    logps: torch.Tensor, num_legal: torch.Tensor, label_logps: torch.Tensor, num_beams: int, xi: float, weight: float
) -> torch.Tensor:
    """w of each position, (M,); see `bear` for the formula and `LossInputs.legal_logps` for the shapes."""
    best = logps.topk(min(num_beams, logps.shape[1]), dim=1).values  # -inf sorts last
    last = num_legal.clamp(max=best.shape[1])[:, None] - 1
    log_beta = best.gather(1, last)[:, 0]
    return 1 + weight * torch.sigmoid((label_logps - log_beta) / xi)


def _code_weight(lambda_c: float | None, lambda_paper: float | None, xi: float) -> float:
    if not (math.isfinite(xi) and xi > 0):
        raise ValueError(f"xi is {xi} but must be above 0")
    if lambda_c is not None and lambda_paper is not None:
        raise ValueError(
            f"lambda_c is {lambda_c} and lambda_paper {lambda_paper}; give one, lambda_paper = xi lambda_c"
        )
    weight = lambda_paper / xi if lambda_paper is not None else 0.25 if lambda_c is None else lambda_c
    if not (math.isfinite(weight) and weight >= 0):
        name, value = ("lambda_c", lambda_c) if lambda_paper is None else ("lambda_paper", lambda_paper)
        raise ValueError(f"{name} is {value} but must not be negative")
    return weight
