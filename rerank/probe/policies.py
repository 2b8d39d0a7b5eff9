"""The policies that are probed: completions that lazy ones would write for a row, and an honest one.

Positions are those of the candidates as shown. Where the recipe asks for the best `top_k`, a completion names those.
"""

import random
import re
from collections.abc import Callable, Sequence

from rerank.metrics import best_first, kendall_tau
from rerank.probe.rows import ProbeRow
from rerank.prompts import THINK, THINK_END, completion, parse_completion, spaced

Policy = Callable[[ProbeRow, random.Random], str]


def answer(row: ProbeRow, order: Sequence[int]) -> str:
    """A ranking after a trace that cites its first candidate and claims nothing."""
    return completion(f"best{spaced(row.labels[order[0]])}", order, row.labels, row.top_k)


def _list(row: ProbeRow, labels: Sequence[str]) -> str:
    """Labels after the trace of the oracle, whether they are a ranking or not."""
    return f"{THINK}best{spaced(_oracle_labels(row)[0])}{THINK_END}" + "".join(map(spaced, labels))


def _shown(row: ProbeRow) -> list[int]:
    return list(range(len(row.labels)))


def _oracle_labels(row: ProbeRow) -> list[str]:
    """The labels that the oracle writes."""
    return [row.labels[position] for position in best_first(row.row.relevance)][: row.top_k or None]


def input_order(row: ProbeRow, rng: random.Random) -> str:
    """The order shown: the no-op."""
    return answer(row, _shown(row))


def no_trace(row: ProbeRow, rng: random.Random) -> str:
    """The order shown, after an empty trace."""
    return completion(None, _shown(row), row.labels, row.top_k)


def swap_neighbours(row: ProbeRow, rng: random.Random) -> str:
    """A near-copy: two neighbours of equal relevance change places, so that nothing is won or lost."""
    order, gains = _shown(row)[: row.top_k or None], row.row.relevance
    places = [place for place in order[1:] if gains[place] == gains[place - 1]]
    if places:
        place = rng.choice(places)
        order[place - 1 : place + 1] = order[place], order[place - 1]
    return answer(row, order)


def second_to_first(row: ProbeRow, rng: random.Random) -> str:
    """A near-copy: the first two candidates change places."""
    first, second, *others = _shown(row)
    return answer(row, [second, first, *others])


def reverse(row: ProbeRow, rng: random.Random) -> str:
    """The order shown, last first."""
    return answer(row, _shown(row)[::-1])


def random_order(row: ProbeRow, rng: random.Random) -> str:
    """A random permutation."""
    return answer(row, rng.sample(_shown(row), len(row.labels)))


def last_to_first(row: ProbeRow, rng: random.Random) -> str:
    """The last candidate first, the others as shown."""
    *others, last = _shown(row)
    return answer(row, [last, *others])


def first_to_last(row: ProbeRow, rng: random.Random) -> str:
    """The first candidate last, the others as shown."""
    first, *others = _shown(row)
    return answer(row, [*others, first])


def positive_of(row: ProbeRow) -> int:
    """A positive of the row, drawn by its id where it has several."""
    return random.Random(row.row.row_id).choice(row.row.positives)


def positive_to(place: int, row: ProbeRow, rng: random.Random) -> str:
    """`positive_of` at a place from 0, the others as shown: the value of that place, no policy of the table."""
    moved = positive_of(row)
    others = [candidate for candidate in _shown(row) if candidate != moved]
    return answer(row, [*others[:place], moved, *others[place:]])


def by_popularity(row: ProbeRow, rng: random.Random) -> str:
    """The candidate that most users took first; ties stay as shown."""
    return answer(row, best_first(row.popularity))


def duplicate(row: ProbeRow, rng: random.Random) -> str:
    """The oracle's ranking with its first candidate again in place of the last: no ranking, like the next five."""
    labels = _oracle_labels(row)
    return _list(row, [*labels[:-1], labels[0]] if len(labels) > 1 else labels * 2)


def omission(row: ProbeRow, rng: random.Random) -> str:
    """The oracle's ranking without its last candidate."""
    return _list(row, _oracle_labels(row)[:-1])


def foreign_item(row: ProbeRow, rng: random.Random) -> str:
    """The oracle's ranking with an item that is no candidate in place of the last."""
    first, number = row.labels[0], len(row.labels)
    if first.isdecimal():
        foreign = str(number + 1)
    else:
        foreign = chr(ord(first) + number) if first.isalpha() else re.sub("[0-9]+", "999999", first)
    return _list(row, [*_oracle_labels(row)[:-1], foreign])


def truncated(row: ProbeRow, rng: random.Random) -> str:
    """The oracle's completion, cut off after two thirds."""
    text = oracle(row, rng)
    return text[: 2 * len(text) // 3]


def empty(row: ProbeRow, rng: random.Random) -> str:
    """Nothing."""
    return ""


def junk(row: ProbeRow, rng: random.Random) -> str:
    """Words that rank nothing."""
    return "I am sorry, but all of these are equally good."


def junk_with_target(row: ProbeRow, rng: random.Random) -> str:
    """Words around the label of the best candidate."""
    return f"The best one is {_oracle_labels(row)[0]}, the others follow."


def oracle(row: ProbeRow, rng: random.Random) -> str:
    """The best order there is."""
    return answer(row, best_first(row.row.relevance))


# With the kind of each, in the order of the table: the first is the one that others are compared with. A copy is the
# order shown or nearly so, a blind order does not look at the row, a fact is one that an honest policy may rest on.
POLICIES: tuple[tuple[Policy, str], ...] = (
    *((policy, "copy") for policy in (input_order, no_trace, swap_neighbours, second_to_first)),
    *((policy, "blind") for policy in (reverse, random_order, last_to_first, first_to_last)),
    (by_popularity, "fact"),
    *((policy, "no ranking") for policy in (duplicate, omission, foreign_item, truncated, empty)),
    *((policy, "no ranking") for policy in (junk, junk_with_target)),
)
RANDOM = (swap_neighbours, random_order)  # those whose completions differ from draw to draw
NEAR = 0.8  # Kendall's tau with the order shown, above which an order is a copy of it


def all_of(rows: Sequence[ProbeRow], best_fixed_order: Policy) -> list[tuple[Policy, str]]:
    """The policies of a table and their kinds: POLICIES, the best blind order, a sort by each fact, the oracle.

    In short lists a near-copy is none: what changes as much as NEAR allows counts as a blind order there.
    """
    found = [(policy, _kind(policy, kind, rows)) for policy, kind in POLICIES]
    place = [kind for _, kind in found].index("fact")
    facts = [(_by_fact(name), "fact") for name in rows[0].fact_names]
    return [*found[:place], (best_fixed_order, "blind"), found[place], *facts, *found[place + 1 :], (oracle, "oracle")]


def _kind(policy: Policy, kind: str, rows: Sequence[ProbeRow]) -> str:
    if kind != "copy":
        return kind
    orders = [parse_completion(policy(row, random.Random(0)), row.labels, row.top_k).order for row in rows]
    taus = [kendall_tau(order) for order in orders if order is not None]
    return "copy" if sum(taus) / len(taus) > NEAR else "blind"


def _by_fact(name: str) -> Policy:
    """The candidate with the highest value of a fact first; ties stay as shown."""

    def by_fact(row: ProbeRow, rng: random.Random) -> str:
        return answer(row, best_first(row.fact(name)))

    by_fact.__name__ = f"by_{name}"
    return by_fact
