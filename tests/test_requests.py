"""Requests as a source: every form, by hand."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_files import prepare
from request_logs import (
    HISTORIES,
    LOG,
    START,
    arguments,
    interaction,
    item_event,
    long_records,
    metarank_events,
    ranking,
    request,
    run,
    write_csv,
    write_lines,
    write_log,
    write_table,
)

from rerank import data
from rerank.data.requests.rows import FEEDBACK

FORMS = (
    "wide.jsonl wide.jsonl.gz wide.csv wide.parquet long.csv long.csv.gz long.jsonl long.parquet "
    "behaviors.tsv behaviors.tsv.gz events.jsonl events.jsonl.gz"
).split()
# Graded, with candidates that were not seen, scores and columns of both kinds; the third has neither user nor scores.
RICH = [
    request("q1", "u", 0, "abc", [0, 2, None], scores=[0.5, 0.25, 0.1], price=[1, 2.5, None], query="cat", hour=3),
    request("q2", "v", 10, "ca", [1, 0], scores=[3.0, 2.0], price=[4.0, 5.0], query="dog, red", hour=4),
    request("q3", None, 20, "ab", [None, 1], scores=[None, None], price=[None, 7.0], query=None, hour=5),
    request("q4", "u", 30, "cab", [0, 0, 1], scores=[2.0, 1.0, -1.0], price=[0.0, 1.0, 2.0], query="cat", hour=6),
]
RICH_OPTIONS = {"request_fields": ["query", "hour"], "candidate_fields": ["price"]}


def columns(found, *names):
    return [tuple(row[name] for name in names) for row in found["rows"]]


def test_a_log_becomes_the_documented_tables(tmp_path):
    found = run(tmp_path, LOG)
    # The latest quarter of eight requests is two, from 60 on; the eighth before it one, at 50.
    assert columns(found, "request_id", "user_id", "split", "candidates", "relevance", "history") == [
        ("q1", "u", "rerank", "abc", [0, 1, 0], ""),
        ("q2", "v", "rerank", "cadb", [1, 0, 1, 0], ""),
        ("q3", "u", "rerank", "dc", [0, 0], "b"),
        ("q4", "v", "rerank", "bd", [1, 0], "cd"),
        ("q5", "u", "rerank", "edcba", [0, 0, 0, 1, 1], "b"),
        ("q6", "w", "valid", "ea", [1, 0], ""),
        ("q7", "v", "test", "aec", [0, 1, 0], "cdb"),
        ("q8", "u", "test", "bac", [1, 0, 0], "bba"),
    ]
    assert found["rows"][7]["history_times"] == [START, START + 40, START + 40]
    assert found["rows"][7]["history_events"] == [None, None, None]
    unused = columns(found, "position", "target", "scores", "fields")
    assert unused == [(None, None, None, "{}")] * 8
    assert [row["row_id"] for row in found["rows"]] == [*range(8)]
    assert [row["time"] for row in found["rows"]] == [START + 10 * n for n in range(8)]
    # Of one user in order of time, of one request in the order shown.
    assert found["interactions"] == [
        ("u", "b", 0, START, "rerank"),
        ("u", "b", 1, START + 40, "rerank"),
        ("u", "a", 2, START + 40, "rerank"),
        ("u", "b", 3, START + 70, "test"),
        ("v", "c", 0, START + 10, "rerank"),
        ("v", "d", 1, START + 10, "rerank"),
        ("v", "b", 2, START + 30, "rerank"),
        ("v", "e", 3, START + 60, "test"),
        ("w", "e", 0, START + 50, "valid"),
    ]


def test_rows_have_the_documented_columns_and_types(tmp_path):
    schema = run(tmp_path, RICH, **RICH_OPTIONS)["tables"]["rows"].schema
    numbers, words = pa.list_(pa.float64()), pa.list_(pa.string())
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        **{"row_id": pa.int64(), "request_id": pa.string(), "user": pa.int64(), "split": pa.string()},
        **{"position": pa.int64(), "time": pa.float64(), "history": pa.list_(pa.int64()), "history_times": numbers},
        **{"history_events": words, "target": pa.int64(), "candidates": pa.list_(pa.int64()), "relevance": numbers},
        **{"feedback": pa.list_(FEEDBACK), "scores": numbers, "fields": pa.string(), "candidate_price": numbers},
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tables_on_what_all_can_carry(tmp_path, form):
    base, other = tmp_path / "base", tmp_path / "other"
    base.mkdir(), other.mkdir()
    expected, found = run(base, LOG), run(other, write_log(other, form))
    for name in ("items", "users", "interactions"):
        assert found["tables"][name].equals(expected["tables"][name])
    apart = ["history_times", "history_events"]  # of a history of the log's own, and of events without a type
    rows = [tables["tables"]["rows"].drop_columns(apart) for tables in (expected, found)]
    assert rows[1].equals(rows[0])
    assert [row["history"] for row in found["rows"]] == HISTORIES
    assert found["metrics"]["click_rate_by_place"] == expected["metrics"]["click_rate_by_place"]


@pytest.mark.parametrize("form", ["wide.jsonl", "wide.parquet", "long.jsonl", "long.parquet", "wide.csv", "long.csv"])
def test_grades_nulls_scores_and_columns_are_read_from_wide_and_long(tmp_path, form):
    found = run(tmp_path, write_log(tmp_path, form, RICH), **RICH_OPTIONS)
    assert columns(found, "user_id", "candidates", "relevance", "scores", "candidate_price") == [
        ("u", "abc", [0, 2, None], [0.5, 0.25, 0.1], [1, 2.5, None]),
        ("v", "ca", [1, 0], [3, 2], [4, 5]),
        (None, "ab", [None, 1], None, [None, 7]),
        ("u", "cab", [0, 0, 1], [2, 1, -1], [0, 1, 2]),
    ]
    fields = [json.loads(row["fields"]) for row in found["rows"]]
    hours = [3, 4, 5, 6] if "csv" not in form else ["3", "4", "5", "6"]  # of text nothing is guessed
    queries = ["cat", "dog, red", None, "cat"]
    assert fields == [{"query": query, "hour": hour} for query, hour in zip(queries, hours, strict=True)]


def test_a_column_that_is_null_in_every_line_is_as_one_that_is_not_there(tmp_path):
    nothing = {"scores": None, "query": None, "user": None}
    log = [{**row, **nothing, "price": [None] * len(row["candidates"])} for row in LOG]
    found = run(tmp_path, log, split="by_user", **{**RICH_OPTIONS, "request_fields": ["query"]})
    assert columns(found, "scores", "user_id", "fields") == [(None, None, '{"query": null}')] * 8
    assert found["rows"][0]["candidate_price"] == [None] * 3


def test_a_position_column_orders_the_candidates_of_a_long_log(tmp_path):
    rows = [
        ("q1", "u", 1, "a", 0, 2),
        ("q2", "u", 2, "c", 1, 1),
        ("q1", "u", 1, "b", 1, 1),
        ("q2", "u", 2, "a", 0, 10),
    ]
    rows += [("q2", "u", 2, "b", 0, 2), ("q3", "u", 3, "a", 1, 1), ("q3", "u", 3, "b", 0, 1)]  # a tie: file order
    header = "id,who,when,item,grade,rank"
    names = {"request": "id", "user": "who", "time": "when", "relevance": "grade", "position": "rank"}
    path, options = write_csv(tmp_path / "log.csv", header, rows), {"valid_fraction": 0.34, "test_fraction": 0.33}
    found = run(tmp_path, path, request_columns=names, **options)
    assert columns(found, "request_id", "candidates", "relevance") == [
        ("q1", "ba", [1, 0]),
        ("q2", "cba", [1, 0, 0]),
        ("q3", "ab", [1, 0]),
    ]


def test_minds_words_may_hold_hyphens_and_unseen_candidates(tmp_path):
    lines = [f"{n}\tu\t11/1{n}/2019 {n}:05:58 PM\tN-1\tN-1-0 a-null b-1" for n in range(1, 5)]
    found = run(tmp_path, write_lines(tmp_path / "behaviors.tsv", lines))
    assert found["tables"]["items"]["item_id"].to_pylist() == ["N-1", "a", "b"]
    assert found["rows"][0]["relevance"] == [0, None, 1]
    # 2019-11-11 13:05:58 UTC
    assert found["rows"][0]["time"] == 1573477558


def test_minds_items_are_read_without_a_header(tmp_path):
    news = [f"{item}\tsport\tgolf\tTitle {item}\tText {item}\turl\t[]\t[]" for item in "edcba"]
    items = {"items": write_lines(tmp_path / "news.tsv", news), "items_format": "mind"}
    table = run(tmp_path, LOG, **items, text_columns=["title", "abstract"])["tables"]["items"]
    assert table.select(["item_id", "title", "category", "text"]).to_pylist()[0] == {
        **{"item_id": "e", "title": "Title e", "category": "sport", "text": "Title e. abstract: Text e"}
    }


def test_metarank_takes_the_highest_grade_and_the_time_of_the_feedback(tmp_path):
    first, second, third, fourth = (request(f"q{n}", "u", 100 * n, "abc", []) for n in range(4))
    ms = 1000 * START
    events = [
        ranking(first, ms),  # a number of milliseconds
        interaction(first, "b", ms + 5_000, "click"),
        interaction(first, "b", ms + 150_000, "buy"),  # after the second request, which knows of the click alone
        interaction(first, "b", ms + 160_000, "buy"),
        interaction(first, "a", ms + 6_000, "view"),  # graded 0
        ranking(second, str(ms + 100_000)),
        interaction(second, "c", ms + 90_000, "click"),  # a clock that is late: not before its own request
        ranking(third, "2020-09-13T12:30:00Z"),  # START is 12:26:40
        interaction(third, "a", "2020-09-13T12:30:07Z"),
        ranking(fourth, ms + 300_000),
    ]
    grades = {"view": 0, "click": 1, "buy": 2}
    found = run(tmp_path, write_lines(tmp_path / "e.jsonl", map(json.dumps, events)), grades=grades)
    assert [row["relevance"] for row in found["rows"]] == [[0, 2, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert [row["history"] for row in found["rows"]] == ["", "b", "cb", "cba"]
    assert found["rows"][1]["history_events"] == ["click"]
    assert found["rows"][3]["history_events"] == ["click", "buy", "click"]
    assert found["rows"][3]["history_times"] == [START + 100, START + 150, START + 207]
    assert [row["time"] for row in found["rows"]] == [START, START + 100, START + 200, START + 300]
    assert [(place, grade, time - START) for place, grade, time in map(dict.values, found["rows"][0]["feedback"])] == [
        (1, 1, 5),
        (1, 2, 150),
    ]
    # An item counts once a list, from its first feedback on.
    assert [(item, time - START) for _, item, _, time, _ in found["interactions"]] == [
        ("b", 5),
        ("c", 100),
        ("a", 207),
    ]


def test_metaranks_fields_are_scores_and_columns(tmp_path):
    events = metarank_events(LOG)
    rankings = [event for event in events if event["event"] == "ranking"]
    rankings[0]["items"] = [{"id": item, "relevancy": score} for item, score in zip("abc", (3, 2, 1.5), strict=True)]
    for event in rankings[1:]:
        event["fields"] = [{"name": "query", "value": "red cat"}, {"name": "tags", "value": ["x", "y"]}]
        values = [{"name": "relevancy", "value": 0.5}, {"name": "price", "value": 2.5}]
        event["items"] = [{"id": item["id"], "fields": values} for item in event["items"]]
        event["session"] = "s1"
    path = write_lines(tmp_path / "events.jsonl", map(json.dumps, events))
    found = run(tmp_path, path, request_fields=["query", "tags", "session"], candidate_fields=["price"])
    assert columns(found, "scores", "candidate_price")[:2] == [([3, 2, 1.5], [None] * 3), ([0.5] * 4, [2.5] * 4)]
    first, second = (json.loads(row["fields"]) for row in found["rows"][:2])
    assert first == {"query": None, "tags": None, "session": None}
    assert second == {"query": "red cat", "tags": "x, y", "session": "s1"}


@pytest.mark.parametrize("form", ["mind", "metarank"])
def test_interactions_take_the_items_of_such_a_log(tmp_path, form):
    news = [f"{item}\tsport\tgolf\tFilm {item}\t\t\t\t" for item in "abcdefgh"]
    events = [json.dumps(item_event(item, title=f"Film {item}", category="sport")) for item in "abcdefgh"]
    path = write_lines(tmp_path / "told.gz", news if form == "mind" else events)
    taken = write_csv(tmp_path / "t.csv", "user,item,time", [("u", item, n) for n, item in enumerate("abcdefgh")])
    data.main(data.DataArguments(run_dir="run", interactions=taken, items=path, items_format=form), tmp_path)
    assert pq.read_table(tmp_path / "items.parquet")["text"].to_pylist()[1] == "Film b. category: sport"


def test_metaranks_item_fields_become_columns_of_which_the_last_event_holds(tmp_path, caplog):
    told = [item_event(item, title=f"Film {item}", genres=["war", "art"], votes=2.5e3) for item in "bacd"]
    told.append({**item_event("a", title="Film A"), "timestamp": 1_700_000_000_000})
    events = [*told, {"event": "user", "id": "1", "user": "u", "fields": []}, *metarank_events(LOG)]
    path = write_lines(tmp_path / "events.jsonl.gz", map(json.dumps, events))
    options = {"items": path, "item_columns": {"category": "genres", "popular": "votes"}}
    with caplog.at_level(logging.INFO):
        found = run(tmp_path, path, **options)
    assert caplog.text.count(f"1 user events of {path} are not used: what is known of a user is a field of") == 1
    named = ["item_id", "title", "category", "text", "popular", "source_row"]
    assert [tuple(row[name] for name in named) for row in found["tables"]["items"].to_pylist()] == [
        ("b", "Film b", "war, art", "Film b. category: war, art", "2500.0", 0),
        ("a", "Film A", "war, art", "Film A. category: war, art", "2500.0", 1),
        ("c", "Film c", "war, art", "Film c. category: war, art", "2500.0", 2),
        ("d", "Film d", "war, art", "Film d. category: war, art", "2500.0", 3),
        ("e", "", "", "", "", None),  # shown, but without metadata
    ]
    metrics = found["metrics"]
    assert (metrics["items"], metrics["items_without_metadata"], metrics["items_without_text"]) == (5, 1, 1)
    assert metrics["sources"].keys() == {"events.jsonl.gz"}


def test_counts_and_the_click_rate_by_place(tmp_path, caplog):
    log = [
        request("q1", "u", 0, "abc", [0, 1, None]),
        request("q2", "u", 10, "bc", [2, 1]),  # all relevant, and b was taken before
        request("q3", "v", 20, "ab", [None, None]),  # nothing seen
        request("q4", "v", 30, "abcd", [0, 0, 0, 0]),
        request("q5", "u", 40, "ab", [1, None]),  # all that was seen
        request("q6", "w", 50, "ab", [1, 0]),
    ]
    with caplog.at_level(logging.INFO):
        metrics = run(tmp_path, log, valid_fraction=0.2, test_fraction=0.2)["metrics"]
    counted = {name: metrics[name] for name in metrics if name.startswith(("requests", "history_"))}
    assert counted == {
        "requests": 6,
        "requests_without_history": 4,  # q1, q3, q4, q6
        "requests_without_relevant": 2,
        "requests_all_relevant": 2,
        "history_has_own_feedback": 1,
    }
    assert metrics["click_rate_by_place"] == [
        {"place": 1, "shown": 5, "clicked": 3, "share": 3 / 5},
        {"place": 2, "shown": 4, "clicked": 2, "share": 2 / 4},
        {"place": 3, "shown": 1, "clicked": 0, "share": 0.0},
        {"place": 4, "shown": 1, "clicked": 0, "share": 0.0},
    ]
    assert metrics["midtrain_has_seen_rerank_targets"] is True
    assert metrics["rows"] == {"rerank": 4, "valid": 1, "test": 1}
    said = caplog.text
    assert "4 of 6 requests have no history" in said and "2 of 6 requests have no relevant candidate" in said
    assert "2 of 6 requests have nothing but relevant candidates" in said and "set history_gap" in said
    assert "4 of 4 items have no metadata" in said and "click rate by place: 1: 60.0%; 2: 50.0%; 3: 0.0%" in said


def test_a_log_of_several_row_groups_is_read_in_its_order(tmp_path):
    shown = [request(f"q{n}", f"u{n % 7}", n, [f"i{n % 11}", f"i{(n + 1) % 11}"], [1, 0]) for n in range(5000)]
    path = write_table(tmp_path / "long.parquet", long_records(shown))
    log = prepare(arguments(path)).log
    assert log.request_ids.to_pylist() == [row["request"] for row in shown]
    assert log.relevance.tolist() == [1, 0] * 5000
