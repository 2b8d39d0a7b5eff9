"""DAPO on TRL's GRPOTrainer: dynamic sampling, whole groups, rollouts stored and held to be on-policy."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import split_tensor_dict

from rerank import scoring
from rerank.dapo.checkpoint import BatchInUse, load_batch, load_state, save_state
from rerank.dapo.consistency import consistency, is_due
from rerank.dapo.gap import GapCheck, OffPolicyError
from rerank.dapo.groups import Group, record
from rerank.dapo.prepared import Prepared, PreparedTrainer
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.sampler import GroupSampler, SamplingOptions, StepGroups
from rerank.dapo.tracking import GAP, LARGEST_GAP, log_traces
from rerank.rollouts import metrics as rollout_metrics
from rerank.rollouts.store import RolloutWriter, to_table

if TYPE_CHECKING:
    from peft import PeftConfig

    from rerank.dapo import DapoArguments, DapoConfig

logger = logging.getLogger(__name__)


class DapoTrainer(PreparedTrainer):
    """TRL's GRPOTrainer whose steps hold useful groups only, sampled on-policy from a stream of prompts.

    An optimizer step, in order; each is a method of this name:

    1. `check_consistency`: every few steps, rank the same rows in two orders of their candidates.
    2. `sample_groups`: sample groups of completions until enough are useful (`GroupSampler`), by `generate` and
       `score`; store those that are not.
    3. `choose_groups`: take this process's share of the useful groups, and padding where they are too few.
    4. `compute_advantages`: hand the completions and rewards to TRL, which computes advantages and pads tensors.
    5. `mask_padding`: leave padding groups out of the loss.
    6. `show_groups`: show one kept and one discarded group in trackio, where `report_to` names it.
    7. `compute_loss`: forward pass and loss of a micro-batch, by TRL.
    8. `measure_gap`: compare its log-probabilities with those at sampling.
    9. `store_rollouts`: store what was trained on, after the last micro-batch.
    10. `log_gap`: log the mean gap, and stop the run when rollouts are off-policy.

    Steps 1 to 6 make a generation batch, in `_generate_and_score_completions`; the others follow its micro-batches.
    They hand each other `prepared` and nothing else.

    Where a batch has several updates (`num_iterations` above 1, or `steps_per_generation` above
    `gradient_accumulation_steps`), the weights that sampled it are gone after the first. TRL then computes
    log-probabilities at sampling, for the ratio that DAPO clips (eq. 10), and steps 8 to 10 follow step 6 with the
    whole batch. With one update the ratio is 1 everywhere, and clipping does nothing.

    Args:
        args: Options of the stage.
        config: TRL's options.
        model: The policy.
        prompts: Where prompts come from, in place of TRL's dataset.
        rollout_dir: Where rollouts are stored.
        peft_config: For LoRA.
    """

    def __init__(
        self,
        args: "DapoArguments",
        config: "DapoConfig",
        model: PreTrainedModel,
        prompts: PromptStream,
        rollout_dir: Path,
        peft_config: "PeftConfig | None" = None,
    ) -> None:
        self.rewards, self.prompts = args.load_rewards(), prompts
        self.gap_check = GapCheck(args.max_logp_gap)
        config.reward_weights = [reward.weight for reward in self.rewards]
        dataset = Dataset.from_dict({"prompt": ["its number"] * len(prompts.rows)})  # only its length counts
        super().__init__(
            model,
            [*self.rewards],
            config,
            dataset,
            processing_class=prompts.prompter.tokenizer,
            peft_config=peft_config,
            seed=prompts.seed,
            group_forward=args.group_forward,
        )
        self.writer = RolloutWriter(rollout_dir, self.accelerator.process_index)
        self.generate_every = config.steps_per_generation * self.num_iterations  # micro-batches, as in TRL
        # an optimizer step samples more than once, all of it with the same weights
        keeps_surplus = self.generate_every < config.gradient_accumulation_steps
        rounds = args.max_sampling_rounds if args.dynamic_sampling else 1
        outcome = scoring.choose_outcome(args.outcome, self.rewards, prompts.has_several_positives)
        logger.info("completions of a useful group differ in %s", outcome)
        sampling = SamplingOptions(
            self.num_generations,
            outcome,
            rounds,
            args.dynamic_sampling,
            keeps_surplus=keeps_surplus,
            masks_truncated=config.mask_truncated_completions,
        )
        self.sampler = GroupSampler(self.generate, self.score, prompts, sampling)

    # The steps, in order

    def _prepare_inputs(self, generation_batch):
        """Keeps the completions of a prompt in one micro-batch, where TRL shuffles them."""
        if self._step % self.generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs):
        num_groups = len(inputs) * self.accelerator.num_processes // self.num_generations
        self.prepared = self.prepared.next(self.state.global_step, self.args.steps_per_generation)
        self.check_consistency()
        sampled = self.sample_groups(num_groups)
        self.rest_engine()  # not between rounds, whose weights are the same
        self.choose_groups(sampled, num_groups)
        output = self.compute_advantages()
        self.mask_padding(output)
        self.show_groups(sampled)
        output["rollout"] = torch.arange(len(self.prepared.rollouts))
        if "old_per_token_logps" in output:  # of the whole batch
            self.prepared.micro_batches_left = 1
            self._hold_on_policy(output)
        return output

    def check_consistency(self) -> None:
        """In the steps that are due, log how alike the policy ranks rows in two orders."""
        updates = -(-self.generate_every // self.args.gradient_accumulation_steps)
        if self.use_vllm and is_due(self.state.global_step, updates):
            self._log_means(consistency(self.prompts, self.generate_greedily))

    def sample_groups(self, num_groups: int) -> StepGroups:
        """Sample until `num_groups` groups are useful or rounds are used up; log metrics, store what is discarded."""
        found, metrics = self.sampler.collect(self.state.global_step, num_groups)
        if found.sampled and self.accelerator.is_main_process:  # whose metrics are logged
            metrics |= self._rollout_metrics(found.sampled)
        self._log_means(metrics)
        self._store_discarded(found.discarded)
        return found

    def choose_groups(self, found: StepGroups, num_groups: int) -> None:
        """Take this process's share of the useful groups, filled up by padding, and the rewards of all processes."""
        kept = len(found.kept)
        chosen = [*found.kept, *found.padding[: num_groups - kept]]
        share = num_groups // self.accelerator.num_processes
        first, names = self.accelerator.process_index * share, self.reward_func_names
        self.prepared.groups = chosen[first : first + share]
        self.prepared.num_trained = min(max(kept - first, 0), share)
        rewards = [
            # TRL's means leave nan out
            [rollout.rewards.get(name, torch.nan) if number < kept else torch.nan for name in names]
            for number, group in enumerate(chosen)
            for rollout in group.rollouts
        ]
        self.prepared.rewards = torch.tensor(rewards, device=self.accelerator.device)

    def compute_advantages(self) -> dict[str, torch.Tensor]:
        """TRL's tensors of the chosen completions; the advantage of each is noted."""
        prompts = [group.prompt.asked.prompt for group in self.prepared.groups for _ in group.rollouts]
        output = super()._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
        advantages = output["advantages"].tolist()
        for rollout, advantage in zip(self.prepared.trained, advantages, strict=False):
            rollout.advantage = advantage
        return output

    def mask_padding(self, output: dict[str, torch.Tensor]) -> None:
        """Leave padding groups out of the loss and out of the count of its tokens."""
        mask = output["completion_mask"]
        mask[len(self.prepared.trained) :] = 0
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()

    def show_groups(self, found: StepGroups) -> None:
        """Log a kept and a discarded group of an optimizer step's first sampling as traces."""
        is_first = self._step % self.args.gradient_accumulation_steps == 0
        if "trackio" in self.args.report_to and is_first and self.accelerator.is_main_process:
            kept = self.prepared.groups[: self.prepared.num_trained]  # whose advantages this process knows
            log_traces([*kept[:1], *found.discarded[:1]], self.state.global_step)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.prepared.micro_batches_left:
            self._hold_on_policy(inputs)
        return loss

    def measure_gap(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take a micro-batch's log-probabilities, by the weights that sampled it, into the gap and the rollouts."""
        logps = inputs.get("old_per_token_logps", self.prepared.logps).float()
        mask, sampled = inputs["completion_mask"].bool(), inputs.get("sampling_per_token_logps")
        if sampled is not None:
            known = mask & ~sampled.isnan()  # the engine may not tell; a model that says nan is no small gap
            self.prepared.gaps.append((logps - sampled).abs()[known])
        trained = self.prepared.trained
        for place, index in enumerate(inputs["rollout"].tolist()):
            if index < len(trained) and mask[place].any():
                trained[index].policy_logps = logps[place, : len(trained[index].completion.ids)].tolist()

    def store_rollouts(self) -> None:
        """Store what was trained on; a run resumed from now on continues with other prompts."""
        self.writer.add(self._records(self.prepared.groups[: self.prepared.num_trained]))
        self.writer.flush()
        self.prepared.resume_from = replace(self.sampler.state)

    def log_gap(self) -> None:
        """Log the gap over all processes, and stop the run when it is too large."""
        gaps = torch.cat([*self.prepared.gaps, torch.empty(0, device=self.accelerator.device)])
        sums = torch.stack([gaps.double().sum(), torch.ones_like(gaps, dtype=torch.double).sum()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not count:
            return
        mean = total / count
        if not self.vllm_importance_sampling_correction:  # TRL logs it otherwise
            largest = self.accelerator.gather(gaps.max() if len(gaps) else gaps.sum()).max().item()
            self._log_means({GAP: mean, LARGEST_GAP: largest})
        self.gap_check(self.state.global_step, mean)

    # Their parts

    def _hold_on_policy(self, inputs: dict[str, torch.Tensor]) -> None:
        """Steps 8 to 10, the last two of them after the last micro-batch."""
        self.prepared.micro_batches_left -= 1
        self.measure_gap(inputs)
        if self.prepared.micro_batches_left:
            return
        self.store_rollouts()
        try:
            self.log_gap()
        except OffPolicyError:
            if self.state.global_step:
                self.prepared.resume_from, self._step = self.prepared.began[1], 0  # this step is sampled again
                self._save_checkpoint(self.model, trial=None)
            raise

    def score(self, completions: Sequence[str], columns: Mapping[str, object]) -> scoring.Scores:
        """Rewards of completions, which may log as in TRL."""
        own = {"trainer_state": self.state, "log_extra": self._log_completion_extra, "log_metric": self._log_metric}
        return scoring.score(self.rewards, completions, {**columns, **own})

    def _log_means(self, metrics: Mapping[str, float]) -> None:
        """Let TRL log the mean of each metric over the calls until it logs."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(float(value))

    def _records(self, groups: Sequence[Group]) -> list[dict[str, object]]:
        """The rollouts of groups as the store takes them."""
        run = self.writer.folder.resolve().parents[1].name  # RUN_DIR/dapo.partial/rollouts
        return [record(group, rollout, run) for group in groups for rollout in group.rollouts]

    def _rollout_metrics(self, sampled: Sequence[Group]) -> dict[str, float]:
        """Reward-hacking metrics of all groups that were sampled, discarded or not."""
        kept = [self.sampler.is_kept(group) for group in sampled for _ in group.rollouts]
        records = [{**of, "kept": is_kept} for of, is_kept in zip(self._records(sampled), kept, strict=True)]
        weights = {reward.name: reward.weight for reward in self.rewards}
        found = rollout_metrics.overall(to_table(records), weights, self.prompts.prompter.catalogue)
        return {f"rollouts/{name}": value for name, value in found.items()}

    def _store_discarded(self, groups: Sequence[Group]) -> None:
        """Store groups that are not trained on, each by one process."""
        self.writer.add(self._records(groups[self.accelerator.process_index :: self.accelerator.num_processes]))

    # Checkpoints

    def train(self, *args, **kwargs):
        """Train; returns what transformers does. All rollouts are on disk then."""
        with closing(self.writer):
            result = super().train(*args, **kwargs)
            self._store_discarded(self.sampler.drop_stale())
            return result

    def _save_checkpoint(self, model, trial):
        self._store_discarded(self.sampler.drop_stale())  # the weights have changed: no step trains on them
        self.writer.flush(wait=True)  # a run that continues from this checkpoint does not sample these again
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            save_state(folder, self.prepared.resume_from)
        if self._step % self.generate_every:
            BatchInUse(self._step, self._buffered_inputs).save(folder, self.accelerator.process_index)
        super()._save_checkpoint(model, trial)

    def continue_from(self, checkpoint: str | None) -> None:
        """Continue sampling where a checkpoint left off, or start without one; delete rollouts of later steps."""
        step, num_processes = 0, self.accelerator.num_processes
        if checkpoint is not None:
            self.sampler.state = load_state(Path(checkpoint))
            self.prepared = Prepared(replace(self.sampler.state))
            if batch := load_batch(Path(checkpoint), self.accelerator.process_index, num_processes):
                self._step, self._buffered_inputs = batch.step, batch.inputs
            step = int(checkpoint.rpartition("-")[2])
        self.writer.discard_from(step, num_processes)
