"""Rollouts as text, for the printed view and the terminal browser: outcome, orders, rewards, prompt and completion.

Model output is shown as `rich.text.Text`, never as markup, so that no completion can style or hide anything.
"""

import re
from collections.abc import Mapping, Sequence
from math import isnan

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rerank.catalogue import Catalogue
from rerank.rollouts.schema import Rollout

_UNUSUAL = re.compile(r"[^ -~\n]")
_SEMANTIC_ID = re.compile(r"<s_a_\d+>(?:<s_[b-z]_\d+>)*")


def print_group(group: Sequence[Rollout], catalogue: Catalogue | None, console: Console) -> None:
    """Print a group of rollouts; without a catalogue items are shown by number."""
    console.print(Rule(Text(heading(group)), align="left"))
    console.print(Text(visible(group[0]["prompt"])), style="dim")
    for number, rollout in enumerate(group, start=1):
        console.print()
        console.print(Text(f"rollout {number}: {outcome(rollout)}", style="bold"))
        console.print(Text(visible(rollout["completion"])))
        console.print(_orders(rollout, catalogue))
        total = f"reward {shown_number(rollout['reward'])}, advantage {shown_number(rollout['advantage'])}"
        console.print(Text(f"{total} ({', '.join(reward_parts(rollout))})"))


def heading(group: Sequence[Rollout]) -> str:
    """Where a group stands in its run."""
    first = group[0]
    place = f"step {first['step']}, group {first['group']}, row {first['row_id']}, user {first['user']}"
    return f"{place}: {len(group)} rollouts"


def outcome(rollout: Rollout) -> str:
    """A rollout's outcome: the places of the best-placed positive, or why it is no ranking, and whether it was trained
    on."""
    before, after = rollout["positive_rank"], rollout["positive_rank_after"]
    words = [f"target {before} -> {after}" if rollout["failure"] is None else f"no ranking ({rollout['failure']})"]
    if rollout["truncated"]:
        words.append("truncated")
    words.append("kept" if rollout["kept"] else f"discarded ({rollout['discard_reason']})")
    return ", ".join(words)


def reward_parts(rollout: Rollout) -> list[str]:
    """Each reward by name, and whether its condition kept it from counting."""
    unmet = {name for name, is_met in rollout["conditions"].items() if not is_met}
    parts = rollout["reward_components"].items()
    return [f"{name} {shown_number(part)}{' [condition not met]' if name in unmet else ''}" for name, part in parts]


def incoming_order(rollout: Rollout, catalogue: Catalogue | None) -> Text:
    """The first stage's order, one numbered line an item; relevant items carry a star and a grade that is not 1."""
    lines = [_line(rank, item_text(rollout, old, catalogue)) for rank, old in enumerate(_incoming(rollout), start=1)]
    return Text("\n").join(lines)


def outgoing_order(rollout: Rollout, catalogue: Catalogue | None) -> Text:
    """A completion's order, one numbered line an item, each that moved with an arrow and the rank it came from."""
    if rollout["order"] is None:
        return Text(f"no ranking: {rollout['failure']}", style="bold red")
    lines = []
    for rank, position in enumerate(rollout["order"], start=1):
        before = rollout["first_stage_ranks"][position]
        line = _line(rank, item_text(rollout, position, catalogue))
        if before != rank:
            line.append(f" ↑{before}" if before > rank else f" ↓{before}", style="green" if before > rank else "red")
        lines.append(line)
    return Text("\n").join(lines)


def _line(rank: int, item: Text) -> Text:
    return Text().append(f"{rank:2} ", style="dim").append_text(item)


def _orders(rollout: Rollout, catalogue: Catalogue | None) -> Table:
    """Incoming and outgoing order side by side."""
    ranks, incoming = rollout["first_stage_ranks"], _incoming(rollout)
    outgoing: Sequence[int | None] = rollout["order"] or [None] * len(incoming)
    table = Table("rank", "incoming", "outgoing", "was")
    for rank, (old, new) in enumerate(zip(incoming, outgoing, strict=True), start=1):
        item, was = (Text("-"), "") if new is None else (item_text(rollout, new, catalogue), str(ranks[new]))
        table.add_row(str(rank), item_text(rollout, old, catalogue), item, was)
    return table


def _incoming(rollout: Rollout) -> list[int]:
    """Positions into the shown candidates in the first stage's order."""
    ranks = rollout["first_stage_ranks"]
    return sorted(range(len(ranks)), key=ranks.__getitem__)


def item_text(rollout: Rollout, position: int, catalogue: Catalogue | None) -> Text:
    """A shown candidate by its title, with a star where it is relevant, and its grade if that is not 1; a question
    mark where it was not seen."""
    item, grade = rollout["candidates"][position], rollout["relevance"][position]
    name = str(item) if catalogue is None else visible(catalogue.titles[item] or catalogue.item_ids[item])
    if not grade > 0:
        return Text(f"? {name}" if isnan(grade) else name)
    return Text(f"*{'' if grade == 1 else f'{grade:g}'} {name}", style="bold green")


def with_titles(text: str, titles: Mapping[str, str]) -> str:
    """`text` with ‹title› for each semantic id that is a key of `titles`; others stay as they are."""
    return _SEMANTIC_ID.sub(lambda match: f"‹{titles[match[0]]}›" if match[0] in titles else match[0], text)


def visible(text: str) -> str:
    """`text` with control characters spelled out: a completion must not move the cursor or clear the screen."""
    return _UNUSUAL.sub(lambda match: match[0] if match[0].isprintable() else repr(match[0])[1:-1], text)


def shown_number(value: float | None) -> str:
    """A value as shown; a discarded rollout has no advantage."""
    return "none" if value is None else f"{value:.3f}"
