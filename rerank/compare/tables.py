"""The tables of `rerank compare`: of runs that rank lists, the catalogue for the next item, or held-out sets."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rerank.compare import evaluations
from rerank.compare.evaluations import ListEvaluation, RunsOf, Variants, mean
from rerank.next_item import held_out_sets, recall
from rerank.next_item.pruning import Pruning
from rerank.results.intervals import Sampling
from rerank.results.rankers import of_task
from rerank.results.tables import NO_VALUE, Results, interval, markdown_table, number

METRICS, COMPARED = ("R@1", "R@5", "N@5"), ("N@5", "R@1")  # of lists of candidates
COMPARED_NEXT = ("R@10", "N@10")
CATALOGUE_MODELS = [ranker.name for ranker in of_task("next_item") if ranker.stage == "sft"]
SEARCH = "sft"  # ranks the catalogue by beam search

Line = tuple[Sequence[evaluations.Evaluation], str]  # seeds and the ranker
Prunings = Mapping[str, Sequence[Pruning]]  # variant -> that of each seed, where it was measured


def rows_of(results: Results) -> str:
    """Which rows were evaluated, and how to read the tables."""
    task = results.get("task", "rerank")
    if task == "held_out_sets":
        return (
            f"{results['n']} users, {results['split']}: all that is held out of a user, found from the training items."
            "\nRecall@k is hits over min(k, number of held-out items). Intervals: 95 %, paired bootstrap, users "
            "drawn, of the mean over seeds."
        )
    intervals = "Intervals: 95 %, paired bootstrap, whole users drawn, of the mean over seeds."
    if task == "next_item":
        return (
            f"{results['n']['all']} {results['split']} rows, all items ranked, {results['num_beams']} beams.\n"
            f"{intervals} One hop: the target is among the 50 most frequent direct training successors of the "
            "history's items."
        )
    return (
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']}.\n"
        f"{intervals} A completion that is no ranking scores zero. The difference to sft is, for dapo, to the model "
        "of the sft stage that it started from."
    )


def minus(
    line: Line, other: Line | None, metric: str, sampling: Sampling, chosen: np.ndarray | slice = slice(None)
) -> str:
    """A cell: the difference of a metric on the chosen rows, with its interval; nothing without the other line."""
    if other is None:
        return NO_VALUE
    return interval(*sampling.difference(*(mean(*one, metric)[chosen] for one in (line, other))))


def spread(line: Line, metric: str, chosen: np.ndarray | slice = slice(None)) -> str:
    """A cell: the standard deviation of a metric on the chosen rows over seeds."""
    seeds, ranker = line
    found = [seed.values[ranker][metric][chosen].mean() for seed in seeds]
    return number(float(np.std(found, ddof=1))) if len(found) > 1 else NO_VALUE


def list_lines(runs_of: RunsOf) -> list[str]:
    """Each ranker's values, baselines once, then the differences; a row's value is its mean over seeds.

    A model that a variant shares with the first one stands there only. Differences are to the no-op, to sft (of dapo:
    the model it started from), and to the same ranker of the first variant.
    """
    read = evaluations.load_all(ListEvaluation.load, runs_of, "rows")
    first, of_first = next(iter(read.items()))
    baselines = [ranker.name for ranker in of_task("rerank") if ranker.is_baseline]
    rankers = [(NO_VALUE, of_first, name) for name in baselines if name in of_first[0].values]
    for variant, seeds in read.items():
        own = [name for name in seeds[0].values if name not in baselines]
        own = [name for name in own if seeds is of_first or not _shared(seeds, of_first, name)]
        rankers += [(variant, seeds, name) for name in own]
    sampling, values, differences = Sampling(of_first[0].users), [], []
    for variant, seeds, ranker in rankers:
        cells = [number(mean(seeds, ranker, metric).mean()) for metric in METRICS]
        references: list[Line | None] = [(of_first, "no_op"), None, None]
        if variant == NO_VALUE:
            values.append([variant, ranker, "1", *cells, NO_VALUE, NO_VALUE])
        else:
            failed = f"{mean(seeds, ranker, evaluations.FAILED).mean():.1%}"
            values.append([variant, ranker, str(len(seeds)), *cells, failed, spread((seeds, ranker), "N@5")])
            start = seeds[0].start if ranker == "dapo" else "sft"
            if ranker != start and (start in seeds[0].values or _shared(seeds, of_first, start)):
                references[1] = (seeds if start in seeds[0].values else of_first, start)
            if seeds is not of_first and ranker in of_first[0].values:
                references[2] = (of_first, ranker)
        pairs = itertools.product(COMPARED, references)
        cells = [minus((seeds, ranker), other, metric, sampling) for metric, other in pairs]
        differences.append([variant, ranker, *cells])
    heads = ["variant", "ranker", "seeds", *METRICS, evaluations.FAILED, "spread of N@5"]
    minus_heads = [f"{metric} − {other}" for metric in COMPARED for other in ("no-op", "sft", first)]
    table = markdown_table(["variant", "ranker", *minus_heads], differences[1:], 2)  # the no-op stands first
    return [*markdown_table(heads, values, 2), "", *table]


def _shared(seeds: Sequence[ListEvaluation], others: Sequence[ListEvaluation], ranker: str) -> bool:
    """Whether the runs have the others' model under this name, seed by seed, and it was evaluated there."""
    pairs = zip(seeds, others, strict=True)
    return ranker in others[0].values and all(one.folders[ranker] == other.folders[ranker] for one, other in pairs)


