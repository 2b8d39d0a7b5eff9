"""The data stage: every message that bad input gets, one line each."""

import re
from pathlib import Path

import pytest

from rerank import data

USER = [("u", item, time) for time, item in enumerate("abcdefgh")]


def write_csv(path: Path, rows: list[tuple], header: str = "user,item,time") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def arguments(interactions: Path | str, **options) -> data.DataArguments:
    return data.DataArguments(run_dir="run", interactions=str(interactions), **options)


@pytest.fixture
def toy_csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "toy.csv", USER)


BAD_ROWS = {
    "a time that is text": (["u,a,1", "u,b,yesterday"], r"t.csv line 3: time is 'yesterday', not a number of seconds"),
    "a time that is no number": (["u,a,1", "u,b,nan"], r"t.csv line 3: time is 'nan', not"),
    "an empty time": (["u,a,1", "u,b,", "u,c,x"], r"t.csv line 3: time is '', not a number .*; correct the row"),
    "an empty user": (["u,a,1", ",b,2"], r"t.csv line 3: user is empty; fill it or remove the row"),
    "an empty item": (["u,,1"], r"t.csv line 2: item is empty"),
    "a short row": (["u,a,1", "u,b"], r"t.csv cannot be read: .*Line: 3; correct the row or the format"),
    "no row": ([], r"t.csv is empty; give a file with at least one row"),
    "sequences that are too short": (["u,a,1", "u,b,2", "v,a,1"], r"split: per_user leaves no user with a rerank row"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, name):
    lines, message = BAD_ROWS[name]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["user,item,time", *lines]) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        data.check(arguments(path))
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_those_there(toy_csv):
    with pytest.raises(ValueError, match="no column 'when' for time; it has user, item, time; correct columns"):
        data.check(arguments(toy_csv, columns={"time": "when"}))
    with pytest.raises(
        ValueError, match="columns has the unknown key 'users'; known: user, item, time, position, split"
    ):
        data.check(arguments(toy_csv, columns={"users": "user"}))
    with pytest.raises(
        ValueError, match="no column 'item_id' for item; it has user, item, time; correct item_columns"
    ):
        data.check(arguments(toy_csv, items=str(toy_csv), item_columns={"item": "item_id"}))
    with pytest.raises(ValueError, match="no column 'brand' for the text; it has item; correct text_columns"):
        items = write_csv(toy_csv.with_name("items.csv"), [("a",)], "item")
        data.check(arguments(toy_csv, items=str(items), text_columns=["brand"]))


def test_a_required_column_that_nothing_maps_is_named(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("u", "a")], "customer,item")
    with pytest.raises(ValueError, match="no column 'user' for user; it has customer, item; correct columns"):
        data.check(arguments(path))


def test_an_item_that_items_lacks_is_named_with_its_line(tmp_path, toy_csv):
    items = write_csv(tmp_path / "items.csv", [(item,) for item in "abcdefg"], "item")
    with pytest.raises(ValueError, match=r"toy.csv line 9: item 'h' is not in .*items.csv; add it there or remove"):
        data.check(arguments(toy_csv, items=str(items)))


def test_an_item_that_stands_twice_in_items_is_named(tmp_path, toy_csv):
    items = write_csv(tmp_path / "items.csv", [(item,) for item in "abcab"], "item")
    with pytest.raises(ValueError, match=r"items.csv line 5: item 'a' stands there again \(first: line 2\); keep one"):
        data.check(arguments(toy_csv, items=str(items)))


def test_missing_and_empty_files_are_named(tmp_path, toy_csv):
    with pytest.raises(
        FileNotFoundError, match="interactions is .*nowhere.csv, which does not exist; correct the path"
    ):
        data.check(arguments(tmp_path / "nowhere.csv"))
    with pytest.raises(FileNotFoundError, match="items is nowhere.jsonl, which does not exist"):
        data.check(arguments(toy_csv, items="nowhere.jsonl"))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.txt", "a.json"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} is empty; give a file with at least one row"):
            data.check(arguments(tmp_path / name))


def test_files_that_are_not_what_their_name_says_are_named(tmp_path):
    (tmp_path / "t.csv.gz").write_text("user,item\nu,a\n")
    (tmp_path / "t.jsonl").write_text('{"user": "u"}\n{"user": \n')
    (tmp_path / "t.parquet").write_text("user,item\n")
    (tmp_path / "t.json").write_text("[1, 2]")
    (tmp_path / "twice.csv").write_text("user,user\n")
    messages = {
        "t.csv.gz": "is not UTF-8 text, gzipped if named .gz",
        "t.jsonl": "cannot be read: .*; correct the row or the format",
        "t.parquet": "cannot be read: ",
        "t.json": "is no JSON object of item: ",
        "twice.csv": "names a column twice in its header",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"{re.escape(name)}.* {message}"):
            data.check(arguments(tmp_path / name))


