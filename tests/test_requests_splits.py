"""Splits of requests, and interactions beside them."""

import json

import pytest
from request_logs import LOG, START, metarank_events, request, run, write_csv, write_lines

from rerank import data

MANY = [request(f"q{n}", f"u{n % 20}", n, "ab", [1, 0]) for n in range(60)]


def splits(found):
    return [row["split"] for row in found["rows"]]


def users_of(found, split):
    return {row["user_id"] for row in found["rows"] if row["split"] == split}


def test_by_time_holds_out_the_latest_and_never_divides_one_moment(tmp_path):
    times = (0, 1, 2, 3, 3, 4, 5, 5, 6, 6)
    log = [request(f"q{n}", "u", time, "ab", [1, 0]) for n, time in enumerate(reversed(times))]
    found = run(tmp_path, log, test_fraction=0.1, valid_fraction=0.2)
    # The latest tenth of ten is one, at 6, where there are two; the fifth before it begins with the eighth, at 5.
    assert splits(found) == ["test"] * 2 + ["valid"] * 2 + ["rerank"] * 6


def test_by_user_draws_whole_users_by_the_seed(tmp_path):
    options = {"split": "by_user", "test_fraction": 0.2, "valid_fraction": 0.1}
    found, again = run(tmp_path, MANY, **options), run(tmp_path, MANY[::-1], **options)
    other = run(tmp_path, MANY, **options, seed=1)
    test, valid, train = (users_of(found, split) for split in ("test", "valid", "rerank"))
    assert (len(test), len(valid), len(train)) == (4, 2, 14)  # shares of 20 users
    assert len(test | valid | train) == 20
    assert [users_of(again, split) for split in ("test", "valid")] == [test, valid]
    assert users_of(other, "test") != test
    # A row of a test user has its user's earlier rows as history; nobody else's events changed.
    assert all(len(row["history"]) == int(row["request_id"][1:]) // 20 for row in found["rows"])


def test_test_users_are_exactly_those_of_the_file(tmp_path):
    named = write_lines(tmp_path / "users.txt", ["u3", "", " u7 ", "u11"])
    options = {"split": "by_user", "test_users": named, "valid_fraction": 0.12}
    found = run(tmp_path, MANY, **options)
    assert users_of(found, "test") == {"u3", "u7", "u11"}
    assert len(users_of(found, "valid")) == 2  # 0.12 of the 17 others


def test_by_user_takes_each_request_without_a_user_for_a_user(tmp_path):
    log = [{**row, "user": None} for row in MANY]
    found = run(tmp_path, log, split="by_user", test_fraction=0.1, valid_fraction=0.05)
    assert [splits(found).count(split) for split in ("test", "valid", "rerank")] == [6, 3, 51]


def test_per_user_holds_out_each_users_last_requests(tmp_path):
    log = [*LOG, request("q9", None, 80, "ab", [1, 0]), request("q0", "u", -1, "ba", [1, 0])]
    found = run(tmp_path, log, split="per_user", num_test=1, num_valid=2)
    # u: q0 q1 | q3 q5 | q8 in order of time; v: q2 q4 | q7; w has one, and a request without a user trains
    by_id = {row["request_id"]: row["split"] for row in found["rows"]}
    assert by_id == {
        **dict.fromkeys(("q0", "q1", "q9"), "rerank"),
        **dict.fromkeys(("q3", "q5", "q2", "q4"), "valid"),
        **dict.fromkeys(("q8", "q7", "q6"), "test"),
    }


def test_per_user_without_times_takes_the_last_of_the_file(tmp_path):
    log = [{name: value for name, value in row.items() if name != "time"} for row in LOG]
    found = run(tmp_path, log, split="per_user")
    # u: q1 q3 | q5 | q8; v: q2 | q4 | q7; w: q6
    assert splits(found) == ["rerank"] * 3 + ["valid"] * 2 + ["test"] * 3


def test_given_shows_no_held_out_positive_in_a_training_history(tmp_path):
    # u's held-out requests stand before the last training request in time.
    words = ["train", "train", "valid", "test", "Test", "dev", "train", "history"]
    log = [{**row, "part": word} for row, word in zip(LOG, words, strict=True)]
    log[2]["relevance"], log[3]["user"] = [1, 0], "u"
    found = run(tmp_path, log, split="given", request_columns={"split": "part"})
    assert splits(found) == ["rerank", "rerank", "valid", "test", "test", "valid", "rerank", "rerank"]
    assert [row["history"] for row in found["rows"]] == [
        *("", "", "b"),
        "bd",  # of q1 and of the validation request q3
        "bdb",  # and of the test request q4
        "",
        "cd",
        "b",  # q8 trains: not d of q3, b of q4, or b and a of q5
    ]


def test_given_leaves_held_out_positives_out_of_the_logs_own_histories(tmp_path, caplog):
    # u's test request at 20 stands between training ones; of v's none is held out before another.
    words = ["train", "train", "test", "train", "train", "valid", "test", "train"]
    histories = ["d", "d", "d", "dc", "xdbx", "d", "dx", "cdx"]
    log = [{**row, "split": word, "history": [*own]} for row, word, own in zip(LOG, words, histories, strict=True)]
    log[2]["relevance"] = [1, 0]  # d
    log[6]["relevance"] = [1, 0, 0]  # a, of v at 60
    with caplog.at_level("INFO"):
        found = run(tmp_path, log, split="given")
    assert [row["history"] for row in found["rows"]] == ["d", "d", "d", "dc", "xbx", "d", "dx", "cx"]
    assert "2 items are left out of histories" in caplog.text
    untimed = [{name: value for name, value in row.items() if name != "time"} for row in log]
    assert [row["history"] for row in run(tmp_path, untimed, split="given")["rows"]][4:] == ["xbx", "d", "dx", "cx"]


def test_given_without_a_valid_part_holds_out_the_latest_training_requests(tmp_path):
    words = ["train"] * 5 + ["test", "train", "test"]
    log = [{**row, "split": word} for row, word in zip(LOG, words, strict=True)]
    found = run(tmp_path, log, split="given", valid_fraction=0.34)
    # six training requests, of which the latest third begins with the fifth
    assert splits(found) == ["rerank"] * 4 + ["valid", "test", "valid", "test"]


def beside(folder, rows, header="user,item,time"):
    """Options that name a table of interactions, whose times count from START."""
    return {"interactions": write_csv(folder / "taken.csv", header, rows)}


def at(*rows):
    return [(user, item, START + time) for user, item, time in rows]


def test_interactions_before_a_request_are_in_its_history(tmp_path):
    rows = at(("u", "x", -5), ("u", "y", 20), ("u", "y", 20), ("v", "z", 9), ("other", "a", 1), ("u", "late", 55))
    rows += at(("w", "x", 50), ("v", "y", 49))
    found = run(tmp_path, LOG, **beside(tmp_path, rows))
    # Held out is what is at 50 or after: u's late and w's x are left out. y is not strictly before q3 at 20.
    # v has z and c d, then b, then y at 49.
    items = found["tables"]["items"]["item_id"].to_pylist()
    assert items == [*"abcdexyz", "late"]
    histories = {row["request_id"]: row["history"] for row in found["rows"]}
    assert histories == {
        **{"q1": "x", "q2": "z", "q3": "xb", "q4": "zcd", "q5": "xby", "q6": "", "q7": "zcdby", "q8": "xbyba"}
    }
    assert found["tables"]["users"]["user_id"].to_pylist() == ["u", "v", "w", "other"]
    taken = [(user, item, split) for user, item, _, _, split in found["interactions"] if user in ("u", "other")]
    assert taken == [
        *(("u", "x", "train"), ("u", "b", "rerank"), ("u", "y", "train"), ("u", "b", "rerank"), ("u", "a", "rerank")),
        *(("u", "b", "test"), ("other", "a", "train")),
    ]
    counts = ("interactions_read", "duplicates_removed", "interactions_left_out")
    assert [found["metrics"][name] for name in counts] == [8, 1, 2]
    assert found["rows"][4]["history_times"] == [START - 5, START, START + 20]


def test_the_gap_holds_for_interactions_too(tmp_path):
    found = run(tmp_path, LOG, **beside(tmp_path, at(("u", "x", 10), ("u", "y", 11))), history_gap=29)
    assert found["rows"][4]["history"] == "bx"  # q5 at 40


def test_interactions_of_a_user_at_or_after_the_first_held_out_request_are_left_out(tmp_path):
    # per_user: u's validation request q5 is at 40, v's q4 at 30; w's test request q6 at 50.
    rows = at(("u", "x", 39), ("u", "x", 40), ("v", "x", 29), ("v", "x", 31), ("w", "x", 49), ("w", "x", 50))
    found = run(tmp_path, LOG, split="per_user", **beside(tmp_path, rows))
    taken = [(user, time - START) for user, item, _, time, _ in found["interactions"] if item == "x"]
    assert taken == [("u", 39), ("v", 29), ("w", 49)]
    assert found["metrics"]["interactions_left_out"] == 3


def test_by_user_the_interactions_of_a_held_out_user_train_nothing(tmp_path):
    named = write_lines(tmp_path / "users.txt", ["w"])
    rows = at(("u", "x", 0), ("w", "x", 5), ("w", "y", 500), ("other", "x", 1))
    options = {"split": "by_user", "test_users": named, "valid_fraction": 0.3}
    found = run(tmp_path, LOG, **options, **beside(tmp_path, rows))
    split_of = {(user, item): split for user, item, _, _, split in found["interactions"]}
    assert split_of["w", "x"] == split_of["w", "y"] == "test"
    assert split_of["other", "x"] == "train"
    assert found["rows"][5]["history"] == "x"  # what is before q6


def test_interactions_without_times_are_before_requests_without_times_only(tmp_path):
    log = [{name: value for name, value in row.items() if name != "time"} for row in LOG]
    options = beside(tmp_path, [("u", "x"), ("u", "y")], "user,item")
    found = run(tmp_path, log, split="per_user", **options)
    assert found["rows"][0]["history"] == "xy" and found["rows"][2]["history"] == "xyb"
    with pytest.raises(ValueError, match="taken.csv line 2: the interaction has no time but the requests have"):
        run(tmp_path, LOG, **options)
    rows = [("u", "x", 1000 * START)]
    with pytest.raises(ValueError, match="taken.csv line 2: time is 1600000000000, which are milliseconds"):
        run(tmp_path, LOG, **beside(tmp_path, rows))


def test_interactions_without_times_do_not_tell_what_was_taken_in_a_held_out_request(tmp_path):
    words = [
        "train",
        "train",
        "train",
        "train",
        "test",
        "valid",
        "train",
        "train",
    ]  # u takes b and a in the test request
    log = [{**row, "split": word} for row, word in zip(LOG, words, strict=True)]
    log = [{name: value for name, value in row.items() if name != "time"} for row in log]
    rows = [("u", "x"), ("u", "a"), ("v", "a"), ("w", "e"), ("w", "x"), ("u", "b")]
    found = run(tmp_path, log, split="given", **beside(tmp_path, rows, "user,item"))
    assert [row["history"] for row in found["rows"]] == ["x", "a", "xb", "acd", "xb", "x", "acdb", "xb"]
    assert found["metrics"]["interactions_left_out"] == 3


def test_metaranks_log_takes_a_table_of_interactions_too(tmp_path):
    path = write_lines(tmp_path / "events.jsonl", map(json.dumps, metarank_events(LOG)))
    found = run(tmp_path, path, **beside(tmp_path, at(("u", "x", -5))))
    assert found["rows"][7]["history"] == "xbba"
    assert found["rows"][7]["history_events"] == [None, "click", "click", "click"]


def test_the_metrics_of_interactions_alone_have_no_counts_of_requests(tmp_path):
    rows = [("u", item, time) for time, item in enumerate("abcdefgh")]
    path = write_csv(tmp_path / "t.csv", "user,item,time", rows)
    metrics = data.main(data.DataArguments(run_dir="run", interactions=path), tmp_path)
    assert [*metrics] == [
        *("users", "items", "interactions", "interactions_read", "duplicates_removed", "interactions_of_split"),
        *("rows", "sequence_length", "share_of_time_ties", "items_without_text", "midtrain_has_seen_rerank_targets"),
        *("terms", "sources", "left_out", "share_of_targets_in_history"),
    ]
