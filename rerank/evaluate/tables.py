"""The results as tables: Markdown for a file, rich for a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rerank.metrics import METRICS

if TYPE_CHECKING:
    import rich.table

NO_VALUE = "–"
COLUMNS = (
    *METRICS,
    "N@5 − no-op",
    "R@1 − no-op",
    "fall-back N@5",
    "parse failures",
    "copies",
    "tokens/row",
    "ms/row",
    "end-to-end N@5",
)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table cell."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def counted(count: int, what: str) -> str:
    """A count of things for a text."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def percent(value: float | None) -> str:
    """A share for a table cell."""
    return NO_VALUE if value is None else f"{100 * value:.1f} %"


def interval(difference: float, bounds: list[float]) -> str:
    """A difference with its interval."""
    return f"{difference:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"


def failures(row: Mapping[str, Any]) -> str:
    """How many completions were no ranking, and of what kind."""
    if row["parse_failures"] is None:
        return NO_VALUE
    kinds = ", ".join(f"{kind} {found['count']}" for kind, found in row["parse_failure_kinds"].items())
    return f"{row['parse_failures']} ({percent(row['parse_failure_share'])})" + (f": {kinds}" if kinds else "")


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
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


def title(results: Mapping[str, Any]) -> str:
    """What the table shows, and a warning when these are not the test rows."""
    text = (
        f"{results['n']} {results['split']} rows whose list holds a relevant item, of {results['n_all']} "
        f"({percent(results['hit_share'])} hold one)"
    )
    return text if results["split"] == "test" else f"{text}; NOT the test split: to choose by, not to report"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader needs to read the numbers."""
    lines = [
        f"Differences to the no-op with intervals: {results['intervals']}.",
        "A completion that is no ranking scores zero in every metric; with fall-back it counts as the input order.",
        "End to end: lists without a relevant item count zero.",
    ]
    for name, found in results["comparisons"].items():
        parts = [f"{metric} {interval(value['difference'], value['interval'])}" for metric, value in found.items()]
        lines.append(f"{name.replace('_vs_', ' minus ')}: {'; '.join(parts)}.")
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The content of results.md."""
    lines = [f"# Results: {title(results)}", "", f"| ranker | {' | '.join(COLUMNS)} |"]
    lines.append("|---|" + "---:|" * len(COLUMNS))
    lines += [f"| {name} | {' | '.join(cells(name, row))} |" for name, row in results["rows"].items()]
    end_to_end = [f"| ranker | {' | '.join(METRICS)} |", "|---|" + "---:|" * len(METRICS)]
    for name, row in results["rows"].items():
        end_to_end.append(f"| {name} | {' | '.join(number(row['end_to_end'][metric]) for metric in METRICS)} |")
    lines += ["", f"End to end, all {results['n_all']} rows:", "", *end_to_end, ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(results)), ""])


def results_table(results: Mapping[str, Any]) -> "rich.table.Table":
    """The results for a terminal of 80 columns: what one decides by; results.md holds the rest."""
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
