"""Words of the facts on candidate lines.

A fact is a column of features.json. Those of FACTS and FURTHER_FACTS have words of their own, any other (a number of
the user's candidates or items) goes by its name.
"""

import re
from collections.abc import Sequence

# Fact -> (the short word of "codes", the phrase of "words"). Each value comes from other users' training sequences.
FACTS: dict[str, tuple[str, str]] = {
    "direct_last": ("next", "chosen next by {:.0f} others after the last item"),
    "direct_second": ("skip", "chosen next by {:.0f} others after the last item but one"),
    "from_last": ("link", "follows the last item with weight {:.2f}"),
    "sum_counts": ("sum", "follows the recent items with weight {:.2f}"),
    "popularity": ("pop", "chosen {:.0f} times by others"),
    "cosine_last": ("like", "similarity {:.2f} to the last item"),
    "cosine_max": ("near", "similarity {:.2f} to the nearest item of the history"),
    "lift": ("lift", "follows the recent items {:.2f} strong for its popularity"),
    "near": ("soon", "others take it within ten places of the recent items with share {:.2f}"),
    "fit_history": ("fit", "fits the whole history with score {:.2f}"),
    "fit_recent": ("now", "fits the recent items with score {:.2f}"),
}
# Those that a prompt shows only where its recipe names them: of the first stage, and of the lists of a log.
FURTHER_FACTS: dict[str, tuple[str, str]] = {
    "place": ("place", "at place {:.0f} of the first stage"),
    "first_stage_score": ("score", "first-stage score {:.2f}"),
    "click_rate": ("ctr", "clicked in {:.3f} of the lists that showed it"),
    "shown": ("shown", "shown in {:.0f} lists"),
}
UNKNOWN = "?"  # in place of the bucket of a number that is not known
NUM_BUCKETS = 10  # unless told otherwise

_NAME = re.compile(r"[^\W\d][\w-]*")


def fact_words(name: str) -> tuple[str, str]:
    """The short word of a fact, and the phrase that takes its value."""
    return (FACTS | FURTHER_FACTS).get(name, (name, f"{name} {{:.2f}}"))


def coded(name: str, bucket: float) -> str:
    """A fact as `evidence: codes` writes it, such as `next:8`; `next:?` for nan."""
    return f"{fact_words(name)[0]}:{UNKNOWN if bucket != bucket else int(bucket)}"


def worded(name: str, value: float) -> str:
    """A fact as `evidence: words` writes it; nan is said to be unknown."""
    word, phrase = fact_words(name)
    return f"{word} unknown" if value != value else phrase.format(value)


def code_words(names: Sequence[str], num_buckets: int = NUM_BUCKETS) -> list[str]:
    """Every word that `coded` can write of facts: the buckets, and of those that are not in FACTS the unknown one."""
    buckets = [(name, [*range(num_buckets), *([] if name in FACTS else [UNKNOWN])]) for name in names]
    return [f"{fact_words(name)[0]}:{bucket}" for name, of_name in buckets for bucket in of_name]


def check_facts(key: str, names: Sequence[str]) -> None:
    """Refuse facts that no line of a prompt could hold, or tell apart.

    Args:
        key: Option that names them.
        names: Of the facts.
    """
    words: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{key} holds {name!r}, but a fact is one word of letters, digits, _ and -, such as popularity or "
                "candidate_price; rename the column"
            )
        other = words.setdefault(fact_words(name)[0], name)
        if other != name:
            raise ValueError(
                f"{key} holds {other!r} and {name!r}, which prompts write with one word, {fact_words(name)[0]}; leave "
                "one out"
            )
