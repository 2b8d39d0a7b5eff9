"""TRL's GRPOTrainer on completions that are prepared for it, each sampled with a seed of its own."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object
from trl import GRPOTrainer

from rerank.dapo.checks import choose_group_forward
from rerank.dapo.groups import Completion, Group, Rollout, request_seed
from rerank.dapo.prompt_stream import TrainingPrompt
from rerank.dapo.sampler import SamplerState
from rerank.models import engine, server
from rerank.models.group_attention import group_logps_and_entropies
from rerank.prompts import completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import GRPOConfig
    from vllm import LLM


@dataclass
class Prepared:
    """A generation batch on its way through the overridden methods of TRL: all that one leaves for another.

    Attributes:
        resume_from: State of the sampler when rollouts were last stored, for checkpoints.
        began: The optimizer step that samples, and the state of the sampler as it began.
        micro_batches_left: Those whose loss is still to be computed by the weights that sampled them.
        requests: Prompts of the completions that are being sampled; empty for greedy decoding.
        groups: This process's groups of completions, once chosen.
        num_trained: How many of them, the first, are trained on; the others are padding.
        rewards: (completions of all processes, rewards), nan for padding.
        logps: (B, T) log-probabilities of the last forward pass, B rows of T completion tokens.
        gaps: Of each micro-batch, |log-probability at sampling - in training| of every token that both tell.
    """

    resume_from: SamplerState
    began: tuple[int, SamplerState] = (-1, SamplerState())
    micro_batches_left: int = 0
    requests: list[TrainingPrompt] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    num_trained: int = 0
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logps: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gaps: list[torch.Tensor] = field(default_factory=list)

    def next(self, step: int, micro_batches: int) -> "Prepared":
        """An empty one for the next generation batch, of `micro_batches`; an optimizer step may have several."""
        began = self.began if self.began[0] == step else (step, self.resume_from)
        return Prepared(self.resume_from, began, micro_batches)

    @property
    def rollouts(self) -> list[Rollout]:
        """This process's completions."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def trained(self) -> list[Rollout]:
        """Those that are trained on: the first of `rollouts`."""
        return [rollout for group in self.groups[: self.num_trained] for rollout in group.rollouts]


