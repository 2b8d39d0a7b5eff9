"""Requests: every message that bad input gets, one line each."""

import json

import pytest
from request_logs import (
    LOG,
    START,
    interaction,
    item_event,
    long_records,
    metarank_events,
    ranking,
    request,
    write_lines,
    write_log,
    write_table,
)

from rerank import data


def changed(row, **columns):
    """LOG as wide JSONL, with other columns in one request."""
    return [{**one, **columns} if n == row else one for n, one in enumerate(LOG)]


SCORED = [{**row, "scores": [0.5] * len(row["candidates"]), "price": [1] * len(row["candidates"])} for row in LOG]
WIDE = {  # message -> requests
    "wide.jsonl line 3: candidate 'd' stands twice in the request 'q3'; keep one": changed(2, candidates=["d", "d"]),
    "line 2: relevance has 3 values but 4 candidates stand in the request 'q2'; give": changed(1, relevance=[0, 1, 0]),
    "line 2: relevance has 0 values but 4 candidates": changed(1, relevance=None),
    "line 4: relevance of candidate 'b' is 'yes', not a number; give a grade": changed(3, relevance=["yes", 0]),
    "line 4: relevance of candidate 'd' is 'inf', not a number": changed(3, relevance=[0, "inf"]),
    "line 4: relevance of candidate 'b' is -1.*, below 0; grades begin at 0": changed(3, relevance=[-1, 0]),
    "line 4: relevance of candidate 'b' is 0.5; a grade is a whole number": changed(3, relevance=[0.5, 0]),
    "line 4: relevance of candidate 'd' is 31.*; a grade is .* of at most 30": changed(3, relevance=[0, 31]),
    "line 1: request 'q1' has 1 candidates, and nothing to rank.*; remove": changed(
        0, candidates=["a"], relevance=[1]
    ),
    "line 5: request 'q5' has 0 candidates": changed(4, candidates=[], relevance=[]),
    "line 6: a candidate in candidates is empty": changed(5, candidates=["e", None]),
    "line 2: request 'q1' repeats wide.jsonl line 1; give each": changed(1, request="q1"),
    "line 3: request is empty": changed(2, request=None),
    "line 3: time is 'noon', neither a number nor a date; correct it": changed(2, time="noon"),
    "line 3: time is 1600000020000, which are milliseconds since 1970; write seconds": changed(
        2, time=START * 1000 + 20_000
    ),
    "line 3: time is 1600000020000000, which are microseconds": changed(2, time=str(START * 10**6 + 20 * 10**6)),
    "line 3: request 'q3' has no time but split is by_time; fill it": changed(2, time=None),
    "no training request has a candidate with a grade above 0": [
        {**row, "relevance": [int(n > 4)] * len(row["candidates"])} for n, row in enumerate(LOG)
    ],
    "line 1: an item of the history is empty": [{**row, "history": ["a", None]} for row in LOG],
}
COLUMNS = {  # message -> requests, of which the second has other columns
    "line 2: scores has 2 values but 4 candidates": {"scores": [1, 2]},
    "line 2: scores of candidate 'a' is 'x', not a number; correct it, or give": {"scores": [1, "x", 2, 3]},
    "line 2: scores of candidate 'a' is '', not a number; give every candidate": {"scores": [1, None, 2, 3]},
    "line 2: price has 1 values but 4 candidates": {"price": [1]},
    "line 2: price of candidate 'c' is 'x', not a number; leave it empty": {"price": ["x", 1, 2, 3]},
}
OPTIONS = {  # message -> options
    "neither requests nor interactions is set; name": {"requests": None},
    "no column 'asked' for request; it has request, user": {"request_columns": {"request": "asked"}},
    "request_columns has the unknown key 'item'; known: request, user": {"request_columns": {"item": "candidates"}},
    "no column 'query' for a request; .*; correct request_fields": {"request_fields": ["query"]},
    "no column 'price' for the candidates; .*; correct candidate_fields": {"candidate_fields": ["price"]},
    "split is given but wide.jsonl has no column 'split'; map": {"split": "given"},
    "line 1: user is 'u', not a split .train,": {"split": "given", "request_columns": {"split": "user"}},
    "split is random but requests are split by_time, by_user": {"split": "random"},
    "min_history is 3 but is for interactions only; remove": {"min_history": 3},
    "num_rerank is all but is for": {"num_rerank": "all"},
    "min_item_interactions is 5 but is for": {"min_item_interactions": 5},
    "rebuild is True but is for interactions only": {"split": "given", "rebuild": True},
    "columns is .* but interactions is not set; name columns of requests in": {"columns": {"user": "who"}},
    "history_gap is -1 but must be at least 0": {"history_gap": -1},
    "requests_format is 'deep' but must be one of auto, wide, long, mind, metarank": {"requests_format": "deep"},
    "the grade of click is -1 but must be at least 0": {"grades": {"click": -1}},
    "grades has 'high' for click; give a whole number from 0 to 30": {"grades": {"click": "high"}},
    "grades has 0.5 for view; give a whole number": {"grades": {"view": 0.5}},
    "the grade of buy is 31 but must be at least 0 and at most 30": {"grades": {"buy": 31}},
    "test_users is set but split is by_time; set split: by_user": {"test_users": "users.txt"},
    "users.txt line 2: no request is of the user 'x'; correct": {"split": "by_user", "test_users": "users.txt"},
    "empty.txt names no user; give one id a line": {"split": "by_user", "test_users": "empty.txt"},
    "wide.jsonl: split: by_user leaves no rerank request of 8; change": {"split": "by_user", "test_users": "all.txt"},
    "wide.jsonl: split: per_user leaves no rerank request": {"split": "per_user", "num_test": 9},
    "item_columns has the key 'text', which items.parquet has": {"items": "i.csv", "item_columns": {"text": "name"}},
    "wide.jsonl has no column 'item' for item; it has request": {"requests_format": "long"},
    "requests is users.txt, whose suffix tells no format; name it .csv": {"requests": "users.txt"},
    "requests is i.csv, which has neither a column candidates .wide. nor item .long.": {"requests": "i.csv"},
    "wide.jsonl line 1: event is '', none of item, user, ranking": {"requests_format": "metarank"},
    "request_columns is set but the names of the form metarank are fixed": {
        "requests_format": "metarank",
        "request_columns": {"user": "who"},
    },
}
NOT_FOR_INTERACTIONS = {  # message -> options
    "split is by_user but requests is not set; interactions are": {"split": "by_user"},
    "history_gap is 5 but requests is not set; name the log or remove it": {"history_gap": 5},
    "request_fields is .* but requests is not set": {"request_fields": ["query"]},
    "rebuild is true but split is per_user; ready rows": {"rebuild": True},
    "rebuild is true but t.csv has neither a column items nor history": {"rebuild": True, "split": "given"},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "wide.jsonl")
    write_lines(tmp_path / "users.txt", ["u", "x"])
    write_lines(tmp_path / "all.txt", ["u", "v", "w"])
    write_lines(tmp_path / "i.csv", ["name", "b"])
    write_lines(tmp_path / "t.csv", ["user,item,split", *(f"u,{item},train" for item in "abcdefgh")])
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


