"""The data stage: every message that bad input gets, one line each."""

import pytest

from rerank import data

GOOD = "user,item,time\n" + "".join(f"u,{item},{time}\n" for time, item in enumerate("abcdefgh"))
NO_TIME = "user,item,position,when\nu,a,1,\nu,b,0,3\n"
SPLIT, BY_TIME, WHEN = {"split": "given"}, {"split": "by_time"}, {"columns": {"time": "when"}}
REBUILD = {**SPLIT, "rebuild": True}
LOPSIDED = {"split": "by_time", "valid_fraction": 0.5, "test_fraction": 0.45}

BAD_ROWS = {  # after the header of a file of interactions
    "u,a,1\nu,b,yesterday\n": "t.csv line 3: time is 'yesterday', not a number of seconds",
    "u,a,1\nu,b,nan\n": "t.csv line 3: time is 'nan', not",
    "u,a,1\nu,b,\nu,c,x\n": "t.csv line 3: time is '', not a number .*; correct the row",
    "u,a,1\n,b,2\n": "t.csv line 3: user is empty; fill it or remove the row",
    "u,,1\n": "t.csv line 2: item is empty",
    "u,a,1\nu,b\n": "t.csv cannot be read: .*Line: 3, .* Columns: 3 Found: 2; correct the row or the format",
    "": "t.csv is empty; give a file with at least one row",
    "u,a,1\nu,b,2\nv,a,1\n": "split: per_user leaves no user with a rerank row",
}
BAD_FILES = {  # name -> content, message
    "t.csv.gz": ("user,item\nu,a\n", "is not gzipped .*; rename it without .gz"),
    "t.jsonl": ('{"user": "u"}\n{"user": \n', "cannot be read: .*; correct the row or the format"),
    "t.parquet": ("user,item\n", "cannot be read: "),
    "t.json": ("[1, 2]", "is no JSON object of item: "),
    "twice.csv": ("user,user\n", "names a column twice in its header"),
    "customers.csv": ("customer,item\nu,a\n", "no column 'user' for user; it has customer, item; correct columns"),
    **{f"empty.{form}": ("", "is empty; give a file with") for form in ("csv", "tsv", "jsonl", "txt", "json")},
}
BAD_COLUMNS = {  # message -> options
    "no column 'when' for time; it has user, item, time; correct columns": {"columns": {"time": "when"}},
    "columns has the unknown key 'users'; known: user, item, time, position, spl": {"columns": {"users": "user"}},
    "no column 'id' for item; .*; correct item_col": {"items": "t.csv", "item_columns": {"item": "id"}},
    "no column 'brand' for the text; .*; correct text_columns": {"items": "t.csv", "text_columns": ["brand"]},
    r"text_columns is \['title'\] but items is not set; name the table of items": {"text_columns": ["title"]},
    "interactions is x.dat, whose suffix tells no format; set the format: one of csv": {"interactions": "x.dat"},
}
BAD_ITEMS = {  # file of items -> message
    "item\na\nb\nc\nd\ne\nf\ng": "t.csv line 9: item 'h' is not in items.csv; add it there",
    "item\na\nb\nc\na\nb": "items.csv line 5: item 'a' repeats items.csv line 2; keep one",
}
BAD_SPLITS = [  # options, interactions, message
    ({"min_user_interactions": 20}, GOOD, "min_user_interactions 20 and min_item_interactions 0 leave no user; lower"),
    (LOPSIDED, GOOD, "split: by_time leaves no user with a rerank row .* change valid_fraction"),
    ({"min_history": 20}, GOOD, "split: per_user leaves no user with a rerank row .min_history 20, 1 users.; give"),
    (SPLIT, GOOD, "split is given but .* has no column 'split'; map it in columns"),
    (BY_TIME, NO_TIME, "split is by_time but .* has no column 'time'; map it in columns"),
    (
        {**BY_TIME, "columns": {"time": "when", "position": "position"}},
        NO_TIME,
        "t.csv line 2: the time is empty but split is by_time",
    ),
    (REBUILD, "split,user,items\ntrain,u,a b\ntest,u,b c\n", "no valid part, and without a time no training rows are"),
    (REBUILD, "split,user,items\ntra,u,a b\n", "line 2: split is 'tra', not a split .train, history, valid"),
    (REBUILD, "split,user,items\ntrain,u,\nvalid,u,a b\n", "line 2: items is empty; fill it or remove the row"),
]
NOT_THERE = {  # message -> options
    "interactions is nowhere.csv, which does not exist; correct the path": {"interactions": "nowhere.csv"},
    "items is nowhere.jsonl, which does not exist": {"items": "nowhere.jsonl"},
    "no_such_package is not installed; `pip install": {"interactions": "package:no_such_package/x.csv"},
    "interactions is folder, no data set on disk or on the hub": {"interactions": "folder"},
}
BAD_OPTIONS = {
    "format is 'xml'.* one of auto, csv": {"format": "xml"},
    "items_format is 'xml'.* one of": {"items_format": "xml"},
    "split is 'sideways'.* one of per_user, by_time, by_user, random, given": {"split": "sideways"},
    "num_test is 0 but must be at least 1": {"num_test": 0},
    "num_valid is 0 but": {"num_valid": 0},
    "min_history is 0 but": {"min_history": 0},
    "num_rerank is 'most' but must be a whole number of at least 1, or all": {"num_rerank": "most"},
    "num_rerank is 0 but": {"num_rerank": 0},
    "min_user_interactions is -1 but must be at least 0": {"min_user_interactions": -1},
    "valid_fraction is 0 but must be above 0 and below 1": {"valid_fraction": 0},
    "test_fraction is 1.5 but must be": {"test_fraction": 1.5},
    "together leave nothing to train on": {"valid_fraction": 0.5, "test_fraction": 0.5},
    "split: given takes interactions as they are": {"split": "given", "min_item_interactions": 5},
}

CASES = [
    *(({}, {"t.csv": "user,item,time\n" + rows}, message) for rows, message in BAD_ROWS.items()),
    *(({"interactions": name}, {name: text}, f"{name}.* {message}") for name, (text, message) in BAD_FILES.items()),
    *(({"items": "items.csv"}, {"items.csv": ids}, message) for ids, message in BAD_ITEMS.items()),
    *((options, {"t.csv": text}, message) for options, text, message in BAD_SPLITS),
    *((options, {}, message) for message, options in {**BAD_COLUMNS, **BAD_OPTIONS}.items()),
]


@pytest.mark.parametrize(("options", "files", "message"), CASES, ids=[message[:40] for _, _, message in CASES])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, options, files, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {"t.csv": GOOD, **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        data.check(data.DataArguments(run_dir="run", **{"interactions": "t.csv", **options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", NOT_THERE)
def test_input_that_is_not_there_is_named(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.csv").write_text(GOOD)
    with pytest.raises(FileNotFoundError, match=message):
        data.check(data.DataArguments(run_dir="run", **{"interactions": "t.csv", **NOT_THERE[message]}))
