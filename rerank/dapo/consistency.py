"""Whether the policy ranks alike when the candidates are shown in another order: measured on the same rows all along.

A policy that reads the candidates does; one that copies their order, or has a favourite place, does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from rerank import rollout_metrics
from rerank.dapo.prompt_stream import PromptStream, prompt_row
from rerank.prompts import parse_completion


class ConsistencyCheck:
    """Ranks a few rows greedily, in first-stage order and in a shuffled one.

    Args:
        trainer: A DapoTrainer.
        num_rows: How many of the training rows; 0 for no check.
        every: Steps between two checks.
    """

    def __init__(self, trainer: Any, prompts: PromptStream, num_rows: int, every: int) -> None:
        self.trainer, self.every = trainer, every
        rng = np.random.default_rng([prompts.seed, num_rows])
        chosen = rng.choice(len(prompts.rows), min(num_rows, len(prompts.rows)), replace=False)
        rows = [prompts.rows[place] for place in sorted(chosen)]
        shuffles = [rng.permutation(len(row["candidates"])).tolist() for row in rows]
        shown = zip(rows, shuffles, strict=True)
        self.shuffled = [prompt_row(row, prompts.encoder, order) for row, order in shown]
        self.rows = [prompt_row(row, prompts.encoder) for row in rows]

    def log(self, step: int) -> None:
        """Log `rollouts/consistency/...` of the policy as the engine has it, in the steps that are due."""
        if not self.rows or step % self.every:
            return
        agreement = rollout_metrics.agreement(self._rank(self.rows), self._rank(self.shuffled))
        for name, value in agreement.items():
            self.trainer._metrics["train"][f"rollouts/consistency/{name}"].append(float(value))

    def _rank(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int] | None]:
        """Items of each row, best first; None for no ranking. Each process ranks a share."""
        accelerator = self.trainer.accelerator
        share = -(-len(rows) // accelerator.num_processes)
        shares = [*rows, *[rows[-1]] * (share * accelerator.num_processes - len(rows))]
        first = accelerator.process_index * share
        local = shares[first : first + share]
        completions = self.trainer.generate_greedily([row["prompt"] for row in local])
        found = []
        for row, text in zip(local, completions, strict=True):
            order = parse_completion(text, row["candidate_labels"]).order
            found.append(None if order is None else [row["candidates"][place] for place in order])
        return gather_object(found)[: len(rows)]
