"""The rows that the task rerank trains on: accepted attempts with gold orders, what a loss reads of their candidates,
and their lengths.

N candidates of a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.losses import Losses, Row
from rerank.metrics import best_first, judged_order
from rerank.models.one_token import tokens_of
from rerank.prompts import THINK_END
from rerank.rows import PromptedRow, Prompter, RankingRow
from rerank.rows.on_read import MadeOnRead, column, places_to_check, read_parts, store
from rerank.rows.stored import TrainingLists
from rerank.rows.teacher_scores import read_scores

Attempt = tuple[RankingRow, str | None, Sequence[int]]  # a row, its trace, and the teacher's order


def examples(
    prompter: Prompter, run: str, with_trace: bool, losses: Losses, folder: Path, as_accepted: bool = False
) -> tuple[Sequence[RankingRow], Sequence[Row]]:
    """The rows of the accepted attempts on the sft rows, and the attempts, encoded with the orders that they teach;
    both are made when they are read.

    A token loss that is computed at the first label alone needs no attempt: all sft rows are encoded, up to there.

    Args:
        prompter: With the tokenizer.
        run: Folder of the run.
        with_trace: Whether traces are taught.
        losses: That read the rows.
        folder: Of the memory-mapped files that they are read from.
        as_accepted: Whether an attempt teaches its own order, in place of the gold order.
    """
    lists, scores = TrainingLists.find(run, "sft"), read_scores(run)
    rows = lists.stored(folder / "rows.arrow", prompter.needs_features)
    attempts: Sequence[Attempt]
    if losses.one_token:
        attempts = MadeOnRead(len(rows), lambda place: _without_trace(rows[place], scores))
    else:
        attempts = accepted(run, with_trace, lists, rows, folder / "accepted.arrow")

    def encode(place: int) -> Row:
        row, trace, order = attempts[place]
        order = list(order) if as_accepted else gold_order(row, order)
        example: Row = prompter.example(row, trace, order)
        if losses.first_label:
            example = with_first_label(prompter, row, order, example, scores)
        return up_to_first_label(example) if losses.one_token else example

    return MadeOnRead(len(attempts), lambda place: attempts[place][0]), MadeOnRead(len(attempts), encode)


def accepted(
    run: str, with_trace: bool, lists: TrainingLists, rows: Sequence[RankingRow], file: Path
) -> Sequence[Attempt]:
    """The accepted attempts on some rows, in the order of their file, read from a memory-mapped copy."""
    path, names = run_dir.stage_dir(run, "traces") / "accepted.parquet", ("row_id", "trace", "order")
    schema = pa.schema([pq.read_schema(path).field(name) for name in names])
    table = store(file, schema, (lists.own(part) for part in read_parts(path, names)))
    places = lists.places(column(table, "row_id"))

    def attempt(place: int) -> Attempt:
        record = table[place]
        return rows[int(places[place])], record["trace"] if with_trace else None, record["order"]

    return MadeOnRead(len(table), attempt)


def _without_trace(row: RankingRow, scores: Mapping[int, Sequence[float]]) -> Attempt:
    """The order by the teacher's scores; the order shown without them."""
    known = scores.get(row.row_id)
    return row, None, list(range(len(row.candidates))) if known is None else best_first(known)


def with_first_label(
    prompter: Prompter,
    row: RankingRow,
    order: Sequence[int],
    example: Row,
    scores: Mapping[int, Sequence[float]],
) -> Row:
    """An encoded row with the place of the first label and LIST_COLUMNS.

    Args:
        prompter: That encoded it.
        row: Before.
        order: That it teaches.
        example: By `Prompter.example`.
        scores: The teacher's, of candidates by row_id; the row may be missing.

    Raises:
        ValueError: When a label is not one token.
    """
    assert prompter.tokenizer is not None
    (tokens,) = tokens_of([PromptedRow(row, "", prompter.labels(row), 0)], prompter.tokenizer)
    trace_end = prompter.tokenizer.convert_tokens_to_ids(THINK_END)
    answer = sum(label == -100 for label in example["labels"])
    first = example["input_ids"].index(trace_end, answer) + 1
    if example["input_ids"][first] != tokens[order[0]]:
        raise ValueError(
            f"row {row.row_id}: the first label of its ranking is written with another token than alone, so that "
            "no loss can read it there; train with ranking: letter, or without soft_targets and ranknet"
        )
    columns = {"first_label": first, "label_tokens": tokens, "grades": list(row.relevance)}
    columns |= {"ranks": ranks_of(row, order, prompter.settings.top_k)}
    return {**example, **columns, "teacher_scores": scores.get(row.row_id, [math.nan] * len(order))}


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


Check = Callable[[Sequence[Row], Sequence[int]], None]


def check_of(limits: Mapping[str, int | None], cure: Callable[[str, Sequence[int], int], str]) -> Check:
    """The check that refuses rows beyond any of some limits.

    Args:
        limits: Tokens of a row at most, by the name of the limit.
        cure: From the limit, the places of rows, and which of these is that of the longest, to what the message says.
    """

    def check(rows: Sequence[Row], places: Sequence[int]) -> None:
        for name, most in limits.items():
            check_lengths(rows, most, name, partial(cure, name, places))

    return check


def check_and_keep(rows: Sequence[Row], check: Check) -> tuple[Sequence[Row], list[Row]]:
    """The rows to train on, and those of them that are made before training (`rerank.rows.on_read`).

    Args:
        rows: Made when they are read.
        check: Refuses rows, told with their places; called of those that are made before training, and of every other
            one when it is read.
    """
    places = places_to_check(len(rows))
    made = [rows[place] for place in places]
    check(made, places)
    if len(made) == len(rows):
        return made, made

    def read(place: int) -> Row:
        row = rows[place]
        check([row], [place])
        return row

    return MadeOnRead(len(rows), read), made