def assert_refused(message, error=ValueError, **options):
    """The check of the stage refuses in one line."""
    with pytest.raises(error, match=message) as caught:
        data.check(data.DataArguments(run_dir="run", **options))
    assert "\n" not in str(caught.value)


def check_log(message, requests, **options):
    defaults = {"split": "by_time", "valid_fraction": 0.125, "test_fraction": 0.25}
    assert_refused(message, requests=requests, **{**defaults, **options})


@pytest.mark.parametrize("message", WIDE)
def test_a_bad_request_is_refused_in_one_line(here, message):
    write_table(here / "wide.jsonl", WIDE[message])
    check_log(message, "wide.jsonl")


@pytest.mark.parametrize("message", COLUMNS)
def test_a_bad_column_of_the_candidates_is_refused_in_one_line(here, message):
    write_table(here / "wide.jsonl", [{**row, **(COLUMNS[message] if n == 1 else {})} for n, row in enumerate(SCORED)])
    check_log(message, "wide.jsonl", candidate_fields=["price"])


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options_of_requests_are_refused_in_one_line(here, message):
    check_log(message, **{"requests": "wide.jsonl", **OPTIONS[message]})


@pytest.mark.parametrize("message", NOT_FOR_INTERACTIONS)
def test_options_of_requests_are_refused_without_them(here, message):
    assert_refused(message, interactions="t.csv", **NOT_FOR_INTERACTIONS[message])


