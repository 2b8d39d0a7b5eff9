"""The groups of a step: prompts are sampled and scored until enough groups are useful."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rerank.dapo.groups import Completion, Group, Rollout, num_prompts
from rerank.dapo.prompt_stream import PromptStream, TrainingPrompt
from rerank.launch.processes import in_shares
from rerank.prompts import parse_completion
from rerank.rows import PromptedRow, reward_columns
from rerank.scoring import RANK_GAIN, Scores

logger = logging.getLogger(__name__)

Generate = Callable[[Sequence[TrainingPrompt]], Sequence[Completion]]
Score = Callable[[Sequence[str], Mapping[str, object]], Scores]
FRUITLESS_STEPS = 3  # first steps without one useful group that stop the run: nothing would ever be learned


@dataclass(frozen=True)
class SamplingOptions:
    """How a step gets its groups.

    Attributes:
        num_generations: Completions of a prompt.
        outcome: Members of a useful group differ in it: a reward's name, or `rank_gain`.
        max_rounds: Sampling rounds of a step at most.
        is_dynamic: Whether groups whose completions all have one outcome are dropped, and new prompts sampled;
            otherwise all groups count as useful.
        keeps_surplus: Whether useful groups beyond a call of `collect` are for the next one, if of the same step.
        masks_truncated: Whether completions that the token limit cut off are left out of the loss. They have no
            reward and no outcome then, so that they neither make a group useful nor enter its mean.
    """

    num_generations: int
    outcome: str = RANK_GAIN
    max_rounds: int = 1
    is_dynamic: bool = False
    keeps_surplus: bool = False
    masks_truncated: bool = True


@dataclass
class SamplerState:
    """The state of a sampler that a resumed run needs.

    Attributes:
        num_drawn: Prompts sampled so far.
        share_useful: Of the groups sampled lately.
        has_found_useful: Whether any group was useful.
    """

    num_drawn: int = 0
    share_useful: float = 1.0
    has_found_useful: bool = False


@dataclass(frozen=True)
class StepGroups:
    """The outcome of one call of `GroupSampler.collect`.

    Attributes:
        kept: Useful groups to train on, at most those asked for.
        sampled: All groups sampled in the call.
        discarded: Groups not to be trained on, of this step or left over from the one before.
    """

    kept: list[Group]
    sampled: list[Group]
    discarded: list[Group]

    @property
    def padding(self) -> list[Group]:
        """Padding groups for a step that is short of useful ones."""
        return [*(group for group in self.discarded if group.discard_reason == "all_equal"), *self.kept]


class GroupSampler:
    """Samples groups of completions; every process of a launch gets the same.

    Args:
        generate: Completes prompts, each of which comes `num_generations` times in a row; a process's share of them.
        score: Scores completions, given as texts and columns.
        prompts: Where prompts come from.
        options: How a step gets its groups.

    Attributes:
        state: What a resumed run needs.
    """

    def __init__(self, generate: Generate, score: Score, prompts: PromptStream, options: SamplingOptions) -> None:
        self.generate, self.score, self.prompts, self.options = generate, score, prompts, options
        self.state = SamplerState()
        self._surplus: list[Group] = []
        self._step, self._num_prompts, self._num_useful, self._num_collected = -1, 0, 0, 0
        self._applied: set[str] = set()  # rewards that some completion has got

    def collect(self, step: int, wanted: int) -> tuple[StepGroups, dict[str, float]]:
        """Groups of an optimizer step, and metrics of sampling them.

        Args:
            step: The optimizer step; groups left over from an earlier one are stale.
            wanted: Useful groups to find.

        Raises:
            ValueError: When the first steps had no useful group at all, or a reward was None on every completion.
        """
        metrics: dict[str, float] = {}
        stale: list[Group] = []
        if step != self._step:
            stale = self.drop_stale()
            metrics["groups/discarded_stale"] = len(stale)
            self._step, self._num_prompts, self._num_useful = step, 0, 0
        useful, sampled, num_rounds = self._surplus, list[Group](), 0
        while len(useful) < wanted and num_rounds < self.options.max_rounds:
            found = self._sample_round(wanted, wanted - len(useful), num_rounds)
            self._num_useful += sum(group.is_useful() for group in found)
            useful = [*useful, *filter(self.is_kept, found)]
            sampled, num_rounds = [*sampled, *found], num_rounds + 1
        kept, self._surplus = useful[:wanted], useful[wanted:]
        if sampled:
            metrics |= self._measure(sampled, num_rounds, wanted - len(kept))
        discarded = [*stale]
        if not self.options.keeps_surplus:
            discarded += _discard(self._surplus, "surplus")
            metrics["groups/discarded_surplus"], self._surplus = len(self._surplus), []
        all_equal = _discard([group for group in sampled if not self.is_kept(group)], "all_equal")
        metrics["groups/discarded_all_equal"] = len(all_equal)
        return StepGroups(kept, sampled, [*discarded, *all_equal]), metrics

    def drop_stale(self) -> list[Group]:
        """The useful groups left over, for weights that have changed since."""
        stale, self._surplus = _discard(self._surplus, "stale"), []
        return stale

    def is_kept(self, group: Group) -> bool:
        """Whether a group counts as useful: all do without dynamic sampling."""
        return not self.options.is_dynamic or group.is_useful()

    def _sample_round(self, wanted: int, missing: int, round: int) -> list[Group]:
        """Groups of the next prompts, in their order."""
        # the rounds of this step tell more than those before: at first nothing is known
        share = self._num_useful / self._num_prompts if self._num_prompts else self.state.share_useful
        count = num_prompts(missing, share, wanted) if self.options.is_dynamic else wanted
        prompts = self.prompts.take(self.state.num_drawn, count)
        numbered = list(enumerate(prompts, start=self._num_prompts))
        self._num_prompts += count
        self.state.num_drawn += count
        return in_shares(lambda share: self._sample(share, round), numbered)

    def _sample(self, numbered: Sequence[tuple[int, TrainingPrompt]], round: int) -> list[Group]:
        """A scored group of completions of each prompt."""
        size = self.options.num_generations
        prompts = [prompt for _, prompt in numbered for _ in range(size)]
        completions = self.generate(prompts)
        asked = [prompt.asked for prompt in prompts]
        columns = {**reward_columns(asked), "completion_ids": [completion.ids for completion in completions]}
        scores = self.score([completion.text for completion in completions], columns)
        rollouts = [self._rollout(*pair, scores, i) for i, pair in enumerate(zip(asked, completions, strict=True))]
        return [
            Group(prompt, rollouts[i * size : (i + 1) * size], self._step, round, number)
            for i, (number, prompt) in enumerate(numbered)
        ]

    def _rollout(self, asked: PromptedRow, completion: Completion, scores: Scores, i: int) -> Rollout:
        """Completion number `i` of a batch with its scores."""
        parsed, paid = parse_completion(completion.text, asked.labels, asked.top_k), scores.totals[i].item()
        values = dict(zip(scores.names, scores.values[i].tolist(), strict=True))
        rewards = {name: value for name, value in values.items() if not math.isnan(value)}
        of_order = self.options.outcome == RANK_GAIN
        outcome = asked.row.rank_gain(parsed.order) if of_order else rewards.get(self.options.outcome)
        masked = completion.truncated and self.options.masks_truncated
        return Rollout(
            completion,
            {} if masked else rewards,
            dict(zip(scores.names, scores.conditions[i].tolist(), strict=True)),
            None if masked or math.isnan(paid) else paid,
            parsed.order,
            parsed.failure,
            None if masked else outcome,
            masked,
        )

    def _measure(self, sampled: Sequence[Group], num_rounds: int, num_missing: int) -> dict[str, float]:
        """Metrics of the groups sampled in a call; they enter the state."""
        state, num_useful = self.state, sum(group.is_useful() for group in sampled)
        state.share_useful = 0.9 * state.share_useful + 0.1 * num_useful / len(sampled)
        state.has_found_useful = state.has_found_useful or num_useful > 0
        if num_missing:
            logger.warning("step %d lacks %d groups after %d rounds", self._step, num_missing, num_rounds)
        self._refuse_fruitless(sampled[-1].rollouts[0])
        self._refuse_silent([rollout for group in sampled for rollout in group.rollouts if not rollout.masked])
        return {
            "groups/share_useful": num_useful / len(sampled),
            "groups/rounds": num_rounds,
            "groups/prompts": len(sampled),
            "groups/prompts_drawn": state.num_drawn,
            "groups/draws_per_row": state.num_drawn / len(self.prompts.rows),
            "groups/missing": num_missing,
        }

    def _refuse_fruitless(self, example: Rollout) -> None:
        """Stop when no group was useful yet; later a step without one is bad luck, or the policy has learned."""
        self._num_collected += 1
        is_hopeless = not self.state.has_found_useful and self._num_collected >= FRUITLESS_STEPS
        if self.options.is_dynamic and is_hopeless:
            raise ValueError(
                f"in {FRUITLESS_STEPS} steps no group differed in the outcome {self.options.outcome!r} "
                f"(the last is {example.outcome} for {example.completion.text[:80]!r}): look at the rollouts with "
                "`rerank inspect`, then train the sft stage longer, raise temperature, or name another outcome"
            )

    def _refuse_silent(self, scored: Sequence[Rollout]) -> None:
        """Stop when a reward has applied to no completion yet: it is paid to nobody."""
        self._applied.update(*(rollout.rewards for rollout in scored))
        silent = [name for rollout in scored[:1] for name in rollout.conditions if name not in self._applied]
        if silent and self._num_collected >= FRUITLESS_STEPS:
            raise ValueError(
                f"the reward {silent[0]} was None on every completion of the first {FRUITLESS_STEPS} steps (the last "
                f"is {scored[-1].completion.text[:80]!r}); mend it, or take it out of rewards"
            )


def _discard(groups: Sequence[Group], reason: str) -> list[Group]:
    for group in groups:
        group.discard_reason = reason
    return list(groups)
