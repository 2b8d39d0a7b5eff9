"""Does cheating cost something against trying? `rerank probe RECIPE.yaml` asks a recipe's rewards, before training.

No model is needed: policies that copy, shuffle, cut off or write junk (`policies`) answer the dapo stage's own
training rows (`rows`) and are paid by the recipe's own rewards, conditions and weights. DAPO learns from differences
within a group, so that neither a constant nor a scale of the rewards changes what it learns. Earnings are therefore
told in shares: 0 is the mean of random orders on the same rows, 1 the oracle. A good first stage is better than random
orders, and a copy of it earns that; the bars are therefore on the share less that of the rank gain alone, which is 0
for every order where a reward pays for rank and a constant. The verdict falls on the rows whose target is not first
already. Where a row has several positives, the target of what is said here is the best-placed of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank import scoring
from rerank.launch import recipe
from rerank.probe import policies
from rerank.probe.rows import ProbeRow, read_rows
from rerank.probe.scores import NUM_RANDOM, SAME, Scale, Scorer, best_blind_order
from rerank.results.tables import NO_VALUE, number, percent
from rerank.rollouts.metrics import dapo_keys
from rerank.scoring import RANK_GAIN

if TYPE_CHECKING:
    from rich.table import Table

MAX_COPY, MAX_BLIND = -0.03, 0.25
GROUP_SIZE = 8  # TRL's num_generations
REFERENCE = (  # GR2's conditional reward: where copying is cheap even here, it is so by the rows
    {"name": "rank_promotion"},
    {"name": "well_formed", "weight": 0.2, "condition": "promoted_or_kept_first"},
)
REWARD_FILE_KEYS = {"rewards", "outcome"}  # a file with no other keys is no recipe of a run
COLUMNS = (
    "rank\ngain",
    "reward",
    "share",
    "beyond\nrank",
    "spread",
    "above\nno-op",
    "useful\nno-op",
    "useful\nrandom",
)
CAPTION = (
    "Share: 0 is the mean of random orders, 1 the oracle; beyond rank: less the share of its rank gain. Rank gain: "
    "mean places by which the target rises, – for no ranking. Above no-op: rows in which it earns more than the "
    "input order. Useful: groups, half from the policy and half from the input order or random orders, that differ "
    "in the recipe's outcome; others are discarded. If first: its reward where the target is first already."
)
CHECKED_ROWS = 1000  # before dapo starts


@dataclass(frozen=True)
class Outcome:
    """The earnings of one policy. Means are over rows whose target is not first, but for `reward_if_first`.

    Attributes:
        kind: Of the policy, as in `policies.POLICIES`.
        rank_gain: Mean places by which the target rises; None for what is no ranking.
        share: Its reward, 0 as the mean of random orders and 1 as the oracle; None where the oracle earns no more.
        gain_share: Its rank gain alike; None for what is no ranking.
        spread: Standard deviation of its reward over rows.
        above_no_op: Share of rows in which it earns more than the input order.
        useful_with_no_op: Share of groups, half from it and half from the input order, whose outcomes differ.
        useful_with_random: The same with random orders as the other half.
        reward_if_first: Its reward where the target is first already; None without such rows.
        parts: Mean of each reward after its condition and weight.
    """

    policy: str
    kind: str
    rank_gain: float | None
    reward: float
    share: float | None
    gain_share: float | None
    spread: float
    above_no_op: float
    useful_with_no_op: float
    useful_with_random: float
    reward_if_first: float | None
    parts: dict[str, float]

    @property
    def beyond_rank(self) -> float | None:
        """Its share less that of its rank gain, which is 0 for no ranking."""
        return None if self.share is None else self.share - (self.gain_share or 0.0)

    def excess(self, max_blind: float) -> float:
        """By how much `beyond_rank` is above the bar of its kind; what has none is below every bar.

        A blind order that loses rank against random orders is held against them: it earns nothing by being worse.
        """
        if self.beyond_rank is None or self.share is None or self.kind not in BARS:
            return -np.inf
        if BARS[self.kind]:
            return self.beyond_rank - MAX_COPY
        return min(self.beyond_rank, self.share) - max_blind


BARS = {"copy": True, "no ranking": True, "blind": False}  # kind -> whether its bar is that of copies


@dataclass(frozen=True)
class Probe:
    """The earnings of every policy, the oracle last, and the verdict.

    Attributes:
        rows: Which rows were used, in words.
        max_blind: By how much the share of an order that does not look at the row may be above that of its rank gain.
        reference: `beyond_rank` of the input order under REFERENCE.
    """

    outcomes: list[Outcome]
    rows: str
    max_blind: float
    reference: float

    @property
    def oracle(self) -> Outcome:
        """The earnings of the best order."""
        return self.outcomes[-1]

    @property
    def worst(self) -> Outcome:
        """The policy that is furthest above its bar; of equals the first of the table."""
        return max(self.outcomes, key=lambda outcome: round(outcome.excess(self.max_blind), 9))

    @property
    def passed(self) -> bool | None:
        """Whether no policy is above its bar; None where these rows let copying pay under any reward."""
        if self.oracle.share is not None and self.worst.excess(self.max_blind) <= SAME:
            return True
        is_by_rows = self.oracle.share is not None and self.worst.kind == "copy" and self.reference > MAX_COPY
        return None if is_by_rows else False

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        worst, bar = self.worst, percent(MAX_COPY, 0)
        if self.oracle.share is None:
            return (
                f"the oracle earns {self.oracle.reward:.3f}, no more than random orders, so that these rewards pay "
                "nobody for ranking better"
            )
        if self.passed:
            copy = max((o for o in self.outcomes if o.kind == "copy"), key=lambda outcome: outcome.beyond_rank or 0.0)
            return (
                f"copying costs: {copy.policy} earns {percent(copy.share, 0)} of the oracle's lead over random orders "
                f"where its rank gain is {percent(copy.gain_share, 0)} (at most {bar} between them), and no order "
                "that does not look at the row earns much more than its rank gain"
            )
        if self.passed is None:
            return (
                f"no verdict: on these rows copying earns {percent(self.reference, 0)} of the oracle's lead over "
                f"random orders beside its rank gain even under GR2's conditional reward (at most {bar} is wanted); "
                "probe more rows, or longer lists"
            )
        share, lead = percent(worst.share, 0), "of the oracle's lead over random orders"
        if worst.kind == "blind":
            return (
                f"{worst.policy} does not look at the row and earns {share} {lead}, but its rank gain is "
                f"{percent(worst.gain_share, 0)} of the oracle's; pay ranks more evenly"
            )
        return (
            f"{worst.policy} {_movement(worst)} and earns {share} {lead} where its rank gain is "
            f"{percent(worst.gain_share or 0.0, 0)} (at most {bar} between them is wanted: it must cost something)"
            f"{_source(worst)}; pay what is no rank only where the ranking helped, such as "
            "`condition: promoted_or_kept_first`"
        )


def _movement(outcome: Outcome) -> str:
    """The movement of the target, in words."""
    if outcome.rank_gain is None:
        return "is no ranking"
    return f"moves the target by {outcome.rank_gain:+.2f} places" if outcome.rank_gain else "wins the target no place"


def _source(outcome: Outcome) -> str:
    """The reward that pays a policy most, where one does."""
    paid = {name: value for name, value in outcome.parts.items() if value > 0}
    if not paid:
        return ""
    name = max(paid, key=paid.__getitem__)
    share = paid[name] / sum(paid.values())
    return f", all of it from {name}" if share == 1 else f", {percent(share, 0)} of what it is paid from {name}"


def read_keys(path: str | Path, run: str | None) -> dict[str, Any]:
    """The keys to probe: a dapo recipe's, or of a file of rewards and of the run's own dapo recipe, if it has one.

    Args:
        run: Folder of the run, in place of the recipe's `run_dir`.
    """
    keys = recipe.load(path) | {"rewards": scoring.read_rewards(str(path), str(path))}
    if run and set(keys) <= REWARD_FILE_KEYS:
        keys = dapo_keys(run) | keys
    keys |= {"run_dir": run} if run else {}
    if not keys.get("run_dir"):
        raise ValueError(f"{path}: run_dir is missing; add it, or give --run-dir")
    return keys


def probe(keys: Mapping[str, Any], num_rows: int = 0, max_blind: float = MAX_BLIND) -> Probe:
    """Score all policies on the rows and with the rewards of a dapo recipe.

    Args:
        keys: The recipe's.
        num_rows: Number of rows, drawn at random; 0 for all.
        max_blind: By how much the share of an order that does not look at the row may be above that of its rank gain.

    Raises:
        FileNotFoundError: When the stages before are missing.
        ValueError: On a bad reward, naming it and the row, or when no row leaves anything to gain.
    """
    if num_rows < 0:
        raise ValueError(f"rows is {num_rows} but must be at least 1, or 0 for all")
    if not 0 <= max_blind <= 1:
        raise ValueError(f"max-share is {max_blind} but must be from 0 to 1, such as {MAX_BLIND}")
    group_size = keys.get("num_generations", GROUP_SIZE)
    if type(group_size) is not int or group_size < 2:
        raise ValueError(f"num_generations is {group_size!r} but must be an integer of at least 2")
    scoring.check_aggregation(keys, "the dapo recipe")
    rows, what = read_rows(keys, num_rows)
    rewards = scoring.load_rewards(scoring.read_rewards(keys.get("rewards"), "the dapo recipe"))
    scoring.check_outcome(keys.get("outcome"), rewards)
    has_several = scoring.has_several_positives(row.row.relevance for row in rows)
    outcome = scoring.choose_outcome(keys.get("outcome"), rewards, has_several)
    open_rows = [row for row in rows if row.row.positive_rank != 1]
    first_rows = [row for row in rows if row.row.positive_rank == 1]
    if not open_rows:
        raise ValueError(f"the target of all {len(rows)} rows is first already, so there is nothing to gain; add rows")
    outcomes = _outcomes(open_rows, first_rows, Scorer(rewards, outcome, max(1, group_size // 2)))
    reference = Scorer(scoring.load_rewards(REFERENCE), RANK_GAIN, NUM_RANDOM)
    scale = Scale.of(reference, open_rows)
    copied = scale.share(reference.draw(policies.input_order, open_rows).totals.mean()) or 0.0
    what = f"{len(open_rows)} of {len(rows)} {what}, their target not first"
    return Probe(outcomes, what, max_blind, copied - scale.gain_share(0.0))


def problem(keys: Mapping[str, Any]) -> str | None:
    """Why DAPO should not start with this recipe, by CHECKED_ROWS rows, or None; None where it says `probe: false`."""
    found = None if keys.get("probe") is False else probe(keys, CHECKED_ROWS)
    return found.sentence if found and found.passed is False else None


def _outcomes(open_rows: Sequence[ProbeRow], first_rows: Sequence[ProbeRow], scorer: Scorer) -> list[Outcome]:
    scale = Scale.of(scorer, open_rows)
    no_op = scorer.draw(policies.input_order, open_rows)
    others = scorer.draw(policies.random_order, open_rows, scorer.num_draws)
    alone, outcomes = replace(scorer, num_draws=1), []
    for policy, kind in policies.all_of(open_rows, best_blind_order(scorer, open_rows)):
        drawn = scorer.draw(policy, open_rows)
        means, is_ranking = drawn.parts.mean(axis=(0, 1)).tolist(), np.isfinite(drawn.gains).all()
        gain = float(drawn.gains.mean()) if is_ranking else None
        outcomes.append(
            Outcome(
                policy=policy.__name__,
                kind=kind,
                rank_gain=gain,
                reward=float(drawn.totals.mean()),
                share=scale.share(drawn.totals.mean()),
                gain_share=None if gain is None else scale.gain_share(gain),
                spread=float(drawn.totals.std()),
                above_no_op=float((drawn.totals > no_op.totals + SAME).mean()),
                useful_with_no_op=drawn.useful_share(no_op),
                useful_with_random=drawn.useful_share(others),
                reward_if_first=float(alone.draw(policy, first_rows).totals.mean()) if first_rows else None,
                parts={reward.name: mean for reward, mean in zip(scorer.rewards, means, strict=True)},
            )
        )
    return outcomes


def table(found: Probe) -> "Table":
    """One line for each policy, for a terminal of 80 columns."""
    from rich import box
    from rich.table import Table

    shown = Table(title=found.rows, caption=CAPTION, caption_justify="left", box=box.SIMPLE, padding=0)
    shown.add_column("policy", no_wrap=True)
    for column in (*COLUMNS, "if\nfirst"):
        shown.add_column(column, justify="right", no_wrap=True)
    for outcome in found.outcomes:
        shown.add_row(
            outcome.policy,
            NO_VALUE if outcome.rank_gain is None else f"{outcome.rank_gain:+.2f}",
            number(outcome.reward, 3),
            percent(outcome.share, 0),
            percent(outcome.beyond_rank, 0),
            number(outcome.spread, 3),
            *(percent(part, 0) for part in (outcome.above_no_op, outcome.useful_with_no_op)),
            percent(outcome.useful_with_random, 0),
            number(outcome.reward_if_first, 3),
        )
    return shown
