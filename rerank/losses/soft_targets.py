"""Token loss: the first label's distribution over the candidates towards a mix of relevance and a teacher's scores."""

import math

import torch

from rerank.launch.values import check_range
from rerank.losses import LossInfo, LossInputs

INFO = LossInfo(
    tasks=("rerank",),
    first_label=True,
    needs="logits of the candidates' labels, each one token, at the first label of each row; a teacher's scores",
    costs="less than TRL's loss: no other token is under loss, and rows end at the first label",
)


def soft_targets(inputs: LossInputs, weight: float = 0.8, temperature: float = 1.0) -> torch.Tensor:
    """-sum of t log p over the candidates that were seen, (P,), for rows whose first label alone is under loss.

    p is the softmax of the labels' logits, t = (1 - weight) r + weight softmax(scores / temperature), where r is
    uniform over the candidates of the highest grade. The trees' scores are calibrated, so that 1 is their temperature.

    Args:
        inputs: Of rows without traces.
        weight: Of the teacher, from 0 (relevance alone) to 1.
        temperature: Of the teacher's scores, above 0.

    Raises:
        ValueError: When a weight needs scores that the rows lack.
    """
    check_range("weight", weight, least=0, most=1)
    check_range("temperature", temperature, above=0)
    labels = inputs.first_labels
    grades = labels.grades.masked_fill(~labels.seen, -math.inf)
    targets = (grades == grades.max(dim=1, keepdim=True).values) & labels.seen
    mixed = (1 - weight) * targets / targets.sum(dim=1, keepdim=True)
    if weight > 0:
        if labels.teacher_scores.isnan().logical_and(labels.seen).any():
            raise ValueError(
                f"weight is {weight} but the rows have no teacher's scores; set teacher: evidence in the traces "
                "recipe, which writes them, and make that stage again, or set weight: 0"
            )
        scores = labels.teacher_scores.masked_fill(~labels.seen, -math.inf)
        mixed = mixed + weight * (scores / temperature).softmax(dim=1)
    logps = labels.logits.masked_fill(~labels.seen, -math.inf).log_softmax(dim=1).masked_fill(~labels.seen, 0)
    return -(mixed * logps).sum(dim=1)
