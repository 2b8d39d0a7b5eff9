"""results.json as text: the table of all rankers with its notes, for results.md, the report and a terminal."""

from typing import TYPE_CHECKING

from rerank.metrics import compared
from rerank.results.tables import (
    NO_VALUE,
    Results,
    Table,
    by_slice_tables,
    counted,
    interval,
    markdown_table,
    metrics_of,
    number,
    order_table,
    percent,
    rank_table,
    shown_metrics,
    slice_table,
)

if TYPE_CHECKING:
    import rich.table


def failures(row: Results) -> str:
    """Number of completions that were no ranking, in all and by kind."""
    if row["parse_failures"] is None:
        return NO_VALUE
    kinds = ", ".join(f"{kind} {found['count']}" for kind, found in row["parse_failure_kinds"].items())
    return f"{row['parse_failures']} ({percent(row['parse_failure_share'])})" + (f": {kinds}" if kinds else "")


def columns(results: Results) -> list[str]:
    """The heads of `cells`."""
    metrics = metrics_of(results)
    main = compared(metrics)[0]
    return [
        *metrics,
        *(f"{metric} − no-op" for metric in compared(metrics)),
        *(f"fall-back {main}", "parse failures", "copies", "tokens/row", "ms/row", f"end-to-end {main}"),
    ]


def cells(name: str, results: Results) -> list[str]:
    """The cells of one ranker, as named by `columns`."""
    row, metrics = results["rows"][name], metrics_of(results)
    main, is_reference = compared(metrics)[0], name == "no_op"
    return [
        *(number(row[metric]) for metric in metrics),
        *(
            NO_VALUE if is_reference else interval(row[f"{metric}_minus_no_op"], row[f"{metric}_interval"])
            for metric in compared(metrics)
        ),
        NO_VALUE if row["parse_failures"] is None else number(row[f"{main}_fallback"]),
        failures(row),
        percent(row["copy_rate"]),
        number(row["tokens_per_row"], 1),
        NO_VALUE if row["seconds_per_row"] is None else f"{1000 * row['seconds_per_row']:.1f}",
        number(row["end_to_end"][main]),
    ]


def title(results: Results) -> str:
    """The rows of the table, with a warning when these are not the test rows."""
    is_some = " and a seen one that is not" if results.get("n_all_relevant") else ""
    text = (
        f"{results['n']} {results['split']} rows whose list holds a relevant item{is_some}, of {results['n_all']} "
        f"(list recall {percent(results.get('list_recall', results['hit_share']))})"
    )
    return text if results["split"] == "test" else f"{text}; NOT the test split: to choose by, not to report"


def rows_that_count(results: Results) -> str:
    """Number of the rows that count end to end."""
    left_out = results.get("n_all_relevant", 0)
    return f"{results['n_all'] - left_out} of {results['n_all']}" if left_out else f"all {results['n_all']}"


def end_to_end_sentence(results: Results) -> str:
    """The rows that count end to end."""
    if not results.get("n_all_relevant"):
        return (
            "End to end: lists without a relevant item count zero, so that list recall is the ceiling of re-ranking."
        )
    return (
        f"End to end, {rows_that_count(results)} rows: {counted(results['n_without_relevant'], 'list')} without a "
        f"relevant item count zero, so that {percent(results['hit_share'])} is the ceiling of re-ranking. "
        f"{counted(results['n_all_relevant'], 'list')} of nothing but relevant items left out of both tables."
    )


def notes(results: Results) -> list[str]:
    """Notes on how to read the numbers."""
    lines = [
        f"Differences to the no-op with intervals: {results['intervals']}.",
        "A completion that is no ranking scores zero in every metric; with fall-back it counts as the input order.",
        end_to_end_sentence(results),
    ]
    if "shared_ids" in results:
        lines.append(shared_ids_sentence(**results["shared_ids"]))
    main = compared(metrics_of(results))[0]
    lines += [fits_sentence(name, found, main) for name, found in results.get("fits", {}).items()]
    lines += [kept_sentence(name, found) for name, found in results.get("kept", {}).items()]
    for name, found in results["comparisons"].items():
        parts = [f"{metric} {interval(value['difference'], value['interval'])}" for metric, value in found.items()]
        lines.append(f"{name.replace('_vs_', ' minus ')}: {'; '.join(parts)}.")
    return lines


def fits_sentence(name: str, fits: Results, metric: str) -> str:
    """How far the numbers of a baseline that is fitted hold on another machine."""
    spread = fits[f"{metric}_spread"]
    return (
        f"{name} ranks by the mean scores of {fits['num']} fits, whose {metric} alone have a standard deviation of "
        f"{spread:.4f}. The same candidates files give the same numbers again; a machine on which the "
        f"embeddings of the texts have other last digits may differ from this one in {metric} by about "
        f"{spread * (2 / fits['num']) ** 0.5:.4f}."
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


def further_tables(results: Results) -> list[Table]:
    """The tables beside the first one that these results hold."""
    found = []
    if "lists" in results:
        lists, slices = results["lists"], results["slices"]
        found = [rank_table(lists, results["n_all"]), slice_table(lists["slices"], slices["n"])]
        rankers: dict[tuple[str, ...], Results] = {(name,): of for name, of in slices["rankers"].items()}
        of_columns = slices.get("columns", {})
        found += by_slice_tables(rankers, slices["n"], of_columns, slices["metric"], slices["reference"])
    return [*found, order_table(results["orders"], metrics_of(results))] if results.get("orders") else found


def markdown(results: Results) -> str:
    """The content of results.md."""
    rows, metrics = results["rows"], metrics_of(results)
    end_to_end = [[name, *(number(row["end_to_end"][metric]) for metric in metrics)] for name, row in rows.items()]
    return "\n".join(
        [
            f"# Results: {title(results)}",
            "",
            *markdown_table(["ranker", *columns(results)], ([name, *cells(name, results)] for name in rows)),
            "",
            f"End to end, {rows_that_count(results)} rows:",
            "",
            *markdown_table(["ranker", *metrics], end_to_end),
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

    metrics = metrics_of(results)
    wanted = (*shown_metrics(metrics), f"{compared(metrics)[0]} − no-op")
    table = Table(title=title(results), caption="\n".join(notes(results)), caption_justify="left", box=box.SIMPLE)
    table.add_column("ranker", no_wrap=True)
    for column in (*wanted, "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in results["rows"].items():
        named = dict(zip(columns(results), cells(name, results), strict=True))
        table.add_row(name, *(named[column] for column in wanted), percent(row["parse_failure_share"]))
    return table
