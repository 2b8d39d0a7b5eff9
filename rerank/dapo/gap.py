"""When the gap between sampling and training log-probabilities is too large."""

from dataclasses import dataclass, field

FIRST_GAPS = 5  # steps whose mean gap is the usual one
MOST_GROWTH, IN_A_ROW = 3.0, 3  # a gap of this many times the usual one, in this many steps, is no chance
LEAST_GAP = 1e-3  # below it, as with float32 weights on both sides, growth means nothing


class OffPolicyError(ValueError):
    """Rollouts come from other weights than those in training."""


@dataclass
class GapCheck:
    """Stops a run whose gap is too large, or has outgrown that of its first steps.

    With a small learning rate an engine whose weights stand still would stay below any fixed bar for long.

    Attributes:
        most: The largest mean gap of a step.
        first: Gaps of the first steps, since the run started or was resumed.
        num_above: Steps in a row, up to the last one, with a gap above MOST_GROWTH times their mean.
    """

    most: float
    first: list[float] = field(default_factory=list)
    num_above: int = 0

    def __call__(self, step: int, gap: float) -> None:
        """Take the mean gap of a step.

        Raises:
            OffPolicyError: When it is too large.
        """
        differ = f"step {step}: sampling and training log-probabilities differ by {gap:.4f} a token on average, "
        if not gap <= self.most:  # nan neither
            raise OffPolicyError(
                f"{differ}more than max_logp_gap {self.most}: the engine samples from other weights or another number "
                "format than the model in training; set rollout_dtype to that of training, or raise max_logp_gap if "
                "you accept off-policy rollouts"
            )
        if len(self.first) < FIRST_GAPS:
            self.first.append(gap)
            return
        usual = sum(self.first) / FIRST_GAPS
        self.num_above = self.num_above + 1 if gap > max(MOST_GROWTH * usual, LEAST_GAP) else 0
        if self.num_above >= IN_A_ROW:
            raise OffPolicyError(
                f"{differ}for {IN_A_ROW} steps in a row more than {MOST_GROWTH:g} times the {usual:.4f} of the first "
                f"{FIRST_GAPS} steps: the engine's weights no longer follow those in training; look at their sync"
            )
