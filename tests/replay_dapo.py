"""The dapo stage on stored rollouts: vLLM still samples, then each completion is exchanged for one of an earlier run.

TOY_ROLLOUTS=RUN_DIR accelerate launch --config_file FILE -m tests.replay_dapo --config tests/toy/7_dapo.yaml
"""

import os

from trl import GRPOTrainer

from rerank import recipe, rollouts


def replay(run: str) -> None:
    """Make TRL's trainer return, for every step, the completions that the run stored for it, in their order."""
    sample = GRPOTrainer._generate_single_turn
    stored: dict[int, list[dict]] = {}
    for row in rollouts.read_rollouts(run).to_pylist():
        stored.setdefault(row["step"], []).append(row)

    def replayed(self, prompt_ids, *args, **kwargs):
        sampled, logps = sample(self, prompt_ids, *args, **kwargs)
        if not self.sampler.requests:  # the check of consistency, which is not stored
            return sampled, logps
        ids = {drawn.row["row_id"] for drawn, _ in self.sampler.requests}
        rows = [row for row in stored[self.state.global_step] if row["row_id"] in ids]
        assert len(sampled) == len(rows)
        assert [self.processing_class(row["prompt"]).input_ids for row in rows] == prompt_ids, "rows in another order"
        return [row["completion_ids"] for row in rows], [row["sampling_logps"] for row in rows]

    GRPOTrainer._generate_single_turn = replayed


if __name__ == "__main__":
    replay(os.environ["TOY_ROLLOUTS"])
    recipe.launch("dapo")
