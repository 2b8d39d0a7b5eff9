"""Cells and tables of results, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rerank.metrics import METRICS, compared

NO_VALUE = "–"
MINUS = "−"
Results = Mapping[str, Any]  # results.json, or a row of it


@dataclass(frozen=True)
class Table:
    """A table with its heading and the sentences on how to read it; its first `num_words` columns are text."""

    title: str
    text: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int = 1

    def lines(self) -> list[str]:
        """As Markdown, after an empty line."""
        return ["", f"{self.title}. {self.text}", "", *markdown_table(self.heads, self.rows, self.num_words)]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], num_words: int = 1) -> list[str]:
    """The lines of a Markdown table: its first `num_words` columns text, the others numbers."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * num_words + "---:|" * (len(heads) - num_words)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table cell."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def counted(count: int, what: str) -> str:
    """A count of things for a text."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share for a table cell."""
    return NO_VALUE if value is None else f"{100 * value:.{digits}f} %"


def interval(difference: float, bounds: Sequence[float]) -> str:
    """A difference with its interval."""
    return f"{difference:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"


def metrics_of(results: Results) -> tuple[str, ...]:
    """The names of the metrics of results.json."""
    return tuple(results.get("metrics", METRICS))


def shown_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics of a narrow table: each recall and the first N@k."""
    return [name for name in metrics if name.startswith("R@") or name == compared(metrics)[0]]


def rank_table(lists: Results, num_rows: int) -> Table:
    """The first-stage rank of the target; `lists` as of SplitLists.summary."""
    shares, target = lists["target_ranks"], f" (target: {lists['target']})" if "target" in lists else ""
    return Table(
        "First-stage rank of the target",
        f"Share of all {num_rows} rows{target}; the list recall of {percent(lists['list_recall'])} is the sum over "
        "ranks:",
        ["rank", *shares],
        [["share", *(percent(share) for share in shares.values())]],
    )


def slice_table(slices: Mapping[str, Results], n: Mapping[str, int] | None = None) -> Table:
    """The slices of the rows: `slices` as of Slices.counts, with list recall where lists are ranked, `n` of them."""
    has_lists = n is not None
    heads = ["slice", "rows", *(["list recall", "rows ranked"] if has_lists else [])]
    rows = [
        [of["meaning"], str(of["rows"]), *([percent(of["list_recall"]), str(n[name])] if n is not None else [])]
        for name, of in slices.items()
    ]
    return Table("Slices", "A row can be in several:", heads, rows)


def by_slice_table(
    rankers: Mapping[tuple[str, ...], Results],
    n: Mapping[str, int],
    metric: str,
    reference: str,
    words: Sequence[str] = ("ranker",),
    of: str = "slices",
) -> Table:
    """A metric on slices.

    Args:
        rankers: Words that name a ranker, its own name last, to what `slices.measure` found.
        n: Rows of each slice to show.
        metric: Its name.
        reference: Name of the ranker that differences are to.
        words: Heads of the words.
        of: Of the title: what slices these are.
    """
    heads = [*words, *(f"{name} (n={n[name]})" for name in n), *(f"{name} {MINUS} {reference}" for name in n)]
    rows = []
    for names, found in rankers.items():
        shown = [found[name] for name in n]
        bounds = [None if names[-1] == reference else one["interval"] for one in shown]
        differences = [
            NO_VALUE if bound is None else interval(one["minus_reference"], bound)
            for one, bound in zip(shown, bounds, strict=True)
        ]
        rows.append([*names, *(number(one["value"]) for one in shown), *differences])
    return Table(f"{metric} on {of}", f"{metric} and its difference to {reference}:", heads, rows, len(words))


def by_slice_tables(
    rankers: Mapping[tuple[str, ...], Results],
    n: Mapping[str, int],
    columns: Mapping[str, Sequence[str]],
    metric: str,
    reference: str,
    words: Sequence[str] = ("ranker",),
) -> list[Table]:
    """`by_slice_table` of the slices by target and history, then for each column of those by its values."""
    of_columns = {name for names in columns.values() for name in names}
    shown = {"slices": [name for name in n if name not in of_columns]}
    shown |= {f"slices by {column}": list(names) for column, names in columns.items()}
    return [
        by_slice_table(rankers, {name: n[name] for name in names}, metric, reference, words, of)
        for of, names in shown.items()
    ]


def order_table(found: Results, metrics: Sequence[str] = METRICS) -> Table:
    """Order robustness; `found` as of `orders` in results.json, with these metrics."""
    rows, main = [], compared(metrics)[0]
    for name, of in found["rankers"].items():
        values = {kind: [number(of[kind][metric]) for metric in metrics] for kind in ("given", "shuffled", "merged")}
        minus = {kind: interval(of[kind]["minus_given"], of[kind]["interval"]) for kind in ("shuffled", "merged")}
        agreement = [number(of["spread"]), number(of["kendall_tau"], 3), percent(of["same_first"])]
        rows += [
            [name, *values["given"], *[NO_VALUE] * 4],
            [f"{name}, mean of orders", *values["shuffled"], minus["shuffled"], *agreement],
            [f"{name}, merged", *values["merged"], minus["merged"], *[NO_VALUE] * 3],
        ]
    orders, shown = counted(found["num_orders"], "random order"), counted(found["rows"], "row")
    return Table(
        "Order robustness",
        f"{shown} of those above, ranked again with their candidates shown in {orders}; each candidate keeps its "
        f"facts, which for trees include its first-stage rank. Mean of orders, with the standard deviation of {main} "
        "over orders as its spread. Kendall's tau and the share with the same first item are between two orders, "
        "means over all pairs. Merged: one ranking of all orders, by reciprocal rank fusion:",
        ["ranker", *metrics, f"{main} {MINUS} as given", f"spread of {main}", "Kendall tau", "same first"],
        rows,
    )