def test_an_unknown_format_a_missing_package_and_a_missing_data_set_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="interactions is x.dat, whose suffix tells no format; set the format: one of csv"
    ):
        data.check(arguments("x.dat"))
    with pytest.raises(FileNotFoundError, match="the package no_such_package is not installed; `pip install"):
        data.check(arguments("package:no_such_package/x.csv"))
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match="interactions is .*empty_folder, no data set on disk or on the hub"):
        data.check(arguments(tmp_path / "empty_folder"))


def test_a_k_core_that_leaves_no_user_is_refused(toy_csv):
    with pytest.raises(
        ValueError, match="min_user_interactions 20 and min_item_interactions 0 leave no user; lower them"
    ):
        data.check(arguments(toy_csv, min_user_interactions=20))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(toy_csv):
    with pytest.raises(ValueError, match="split: by_time leaves no user with a rerank row .* change valid_fraction"):
        data.check(arguments(toy_csv, split="by_time", valid_fraction=0.5, test_fraction=0.45))
    with pytest.raises(
        ValueError, match="split: per_user leaves no user with a rerank row .min_history 20, 1 users.; give"
    ):
        data.check(arguments(toy_csv, min_history=20))


def test_a_split_by_a_column_that_is_not_there_is_refused(tmp_path, toy_csv):
    with pytest.raises(ValueError, match="split is given but .* has no column 'split'; map it in columns"):
        data.check(arguments(toy_csv, split="given"))
    path = write_csv(tmp_path / "t.csv", [("u", "a", 1, ""), ("u", "b", 0, 3)], "user,item,position,when")
    with pytest.raises(ValueError, match="split is by_time but .* has no column 'time'; map it in columns"):
        data.check(arguments(path, split="by_time"))
    with pytest.raises(ValueError, match="t.csv line 2: the time is empty but split is by_time"):
        data.check(arguments(path, split="by_time", columns={"time": "when"}))
    rows = write_csv(tmp_path / "rows.csv", [("train", "u", "a b"), ("test", "u", "b c")], "split,user,items")
    with pytest.raises(ValueError, match="no valid part, and without a time no training rows are the latest; map"):
        data.check(arguments(rows, split="given"))
    with pytest.raises(ValueError, match="line 2: split is 'tra', not a split .train, history, valid"):
        data.check(arguments(write_csv(rows, [("tra", "u", "a b")], "split,user,items"), split="given"))
    with pytest.raises(ValueError, match="line 2: items is empty; fill it or remove the row"):
        write_csv(rows, [("train", "u", ""), ("valid", "u", "a b")], "split,user,items")
        data.check(arguments(rows, split="given"))


def test_item_options_without_items_are_refused(toy_csv):
    with pytest.raises(ValueError, match=r"text_columns is \['title'\] but items is not set; name the table of items"):
        data.check(arguments(toy_csv, text_columns=["title"]))


BAD_OPTIONS = {
    "format is 'xml'; use one of auto, csv": {"format": "xml"},
    "items_format is 'xml'; use one of": {"items_format": "xml"},
    "split is 'sideways'; use one of per_user, by_time, random, given": {"split": "sideways"},
    "num_test is 0 but must be a whole number of at least 1": {"num_test": 0},
    "num_valid is 0 but": {"num_valid": 0},
    "min_history is 0 but": {"min_history": 0},
    "num_rerank is 'most' but must be a whole number of at least 1 or all": {"num_rerank": "most"},
    "num_rerank is 0 but": {"num_rerank": 0},
    "min_user_interactions is -1 but must be a whole number of at least 0": {"min_user_interactions": -1},
    "valid_fraction is 0 but must lie between 0 and 1": {"valid_fraction": 0},
    "test_fraction is 1.5 but must lie": {"test_fraction": 1.5},
    "together leave nothing to train on": {"valid_fraction": 0.5, "test_fraction": 0.5},
    "split: given takes interactions as they are": {"split": "given", "min_item_interactions": 5},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_options_out_of_range_are_refused(message):
    with pytest.raises(ValueError, match=message):
        arguments("x.csv", **BAD_OPTIONS[message])
