"""Histories of requests, joined or of the log's own."""

import numpy as np
from request_logs import HISTORIES, LOG, request, run, write_log


def test_a_history_of_its_own_is_taken_as_it_is(tmp_path):
    log = [{**row, "history": ["x", *history]} for row, history in zip(LOG, HISTORIES, strict=True)]
    for form in ("wide.csv", "wide.jsonl", "long.csv", "long.parquet"):
        found = run(tmp_path, write_log(tmp_path, form, log))
        assert [row["history"] for row in found["rows"]] == [f"x{history}" for history in HISTORIES]
        assert [(row["history_times"], row["history_events"]) for row in found["rows"]] == [(None, None)] * 8
        assert found["tables"]["items"]["item_id"].to_pylist() == [*"abcdex"]  # candidates first
    assert found["metrics"]["requests_without_history"] == 0


def test_a_request_without_a_user_has_a_number_of_its_own_and_no_history(tmp_path):
    log = [{**row, "user": None if row["user"] == "v" else row["user"]} for row in LOG]
    found = run(tmp_path, log)
    assert found["tables"]["users"]["user_id"].to_pylist() == ["u", None, None, "w", None]
    assert [row["user"] for row in found["rows"]] == [0, 1, 0, 2, 0, 3, 4, 0]
    assert [row["history"] for row in found["rows"]] == ["", "", "b", "", "b", "", "", "bba"]


def test_without_times_what_stands_earlier_in_the_file_is_the_history(tmp_path):
    log = [{name: value for name, value in row.items() if name != "time"} for row in LOG]
    found = run(tmp_path, log, split="by_user")
    assert [row["history"] for row in found["rows"]] == HISTORIES
    assert {row["time"] for row in found["rows"]} == {None}
    assert found["rows"][3]["history_times"] == [None, None]
    assert [row[1] for row in found["interactions"]] == [*"bbabcdbee"]


def test_a_request_without_a_time_has_what_stands_earlier_in_the_file(tmp_path):
    # q2 has no time: q1 stands before it, q3 and q4 after it. q4's time is before q3's.
    log = [request("q1", "u", 10, "ab", [1, 0]), request("q2", "u", None, "bc", [1, 0])]
    log += [request("q3", "u", 30, "cd", [1, 0]), request("q4", "u", 20, "de", [1, 0])]
    log += [request("q5", "v", 40, "de", [1, 0]), request("q6", "w", 50, "ed", [1, 0])]
    found = run(tmp_path, log, split="by_user")
    assert [row["history"] for row in found["rows"]] == ["", "a", "abd", "ab", "", ""]
    assert [item for user, item, *_ in found["interactions"] if user == "u"] == [*"abdc"]


def test_the_gap_before_a_request_is_kept_free(tmp_path):
    log = [request(f"q{n}", "u", time, "ab", [n % 2, 1]) for n, time in enumerate((0, 50, 100, 110, 111))]
    # 100 s before 100 is 0, which is not earlier; before 110 it is 10, before 111 11: the first request alone.
    assert [row["history"] for row in run(tmp_path, log, history_gap=100)["rows"]] == ["", "", "", "b", "b"]
    assert [row["history"] for row in run(tmp_path, log)["rows"]] == ["", "b", "bab", "babb", "babbab"]
    # 11 s before 111 is 100, before which there are 0 and 50.
    assert run(tmp_path, log, history_gap=11)["rows"][4]["history"] == "bab"


def test_requests_of_one_moment_are_not_in_each_others_history(tmp_path):
    log = [request(f"q{n}", "u", time, "ab", [1, 0]) for n, time in enumerate((0, 5, 5, 9, 12))]
    assert [row["history"] for row in run(tmp_path, log)["rows"]] == ["", "a", "a", "aaa", "aaaa"]


def test_joined_histories_agree_with_a_slow_loop(tmp_path):
    random = np.random.default_rng(0)
    log = []
    for n in range(300):
        user = random.choice(["u", "v", "w", None], p=[0.4, 0.3, 0.2, 0.1])
        time = None if random.random() < 0.2 else int(random.integers(100))
        shown = random.permutation([*"abcdefgh"])[: random.integers(2, 8)].tolist()
        relevance = random.choice([0, 1, 2, None], size=len(shown)).tolist()
        log.append(request(f"q{n}", user, time, shown, relevance))
    log = [{**row, "split": str(random.choice(["train", "valid", "test"], p=[0.6, 0.2, 0.2]))} for row in log]
    found = run(tmp_path, log, split="given", history_gap=(gap := 5))["rows"]
    level = {"train": 0, "valid": 1, "test": 2}
    for n, row in enumerate(log):
        expected = []
        for other, past in enumerate(log):
            if row["user"] is None or past["user"] != row["user"] or level[past["split"]] > level[row["split"]]:
                continue
            if row["time"] is None or past["time"] is None:
                is_before = other < n
            else:
                is_before = past["time"] < row["time"] - gap
            if is_before:
                graded = zip(past["candidates"], past["relevance"], strict=True)
                expected += [item for item, grade in graded if grade]
        assert sorted(found[n]["history"]) == sorted(expected)