def test_files_that_are_not_there_are_named(here):
    message = "{} is nowhere.jsonl, which does not exist; correct the path"
    assert_refused(message.format("requests"), FileNotFoundError, requests="nowhere.jsonl")
    options = {"requests": "wide.jsonl", "split": "by_user"}
    assert_refused(message.format("test_users"), FileNotFoundError, **options, test_users="nowhere.jsonl")
    for form in ("metarank", "auto"):
        assert_refused(message.format("items"), FileNotFoundError, **options, items="nowhere.jsonl", items_format=form)


def test_a_gap_before_histories_of_the_logs_own_is_refused(here):
    write_table(here / "wide.jsonl", [{**row, "history": ["a"]} for row in LOG])
    check_log("history_gap is 60 but wide.jsonl has histories of its own; remove", "wide.jsonl", history_gap=60)


LONG = {  # message -> line (from 0, after the header), column, value
    "long.csv line 3: candidate 'a' stands twice in the request 'q1'; keep one": (1, "item", "a"),
    "line 3: user is 'x' but long.csv line 2 has 'u' for request 'q1'; give each request": (1, "user", "x"),
    "line 4: time is '7' but long.csv line 2 has '1600000000' for request 'q1'": (2, "time", 7),
    "line 3: hour is '.*9.*' but long.csv line 2 has '.*3.*' for": (1, "hour", 9),
    "line 3: relevance of candidate 'b' is 'x', not a number": (1, "relevance", "x"),
    "line 3: score of candidate 'b' is '', not a number; give every": (1, "score", None),
    "line 3: position is 'top', not a number; correct": (1, "position", "top"),
    "long.csv line 2: time is 1600000000000, which are milliseconds since": (None, "time", 1_600_000_000_000),
    "line 2: request 'one' has 1 candidates": (0, "request", "one"),
    "line 2: request is empty": (0, "request", None),
}


@pytest.mark.parametrize("message", LONG)
def test_a_bad_line_of_a_long_log_is_refused_in_one_line(here, message):
    line, column, value = LONG[message]
    records = [{**row, "score": 1.0, "hour": 3, "position": n} for n, row in enumerate(long_records(LOG))]
    for record in records if line is None else [records[line]]:
        record[column] = value
    write_table(here / "long.csv", records)
    check_log(message, "long.csv", request_fields=["hour"])


MIND = {  # message -> a line of behaviors.tsv
    "behaviors.tsv line 1: impressions of candidate 'N7' is 'N7', not": "1\tu\t11/11/2019 9:05:58 AM\t\tN1-0 N7",
    "line 1: impressions of candidate 'N1' is -1.*, below 0": "1\tu\t11/11/2019 9:05:58 AM\t\tN1--1 N7-0",
    "line 1: time is '31/31/2019 9:05:58 AM', neither": "1\tu\t31/31/2019 9:05:58 AM\t\tN1-1 N7-0",
    "line 1: time is 1573463158000, which are milliseconds since": "1\tu\t1573463158000\t\tN1-1 N7-0",
    "line 1: request '1' has 0 candidates": "1\tu\t11/11/2019 9:05:58 AM\t\t",
    "behaviors.tsv cannot be read: ": "1\tu\t11/11/2019 9:05:58 AM\tN1-1",
    "behaviors.tsv has no column 'query' for a request; it has impression, user": "1\tu\t\t\tN1-1 N7-0",
}


