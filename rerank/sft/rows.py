"""The rows that the task rerank trains on: accepted attempts with gold orders, and their lengths."""

import math
from collections.abc import Callable, Sequence

import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.losses import Row
from rerank.metrics import judged_order
from rerank.rows import Prompter, RankingRow, training_rows


def examples(prompter: Prompter, run: str, with_trace: bool) -> tuple[list[RankingRow], list[dict[str, list[int]]]]:
    """The rows of the accepted attempts on the sft rows, and the attempts, encoded with the gold orders."""
    accepted = pq.read_table(run_dir.stage_dir(run, "traces") / "accepted.parquet").to_pylist()
    rows = {row.row_id: row for row in training_rows(run, "sft")}
    attempts = [attempt for attempt in accepted if attempt["row_id"] in rows]
    traces = [attempt["trace"] if with_trace else None for attempt in attempts]
    chosen = [rows[attempt["row_id"]] for attempt in attempts]
    orders = [gold_order(row, attempt["order"]) for row, attempt in zip(chosen, attempts, strict=True)]
    return chosen, [prompter.example(*parts) for parts in zip(chosen, traces, orders, strict=True)]


def gold_order(row: RankingRow, order: Sequence[int]) -> list[int]:
    """The ranking that a row teaches (positions, best first): by grade, of equal grades in the teacher's order.

    Where the teacher named its best `top_k` only, the others keep the input order behind them. A candidate that was
    not seen keeps the place that the teacher gave it, so that it is taught neither as good nor as bad.

    Args:
        row: With the grade of each candidate.
        order: The teacher's ranking.
    """
    by_grade = iter(sorted(judged_order(order, row.relevance), key=lambda place: -row.relevance[place]))
    return [place if math.isnan(row.relevance[place]) else next(by_grade) for place in order]


def check_lengths(
    rows: Sequence[Row],
    max_length: int | None,
    limit: str = "max_length",
    longest: Callable[[int], str] = lambda place: "raise it",
) -> None:
    """Refuse rows that would be cut, with their number.

    Args:
        rows: Encoded.
        max_length: Tokens of a row at most; None for no limit.
        limit: Its name.
        longest: From the place of the longest row to what the message says of it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    too_long = sum(length > (max_length or 1 << 30) for length in lengths)
    if too_long:
        told = longest(max(range(len(rows)), key=lengths.__getitem__))
        raise ValueError(f"{too_long} of {len(rows)} rows are longer than {limit} {max_length}; {told}")
