"""Whether the policy ranks alike when the candidates are shown in another order, on the same rows all along.

A policy that reads the candidates does; one that copies their order, or has a favourite place, does not.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rerank.dapo.prompt_stream import PromptStream
from rerank.launch.processes import in_shares
from rerank.prompts import parse_completion
from rerank.rollouts import metrics as rollout_metrics
from rerank.rows import PromptedRow

NUM_ROWS, EVERY = 16, 10  # rows of a check, and steps from one to the next: under 1 % of the completions of a training

GenerateGreedily = Callable[[Sequence[str]], Sequence[str]]


def is_due(step: int, num_updates: int) -> bool:
    """Whether a check falls on this optimizer step or one of those that follow before rollouts are sampled again.

    Args:
        step: For which rollouts are sampled.
        num_updates: Steps that train on them.
    """
    return -step % EVERY < num_updates


def consistency(prompts: PromptStream, generate: GenerateGreedily) -> dict[str, float]:
    """Agreement of the rankings of NUM_ROWS rows, once in first-stage order and once shuffled, as metrics to log.

    Args:
        prompts: Whose rows.
        generate: The policy's most probable completion of each prompt.
    """
    rng = np.random.default_rng([prompts.seed, NUM_ROWS])
    chosen = rng.choice(len(prompts.rows), min(NUM_ROWS, len(prompts.rows)), replace=False)
    rows = [prompts.rows[place] for place in sorted(chosen)]
    shuffled = [row.shuffled(rng.permutation(len(row.candidates)).tolist()) for row in rows]
    asked = [[prompts.ask(row) for row in shown] for shown in (rows, shuffled)]
    rankings = [in_shares(lambda share: _rank(share, generate), shown) for shown in asked]
    agreement = rollout_metrics.agreement(*rankings)
    return {f"rollouts/consistency/{name}": value for name, value in agreement.items()}


def _rank(asked: Sequence[PromptedRow], generate: GenerateGreedily) -> list[list[int] | None]:
    """Items of each row, best first; None for no ranking."""
    completions = generate([row.prompt for row in asked])
    answers = zip(asked, completions, strict=True)
    parsed = [(row.row, parse_completion(row.begun + text, row.labels, row.top_k).order) for row, text in answers]
    return [order and [row.candidates[place] for place in order] for row, order in parsed]