def next_item_lines(runs_of: RunsOf) -> list[str]:
    """A table for each group of rows, with differences to the first variant; pruning; each pair's differences."""
    read = evaluations.load_all(evaluations.NextItemEvaluation.load, runs_of, "rows")
    one_hop = next(iter(read.values()))[0].one_hop
    groups, lines = {"all": np.ones(len(one_hop), dtype=bool), "one_hop": one_hop, "rest": ~one_hop}, []
    for group, chosen in groups.items():
        if chosen.any():
            table = group_lines(read, recall.METRICS, COMPARED_NEXT, chosen)
            lines += ["", f"{recall.GROUPS[group]}, {int(chosen.sum())} rows:", "", *table]
    found = {name: [seed.pruning for seed in seeds if seed.pruning is not None] for name, seeds in read.items()}
    measured = {name: seeds for name, seeds in found.items() if len(seeds) == len(read[name])}
    return [*lines, *pruning_lines(measured), *pair_lines(read, COMPARED_NEXT, measured)][1:]


def set_lines(runs_of: RunsOf) -> list[str]:
    """Every ranker with differences to transitions and to the first variant; then each pair's differences."""
    read = evaluations.load_all(evaluations.load_sets, runs_of, "users or items")
    metrics = held_out_sets.METRICS
    return [*group_lines(read, metrics, metrics, slice(None)), *pair_lines(read, metrics, {})]


def group_lines(
    variants: Variants, metrics: Sequence[str], compared: Sequence[str], chosen: np.ndarray | slice
) -> list[str]:
    """The baselines and each variant's rankers on the chosen rows.

    Differences of the compared metrics are to transitions and to the first variant's first ranker; the spread over
    seeds is of the first of them.
    """
    lines = {name: [(seeds, r) for r in CATALOGUE_MODELS if r in seeds[0].values] for name, seeds in variants.items()}
    for name, found in lines.items():
        if not found:
            raise ValueError(f"variant {name} was evaluated without its sft model; let evaluate.models hold sft")
    first, of_first = next(iter(variants.items()))
    baselines = [(of_first[:1], r.name) for r in of_task("next_item") if r.is_baseline]  # the same in all runs
    references = [next(line for line in baselines if line[1] == recall.REFERENCE), lines[first][0]]
    sampling, rows = Sampling(of_first[0].users[chosen]), []
    for name, found in {NO_VALUE: baselines, **lines}.items():
        for line in found:
            others = [None if line == other else other for other in references]
            if found is baselines:
                others[1] = None
            cells = [number(mean(*line, metric)[chosen].mean()) for metric in metrics]
            pairs = itertools.product(others, compared)
            cells += [spread(line, compared[0], chosen), *(minus(line, o, m, sampling, chosen) for o, m in pairs)]
            rows.append([name, line[1], str(len(line[0])), *cells])
    heads = [f"{metric} - {other}" for other in (recall.REFERENCE, first) for metric in compared]
    return markdown_table(["variant", "ranker", "seeds", *metrics, f"spread of {compared[0]}", *heads], rows, 2)