class PreparedTrainer(GRPOTrainer):
    """A GRPOTrainer that samples when it is told to and trains on the groups of completions that it is given.

    Overrides of TRL: `_generate` and `_calculate_rewards` give it `prepared.groups`, `_generate_single_turn` seeds
    requests and waits for a server, `_get_per_token_logps_and_entropies` computes a prompt once for its group.

    Args:
        model, rewards, config, args, kwargs: Of GRPOTrainer.
        seed: Of all sampling.
        group_forward: Of DapoArguments.

    Attributes:
        prepared: The batch in the making.
        group_forward: Whether a prompt is computed once for all completions of its group in a micro-batch.
        group_obstacle: What spoke against it, where it is not.
        rest_engine: Sends an engine that sleeps between steps to sleep.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        rewards: Sequence[Callable],
        config: "GRPOConfig",
        *args: object,
        seed: int,
        group_forward: bool | str,
        **kwargs: object,
    ) -> None:
        self.group_forward, self.group_obstacle = choose_group_forward(group_forward, config, model)
        asks_server, url = config.use_vllm and config.vllm_mode == "server", server.base_url(vars(config))
        with server.answers_within(config.vllm_server_timeout, url) if asks_server else nullcontext():
            super().__init__(model, rewards, config, *args, **kwargs)
        self.sampling_seed, self.prepared = seed, Prepared(SamplerState())
        self.rest_engine: Callable[[], None] = lambda: None
        if self._asks_server():
            if self.accelerator.is_main_process:
                server.ask_one_by_one(self.vllm_generation.vllm_client)
                server.add_retries(self.vllm_generation.vllm_client, self.args.vllm_server_timeout)
        elif self.use_vllm:
            self._seed_requests(self.vllm_generation.llm)
            if self.args.vllm_enable_sleep_mode:
                self.rest_engine = engine.sleep_when_told(self.vllm_generation)

    def generate(self, prompts: Sequence[TrainingPrompt]) -> list[Completion]:
        """Completions of prompts by the present weights, each with a seed of its own."""
        self.prepared.requests = list(prompts)
        prompt_ids, ids, _, _, logps, *_ = self._generate([prompt.asked.prompt for prompt in prompts])
        seeds = self.engine_seeds(prompt_ids)
        self.prepared.requests = []
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        return [
            Completion(
                list(prompt_ids[i]),
                list(own),
                prompts[i].asked.begun + self._text(own),
                logps and list(logps[i]),
                own[-1] not in ends,
                seeds[i],
            )
            for i, own in enumerate(ids)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return completion_text(self._tokenizer, ids, self.eos_token_ids)

    def generate_greedily(self, prompts: Sequence[str]) -> list[str]:
        """The most probable completion of each prompt by the present weights, none of it trained on."""
        prompt_ids, *_ = self._tokenize_prompts(prompts)
        generation = self.vllm_generation
        temperature, generation.temperature = generation.temperature, 0.0
        completion_ids, _ = self._generate_single_turn(prompt_ids, None, {}, 1)  # vLLM refuses more without sampling
        generation.temperature = temperature
        return [self._text(ids) for ids in completion_ids]

    def request_seeds(self) -> list[int]:
        """A seed for each completion that is being sampled; none for greedy decoding."""
        size = self.num_generations
        return [
            request_seed(self.sampling_seed, prompt.asked.row.row_id, prompt.epoch, i % size)
            for i, prompt in enumerate(self.prepared.requests)
        ]

    def engine_seeds(self, prompt_ids: Sequence[Sequence[int]]) -> list[int | None]:
        """The seed with which the engine has sampled each completion, of these prompts; None where it takes none."""
        if not self.use_vllm:
            return [None] * len(self.prepared.requests)
        own = self.request_seeds()
        if not self._asks_server():
            return [*own]
        first = broadcast_object_list([own[0]])[0]  # of the main process, which asks for all
        size = self.num_generations
        own_prompts = list(prompt_ids[::size])  # whole groups, whose prompts are equal
        place = self.accelerator.process_index * len(own_prompts)
        seeds = server.prompt_seeds(first, gather_object(own_prompts))[place : place + len(own_prompts)]
        return [seed + member for seed in seeds for member in range(size)]

    def _generate(self, prompts):
        if not self.prepared.groups:
            return super()._generate(prompts)
        chosen = [rollout.completion for rollout in self.prepared.rollouts]
        logps = None if chosen[0].sampling_logps is None else [completion.sampling_logps for completion in chosen]
        ids = [completion.prompt_ids for completion in chosen], [completion.ids for completion in chosen]
        return *ids, None, [completion.text for completion in chosen], logps, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.prepared.rewards

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        inputs = (model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
        if self.group_forward and not kwargs.get("compute_aux_loss"):
            with self.accelerator.autocast():
                found = *group_logps_and_entropies(*inputs), None
        else:
            found = super()._get_per_token_logps_and_entropies(*inputs, **kwargs)
        self.prepared.logps = found[0].detach()
        return found

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self._asks_server():
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        options, seeds = self.vllm_generation.generation_kwargs, self.request_seeds()
        if seeds:
            self.vllm_generation.generation_kwargs = {**options, "seed": seeds[0]}  # each prompt's follows from it
        answers = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.vllm_generation.generation_kwargs = options
        if not answers[0]:
            if self.state.global_step:
                self._save_checkpoint(self.model, trial=None)
            url = server.base_url(vars(self.args))
            raise ValueError(
                f"the vLLM server at {url} is gone; start it again, then the same command continues from step "
                f"{self.state.global_step}"
            )
        return answers

    def _asks_server(self) -> bool:
        return self.use_vllm and self.args.vllm_mode == "server"

    def _seed_requests(self, llm: "LLM") -> None:
        """Make the colocated engine sample each request with a seed of its own."""
        generate, generation = llm.generate, self.vllm_generation

        def seeded(prompts, sampling_params, **kwargs):
            seeds = self.request_seeds()
            if not seeds:
                return generate(prompts, sampling_params=sampling_params, **kwargs)
            if generation.tensor_parallel_size > 1:  # TRL has gathered the prompts of the engine's processes
                parts = [None] * generation.tensor_parallel_size
                torch.distributed.all_gather_object(parts, seeds, group=generation.tp_group)
                seeds = [seed for part in parts for seed in part]
            params = [sampling_params.clone() for _ in seeds]
            for own, seed in zip(params, seeds, strict=True):
                own.seed = seed
            return generate(prompts, sampling_params=params, **kwargs)

        llm.generate = seeded
