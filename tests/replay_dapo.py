"""The dapo stage on stored rollouts: vLLM still samples, then each completion is exchanged for one of an earlier run.

The second process is also late at the end: a stage is finished only when every process is done with its folder.

TOY_ROLLOUTS=RUN_DIR accelerate launch --config_file FILE -m tests.replay_dapo --config tests/toy/7_dapo.yaml
"""

import os
import time

from trl import GRPOTrainer

from rerank import dapo
from rerank.launch import recipe
from rerank.rollouts import store as rollouts


def replay(run: str) -> None:
    """Make TRL's trainer return, for every step, the completions that the run stored for it, in their order."""
    sample, stored = GRPOTrainer._generate_single_turn, rollouts.read_rollouts(run).to_pylist()

    def replayed(self, prompt_ids, *args, **kwargs):
        sampled, logps = sample(self, prompt_ids, *args, **kwargs)
        if not self.prepared.requests:  # the check of consistency, which is not stored
            return sampled, logps
        ids = {prompt.asked.row.row_id for prompt in self.prepared.requests}
        rows = [row for row in stored if row["step"] == self.state.global_step and row["row_id"] in ids]
        assert len(sampled) == len(rows)
        assert [self.processing_class(row["prompt"]).input_ids for row in rows] == prompt_ids, "rows in another order"
        return [row["completion_ids"] for row in rows], [row["sampling_logps"] for row in rows]

    GRPOTrainer._generate_single_turn = replayed


def be_late(seconds: float) -> None:
    """Make this process read its rollouts after the others have."""
    gain = dapo.gain_at_equal_ranks

    def late(folder):
        time.sleep(seconds)
        return gain(folder)

    dapo.gain_at_equal_ranks = late


if __name__ == "__main__":
    replay(os.environ["TOY_ROLLOUTS"])
    if os.environ["RANK"] == "1":
        be_late(3)
    recipe.launch("dapo")
