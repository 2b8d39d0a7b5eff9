"""The results as tables: Markdown for a file, rich for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rerank.metrics import METRICS

if TYPE_CHECKING:
    import rich.table

NO_VALUE = "–"
Results = Mapping[str, Any]  # results.json, or a row of it
COLUMNS = (
    *METRICS,
    *("N@5 − no-op", "R@1 − no-op", "fall-back N@5", "parse failures"),
    *("copies", "tokens/row", "ms/row", "end-to-end N@5"),
)


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
        f"({percent(results['hit_share'])} hold one)"
    )
    return text if results["split"] == "test" else f"{text}; NOT the test split: to choose by, not to report"


def notes(results: Results) -> list[str]:
    """Notes on how to read the numbers."""
    lines = [
        f"Differences to the no-op with intervals: {results['intervals']}.",
        "A completion that is no ranking scores zero in every metric; with fall-back it counts as the input order.",
        "End to end: lists without a relevant item count zero.",
    ]
    for name, found in results["comparisons"].items():
        parts = [f"{metric} {interval(value['difference'], value['interval'])}" for metric, value in found.items()]
        lines.append(f"{name.replace('_vs_', ' minus ')}: {'; '.join(parts)}.")
    return lines


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
