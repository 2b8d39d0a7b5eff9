"""The rows that the task rerank trains on: accepted attempts with gold orders, what a loss reads of their candidates,
and their lengths.

N candidates of a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.losses import Losses, Row
from rerank.metrics import best_first, judged_order
from rerank.models.one_token import tokens_of
from rerank.prompts import THINK_END
from rerank.rows import Prompter, RankingRow, training_rows
from rerank.rows.teacher_scores import read_scores


def examples(prompter: Prompter, run: str, with_trace: bool, losses: Losses) -> tuple[list[RankingRow], list[Row]]:
    """The rows of the accepted attempts on the sft rows, and the attempts, encoded with the gold orders.

    A token loss that is computed at the first label alone needs no attempt: all sft rows are encoded, up to there.
    """
    rows, scores = {row.row_id: row for row in training_rows(run, "sft")}, read_scores(run)
    attempts: list[dict[str, Any]]
    if losses.one_token:
        attempts = [
            {"row_id": row_id, "trace": None, "order": _teacher_order(row, scores)} for row_id, row in rows.items()
        ]
    else:
        accepted = pq.read_table(run_dir.stage_dir(run, "traces") / "accepted.parquet").to_pylist()
        attempts = [attempt for attempt in accepted if attempt["row_id"] in rows]
    traces = [attempt["trace"] if with_trace else None for attempt in attempts]
    chosen = [rows[attempt["row_id"]] for attempt in attempts]
    orders = [gold_order(row, attempt["order"]) for row, attempt in zip(chosen, attempts, strict=True)]
    encoded: list[Row] = [prompter.example(*parts) for parts in zip(chosen, traces, orders, strict=True)]
    if losses.first_label:
        encoded = with_first_labels(prompter, chosen, orders, encoded, scores)
    return chosen, [up_to_first_label(row) for row in encoded] if losses.one_token else encoded


def _teacher_order(row: RankingRow, scores: Mapping[int, Sequence[float]]) -> list[int]:
    """By the teacher's scores; the order shown without them."""
    return best_first(scores[row.row_id]) if row.row_id in scores else list(range(len(row.candidates)))


def with_first_labels(
    prompter: Prompter,
    rows: Sequence[RankingRow],
    orders: Sequence[Sequence[int]],
    encoded: Sequence[Row],
    scores: Mapping[int, Sequence[float]],
) -> list[Row]:
    """The encoded rows with the place of the first label and LIST_COLUMNS.

    Args:
        prompter: That encoded them.
        rows: Before.
        orders: That they teach.
        encoded: By `Prompter.example`.
        scores: The teacher's, of candidates by row_id; a row may be missing.

    Raises:
        ValueError: When a label is not one token.
    """
    assert prompter.tokenizer is not None
    tokens = tokens_of([prompter.ask(row, 0) for row in rows], prompter.tokenizer)
    trace_end, found = prompter.tokenizer.convert_tokens_to_ids(THINK_END), []
    for row, order, example, of_row in zip(rows, orders, encoded, tokens, strict=True):
        answer = sum(label == -100 for label in example["labels"])
        first = example["input_ids"].index(trace_end, answer) + 1
        if example["input_ids"][first] != of_row[order[0]]:
            raise ValueError(
                f"row {row.row_id}: the first label of its ranking is written with another token than alone, so that "
                "no loss can read it there; train with ranking: letter, or without soft_targets and ranknet"
            )
        unknown = [math.nan] * len(order)
        columns = {"first_label": first, "label_tokens": of_row, "grades": list(row.relevance)}
        columns |= {"ranks": ranks_of(row, order, prompter.settings.top_k)}
        found.append({**example, **columns, "teacher_scores": list(scores.get(row.row_id, unknown))})
    return found


def ranks_of(row: RankingRow, order: Sequence[int], top_k: int = 0) -> list[int]:
    """(N,) rank of each candidate in an order, from 1, among those that were seen; 0 for one that was not.

    Those behind the best `top_k` (0: none) share a rank.
    """
    ranks = [0] * len(order)
    for rank, place in enumerate(judged_order(order, row.relevance), start=1):
        ranks[place] = min(rank, (top_k or rank) + 1)
    return ranks


def up_to_first_label(row: Row) -> Row:
    """An encoded row that ends with its first label, which alone is under loss."""
    first = row["first_label"]
    ids = row["input_ids"][: first + 1]
    return {**row, "input_ids": ids, "labels": [-100] * first + ids[first:]}


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
