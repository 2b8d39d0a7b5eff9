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
    refuse_without_model(variants)
    base = next(ranker for ranker in MODELS if ranker in variants[first][0])
    sampling = Sampling(users[chosen], 2000, 0)
    spread = f"spread of {compared[0]}"
    heads = [*metrics, spread, *(f"{metric} - {other}" for other in ("transitions", first) for metric in compared)]
    lines = [f"| variant | ranker | seeds | {' | '.join(heads)} |", f"|---|---|{'---:|' * (len(heads) + 1)}"]

    def cells(seeds: Sequence[Values], ranker: str, references: Sequence[tuple[Sequence[Values], str]]) -> list[str]:
        found = [number(means(seeds, ranker, metric)[chosen].mean()) for metric in metrics]
        of_seeds = [values[ranker][compared[0]][chosen].mean() for values in seeds]
        found.append(number(float(np.std(of_seeds, ddof=1))) if len(seeds) > 1 else NO_VALUE)
        for others, other in references:
            for metric in compared:
                pair = means(seeds, ranker, metric)[chosen], means(others, other, metric)[chosen]
                is_same = seeds is others and ranker == other
                found.append(NO_VALUE if is_same else difference(*pair, sampling))
        return found + [NO_VALUE] * (len(heads) - len(found))

    baselines = variants[first][:1]  # the same in all runs
    for ranker in BASELINES:
        lines.append(_line(NO_VALUE, ranker, 1, cells(baselines, ranker, [(baselines, "transitions")])))
    references = [(baselines, "transitions"), (variants[first], base)]
    for name, seeds in variants.items():
        for ranker in MODELS:
            if ranker in seeds[0]:
                lines.append(_line(name, ranker, len(seeds), cells(seeds, ranker, references)))
    return lines


def _line(name: str, ranker: str, num_seeds: int, cells: Sequence[str]) -> str:
    return f"| {name} | {ranker} | {num_seeds} | {' | '.join(cells)} |"


def refuse_without_model(variants: Variants) -> None:
    """Refuse a variant whose sft model was not evaluated.

    Raises:
        ValueError: Naming the variant.
    """
    for name, seeds in variants.items():
        if not any(ranker in seeds[0] for ranker in MODELS):
            raise ValueError(f"variant {name} was evaluated without its sft model; let evaluate.models hold sft")


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
