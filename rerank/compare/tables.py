"""The tables of `rerank compare`: of runs that rank lists, the catalogue for the next item, or held-out sets."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rerank.compare import evaluations, slices
from rerank.compare.evaluations import ListEvaluation, RunsOf, Variants, by_seed, count_seeds, mean
from rerank.metrics import compared
from rerank.next_item import held_out_sets, recall
from rerank.results.intervals import Sampling, holds
from rerank.results.rankers import of_task
from rerank.results.tables import NO_VALUE, Results, interval, markdown_table, number, percent, shown_metrics

COMPARED_NEXT = ("R@10", "N@10")
CATALOGUE_MODELS = [ranker.name for ranker in of_task("next_item") if ranker.stage == "sft"]
TREES = "lambdamart"
SEARCH = "sft"  # ranks the catalogue by beam search

Line = tuple[Sequence[evaluations.Evaluation], str]  # seeds and the ranker
Measured = Mapping[str, Sequence[evaluations.NextItemEvaluation]]  # the variants whose pruning was measured


def rows_of(results: Sequence[Results]) -> str:
    """Which rows were evaluated, and how to read the tables, from the results of each seed of a variant."""
    first, num_seeds = results[0], len(results)
    task = first.get("task", "rerank")
    intervals = f"Intervals: {holds(num_seeds)}."
    if task == "held_out_sets":
        return (
            f"{_count(results, 'n')} users, {first['split']}: all that is held out of a user, found from the training "
            f"items.\nRecall@k is hits over min(k, number of held-out items). {intervals}"
        )
    if task == "next_item":
        return (
            f"{_count([of_seed['n'] for of_seed in results], 'all')} {first['split']} rows, all items ranked, "
            f"{first['num_beams']} beams.\n{intervals} One hop: the target is among the 50 most frequent direct "
            "training successors of the history's items."
        )
    recalls = [of_seed.get("list_recall", of_seed["hit_share"]) for of_seed in results]
    is_some = any(of_seed.get("n_all_relevant") for of_seed in results)
    only = f"; {_count(results, 'n_all_relevant')} left out, of relevant items alone" if is_some else ""
    return (
        f"{_count(results, 'n')} {first['split']} rows whose list holds a relevant item, of "
        f"{_count(results, 'n_all')} (list recall {percent(float(np.mean(recalls)))}{only}).\n"
        f"{intervals} A completion that is no ranking scores zero. The difference to sft is, for dapo, to the model "
        "of the sft stage that it started from."
    )


def _count(results: Sequence[Results], key: str) -> str:
    """A number of rows; seeds whose lists or splits differ may have different ones."""
    counts = [of_seed[key] for of_seed in results]
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)} (by seed)"


def minus(
    line: Line, other: Line | None, metric: str, sampling: Sampling, chosen: np.ndarray | slice = slice(None)
) -> str:
    """A cell: the difference of a metric on the chosen rows, with its interval; nothing without the other line."""
    if other is None:
        return NO_VALUE
    return interval(*sampling.difference(*(by_seed(*one, metric)[:, chosen] for one in (line, other))))


def spread(line: Line, metric: str, chosen: np.ndarray | slice = slice(None)) -> str:
    """A cell: the standard deviation of a metric on the chosen rows over seeds."""
    seeds, ranker = line
    found = np.nanmean(by_seed(seeds, ranker, metric)[:, chosen], axis=1)
    return number(float(np.std(found, ddof=1))) if len(found) > 1 else NO_VALUE


def list_lines(runs_of: RunsOf) -> list[str]:
    """Each ranker's values, baselines once, then the differences; a row's value is its mean over seeds.

    A model that a variant shares with the first one stands there only. Differences are to the no-op, to lambdamart, to
    sft (of dapo: the model it started from), and to the same ranker of the first variant.
    """
    read, metrics = evaluations.load_lists(runs_of), evaluations.list_metrics(runs_of)
    shown, main = shown_metrics(metrics), compared(metrics)[0]
    first, of_first = next(iter(read.items()))
    baselines = [ranker.name for ranker in of_task("rerank") if ranker.is_baseline]
    rankers = [(NO_VALUE, of_first, name) for name in baselines if name in of_first[0].values]
    for variant, seeds in read.items():
        own = [name for name in seeds[0].values if name not in baselines and all(name in one.values for one in seeds)]
        own = [name for name in own if seeds is of_first or not _shared(seeds, of_first, name)]
        rankers += [(variant, seeds, name) for name in own]
    sampling, values, differences = Sampling(of_first[0].users), [], []
    always = [name for name in ("no_op", TREES) if name in of_first[0].values]
    for variant, seeds, ranker in rankers:
        cells = [number(mean(seeds, ranker, metric)) for metric in shown]
        references: list[Line | None] = [(of_first, name) if name != ranker else None for name in always]
        references += [None, None]
        if variant == NO_VALUE:
            values.append([variant, ranker, str(count_seeds(seeds, ranker, main)), *cells, NO_VALUE, NO_VALUE])
        else:
            failed = f"{mean(seeds, ranker, evaluations.FAILED):.1%}"
            values.append([variant, ranker, str(len(seeds)), *cells, failed, spread((seeds, ranker), main)])
            start = seeds[0].start if ranker == "dapo" else "sft"
            if ranker != start and (start in seeds[0].values or _shared(seeds, of_first, start)):
                references[-2] = (seeds if start in seeds[0].values else of_first, start)
            if seeds is not of_first and ranker in of_first[0].values:
                references[-1] = (of_first, ranker)
        pairs = itertools.product(compared(metrics), references)
        cells = [minus((seeds, ranker), other, metric, sampling) for metric, other in pairs]
        differences.append([variant, ranker, values[-1][2], *cells])
    heads = ["variant", "ranker", "seeds", *shown, evaluations.FAILED, f"spread of {main}"]
    others = [*(name.replace("no_op", "no-op") for name in always), "sft", first]
    minus_heads = [f"{metric} − {other}" for metric in compared(metrics) for other in others]
    table = markdown_table(["variant", "ranker", "seeds", *minus_heads], differences[1:], 2)  # the no-op stands first
    run = next(iter(runs_of.values()))[0]
    return [*markdown_table(heads, values, 2), "", *table, *slices.list_lines(run, rankers)]


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
    of_first, run = next(iter(read.values())), next(iter(runs_of.values()))[0]
    rankers = [(NO_VALUE, of_first, r.name) for r in of_task("next_item") if r.is_baseline]
    rankers += [(name, seeds, r) for name, seeds in read.items() for r in CATALOGUE_MODELS if r in seeds[0].values]
    lines += slices.next_item_lines(run, rankers)
    measured = {name: seeds for name, seeds in read.items() if all(seed.pruning is not None for seed in seeds)}
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
    baselines: list[Line] = [(of_first, ranker.name) for ranker in of_task("next_item") if ranker.is_baseline]
    references = [next(line for line in baselines if line[1] == recall.REFERENCE), lines[first][0]]
    sampling, rows = Sampling(of_first[0].users[chosen]), []
    for name, found in {NO_VALUE: baselines, **lines}.items():
        for line in found:
            others = [None if line == other else other for other in references]
            if found is baselines:
                others[1] = None
            num_seeds = count_seeds(*line, compared[0]) if found is baselines else len(line[0])
            cells = [str(num_seeds), *(number(mean(*line, metric, chosen)) for metric in metrics)]
            cells.append(spread(line, compared[0], chosen) if num_seeds > 1 else NO_VALUE)
            pairs = itertools.product(others, compared)
            rows.append([name, line[1], *cells, *(minus(line, o, m, sampling, chosen) for o, m in pairs)])
    heads = [f"{metric} - {other}" for other in (recall.REFERENCE, first) for metric in compared]
    return markdown_table(["variant", "ranker", "seeds", *metrics, f"spread of {compared[0]}", *heads], rows, 2)


def pair_lines(variants: Variants, compared: Sequence[str], measured: Measured) -> list[str]:
    """By ranker that two variants have, each variant against every one before it; of the search its pruning too."""
    sampling, lines = Sampling(next(iter(variants.values()))[0].users), []
    for ranker in CATALOGUE_MODELS:
        asked = {name: (seeds, ranker) for name, seeds in variants.items() if ranker in seeds[0].values}
        with_pruning = ranker == SEARCH and len(measured) > 1
        more = ["pruned, points", "violation, points"] if with_pruning else []
        rows = []
        for other, name in itertools.combinations(asked, 2):
            cells = [name, other, str(len(asked[name][0]))]
            cells += [minus(asked[name], asked[other], metric, sampling) for metric in compared]
            rows.append(cells + (_pruning_differences(measured, name, other, sampling) if with_pruning else []))
        if rows:
            heads = ["variant", "minus", "seeds", *compared, *more]
            lines += ["", f"Differences between variants, {ranker}, all rows:", "", *markdown_table(heads, rows, 2)]
    return lines


def pruning_lines(measured: Measured) -> list[str]:
    """Pruning by beam search, over all seeds, of the variants where it was measured."""
    if not measured:
        return []
    read = {name: [seed.pruning for seed in seeds if seed.pruning is not None] for name, seeds in measured.items()}
    steps, rows = max(seeds[0].violates.shape[1] for seeds in read.values()), []
    for name, seeds in read.items():
        top, pruned = (sum(map(np.sum, of)) for of in ([s.is_top for s in seeds], [s.is_pruned for s in seeds]))
        rates = [seed.summary()["pruning_rate"] for seed in seeds]
        violates = np.concatenate([seed.violates for seed in seeds])  # (rows of all seeds, L)
        cells = [name, f"{len(violates) / len(seeds):.0f}", f"{top / len(seeds):.1f}"]
        cells.append(f"{pruned / top:.1%}" if top else NO_VALUE)
        cells.append(f"{np.std(rates, ddof=1):.1%}" if len(rates) > 1 and None not in rates else NO_VALUE)
        by_step = violates.mean(axis=0)
        cells += [f"{violates.any(axis=1).mean():.1%}", *(f"{share:.1%}" for share in by_step)]
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


def _pruning_differences(measured: Measured, name: str, other: str, sampling: Sampling) -> list[str]:
    """Of the pruned share and of the share of violated targets, in points; nothing where not measured in both."""
    if name not in measured or other not in measured:
        return [NO_VALUE] * 2
    of_rates, violated = [], []
    for seeds in (measured[name], measured[other]):
        of_rates += [np.nan_to_num(by_seed(seeds, evaluations.PRUNING, column)) for column in ("pruned", "top")]
        violated.append(by_seed(seeds, evaluations.PRUNING, "violated"))
    differences = sampling.rate_difference(*of_rates), sampling.difference(*violated)
    cells = []
    for found, bounds in differences:
        points = [f"{100 * value:+.1f}" for value in (found, *bounds)]
        cells.append(NO_VALUE if np.isnan([found, *bounds]).any() else f"{points[0]} [{points[1]}, {points[2]}]")
    return cells


LINES: dict[str, Callable[[RunsOf], list[str]]] = {  # by task of the evaluate stage
    "rerank": list_lines,
    "next_item": next_item_lines,
    "held_out_sets": set_lines,
}