@pytest.mark.parametrize("message", MIND)
def test_a_bad_line_of_behaviors_is_refused_in_one_line(here, message):
    write_lines(here / "behaviors.tsv", [MIND[message]])
    check_log(message, "behaviors.tsv", **({"request_fields": ["query"]} if "query" in message else {}))


EVENTS, FIRST = metarank_events(LOG), ranking(LOG[0], "1600000000000")
METARANK = {  # message -> events
    "e.jsonl line 18: type is 'buy', which grades {click: 1} does not name; add it": [
        interaction(LOG[0], "a", "1600000001000", "buy")
    ],
    "line 18: ranking is 'q99', which no ranking event has as its id; add": [
        interaction({"request": "q99"}, "a", "1600000001000")
    ],
    "line 18: ranking is '', which no ranking event has": [interaction({"request": None}, "a", "1600000001000")],
    "line 18: item 'z' is not among those of the ranking 'q1'; correct": [interaction(LOG[0], "z", "1600000001000")],
    "line 18: timestamp is 'noon', neither milliseconds nor a date": [interaction(LOG[0], "a", "noon")],
    "line 18: timestamp is 1600000001, which are seconds since 1970; write milliseconds, or": [
        interaction(LOG[0], "a", "1600000001")
    ],
    "line 18: timestamp is 1600000000, which are seconds since": [ranking({**LOG[0], "request": "q9"}, 1600000000)],
    "line 18: timestamp is 1600000000000000, which are microseconds": [
        ranking({**LOG[0], "request": "q9"}, "1600000000000000")
    ],
    "line 18: request 'q1' repeats e.jsonl line 1; give": [FIRST],
    "line 18: timestamp is 'noon', neither a number nor a date": [ranking({**LOG[0], "request": "q9"}, "noon")],
    "line 18: id is empty": [ranking({**LOG[0], "request": None}, "1600000000000")],
    "line 18: candidate 'a' stands twice in the request 'q9'": [
        ranking(request("q9", "u", 0, "aba", []), "1600000000000")
    ],
    "line 18: request 'q9' has 0 candidates": [{"event": "ranking", "id": "q9", "timestamp": "1600000000000"}],
    "line 18: event is 'rank', none of item, user, ranking, interaction; correct": [{"event": "rank"}],
    "line 18: relevancy of candidate 'a' is 'high', not a number": [
        {**FIRST, "id": "q9", "items": [{"id": "a", "relevancy": "high"}, {"id": "b", "relevancy": 1}]}
    ],
    "line 18: relevancy of candidate 'a' is '', not a number; give every": [
        {**FIRST, "id": "q9", "items": [{"id": "a"}, {"id": "b", "relevancy": 1}]}
    ],
    "e.jsonl cannot be read: ": ["no event"],
}


@pytest.mark.parametrize("message", METARANK)
def test_a_bad_event_is_refused_in_one_line(here, message):
    write_lines(here / "e.jsonl", map(json.dumps, [*EVENTS, *METARANK[message]]))
    check_log(message, "e.jsonl")


def test_fields_and_events_that_no_line_has_are_refused(here):
    write_lines(here / "e.jsonl", map(json.dumps, EVENTS))
    check_log(
        "e.jsonl has no ranking with the field 'query'; correct request_fields", "e.jsonl", request_fields=["query"]
    )
    message = "e.jsonl has no ranking's item with the field 'price'; correct candidate_fields"
    check_log(message, "e.jsonl", candidate_fields=["price"])
    check_log("e.jsonl has no item event; leave items out", "e.jsonl", items="e.jsonl")
    write_lines(here / "i.jsonl", map(json.dumps, [item_event("a", title="A")]))
    check_log("i.jsonl has no ranking event; set requests_format", "i.jsonl")
    check_log(
        "no column 'genre' for category; it has item, .*title",
        "e.jsonl",
        items="i.jsonl",
        items_format="metarank",
        item_columns={"category": "genre"},
    )
