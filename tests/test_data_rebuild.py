"""The data stage: ready rows, put back into one sequence per user."""

import pytest
from test_data import run

from rerank.data.ready_rows import merge_rows


def test_ready_rows_keep_their_split_and_history_and_become_one_sequence_per_user(tmp_path):
    # The second row overlaps the first by two items, the test row jumps over d: d was seen, but is no target.
    rows = [("train", "u", 1, "a b c"), ("train", "u", 2, "b c d"), ("valid", "u", 3, "c d e")]
    rows += [("test", "u", 5, "e f g"), ("train", "v", 1, "x a b c")]
    found = run(tmp_path, rows, "split,user,time,items", split="given", rebuild=True, num_rerank=1)
    assert found["sequences"]["u"] == list("abcdefg")
    assert found["splits"]["u"] == ["train", "train", "train", "rerank", "valid", "test", "test"]
    assert found["rows"] == [
        ("u", "rerank", ["b", "c"], "d"),
        ("u", "valid", ["c", "d"], "e"),
        ("u", "test", ["e", "f"], "g"),
        ("v", "rerank", ["x", "a", "b"], "c"),
    ]


def test_ready_rows_as_history_and_item_hold_out_the_latest_training_rows(tmp_path):
    rows = [("train", "u", 1, "a b", "c"), ("train", "u", 2, "b c", "d"), ("train", "u", 3, "c d", "e")]
    rows += [("train", "v", 4, "a b", "f"), ("test", "u", 5, "d e", "f")]
    options = {"split": "given", "rebuild": True, "columns": {"time": "when"}, "valid_fraction": 0.25}
    found = run(tmp_path, rows, "split,user,when,history,item", **options)
    # four training rows, the latest quarter is v's; the items it brings along are held out with it
    assert found["splits"] == {"u": ["train"] * 4 + ["rerank", "test"], "v": ["valid"] * 3}
    assert found["metrics"]["rows"] == {"rerank": 1, "valid": 1, "test": 1}


def test_merging_rows_takes_the_longest_overlap():
    table, torn = merge_rows([0, 0], [[1, 1, 2], [1, 2, 1]], [None, 3.0], ["train", "train"])
    # 1 1 2, then 1 2 lies over its end and 1 is new
    assert table["item"].to_pylist() == [1, 1, 2, 1]
    assert table["available"].to_pylist() == [0, 0, 2, 2]
    assert table["time"].to_pylist() == [None, None, None, 3.0]
    assert torn == []


def test_rows_that_do_not_continue_those_before_them_are_told():
    # One session of three clicks, whose rows share a history: laid over each other they are a false sequence.
    windows = [[1, 2, 3, 10], [1, 2, 3, 11], [1, 2, 3, 10, 12]]
    table, torn = merge_rows([0] * 3, windows, [None] * 3, ["train"] * 3)
    assert table["item"].to_pylist() == [1, 2, 3, 10, 1, 2, 3, 11, 1, 2, 3, 10, 12]
    assert torn == [1, 2]
    # Within a split the whole history is the end of the sequence; where it changes, rows may be missing in between.
    for split, expected in (("train", [1]), ("test", [])):
        assert merge_rows([0, 0], [[1, 2, 3], [3, 4, 5]], [None] * 2, ["train", split])[1] == expected
    assert merge_rows([0, 0], [[1, 2, 3], [4, 5]], [None] * 2, ["train", "test"])[1] == [1]
    assert merge_rows([0, 1], [[1, 2, 3], [4, 5]], [None] * 2, ["train"] * 2)[1] == []  # another user


def test_ready_rows_are_rebuilt_up_to_one_torn_row_in_a_hundred(tmp_path):
    # A walk of 101 rows has a hundred that follow another; one breaks off it, then a second one.
    walk = [
        ("test" if n == 100 else "valid" if n == 99 else "train", "u", n, f"i{n} i{n + 1} i{n + 2}")
        for n in range(101)
    ]
    walk[50] = ("train", "u", 50, "i50 x i52")
    options = {"split": "given", "rebuild": True, "header": "split,user,time,items"}
    with pytest.raises(
        ValueError, match=r"t.csv line 52: its history does not continue .*, as in 2 of 100 rows .* above 1%"
    ):
        run(tmp_path, walk, **options)
    walk[51] = ("train", "u", 51, "x i52 i53")
    assert run(tmp_path, walk, **options)["metrics"]["rows"]["test"] == 1


def test_ready_rows_that_are_not_to_be_rebuilt_are_refused(tmp_path):
    with pytest.raises(ValueError, match="t.csv has the column items: whole rows, .*; set rebuild: true to put"):
        run(tmp_path, [("train", "u", 1, "a b c")], "split,user,time,items", split="given")
