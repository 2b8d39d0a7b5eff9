"""Tables of variants that rank the whole catalogue, from each row's values.

A variant has the values of each of its seeds: ranker to metric to (R,), one for each of the R rows.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rerank.compare.rankings_table import difference
from rerank.evaluate.results import Sampling
from rerank.evaluate.tables import NO_VALUE, number

BASELINES = ("popularity", "transitions")
SEARCH = "sft"  # beam search
MODELS = (SEARCH, "sft_head", "sft_both")

Values = Mapping[str, Mapping[str, np.ndarray]]
Variants = Mapping[str, Sequence[Values]]


def means(seeds: Sequence[Values], ranker: str, metric: str) -> np.ndarray:
    """(R,) a metric of each row, the mean over seeds."""
    return np.mean([values[ranker][metric] for values in seeds], axis=0)


def group_lines(
    variants: Variants, users: np.ndarray, metrics: Sequence[str], compared: Sequence[str], chosen: np.ndarray
) -> list[str]:
    """The baselines and each variant's rankers on the chosen rows, with differences of the compared metrics.

    They are to transitions and to the first variant's first ranker.

    Args:
        variants: Name to values of each seed.
        users: (R,) whose a row is.
        metrics: To show.
        compared: Those with differences; the spread over seeds is of the first.
        chosen: (R,) bool.
    """
    first = next(iter(variants))
    base = next(ranker for ranker in MODELS if ranker in variants[first][0])
    sampling = Sampling(users[chosen], 2000, 0)
    heads = [
        *metrics,
        f"spread of {compared[0]}",
        *(f"{m} - {other}" for other in ("transitions", first) for m in compared),
    ]
    lines = [f"| variant | ranker | seeds | {' | '.join(heads)} |", f"|---|---|{'---:|' * (len(heads) + 1)}"]

    def differences(seeds: Sequence[Values], ranker: str, others: Sequence[Values], other: str) -> list[str]:
        if seeds is others and ranker == other:
            return [NO_VALUE] * len(compared)
        pairs = [(means(seeds, ranker, metric), means(others, other, metric)) for metric in compared]
        return [difference(values[chosen], reference[chosen], sampling) for values, reference in pairs]

    baselines = variants[first][:1]
    for name, seeds in {NO_VALUE: baselines, **variants}.items():
        for ranker in BASELINES if name == NO_VALUE else MODELS:
            if ranker not in seeds[0]:
                continue
            cells = [number(means(seeds, ranker, metric)[chosen].mean()) for metric in metrics]
            of_seeds = [values[ranker][compared[0]][chosen].mean() for values in seeds]
            cells.append(number(float(np.std(of_seeds, ddof=1))) if len(seeds) > 1 else NO_VALUE)
            cells += differences(seeds, ranker, baselines, "transitions")
            to_first = differences(seeds, ranker, variants[first], base)
            cells += [NO_VALUE] * len(compared) if name == NO_VALUE else to_first
            lines.append(f"| {name} | {ranker} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def pair_lines(
    variants: Variants,
    users: np.ndarray,
    compared: Sequence[str],
    ranker: str,
    more_heads: Sequence[str] = (),
    more_cells: Callable[[str, str], list[str]] = lambda name, other: [],
) -> list[str]:
    """Each variant's ranker against that of every variant before it; nothing unless two variants have it."""
    asked = [name for name, seeds in variants.items() if ranker in seeds[0]]
    if len(asked) < 2:
        return []
    sampling = Sampling(users, 2000, 0)
    heads = [*compared, *more_heads]
    lines = ["", f"Differences between variants, {ranker}, all rows:", ""]
    lines += [f"| variant | minus | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    for other, name in itertools.combinations(asked, 2):
        pairs = [(means(variants[name], ranker, m), means(variants[other], ranker, m)) for m in compared]
        cells = [difference(*pair, sampling) for pair in pairs] + more_cells(name, other)
        cells += [NO_VALUE] * (len(heads) - len(cells))
        lines.append(f"| {name} | {other} | {' | '.join(cells)} |")
    return lines
