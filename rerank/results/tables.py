"""The results as tables: Markdown for a file, rich for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rerank.metrics import METRICS

if TYPE_CHECKING:
    import rich.table

NO_VALUE = "–"
MINUS = "−"
Results = Mapping[str, Any]  # results.json, or a row of it
COLUMNS = (
    *METRICS,
    *("N@5 − no-op", "R@1 − no-op", "fall-back N@5", "parse failures"),
    *("copies", "tokens/row", "ms/row", "end-to-end N@5"),
)


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


def failures(row: Results) -> str:
    """Number of completions that were no ranking, in all and by kind."""
    if row["parse_failures"] is None:
        return NO_VALUE
    kinds = ", ".join(f"{kind} {found['count']}" for kind, found in row["parse_failure_kinds"].items())
    return f"{row['parse_failures']} ({percent(row['parse_failure_share'])})" + (f": {kinds}" if kinds else "")


def cells(name: str, row: Results) -> list[str]:
    """The cells of one ranker, as named by COLUMNS."""
    is_reference = name == "no_op"
    return [
        *(number(row[metric]) for metric in METRICS),
        *(
            NO_VALUE if is_reference else interval(row[f"{metric}_minus_no_op"], row[f"{metric}_interval"])
            for metric in ("N@5", "R@1")
        ),
        NO_VALUE if row["parse_failures"] is None else number(row["N@5_fallback"]),
        failures(row),
        percent(row["copy_rate"]),
        number(row["tokens_per_row"], 1),
        NO_VALUE if row["seconds_per_row"] is None else f"{1000 * row['seconds_per_row']:.1f}",
        number(row["end_to_end"]["N@5"]),
    ]


def title(results: Results) -> str:
    """The rows of the table, with a warning when these are not the test rows."""
    text = (
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']} "
        f"(list recall {percent(results['hit_share'])})"
    )
    return text if results["split"] == "test" else f"{text}; NOT the test split: to choose by, not to report"


def notes(results: Results) -> list[str]:
    """Notes on how to read the numbers."""
    lines = [
        f"Differences to the no-op with intervals: {results['intervals']}.",
        "A completion that is no ranking scores zero in every metric; with fall-back it counts as the input order.",
        "End to end: lists without a relevant item count zero, so that list recall is the ceiling of re-ranking.",
    ]
    if "shared_ids" in results:
        lines.append(shared_ids_sentence(**results["shared_ids"]))
    lines += [fits_sentence(name, found) for name, found in results.get("fits", {}).items()]
    lines += [kept_sentence(name, found) for name, found in results.get("kept", {}).items()]
    for name, found in results["comparisons"].items():
        parts = [f"{metric} {interval(value['difference'], value['interval'])}" for metric, value in found.items()]
        lines.append(f"{name.replace('_vs_', ' minus ')}: {'; '.join(parts)}.")
    return lines


def fits_sentence(name: str, fits: Results) -> str:
    """How far the numbers of a baseline that is fitted hold on another machine."""
    return (
        f"{name} ranks by the mean scores of {fits['num']} fits, whose N@5 alone have a standard deviation of "
        f"{fits['N@5_spread']:.4f}. The same candidates files give the same numbers again; a machine on which the "
        "embeddings of the texts have other last digits may differ from this one in N@5 by about "
        f"{fits['N@5_spread'] * (2 / fits['num']) ** 0.5:.4f}."
    )


def kept_sentence(name: str, kept: Results) -> str:
    """Which state of a model was kept, and by how many looks at validation rows."""
    return (
        f"{name} is the model of step {kept['step']} of {kept['of_steps']}, chosen by {kept['checks']} looks at "
        f"{kept['rows']} validation rows: {kept['metric']} {kept['value']:.4f}, {kept['minus_start']:+.4f} against "
        "its start, which the choice flatters."
    )


def shared_ids_sentence(items: int, rows: int) -> str:
    """How hits are counted where items share an id."""
    if not items:
        return "Hits are counted by item; no two items share a semantic id."
    return (
        f"Hits are counted by item. {items} items share a semantic id with another, and {counted(rows, 'list')} show "
        "two of one id, whose mentions in a completion stand for them in the order shown."
    )


def rank_table(lists: Results, num_rows: int) -> Table:
    """The first-stage rank of the target; `lists` as of SplitLists.summary."""
    shares = lists["target_ranks"]
    return Table(
        "First-stage rank of the target",
        f"Share of all {num_rows} rows; the list recall of {percent(lists['list_recall'])} is the sum over ranks:",
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
) -> Table:
    """A metric on slices.

    Args:
        rankers: Words that name a ranker, its own name last, to what `slices.measure` found.
        n: Rows of each slice.
        metric: Its name.
        reference: Name of the ranker that differences are to.
        words: Heads of the words.
    """
    heads = [*words, *(f"{name} (n={n[name]})" for name in n), *(f"{name} {MINUS} {reference}" for name in n)]
    rows = []
    for names, found in rankers.items():
        bounds = [None if names[-1] == reference else of["interval"] for of in found.values()]
        differences = [
            NO_VALUE if bound is None else interval(of["minus_reference"], bound)
            for of, bound in zip(found.values(), bounds, strict=True)
        ]
        rows.append([*names, *(number(of["value"]) for of in found.values()), *differences])
    return Table(f"{metric} on slices", f"{metric} and its difference to {reference}:", heads, rows, len(words))


def order_table(found: Results) -> Table:
    """Order robustness; `found` as of `orders` in results.json."""
    rows = []
    for name, of in found["rankers"].items():
        metrics = {kind: [number(of[kind][metric]) for metric in METRICS] for kind in ("given", "shuffled", "merged")}
        minus = {kind: interval(of[kind]["minus_given"], of[kind]["interval"]) for kind in ("shuffled", "merged")}
        agreement = [number(of["spread"]), number(of["kendall_tau"], 3), percent(of["same_first"])]
        rows += [
            [name, *metrics["given"], *[NO_VALUE] * 4],
            [f"{name}, mean of orders", *metrics["shuffled"], minus["shuffled"], *agreement],
            [f"{name}, merged", *metrics["merged"], minus["merged"], *[NO_VALUE] * 3],
        ]
    orders, shown = counted(found["num_orders"], "random order"), counted(found["rows"], "row")
    return Table(
        "Order robustness",
        f"{shown} of those above, ranked again with their candidates shown in {orders}; each candidate keeps its "
        "facts, which for trees include its first-stage rank. Mean of orders, with the standard deviation of N@5 over "
        "orders as its spread. Kendall's tau and the share with the same first item are between two orders, means "
        "over all pairs. Merged: one ranking of all orders, by reciprocal rank fusion:",
        ["ranker", *METRICS, f"N@5 {MINUS} as given", "spread of N@5", "Kendall tau", "same first"],
        rows,
    )


def further_tables(results: Results) -> list[Table]:
    """The tables beside the first one that these results hold."""
    found = []
    if "lists" in results:
        lists, slices = results["lists"], results["slices"]
        found = [rank_table(lists, results["n_all"]), slice_table(lists["slices"], slices["n"])]
        rankers: dict[tuple[str, ...], Results] = {(name,): of for name, of in slices["rankers"].items()}
        found.append(by_slice_table(rankers, slices["n"], slices["metric"], slices["reference"]))
    return [*found, order_table(results["orders"])] if results.get("orders") else found


def markdown(results: Results) -> str:
    """The content of results.md."""
    rows = results["rows"].items()
    end_to_end = [[name, *(number(row["end_to_end"][metric]) for metric in METRICS)] for name, row in rows]
    return "\n".join(
        [
            f"# Results: {title(results)}",
            "",
            *markdown_table(["ranker", *COLUMNS], ([name, *cells(name, row)] for name, row in rows)),
            "",
            f"End to end, all {results['n_all']} rows:",
            "",
            *markdown_table(["ranker", *METRICS], end_to_end),
            *(line for table in further_tables(results) for line in table.lines()),
            "",
            *(f"- {note}" for note in notes(results)),
            "",
        ]
    )


def results_table(results: Results) -> "rich.table.Table":
    """The columns to decide by, for a terminal of 80 columns; results.md holds the rest."""
    from rich import box
    from rich.table import Table

    wanted = ("R@1", "R@5", "N@5", "N@5 − no-op")
    table = Table(title=title(results), caption="\n".join(notes(results)), caption_justify="left", box=box.SIMPLE)
    table.add_column("ranker", no_wrap=True)
    for column in (*wanted, "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in results["rows"].items():
        named = dict(zip(COLUMNS, cells(name, row), strict=True))
        table.add_row(name, *(named[column] for column in wanted), percent(row["parse_failure_share"]))
    return table
