"""Files as people have them: columns, cells and parts whose types or places could be taken for others."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from real_files import connection, prepare, read_interactions, read_items, write

from rerank import data
from rerank.data import tables
from rerank.data.asked import Asked
from rerank.data.sources.opening import open_source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(message, *args, of=read_interactions, **options):
    """The line with which a file is refused."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        of(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_column_named_as_our_places_changes_no_order():
    columns = {"user": ["u"] * 3, "item": list("abc"), "source_row": [2, 1, 0]}
    assert [item for _, item, _ in read_interactions("t.parquet", pa.table(columns))[0]] == list("abc")
    found = read_items("i.parquet", pa.table(columns), "place", item_columns={"place": "source_row"})[0]
    assert [(row[0], row[-1]) for row in found] == [("a", "2"), ("b", "1"), ("c", "0")]


def test_parts_of_different_types_are_refused_where_they_are_wanted(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"user": ["u"], "item": [7], "other": pa.nulls(1)}))
    write(tmp_path / "2.parquet", pa.table({"user": ["v"], "item": ["007"], "other": ["08"]}))
    refused("^2.parquet has the column 'item' as string but 1.parquet as int64; write it as one type", "*.parquet")
    more = pa.table(
        {"Item": ["x"], "user": ["w"], "item": pa.array([9], pa.int32()), "other": pa.array(["z"]).dictionary_encode()}
    )
    write(tmp_path / "sizes/1.parquet", more.set_column(0, "Item", pa.array([1])))
    write(tmp_path / "sizes/2.parquet", more.set_column(2, "item", pa.array([8])))
    for columns, found in (({}, "98"), ({"item": "other"}, "zz")):
        assert [row[1] for row in read_interactions("sizes", columns=columns)[0]] == list(found)
    rows, _ = read_interactions("*.parquet", columns={"item": "other", "user": "user"}, on_bad_rows="drop")
    assert rows == [("v", "08", None)]


