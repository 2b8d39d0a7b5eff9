"""The groups of a step: prompts are drawn, completed and scored until enough groups are useful."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from rerank import plugins, rollout_metrics
from rerank.dapo import INVALID
from rerank.dapo import groups as grouping
from rerank.dapo.groups import Group, Rollout
from rerank.dapo.prompt_stream import DrawnPrompt, PromptStream
from rerank.plugins import RANK_GAIN
from rerank.prompts import parse_completion
from rerank.rollouts import RolloutWriter

logger = logging.getLogger(__name__)

FRUITLESS_STEPS = 3  # so many first steps without one useful group stop the run: nothing would ever be learned


@dataclass(frozen=True)
class SamplingOptions:
    """How a step gets its groups.

    Args:
        outcome: What members of a useful group differ in: a reward's name, or `rank_gain`.
        max_rounds: Sampling rounds of a step at most; 1, and all groups count as useful, without dynamic sampling.
        is_dynamic: Whether groups of one outcome are exchanged.
    """

    outcome: str = RANK_GAIN
    max_rounds: int = 1
    is_dynamic: bool = False


class GroupSampler:
    """Samples for a trainer of TRL, whose generation and rewards it calls.

    Args:
        trainer: Completes and scores; its metrics take what is logged.
        prompts: Where prompts come from.
        writer: Takes the groups that are not trained on.

    Attributes:
        requests: The prompt and the number within its group of each completion that is being sampled.
    """

    def __init__(self, trainer: GRPOTrainer, prompts: PromptStream, writer: RolloutWriter, options: SamplingOptions):
        self.trainer, self.prompts, self.writer, self.options = trainer, prompts, writer, options
        self.requests: list[tuple[DrawnPrompt, int]] = []
        self._surplus: list[Group] = []
        self._step, self._num_prompts = -1, 0
        self._share_useful, self._has_found_useful, self._fruitless_steps = 1.0, False, 0

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "num_drawn": self.prompts.num_drawn,
            "share_useful": self._share_useful,
            "has_found_useful": self._has_found_useful,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.prompts.num_drawn, self._share_useful = state["num_drawn"], state["share_useful"]
        self._has_found_useful = state["has_found_useful"]

    def request_seeds(self) -> list[int]:
        """A seed for each completion that is being sampled."""
        return [
            grouping.request_seed(self.prompts.seed, drawn.row["row_id"], drawn.draw, member)
            for drawn, member in self.requests
        ]

    def collect(self, wanted: int) -> tuple[list[Group], list[Group]]:
        """Useful groups, at most `wanted`, and others of this step to fill up with; the same in all processes.

        Raises:
            ValueError: When the first steps had no useful group at all.
        """
        step = self.trainer.state.global_step
        if self._step != step:
            self.discard_stale()
            self._step, self._num_prompts = step, 0
        useful, self._surplus = self._surplus[:wanted], self._surplus[wanted:]
        rest: list[Group] = []
        sampled: list[Group] = []
        num_rounds = 0
        while len(useful) < wanted and num_rounds < self.options.max_rounds:
            found = self._sample_everywhere(self._num_to_draw(wanted, wanted - len(useful)), num_rounds)
            sampled, num_rounds = [*sampled, *found], num_rounds + 1
            more, self._surplus, others = self._split(found, wanted - len(useful))
            useful, rest = [*useful, *more], [*rest, *others]
        if sampled:
            self._log(sampled, num_rounds, wanted - len(useful))
        if not self._reuses_surplus():
            self._discard(self._surplus, "surplus", step)
            self._surplus = []
        self._discard(rest, "all_equal", step)
        return useful, rest

    def discard_stale(self) -> None:
        """Store useful groups that were left over when the weights changed."""
        self._discard(self._surplus, "stale", self._step)
        self._surplus = []

    def _num_to_draw(self, wanted: int, missing: int) -> int:
        return grouping.prompts_to_draw(missing, self._share_useful, wanted) if self.options.is_dynamic else wanted

    def _split(self, found: list[Group], missing: int) -> tuple[list[Group], list[Group], list[Group]]:
        return grouping.split(found, missing) if self.options.is_dynamic else (found, [], [])

    def _reuses_surplus(self) -> bool:
        """Whether an optimizer step samples more than once, all of it with the same weights."""
        args = self.trainer.args
        return args.steps_per_generation * self.trainer.num_iterations < args.gradient_accumulation_steps

    def _sample_everywhere(self, count: int, round: int) -> list[Group]:
        """Groups of the next `count` prompts, in the order drawn, an equal share sampled by each process; what is
        short of equal shares repeats the last prompt and is dropped."""
        accelerator = self.trainer.accelerator
        drawn, share = self.prompts.draw(count), -(-count // accelerator.num_processes)
        first = accelerator.process_index * share
        shares = [*drawn, *[drawn[-1]] * (share * accelerator.num_processes - count)]
        groups = self._sample(shares[first : first + share], self._num_prompts + first, round)
        self._num_prompts += count
        return gather_object(groups)[:count]

    def _sample(self, drawn: Sequence[DrawnPrompt], first_number: int, round: int) -> list[Group]:
        """A group of completions of each of this process's prompts, scored."""
        trainer, size = self.trainer, self.trainer.num_generations
        self.requests = [(prompt, member) for prompt in drawn for member in range(size)]
        rows = [prompt.row for prompt, _ in self.requests]
        prompts = [row["prompt"] for row in rows]
        prompt_ids, completion_ids, _, completions, logps, *_ = trainer._generate(prompts)
        rewards = trainer._calculate_rewards(rows, prompts, completions, completion_ids)  # of all processes
        first = trainer.accelerator.process_index * len(rows)
        rewards = self._alone_where_invalid(rewards[first : first + len(rows)].cpu()).tolist()
        gates = self._gates(rows, prompts, completions, completion_ids)
        rollouts = [
            self._rollout(
                prompt, prompt_ids[i], completion_ids[i], completions[i], logps and logps[i], rewards[i], gates[i]
            )
            for i, (prompt, _) in enumerate(self.requests)
        ]
        return [
            Group(prompt, rollouts[i * size : (i + 1) * size], first_number + i, round)
            for i, prompt in enumerate(drawn)
        ]

    def _rollout(
        self,
        drawn: DrawnPrompt,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        completion: str,
        logps: Sequence[float] | None,
        rewards: list[float],
        gates: dict[str, bool],
    ) -> Rollout:
        parsed = parse_completion(completion, drawn.row["candidate_labels"])
        ends = (*self.trainer.eos_token_ids, self.trainer._tokenizer.pad_token_id)
        return Rollout(
            prompt_ids=list(prompt_ids),
            completion_ids=list(completion_ids),
            completion=completion,
            sampling_logps=None if logps is None else list(logps),
            rewards=rewards,
            gates=gates,
            order=parsed.order,
            failure=parsed.failure,
            truncated=completion_ids[-1] not in ends,
            outcome=self._outcome(drawn, parsed.order, rewards),
        )

    def _alone_where_invalid(self, rewards: torch.Tensor) -> torch.Tensor:
        """(completions, rewards) without the other rewards where `invalid_reward` holds."""
        names = self.trainer.reward_func_names
        if INVALID in names:
            others = torch.arange(len(names)) != names.index(INVALID)
            rewards[(~rewards[:, names.index(INVALID)].isnan())[:, None] & others] = float("nan")
        return rewards

    def _gates(
        self, rows: Sequence[Any], prompts: list[str], completions: list[str], completion_ids: list
    ) -> list[dict[str, bool]]:
        """Of each completion, whether the conditions of the recipe's rewards hold."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        columns |= {"prompts": prompts, "completion_ids": completion_ids}
        rewards = [reward for reward in self.trainer.reward_funcs if isinstance(reward, plugins.Reward)]
        gates = {reward.name: reward.gates(completions, **columns) for reward in rewards}
        return [{name: held[i] for name, held in gates.items()} for i in range(len(rows))]

    def _outcome(self, drawn: DrawnPrompt, order: list[int] | None, rewards: Sequence[float]) -> float | None:
        if self.options.outcome == RANK_GAIN:
            return grouping.rank_gain(drawn, order)
        names = self.trainer.reward_func_names
        if INVALID in names and not np.isnan(rewards[names.index(INVALID)]):
            return -math.inf
        value = rewards[names.index(self.options.outcome)]
        return None if np.isnan(value) else value

    def _log(self, sampled: Sequence[Group], num_rounds: int, num_missing: int) -> None:
        num_useful = sum(group.is_useful() for group in sampled)
        self._share_useful = 0.9 * self._share_useful + 0.1 * num_useful / len(sampled)
        logged = {
            "groups/share_useful": num_useful / len(sampled),
            "groups/rounds": num_rounds,
            "groups/prompts": len(sampled),
            "groups/prompts_drawn": self.prompts.num_drawn,
            "groups/missing": num_missing,
        }
        if self.trainer.accelerator.is_main_process:  # whose metrics are logged
            logged |= self._rollout_metrics(sampled)
        for name, value in logged.items():
            self.trainer._metrics["train"][name].append(float(value))
        if num_missing:
            logger.warning("step %d lacks %d groups after %d rounds", self._step, num_missing, num_rounds)
        self._refuse_fruitless(sampled[-1].rollouts[0], num_useful)

    def _refuse_fruitless(self, example: Rollout, num_useful: int) -> None:
        """Stop when no group was useful yet; later a step without one is bad luck, or the policy has learned."""
        self._has_found_useful = self._has_found_useful or num_useful > 0
        self._fruitless_steps += 1
        is_hopeless = not self._has_found_useful and self._fruitless_steps >= FRUITLESS_STEPS
        if self.options.is_dynamic and is_hopeless:
            raise ValueError(
                f"in {FRUITLESS_STEPS} steps no group differed in the outcome {self.options.outcome!r} "
                f"(the last is {example.outcome} for {example.completion[:80]!r}): look at the rollouts with "
                "`rerank inspect`, then train the sft stage longer, raise temperature, or name another outcome"
            )

    def _rollout_metrics(self, sampled: Sequence[Group]) -> dict[str, float]:
        """The signs of cheating in all that was sampled, kept or not."""
        records = [
            {**self.record(group, member, self._step), "kept": not self.options.is_dynamic or group.is_useful()}
            for group in sampled
            for member in range(len(group.rollouts))
        ]
        weights = dict(zip(self.trainer.reward_func_names, self.trainer.reward_weights.tolist(), strict=True))
        return rollout_metrics.to_log(records, weights, self.prompts.encoder.catalogue)

    def _total(self, rollout: Rollout) -> float:
        return float(np.nansum(np.asarray(rollout.rewards) * self.trainer.reward_weights.cpu().numpy()))

    def record(self, group: Group, member: int, step: int) -> dict[str, Any]:
        """A rollout as the store takes it; `policy_logps`, `advantage` and `kept` are for the trainer to set."""
        names = self.trainer.reward_func_names
        run = self.writer.folder.resolve().parents[1].name  # RUN_DIR/dapo.partial/rollouts
        return grouping.record(group, member, run, step, names, self._total(group.rollouts[member]))

    def _discard(self, groups: Sequence[Group], reason: str, step: int) -> None:
        """Store groups that are not trained on, each by one process."""
        accelerator = self.trainer.accelerator
        self.trainer._metrics["train"][f"groups/discarded_{reason}"].append(float(len(groups)))
        for group in groups[accelerator.process_index :: accelerator.num_processes]:
            records = [self.record(group, member, step) for member in range(len(group.rollouts))]
            self.writer.add({**record, "kept": False, "discard_reason": reason} for record in records)
