"""Refusals of a log of requests, each naming file, row, value and cure."""

from collections.abc import Sequence

import ibis
from ibis import _

from rerank.baselines.lambdamart import MOST_GRADE
from rerank.data import DataArguments
from rerank.data.filters import first_row
from rerank.data.requests.raw import RawLog, refuse_unit
from rerank.data.sources.cells import is_missing, number
from rerank.data.tables import SPLITS, refuse_empty


def check_log(raw: RawLog, candidate_fields: Sequence[str]) -> None:
    """Refuse a request or a candidate that cannot be what it is meant to be.

    Raises:
        ValueError: When a request has no id, another's id, a time that cannot be read or is of another unit, or fewer
            than two candidates; when a candidate stands twice in a request; when a grade, a score or a candidate
            column is no number, or a grade is none of 0, 1 ... MOST_GRADE.
    """
    _check_requests(raw)
    _check_candidates(raw)
    _check_grades(raw)
    _check_scores(raw)
    for name in candidate_fields:
        _refuse_no_number(raw, f"candidate_{name}", name, "leave it empty where it is unknown")
    if raw.histories is not None:
        empty = raw.histories.filter(_.item_id == "").mutate(source_row=_.request_row)
        refuse_empty(empty, raw.source, "an item of the history")


def _check_requests(raw: RawLog) -> None:
    requests, source, names = raw.requests, raw.source, raw.names
    refuse_empty(requests.filter(_.request_id == ""), source, names["request"])
    if not raw.repeats_ids:
        firsts = requests.group_by("request_id").agg(source_row=_.source_row.max(), first_at=_.source_row.min())
        if row := first_row(firsts.filter(_.source_row > _.first_at), source):
            problem = f"request {row['request_id']!r} repeats {source.place(row['first_at'])}"
            raise ValueError(f"{row['place']}: {problem}; give each request an id of its own")
    if row := first_row(requests.filter(_.time.isnull() & (_.raw_time != "")), source):
        problem = f"{names['time']} is {row['raw_time']!r}, neither a number nor a date"
        raise ValueError(f"{row['place']}: {problem}; correct it, or leave it empty where it is unknown")
    times = requests.select("source_row", time=number(requests.raw_time))
    refuse_unit(times, source, names.get("time", "time"), raw.time_unit)


def _check_candidates(raw: RawLog) -> None:
    source = raw.source
    sizes = raw.candidates.group_by("request_row").agg(size=_.count())
    sized = raw.requests.left_join(sizes, raw.requests.source_row == sizes.request_row)
    sized = sized.select("source_row", "request_id", size=_.size.fill_null(0))
    if row := first_row(sized.filter(_.size < 2), source):
        problem = f"request {row['request_id']!r} has {row['size']} candidates, and nothing to rank below 2"
        raise ValueError(f"{row['place']}: {problem}; remove the request or give it more")
    refuse_empty(raw.candidates.filter(_.item_id == ""), source, f"a candidate in {raw.names['item']}")
    window = ibis.window(group_by=["request_row", "item_id"], order_by=["place"])
    twice = raw.candidates.mutate(repeat=ibis.row_number().over(window)).filter(_.repeat > 0)
    if row := first_row(twice, source):
        problem = f"candidate {row['item_id']!r} stands twice in the request{_request_of(raw, row)}"
        raise ValueError(f"{row['place']}: {problem}; keep one of them")


def _check_grades(raw: RawLog) -> None:
    column = raw.names["relevance"]
    _refuse_no_number(
        raw, "relevance", column, "give a grade (0 shown, 1 clicked, ...), or null where it was not seen"
    )
    if row := first_row(raw.candidates.filter(_.relevance < 0), raw.source):
        problem = f"{column} of candidate {row['item_id']!r} is {row['raw_relevance']}, below 0"
        raise ValueError(f"{row['place']}: {problem}; grades begin at 0, and null says that it was not seen")
    no_grade = (_.relevance != _.relevance.round()) | (_.relevance > MOST_GRADE)
    if row := first_row(raw.candidates.filter(no_grade), raw.source):
        problem = f"{column} of candidate {row['item_id']!r} is {row['raw_relevance']}"
        cure = f"a grade is a whole number of at most {MOST_GRADE}, with a gain of 2^grade - 1; map the values to such"
        raise ValueError(f"{row['place']}: {problem}; {cure}")


def _check_scores(raw: RawLog) -> None:
    """Refuse a score that is no number, and one that is missing beside scores of the same request."""
    if "score" not in raw.names:
        return
    _refuse_no_number(raw, "score", raw.names["score"], "correct it, or give the request no scores at all")
    has_any = _.score.notnull().any().over(ibis.window(group_by="request_row"))
    partly = raw.candidates.mutate(has_any=has_any).filter(_.score.isnull() & _.has_any)
    if row := first_row(partly, raw.source):
        problem = f"{raw.names['score']} of candidate {row['item_id']!r} is {row['raw_score']!r}, not a number"
        raise ValueError(f"{row['place']}: {problem}; give every candidate of the request a score, or none")


def _refuse_no_number(raw: RawLog, name: str, column: str, cure: str) -> None:
    candidates = raw.candidates
    bad = candidates[name].isnull() & ~is_missing(candidates[f"raw_{name}"])
    if row := first_row(candidates.filter(bad), raw.source):
        problem = f"{column} of candidate {row['item_id']!r} is {row[f'raw_{name}']!r}, not a number"
        raise ValueError(f"{row['place']}: {problem}; {cure}")


def _request_of(raw: RawLog, row: dict) -> str:
    named = raw.requests.filter(_.source_row == row["request_row"]).to_pyarrow()["request_id"].to_pylist()
    return f" {named[0]!r}"


def check_options(raw: RawLog, args: DataArguments) -> None:
    """Refuse a split for which the log lacks something, and a gap before histories that it brings itself."""
    source = raw.source
    if args.history_gap and raw.histories is not None:
        problem = f"history_gap is {args.history_gap:g} but {source.name} has histories of its own"
        raise ValueError(f"{problem}; remove history_gap, or the histories")
    if args.split == "by_time" and (row := first_row(raw.requests.filter(_.time.isnull()), source)):
        problem = f"request {row['request_id']!r} has no time but split is by_time"
        raise ValueError(f"{row['place']}: {problem}; fill it, or split by_user or per_user")
    if args.split != "given":
        return
    if "split" not in raw.names:
        problem = f"split is given but {source.name} has no column 'split'"
        raise ValueError(f"{problem}; map it in request_columns: {{split: COLUMN}}, or split by_time or by_user")
    if row := first_row(raw.requests.filter(~_.raw_split.lower().isin([*SPLITS])), source):
        problem = f"{raw.names['split']} is {row['raw_split']!r}, not a split ({', '.join(SPLITS)})"
        raise ValueError(f"{row['place']}: {problem}; correct the row or map another column")
