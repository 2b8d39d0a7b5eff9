"""DAPO on TRL's GRPOTrainer: dynamic sampling, whole groups, rollouts stored and held to be on-policy."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from rerank import rollout_server
from rerank.dapo.consistency import ConsistencyCheck
from rerank.dapo.groups import Group, Rollout
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.sampler import GroupSampler, SamplingOptions
from rerank.group_forward import group_logps_and_entropies
from rerank.rollouts import RolloutWriter

logger = logging.getLogger(__name__)

GAP = "sampling/sampling_logp_difference/mean"
LARGEST_GAP = "sampling/sampling_logp_difference/max"
SAMPLING_FILE = "sampling.json"
SHOWN = (  # of all that is logged, what a step prints beside its progress bar
    *("loss", "rollouts/reward", "rollouts/rank_gain", "rollouts/copy_rate", "rollouts/no_ranking"),
    *("groups/share_useful", GAP, "step_time"),
)


class ShortProgress(ProgressCallback):
    """The progress bar of transformers, which prints a few figures of a step in place of a hundred."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ANN001, ANN003, ANN201
        shown = {name.rpartition("sampling/")[2]: logs[name] for name in SHOWN if name in logs}
        super().on_log(args, state, control, logs=shown or logs, **kwargs)


@dataclass
class Gap:
    """|log-probability at sampling - in training| over the tokens of a step: sum, count, largest."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, differences: torch.Tensor) -> None:
        if differences.numel():
            self.total, self.count = self.total + differences.sum().item(), self.count + differences.numel()
            self.largest = max(self.largest, differences.max().item())


class DapoTrainer(GRPOTrainer):
    """TRL's GRPOTrainer whose steps hold useful groups only, sampled on-policy from a stream of prompts.

    Prompts come from `prompts`, not from TRL's sampler: a step draws more of them until it has as many useful groups
    as it has room for. The dataset that TRL is given says only how many steps an epoch has.

    Overrides of TRL, most of which call TRL's own:
        `_prepare_inputs`: keeps the completions of a prompt in one micro-batch, where TRL shuffles them.
        `_generate_and_score_completions`: samples by rounds, then hands TRL the groups that are kept.
        `_generate`, `_calculate_rewards`: give TRL the kept groups' answers and rewards without a second call.
        `_generate_single_turn`: a seed for every request; a server that is away is waited for.
        `_get_per_token_logps_and_entropies`: by the group forward, where it is on; remembers log-probabilities.
        `compute_loss`: measures the gap from them, and completes the stored rollouts.
        `_save_checkpoint`: with how far sampling has come, after the rollouts until there; `train`: after the last.
    """

    def __init__(
        self,
        *args: Any,
        prompts: PromptStream,
        writer: RolloutWriter,
        sampling: SamplingOptions,
        max_logp_gap: float,
        group_forward: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group_forward = group_forward
        self.consistency: ConsistencyCheck | None = None  # for the owner to set
        self.prompts, self.writer, self.max_logp_gap = prompts, writer, max_logp_gap
        self.sampler = GroupSampler(self, prompts, writer, sampling)
        self._ready: list[Rollout] | None = None
        self._ready_rewards: torch.Tensor | None = None
        self._records: list[dict[str, Any] | None] = []
        self._micro_batches_left, self._gap, self._last_logps = 0, Gap(), torch.empty(0)
        self._sampling_done = self.sampler.state
        if self._asks_server():
            if self.accelerator.is_main_process:
                rollout_server.make_patient(self.vllm_generation.vllm_client, self.args.vllm_server_timeout)
        elif self.use_vllm:
            self._seed_requests(self.vllm_generation.llm)

    # Sampling

    def _seed_requests(self, engine: Any) -> None:
        """Make the engine sample each request with a seed of its own."""
        generate, generation = engine.generate, self.vllm_generation

        def seeded(prompts: Sequence[Any], sampling_params: Any, **kwargs: Any) -> Any:
            seeds = self.sampler.request_seeds()
            if not seeds:
                return generate(prompts, sampling_params=sampling_params, **kwargs)
            if generation.tensor_parallel_size > 1:  # TRL has gathered the prompts of the engine's processes
                parts = [None] * generation.tensor_parallel_size
                torch.distributed.all_gather_object(parts, seeds, group=generation.tp_group)
                seeds = [seed for part in parts for seed in part]
            params = []
            for seed in seeds:
                params.append(sampling_params.clone())
                params[-1].seed = seed
            return generate(prompts, sampling_params=params, **kwargs)

        engine.generate = seeded

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        if not self._asks_server():
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        options, seeds = self.vllm_generation.generation_kwargs, self.sampler.request_seeds()
        if seeds:
            self.vllm_generation.generation_kwargs = {**options, "seed": seeds[0]}  # vLLM adds the member's number
        answers = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.vllm_generation.generation_kwargs = options
        if not answers[0]:
            self._stop_without_server()
        return answers

    def _asks_server(self) -> bool:
        return self.use_vllm and self.args.vllm_mode == "server"

    def _stop_without_server(self) -> None:
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
        raise ValueError(
            f"the vLLM server at {rollout_server.base_url(self.args)} is gone; start it again, then the same command "
            f"goes on from step {self.state.global_step}"
        )

    def generate_greedily(self, prompts: Sequence[str]) -> list[str]:
        """The engine's most probable completion of each prompt, by the present weights, none of it trained on."""
        prompt_ids, *_ = self._tokenize_prompts(prompts)
        generation, self.sampler.requests = self.vllm_generation, []
        temperature, generation.temperature = generation.temperature, 0.0
        completion_ids, _ = self._generate_single_turn(prompt_ids, None, {}, 1)  # vLLM refuses more without sampling
        generation.temperature = temperature
        return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)

    def _generate(self, prompts):  # noqa: ANN001, ANN202
        if self._ready is None:
            return super()._generate(prompts)
        ready = self._ready
        logps = None if ready[0].sampling_logps is None else [rollout.sampling_logps for rollout in ready]
        ids = [rollout.prompt_ids for rollout in ready], [rollout.completion_ids for rollout in ready]
        return *ids, None, [rollout.completion for rollout in ready], logps, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):  # noqa: ANN001, ANN202
        if self._ready is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._ready_rewards

    # What TRL trains on

    def _prepare_inputs(self, generation_batch):  # noqa: ANN001, ANN202
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        per_generation = self.args.steps_per_generation
        if self._step % (per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_tensor_dict(
                self._generate_and_score_completions(generation_batch), per_generation
            )
        return self._buffered_inputs[self._step % per_generation]

    def _generate_and_score_completions(self, inputs):  # noqa: ANN001, ANN202
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        processes, size = self.accelerator.num_processes, self.num_generations
        wanted = len(inputs) * processes // size
        if self.consistency is not None:
            self.consistency.log(self.state.global_step)
        useful, rest = self.sampler.collect(wanted)
        fill = [*rest, *useful][: wanted - len(useful)]
        share, first = wanted // processes, self.accelerator.process_index * (wanted // processes)
        chosen = [(group, True) for group in useful] + [(group, False) for group in fill]
        self._ready_rewards = self._rewards_of(chosen)
        chosen = chosen[first : first + share]
        self._ready = [rollout for group, _ in chosen for rollout in group.rollouts]
        try:
            output = super()._generate_and_score_completions(
                [group.drawn.row for group, _ in chosen for _ in range(size)]
            )
        finally:
            self._ready = None
        self._mask_fill(output, torch.tensor([trained for _, trained in chosen]).repeat_interleave(size))
        self._records = self._new_records(chosen, output["advantages"].tolist())
        self._micro_batches_left, self._gap = self.args.steps_per_generation, Gap()
        output["rollout"] = torch.arange(len(self._records))
        return output

    def _rewards_of(self, chosen: Sequence[tuple[Group, bool]]) -> torch.Tensor:
        """(all completions, rewards) of the step; nan, which TRL leaves out of every mean, for what only fills up."""
        missing = [float("nan")] * len(self.reward_funcs)
        rewards = [rollout.rewards if trained else missing for group, trained in chosen for rollout in group.rollouts]
        return torch.tensor(rewards, device=self.accelerator.device)

    def _mask_fill(self, output: dict[str, torch.Tensor], is_trained: torch.Tensor) -> None:
        mask = output["completion_mask"]
        mask[~is_trained.to(mask.device)] = 0
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()

    # Rollouts and the proof that they are on-policy

    def _new_records(
        self, chosen: Sequence[tuple[Group, bool]], advantages: Sequence[float]
    ) -> list[dict[str, Any] | None]:
        """A record for each completion trained on, None for one that fills up."""
        records: list[dict[str, Any] | None] = []
        for group, trained in chosen:
            for member in range(len(group.rollouts)):
                made = self.sampler.record(group, member, self.state.global_step) if trained else None
                records.append(made and {**made, "advantage": advantages[len(records)]})
        return records

    def _get_per_token_logps_and_entropies(  # noqa: ANN202
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **kwargs,  # noqa: ANN001, ANN003
    ):
        inputs = (model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
        if self.group_forward and not kwargs.get("compute_aux_loss"):
            with self.accelerator.autocast():
                found = *group_logps_and_entropies(*inputs), None
        else:
            found = super()._get_per_token_logps_and_entropies(*inputs, **kwargs)
        self._last_logps = found[0].detach()
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001, ANN201
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training and self._micro_batches_left:
            self._micro_batches_left -= 1
            self._note_logps(inputs, inputs.get("old_per_token_logps", self._last_logps).float())
            if not self._micro_batches_left:
                self._finish_rollouts()
        return loss

    def _note_logps(self, inputs: dict[str, torch.Tensor], logps: torch.Tensor) -> None:
        """Take a micro-batch's log-probabilities, by the weights that sampled it, into the gap and the records."""
        mask, sampled = inputs["completion_mask"].bool(), inputs.get("sampling_per_token_logps")
        if sampled is not None:
            known = mask & ~sampled.isnan()  # the engine may not tell; a model that says nan is no small gap
            self._gap.add((logps - sampled).abs()[known])
        for place, index in enumerate(inputs["rollout"].tolist()):
            record = self._records[index]
            if record is not None and mask[place].any():
                record["policy_logps"] = logps[place, : len(record["completion_ids"])].tolist()

    def _finish_rollouts(self) -> None:
        """Store what was trained on, log the gap, and stop the run when it is too large."""
        self.writer.add(record for record in self._records if record is not None)
        self.writer.flush()
        self._sampling_done = self.sampler.state
        sums = torch.tensor([self._gap.total, self._gap.count], dtype=torch.float64, device=self.accelerator.device)
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not count:
            return
        gap = total / count
        if not self.vllm_importance_sampling_correction:  # TRL logs it otherwise
            largest = torch.tensor([self._gap.largest], device=self.accelerator.device)
            self._metrics["train"][GAP].append(gap)
            self._metrics["train"][LARGEST_GAP].append(self.accelerator.gather(largest).max().item())
        if not gap <= self.max_logp_gap:  # nan neither
            raise ValueError(
                f"step {self.state.global_step}: sampling and training log-probabilities differ by {gap:.4f} a token "
                f"on average, more than max_logp_gap {self.max_logp_gap}: the engine samples from other "
                "weights or another number format than the model in training; set rollout_dtype to that of training, "
                "or raise max_logp_gap if you accept off-policy rollouts"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
            self.sampler.discard_stale()
            return result
        finally:
            self.writer.close()

    def _save_checkpoint(self, model, trial):  # noqa: ANN001, ANN202
        self.writer.flush(wait=True)  # a run that goes on from this checkpoint does not sample these again
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SAMPLING_FILE).write_text(json.dumps(self._sampling_done))
        super()._save_checkpoint(model, trial)

    def go_on_from(self, checkpoint: str | None) -> None:
        """Draw prompts from where a checkpoint left off; nothing to do without one."""
        if checkpoint is not None:
            path = Path(checkpoint) / SAMPLING_FILE
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: no checkpoint of this stage; delete {checkpoint}")
            self.sampler.state = json.loads(path.read_text())
            self._sampling_done = self.sampler.state
