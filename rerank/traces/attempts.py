"""Attempts: drafts of a teacher, why each was kept or not, and their statistics.

They are stored batch by batch as they come, so that a stage that was stopped continues where it was.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from rerank import prompts
from rerank.launch.files import write_whole
from rerank.metrics import judged_order, ndcg_at_k
from rerank.rows import RankingRow

if TYPE_CHECKING:
    from rerank.traces import TracesArguments

SCHEMA = pa.schema(
    {
        "row_id": pa.int64(),
        "user": pa.int64(),
        "attempt": pa.int64(),  # from 1
        "completion": pa.string(),
        "trace": pa.string(),
        "order": pa.list_(pa.int64()),
        "failure": pa.string(),
        "accepted": pa.bool_(),
        "reason": pa.string(),  # accepted, a failure of prompts.FAILURES, empty_trace, target_not_first or no_better
        "target_rank_in": pa.int64(),
        "truncated": pa.bool_(),
        "gives_answer_away": pa.bool_(),
    }
)

# A trace that was written by someone who had been told: wording of a key, or of hindsight.
_TOLD = r"(?:told|given|stated|provided|revealed|known)"
_GIVE_AWAY = re.compile(
    r"\b(?:(?:correct|right|true|actual|given|known) (?:answer|item|choice|one)|ground[ -]truth|targets?|answer key|"
    r"the answer is|(?:i|we) (?:was|were|am|are|have been) (?:told|given)|as (?:told|given|stated)|"
    r"(?:actually|really) (?:took|chose|bought|picked|watched))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Draft:
    """A completion that a teacher wrote for one row, and whether its length limit cut it off."""

    text: str
    truncated: bool = False


LEAST_ANSWERS, ENOUGH_ANSWERS = 20, 100  # to judge a teacher by
Teacher = Callable[[Sequence[RankingRow], int], list[Draft]]  # (rows, attempt from 1)


def gives_answer_away(trace: str, label: str) -> bool:
    """Whether a trace shows that its writer had been told the answer.

    True when it holds a phrase such as "correct answer", "target", "ground truth" or "as given", or names the
    relevant candidate's label within five words of told, given, stated, provided, revealed or known. It judges words
    alone: "target audience" counts too, and a rationale shaped by hindsight that never says so does not.
    """
    if _GIVE_AWAY.search(trace):
        return True
    gap, name = r"\W*?(?:\w+\W+){0,5}?", rf"(?<!\d){re.escape(label)}(?!\d)"
    if label.isalpha():
        name = rf"(?<!\w)(?-i:{label})(?!\w)"  # a letter, not one of a word
    near = rf"\b{_TOLD}\b{gap}{name}|{name}{gap}\b{_TOLD}\b"
    return label in trace and re.search(near, trace, re.IGNORECASE) is not None


def refusal(row: RankingRow, order: Sequence[int], accept: str) -> str | None:
    """Why a ranking is not good enough for a row, None where it is; candidates that were not seen do not count.

    Args:
        row: A hit.
        order: Positions, best first.
        accept: `first`: a candidate of the highest grade must stand first. `ndcg`: the NDCG of the whole list must be
            above that of the first stage's order, or 1.
    """
    ranked, shown = ([row.relevance[place] for place in places] for places in (order, row.first_stage_order))
    if accept == "ndcg":
        after, before = (ndcg_at_k(grades, len(grades)) or 0.0 for grades in (ranked, shown))
        return None if after > before or after == 1 else "no_better"
    return None if judged_order(order, row.relevance)[0] in row.best else "target_not_first"


def judge(
    row: RankingRow, labels: Sequence[str], attempt: int, draft: Draft, accept: str = "first", top_k: int = 0
) -> dict[str, object]:
    """A draft as a line of attempts.parquet: accepted when it holds a trace and a valid ranking that `refusal` passes.

    Args:
        row: A hit.
        labels: As `prompts.candidate_labels` gives them for the row.
        attempt: Number of the draw, from 1.
        draft: For this row.
        accept: As for `refusal`.
        top_k: As for `prompts.parse_completion`.
    """
    parsed = prompts.parse_completion(draft.text, labels, top_k)
    reason = parsed.failure
    if parsed.order is not None:
        reason = refusal(row, parsed.order, accept) or "accepted"
        if not (parsed.trace or "").strip():
            reason = "empty_trace"
    best = [labels[place] for place in row.best]
    return {
        "row_id": row.row_id,
        "user": row.user,
        "attempt": attempt,
        "completion": draft.text,
        "trace": parsed.trace,
        "order": parsed.order,
        "failure": parsed.failure,
        "accepted": reason == "accepted",
        "reason": reason,
        "target_rank_in": row.target_rank,
        "truncated": draft.truncated,
        "gives_answer_away": any(gives_answer_away(parsed.trace or "", label) for label in best),
    }


class AttemptStore:
    """Attempts in part files of FOLDER/attempts, each written whole or not at all; in the end one file."""

    name = "attempts"

    def __init__(self, folder: str | Path) -> None:
        self.parts, self.merged = Path(folder) / self.name, Path(folder) / f"{self.name}.parquet"
        self.parts.mkdir(parents=True, exist_ok=True)
        self.num_parts = len(list(self.parts.glob("part-*.parquet")))

    def read(self) -> pa.Table:
        """All attempts so far, by row and attempt."""
        # a run that was stopped after `merge` has them all in one file, and perhaps parts that are left over
        paths = [self.merged] if self.merged.is_file() else sorted(self.parts.glob("part-*.parquet"))
        parts = [pq.read_table(path, schema=SCHEMA) for path in paths]
        return in_order(pa.concat_tables([SCHEMA.empty_table(), *parts]))

    def add(self, attempts: Sequence[Mapping[str, object]]) -> None:
        """Store a batch as one part."""
        table = pa.Table.from_pylist(list(attempts), schema=SCHEMA)
        write_whole(self.parts / f"part-{self.num_parts:06d}.parquet", partial(pq.write_table, table))
        self.num_parts += 1

    def merge(self, attempts: pa.Table) -> None:
        """Write all attempts as attempts.parquet, in place of the parts."""
        write_whole(self.merged, partial(pq.write_table, attempts))
        shutil.rmtree(self.parts)


def in_order(attempts: pa.Table) -> pa.Table:
    """Attempts by row and number."""
    return attempts.sort_by([("row_id", "ascending"), ("attempt", "ascending")])


def attempts_made(table: pa.Table) -> tuple[Counter[int], Counter[int]]:
    """Number of attempts per row, and of those accepted."""
    return Counter(table["row_id"].to_pylist()), Counter(table.filter(table["accepted"])["row_id"].to_pylist())


def collect(
    rows: Sequence[RankingRow],
    labels: Sequence[Sequence[str]],
    open_teacher: Callable[[], Teacher],
    store: AttemptStore,
    args: "TracesArguments",
    top_k: int = 0,
) -> None:
    """Ask the teacher for each row until `traces_per_row` drafts are accepted or `draws_per_row` are made, one draw of
    every open row at a time; draws already stored are not repeated.

    Args:
        rows: Each with a relevant candidate.
        labels: The candidates' labels per row.
        open_teacher: Called once, and only when a row is open.
        store: Where attempts are kept, `batch_size` of them at a time.
        args: Limits, and what is accepted.
        top_k: As for `prompts.parse_completion`.
    """
    from tqdm.auto import tqdm

    made, accepted = attempts_made(store.read())

    def is_open(i: int) -> bool:
        return accepted[rows[i].row_id] < args.traces_per_row and made[rows[i].row_id] < args.draws_per_row

    num_open = sum(map(is_open, range(len(rows))))
    if not num_open:
        return
    teacher, first = open_teacher(), None if made else list[dict[str, object]]()
    with tqdm(total=len(rows), initial=len(rows) - num_open, desc="traces", unit="row") as bar:
        for attempt in range(1, args.draws_per_row + 1):
            drawn = [i for i, row in enumerate(rows) if is_open(i) and made[row.row_id] == attempt - 1]
            for start in range(0, len(drawn), args.batch_size):
                batch = drawn[start : start + args.batch_size]
                drafts = teacher([rows[i] for i in batch], attempt)
                lines = [
                    judge(rows[i], labels[i], attempt, draft, args.accept, top_k)
                    for i, draft in zip(batch, drafts, strict=True)
                ]
                store.add(lines)
                made.update(rows[i].row_id for i in batch)
                accepted.update(rows[i].row_id for i, line in zip(batch, lines, strict=True) if line["accepted"])
                bar.update(sum(not is_open(i) for i in batch))
                if first is not None:
                    first += lines
                    if len(first) >= ENOUGH_ANSWERS or batch[-1] == drawn[-1]:
                        refuse_all_junk(first)
                        first = None


def refuse_all_junk(lines: Sequence[Mapping[str, object]]) -> None:
    """Stop a teacher none of whose first answers is a ranking, with the reasons and one of them.

    The answers are stored: the same command asks on.

    Args:
        lines: As of `judge`; fewer than LEAST_ANSWERS prove nothing.
    """
    if len(lines) < LEAST_ANSWERS or any(line["failure"] is None for line in lines):
        return
    reasons = Counter(str(line["failure"]) for line in lines).most_common()
    cut = sum(bool(line["truncated"]) for line in lines)
    cure = "raise max_completion_tokens" if cut > len(lines) / 2 else "change the teacher or the prompt"
    counted = ", ".join(f"{name} {number}" for name, number in reasons)
    example = str(lines[0]["completion"])[:200]
    raise ValueError(f"none of the first {len(lines)} answers is a ranking ({counted}), such as {example!r}; {cure}")


def summarize(table: pa.Table) -> dict[str, object]:
    """Share of rows with an accepted trace (yield), overall and by the first-stage rank of the target; attempts per
    row, why drafts were refused, how many of the accepted traces are distinct and how many give the answer away."""
    made, accepted = attempts_made(table)
    rank_of = dict(zip(table["row_id"].to_pylist(), table["target_rank_in"].to_pylist(), strict=True))
    rows_at, kept_at = Counter(rank_of.values()), Counter(rank_of[row] for row in accepted)
    kept = table.filter(table["accepted"])
    traces = kept["trace"].to_pylist()
    num_rows, num_kept = len(made), len(traces)
    return {
        "rows": num_rows,
        "accepted": num_kept,
        "yield": len(accepted) / num_rows if num_rows else 0.0,
        "yield_by_first_stage_rank": {
            str(rank): {"rows": rows_at[rank], "accepted": kept_at[rank], "yield": kept_at[rank] / rows_at[rank]}
            for rank in sorted(rows_at)
        },
        "attempts": len(table),
        "mean_attempts": len(table) / num_rows if num_rows else 0.0,
        "reasons": dict(Counter(table["reason"].to_pylist()).most_common()),
        "truncated": sum(table["truncated"].to_pylist()),
        "distinct_trace_share": len(set(traces)) / num_kept if num_kept else None,
        "gives_answer_away_share": sum(kept["gives_answer_away"].to_pylist()) / num_kept if num_kept else None,
        "mean_trace_characters": sum(map(len, traces)) / num_kept if num_kept else None,
    }