LONG = 12345678901234567890
MISSING = "user,item,kind\nu,a,x\nu,b,\nu,c,y\n"
CONDITIONS = {  # condition -> items that stay
    "kind <> 'x'": "c",
    "NOT kind = 'x'": "c",
    "kind IS NULL OR kind IN ('y')": "bc",
    "kind IS NOT NULL": "ac",
    "NOT kind LIKE 'x'": "c",
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_a_missing_value_is_as_in_sql(where):
    assert "".join(item for _, item, _ in read_interactions("t.csv", MISSING, where=where)[0]) == CONDITIONS[where]


@pytest.mark.parametrize("where", [f"user = {LONG}", f"user IN ({LONG}, 7)"])
def test_a_long_number_equals_itself_alone(where):
    rows = f"user,item\n{LONG},a\n{LONG + 1},b\n{LONG - 1},c\n"
    assert [item for _, item, _ in read_interactions("t.csv", rows, where=where)[0]] == ["a"]


def test_comparisons_that_are_not_what_they_look_like_are_refused():
    rows = "user,item,time\nu,a,1420070400000\nu,b,1420070500000\n"
    line = refused(
        "t.csv line 2: time is '1420070400000', neither a date", "t.csv", rows, where="time >= '2015-01-01'"
    )
    assert "as a number in the unit of time, without quotes" in line
    assert len(read_interactions("t.csv", where="time >= 1420070500000")[0]) == 1
    refused("text '9' in order; write the number without quotes: 9", "t.csv", where="time > '9'")
    line = refused("text '11/13/2019' in order, letter by letter", "t.csv", where="time >= '11/13/2019'")
    assert line.endswith("write a date as '2024-03-31 12:00:00'")
    refused("a missing value equals no text; write IS NULL", "t.csv", where="item = ''")


def test_only_whole_words_name_splits_and_text_of_splits_is_not_guessed(tmp_path):
    write(tmp_path / "logs/latest.csv", "user,item\nu,007\n")
    write(tmp_path / "logs/device_1.csv", "user,item\nu,08\n")
    assert [item for _, item, _ in read_interactions("logs")[0]] == ["08", "007"]
    write(tmp_path / "sets/train.csv", "user,item\nu,007\n")
    write(tmp_path / "sets/test.csv", "user,item\nu,08\n")
    refused(r"files are named as splits .test.csv, train.csv.; name one of them, or sets/\*.csv for all", "sets")
    assert len(read_interactions("sets/*.csv")[0]) == 2


def test_hidden_folders_hold_no_parts(tmp_path):
    write(tmp_path / "logs/a.csv", "user,item\nu,a\n")
    for folder in (".ipynb_checkpoints", "_temporary"):
        (tmp_path / "logs" / folder).mkdir()
        write(tmp_path / "logs" / folder / "a.csv", "user,item\nu,a\n")
    assert read_interactions("logs")[0] == [("u", "a", None)]


@pytest.mark.parametrize("column", ["item", "asin"])
def test_one_object_with_an_id_is_one_row(column):
    row = {column: "n0", "title": "Up"}
    columns = {"item_columns": {"item": column}}
    assert read_items("new.json", [row], **columns)[0] == [("n0", "Up", "")]
    assert read_items("new.json", json.dumps(row, indent=1), **columns)[0] == [("n0", "Up", "")]


NESTED = {  # file -> content, message
    "t.jsonl": (
        [{"user": 1, "item": [3, 9, 4]}],
        r"t.jsonl line 1: item is '\[3,9,4\]', a list or an object and no id",
    ),
    "t.json": ('{"0": [[3, 158], [9, 160]]}', r"t.json entry 1: item is '\[3,158\]', a list .*; write one id a row"),
    "t.parquet": (pa.table({"user": [["u", "v"]], "item": ["a"]}), "t.parquet row 1: user is 'u, v', a list or an ob"),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_list_or_an_object_is_no_id(name):
    content, message = NESTED[name]
    refused(message, name, content)


def test_text_that_looks_like_a_list_is_an_id_but_in_json():
    assert read_interactions("t.csv", "user,item\nu,[3]\n")[0] == [("u", "[3]", None)]
    assert read_interactions("t.jsonl", [{"user": "u", "item": "[a"}])[0] == [("u", "[a", None)]
    refused(r"i.jsonl line 1: item is '3, 4', a list", "i.jsonl", [{"item": [3, 4]}], of=read_items)
    assert read_interactions(
        "t.jsonl", [{"user": "u", "item": [1]}, {"user": "u", "item": 2}], on_bad_rows="drop"
    ) == (
        [("u", "2", None)],
        {"item is a list or an object": 1},
    )


def test_a_reason_is_told_without_hints_about_duckdb():
    twice = '{"user": "u", "item": "a", "item": "b"}\n'
    assert refused('t.jsonl", in line 1: .* has duplicate key "item"; correct', "t.jsonl", twice).count("Try") == 0
    assert "Try" not in refused(
        "unexpected end of data; correct the row", "p.jsonl", '{\n"user": "u",\n"item": "c"}\n'
    )


def test_unreadable_lines_of_ready_rows_are_counted(tmp_path):
    rows = [("train", "a b c"), ("train", "b c d"), ("valid", "c d e"), ("test", "d e f")]
    lines = [f"{split},u,{time},{items}\n" for time, (split, items) in enumerate(rows)]
    write(tmp_path / "t.csv", "split,user,time,items\n" + "train,u\n".join(lines))
    options = {"split": "given", "rebuild": True, "on_bad_rows": "drop"}
    found = prepare(data.DataArguments(run_dir="run", interactions="t.csv", **options))
    assert (found.num_read, found.left_out) == (7, {"line with missing columns": 3})


def test_lines_that_are_no_json_are_counted_as_such_and_keep_the_places_of_others():
    write(
        Path("t.jsonl"),
        '{"user": "u", "item": "a", "time": 1}\n{"user": \n[1]\n\n{"user": "", "item": "b", "time": 2}\n',
    )
    rows, left_out = read_interactions("t.jsonl", on_bad_rows="drop")
    assert (rows, left_out) == ([("u", "a", 1.0)], {"line that is no JSON object": 2, "user is empty": 1})


def test_names_for_a_file_that_has_its_own_header_are_refused():
    rows = "customer,movieId,time\nu1,i1,5\nu2,i2,6\n"
    named = {"csv": {"header": ["user", "item", "time"]}}
    line = refused(
        "t.csv line 1 has 'time' where the next 2 rows have numbers: a header; leave", "t.csv", rows, **named
    )
    assert "leave header out of csv" in line
    assert len(read_interactions("t.csv", columns={"user": "customer", "item": "movieId"})[0]) == 2
    rows = "u1,i1,null\nu2,i2,6\nu3,i3,7\n"
    assert len(read_interactions("t.csv", rows, columns={"time": None}, **named)[0]) == 3


ROWS_900 = b"user,item\n" + b"u,a\n" * 900 + b"u,\xe9\n" * 9
PACKED = gzip.compress(b"user,item\n" + b"".join(b"u,%d\n" % n for n in range(9999)))
TEXTS = {  # kind -> file, content, message
    "an encoding in row 900": ("t.csv", ROWS_900, "^t.csv is not UTF-8 text .*; set csv: {encoding: latin-1}"),
    "an encoding of JSON": (
        "t.jsonl",
        b'{"user": "u", "item": "\xe9"}\n' * 2,
        "^t.jsonl is not UTF-8 .*; set csv: {enc",
    ),
    "an encoding of an array": (
        "t.json",
        b'[{"user": "u",\n"item": "\xe9"}]',
        "^t.json is not UTF-8 .*; set csv: {enc",
    ),
    "half a file": ("t.csv.tmp", PACKED[:9000], "^t.csv.gz (is|cannot be).*; copy the file again"),
    "a tenth of a file": ("t.csv.tmp", PACKED[:99], "^t.csv.gz is cut off .*; copy the file again"),
    "not gzipped": ("t.csv.tmp", b"user,item\nu,a\n", "^t.csv.gz is not gzipped .*; rename it without .gz"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_cannot_be_read_names_its_file_and_a_cure(tmp_path, kind):
    name, content, message = TEXTS[kind]
    write(tmp_path / name, content)
    if name.endswith(".tmp"):
        name = str((tmp_path / name).rename(tmp_path / "t.csv.gz").name)
    refused(message, name)


OPTION_FILES = {  # file -> content, start of the refusal, cure
    "u.csv": (b"i1,1\ni2,2\n", "u.csv has no column 'item'", "write a line with the names of its columns above it"),
    "s.csv": (b"item;title\na;b\n", "s.csv has no column 'item'", "part its columns by commas"),
    "l.csv": ("item,title\na,é\n".encode("latin-1"), "l.csv is not UTF-8 text", "write it as UTF-8"),
    "n.csv": (b"id,title\na,b\n", "n.csv has no column 'item'", "rename its column in the file"),
    "t.txt": (b"1 a 5 4\n1 b 3 9\n", "--items is t.txt, and", "write the file as UTF-8 CSV with commas and a header"),
    "b.csv": (b"item,title\na,b\nc\n", "b.csv cannot be read", "correct the row or the format"),
    "e.csv": (b"item,title\n,b\n", "e.csv line 2: item is empty", "fill it or remove the row"),
}


@pytest.mark.parametrize("name", OPTION_FILES)
def test_a_file_that_an_option_names_has_cures_without_a_recipe(tmp_path, name):
    content, start, cure = OPTION_FILES[name]
    write(tmp_path / name, content)
    args = data.DataArguments(run_dir="run", interactions=name, items=name)
    with pytest.raises(ValueError, match=f"^{start}.*; {cure}$"):
        tables.read_items(connection(), open_source(connection(), Asked("items", name, option="--items")), args)


def test_an_option_names_an_object_of_titles(tmp_path):
    write(tmp_path / "titles.json", '{"7": "Toy Story"}')
    args = data.DataArguments(run_dir="run", interactions="x.csv", items="titles.json")
    source = open_source(connection(), Asked("items", "titles.json", option="--items"))
    assert tables.read_items(connection(), source, args)[0].to_pyarrow()["item_id"].to_pylist() == ["7"]
