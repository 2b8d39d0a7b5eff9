"""Re-rank new rows with a trained model, and keep a trained model up to date.

`rerank rank MODEL_DIR --rows FILE --out FILE`: rows come as Parquet, JSONL or CSV with `history` (oldest first) and
`candidates` (first-stage order, of any length), both of original item ids: lists, or in CSV ids parted by spaces.
Where the model's prompts show them, rows have further columns: those of the user and the request by their names,
`time` and `history_times` (seconds), `history_events`, `scores` of the first stage, and numbers of the candidates by
their names, one for each. Every column comes back as it came; `ranking` (best first), `failure` and `trace` are added.
Answers are constrained to be rankings. A row that cannot be ranked has no ranking and its reason in `failure`.

`items` ranks items that the model has not seen, `model_folder` adds them to a folder for good, and renews its counts;
`serve` answers requests over HTTP.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rerank.baselines import Counts
from rerank.baselines.times import in_seconds
from rerank.models.ranker import RankingModel, generate_answers
from rerank.rank.encoder import encode_rows
from rerank.rank.files import Record, open_output, read_rows_file
from rerank.rank.items import with_new_items
from rerank.rank.model_folder import find
from rerank.rank.rows import Encoded, EncodedRow, SettledRow, check_columns

__all__ = ["rank_rows"]

logger = logging.getLogger(__name__)

DAY = 86_400  # seconds
MOST_DAYS = 7  # by which a row may be younger than the counts before a warning


def rank_rows(
    model_dir: str | Path,
    rows_path: str | Path,
    out_path: str | Path,
    unknown: str = "last",
    items_path: str | Path | None = None,
    embeddings_path: str | Path | None = None,
    one_token: bool = False,
) -> int:
    """Rank the rows of a file into another one; returns the number of rows without a ranking.

    Args:
        model_dir: Of the sft or dapo stage.
        rows_path: File of the rows.
        out_path: File to write.
        unknown: Candidates that the model does not know are put `last` in their order, left out (`drop`), or their row
            gets no ranking (`refuse`).
        items_path: File of items that the model does not know, to be ranked as if it did.
        embeddings_path: Their embeddings, where the model's were given, too.
        one_token: Whether the probabilities of the first label rank, in place of a written answer.
    """
    rows = read_rows_file(rows_path)
    write = open_output(rows, Path(out_path))
    model = RankingModel.load(find(model_dir))
    check_columns(rows.records, model, str(rows.path))
    counts = model.load_counts()
    if items_path is not None:
        model, counts = with_new_items(model, counts, items_path, embeddings_path)
    warn_of_old_counts(rows.records, counts)
    encoded = encode_rows(rows.rows, model, counts, unknown, one_token)
    warn_of_unknown(encoded, unknown)
    added = answer_rows(encoded, model, one_token)
    write(added)
    return sum(one["ranking"] is None for one in added)


def answer_rows(encoded: Sequence[Encoded], model: RankingModel, one_token: bool = False) -> list[Record]:
    """The columns to add to each row; no engine starts where no row can be ranked."""
    rows = [one for one in encoded if isinstance(one, EncodedRow)]
    asked = [one.row for one in rows]
    answers = generate_answers(model, asked, constrained=not one_token, one_token=one_token)[0] if rows else []
    answered = iter(zip(rows, answers, strict=True))
    added: list[Record] = []
    for one in encoded:
        if isinstance(one, str):
            added.append({"ranking": None, "failure": one, "trace": None})
        elif isinstance(one, SettledRow):
            added.append({"ranking": one.ranking, "failure": None, "trace": None})
        else:
            row, answer = next(answered)
            added.append({"ranking": row.ranking(answer), "failure": answer.failure, "trace": answer.trace})
    return added


def warn_of_old_counts(records: Sequence[Record], counts: Counts | None) -> None:
    """Say when rows are more than MOST_DAYS younger than the latest event that the counts know."""
    given = [record.get("time") for record in records]
    if counts is None or counts.until is None or all(time is None for time in given):
        return
    from rerank.rank.tables import read_times

    times = read_times(given)
    days = (in_seconds(times) - in_seconds(counts.until)) / DAY
    if (days > MOST_DAYS).any():
        logger.warning(
            "%d of %d rows are more than %d days younger than the counts of the model, which reach until %s, the "
            "youngest by %.0f days; renew them with `rerank refresh`",
            (days > MOST_DAYS).sum(), len(days), MOST_DAYS, counts.latest, np.nanmax(days),
        )  # fmt: skip


def warn_of_unknown(encoded: Sequence[Encoded], unknown: str) -> None:
    """Say how many ids the model does not know."""
    numbers = [one.unknown for one in encoded if not isinstance(one, str)]
    dealt = {"last": "placed last", "drop": "left out"}.get(unknown)
    for name, of_name, what in (("histories", 0, "left out"), ("candidates", 1, dealt)):
        in_rows = [number[of_name] for number in numbers if number[of_name]]
        if in_rows:
            logger.warning(
                "%d ids in %s of %d rows are unknown to the model and %s; --items makes them known",
                sum(in_rows), name, len(in_rows), what,
            )  # fmt: skip