def pair_lines(variants: Variants, compared: Sequence[str], measured: Prunings) -> list[str]:
    """By ranker that two variants have, each variant against every one before it; of the search its pruning too."""
    sampling, lines = Sampling(next(iter(variants.values()))[0].users), []
    for ranker in CATALOGUE_MODELS:
        asked = {name: (seeds, ranker) for name, seeds in variants.items() if ranker in seeds[0].values}
        with_pruning = ranker == SEARCH and len(measured) > 1
        heads = ["variant", "minus", *compared, *(["pruned, points", "violation, points"] if with_pruning else [])]
        rows = []
        for other, name in itertools.combinations(asked, 2):
            cells = [name, other, *(minus(asked[name], asked[other], metric, sampling) for metric in compared)]
            rows.append(cells + (_pruning_differences(measured, name, other, sampling) if with_pruning else []))
        if rows:
            lines += ["", f"Differences between variants, {ranker}, all rows:", "", *markdown_table(heads, rows, 2)]
    return lines


def pruning_lines(measured: Prunings) -> list[str]:
    """Pruning by beam search, over all seeds, of the variants where it was measured."""
    if not measured:
        return []
    steps, rows = max(seeds[0].violates.shape[1] for seeds in measured.values()), []
    for name, seeds in measured.items():
        pruned, top, violated = _over_seeds(seeds)
        rates = [seed.summary()["pruning_rate"] for seed in seeds]
        by_step = np.mean([seed.violates for seed in seeds], axis=(0, 1))  # (L,)
        cells = [name, str(len(top)), f"{top.sum() / len(seeds):.1f}"]
        cells.append(f"{pruned.sum() / top.sum():.1%}" if top.any() else NO_VALUE)
        cells.append(f"{np.std(rates, ddof=1):.1%}" if len(rates) > 1 and None not in rates else NO_VALUE)
        cells += [f"{violated.mean():.1%}", *(f"{share:.1%}" for share in by_step)]
        rows.append(cells + [NO_VALUE] * (steps - len(by_step)))
    heads = ["variant", "n", "targets in the top", "pruned of them", "spread", "violation"]
    return [
        "",
        "Pruning. In the top: the target's whole sequence is among the K most probable items, K being the number of "
        "beams, mean over seeds; pruned: the share of those of all seeds that beam search does not find. Violation: K "
        "valid tokens or more are above a token of the target, anywhere or at a step, mean over seeds:",
        "",
        *markdown_table([*heads, *(f"step {step + 1}" for step in range(steps))], rows),
    ]


def _pruning_differences(measured: Prunings, name: str, other: str, sampling: Sampling) -> list[str]:
    """Of the pruned share and of the share of violated targets, in points; nothing where not measured in both."""
    if name not in measured or other not in measured:
        return [NO_VALUE] * 2
    (*pruned, violated), (*others, violated_there) = _over_seeds(measured[name]), _over_seeds(measured[other])
    differences = sampling.rate_difference(*pruned, *others), sampling.difference(violated, violated_there)
    cells = []
    for found, bounds in differences:
        points = [f"{100 * value:+.1f}" for value in (found, *bounds)]
        cells.append(NO_VALUE if np.isnan([found, *bounds]).any() else f"{points[0]} [{points[1]}, {points[2]}]")
    return cells


def _over_seeds(seeds: Sequence[Pruning]) -> np.ndarray:
    """(3, R): seeds in which the target is pruned, and is in the top; share of them in which a token is violated."""
    pruned, top = (np.sum(found, axis=0) for found in zip(*((s.is_pruned, s.is_top) for s in seeds), strict=True))
    return np.array([pruned, top, np.mean([seed.violates.any(axis=1) for seed in seeds], axis=0)])


LINES: dict[str, Callable[[RunsOf], list[str]]] = {  # by task of the evaluate stage
    "rerank": list_lines,
    "next_item": next_item_lines,
    "held_out_sets": set_lines,
}
