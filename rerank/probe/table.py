"""The probe's outcomes as a table for a terminal of 80 columns."""

from rich import box
from rich.table import Table

from rerank.probe import Outcome, Probe, percent

NO_VALUE = "–"
COLUMNS = ("rank\ngain", "reward", "spread", "of the\noracle", "above\nno-op", "useful\nno-op", "useful\nrandom")
CAPTION = (
    "Rank gain: mean places by which the target rises, – for no ranking. Above no-op: rows in which it earns more "
    "than the input order. Useful: groups, half from the policy and half from the input order or random orders, that "
    "differ in the recipe's outcome; others are discarded. If first: its reward where the target is first already."
)


def table(found: Probe) -> Table:
    """One line a policy."""
    shown = Table(title=found.rows, caption=CAPTION, caption_justify="left", box=box.SIMPLE, padding=0)
    shown.add_column("policy", no_wrap=True)
    for column in (*COLUMNS, "if\nfirst"):
        shown.add_column(column, justify="right", no_wrap=True)
    for outcome in found.outcomes:
        shown.add_row(outcome.policy, *_cells(found, outcome))
    return shown


def _cells(found: Probe, outcome: Outcome) -> list[str]:
    share = found.share(outcome)
    return [
        NO_VALUE if outcome.rank_gain is None else f"{outcome.rank_gain:+.2f}",
        f"{outcome.reward:.3f}",
        f"{outcome.spread:.3f}",
        NO_VALUE if share is None else percent(share),
        percent(outcome.above_no_op),
        percent(outcome.useful_with_no_op),
        percent(outcome.useful_with_random),
        NO_VALUE if outcome.reward_if_first is None else f"{outcome.reward_if_first:.3f}",
    ]
