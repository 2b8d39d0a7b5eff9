"""Rollouts as text: each group's prompt once, then every completion with its order beside the incoming one.

Model output is shown as `rich.text.Text`, never as markup, so that no completion can style or hide anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rerank.catalogue import Catalogue

Rollout = Mapping[str, Any]


def print_groups(groups: Sequence[Sequence[Rollout]], catalogue: Catalogue | None, console: Console) -> None:
    """Print groups of rollouts; without a catalogue items are shown by number."""
    for group in groups:
        first = group[0]
        heading = f"step {first['step']}, group {first['group']}, row {first['row_id']}, user {first['user']}"
        console.print(Rule(Text(f"{heading}: {len(group)} rollouts"), align="left"))
        console.print(_plain(first["prompt"]), style="dim")
        for number, rollout in enumerate(group, start=1):
            _print_rollout(number, rollout, catalogue, console)


def _print_rollout(number: int, rollout: Rollout, catalogue: Catalogue | None, console: Console) -> None:
    console.print()
    console.print(Text(f"rollout {number}: {outcome(rollout)}", style="bold"))
    console.print(_plain(rollout["completion"]))
    console.print(_orders(rollout, catalogue))
    parts = [f"{name} {_number(value)}" for name, value in rollout["reward_components"].items()]
    total = f"reward {_number(rollout['reward'])}, advantage {_number(rollout['advantage'])}"
    console.print(Text(f"{total} ({', '.join(parts)})"))


def outcome(rollout: Rollout) -> str:
    """What became of a rollout: the target's ranks or why it is no ranking, and whether it was trained on."""
    before, after = rollout["target_rank_before"], rollout["target_rank_after"]
    words = [f"target {before} -> {after}" if rollout["failure"] is None else f"no ranking ({rollout['failure']})"]
    if rollout["truncated"]:
        words.append("truncated")
    words.append("kept" if rollout["kept"] else f"discarded ({rollout['discard_reason']})")
    return ", ".join(words)


def _orders(rollout: Rollout, catalogue: Catalogue | None) -> Table:
    """Incoming and outgoing order side by side; relevant items carry a star."""
    ranks = rollout["first_stage_ranks"]
    incoming = sorted(range(len(ranks)), key=ranks.__getitem__)
    outgoing: Sequence[int | None] = rollout["order"] or [None] * len(incoming)
    table = Table("rank", "incoming", "outgoing", "was")
    for rank, (old, new) in enumerate(zip(incoming, outgoing, strict=True), start=1):
        was = "" if new is None else str(ranks[new])
        table.add_row(str(rank), _item(rollout, old, catalogue), _item(rollout, new, catalogue), was)
    return table


def _item(rollout: Rollout, position: int | None, catalogue: Catalogue | None) -> Text:
    if position is None:
        return Text("-")
    item, is_relevant = rollout["candidates"][position], rollout["relevance"][position] > 0
    name = str(item) if catalogue is None else catalogue.titles[item] or catalogue.item_ids[item]
    return Text(f"{'* ' if is_relevant else ''}{name}", style="bold green" if is_relevant else "")


def _plain(text: str) -> Text:
    """Text with control characters made visible: a completion must not move the cursor or clear the screen."""
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
