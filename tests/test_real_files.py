"""Files as people have them: what is read from each kind, by value."""

import json
import logging

import pyarrow as pa
import pytest
from real_files import prepare, read_interactions, read_items, write

from rerank import data
from rerank.launch import named_files
from rerank.launch.named_files import NamedFile

UUIDS = [f"3F2504E0-4F89-41D3-9A0C-0305E82C330{k}" for k in range(3)]
LONG = [12345678901234567890, 12345678901234567891]  # one float


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*args, **options):
    return read_interactions(*args, **options)[0]


def items(*args, **options):
    return read_items(*args, **options)[0]


THREE = [("u", "a", 1.0), ("u", "b", 2.0), ("v", "a", 3.0)]
OBJECTS = [{"user": user, "item": item, "time": time} for user, item, time in THREE]
UTF_16 = "user,item,time\nu,a,1\nu,b,2\nv,a,3\n".encode("utf-16")
TABLES = {  # kind -> name, content, options; each holds THREE
    "pandas' index, which has no name": ("t.csv", ",user,item,time\n0,u,a,1\n1,u,b,2\n2,v,a,3\n", {}),
    "a header equal but for case": ("t.csv", "user,item,time,Time\nu,a,1,9\nu,b,2,9\nv,a,3,9\n", {}),
    "spaces after commas, empty lines": ("t.csv", "user, item, time\nu, a, 1\n\nu, b, 2\nv, a, 3\n\n", {}),
    "Windows' lines, a byte-order mark": ("t.csv", "\ufeffuser,item,time\r\nu,a,1\r\nu,b,2\r\nv,a,3\r\n", {}),
    "two characters, no header (MovieLens-1M)": (
        "ratings.dat",
        "u::a::5::1\nu::b::3::2\nv::a::1::3\n",
        {"csv": {"separator": "::", "header": ["user", "item", "rating", "time"]}},
    ),
    "tabs, no header (u.data)": (
        "u.data",
        "u\ta\t1\nu\tb\t2\nv\ta\t3\n",
        {"format": "tsv", "csv": {"header": ["user", "item", "time"]}},
    ),
    "commas, no header (UserBehavior)": (
        "UserBehavior.csv",
        "u,a,x,pv,1\nu,b,x,pv,2\nv,a,x,buy,3\n",
        {"csv": {"header": ["user", "item", "kind", "what", "time"]}},
    ),
    "semicolons and quotes (Book-Crossing)": (
        "b.csv",
        '"User-ID";"ISBN";"time"\n"u";"a";"1"\n"u";"b";"2"\n"v";"a";"3"\n',
        {"csv": {"separator": ";"}, "columns": {"user": "User-ID", "item": "ISBN"}},
    ),
    "pipes": ("t.csv", "user|item|time\nu|a|1\nu|b|2\nv|a|3\n", {"csv": {"separator": "|"}}),
    "spaces in a .txt": ("t.txt", "user item time\nu a 1\nu b 2\nv a 3\n", {"csv": {"separator": " "}}),
    "columns named 0, 1, 2": (
        "t.csv",
        "0,1,2\nu,a,1\nu,b,2\nv,a,3\n",
        {"columns": {"user": 0, "item": "1", "time": 2}},
    ),
    "UTF-16": ("t.csv", UTF_16, {"csv": {"encoding": "utf-16"}}),
    "JSONL with a byte-order mark": ("t.jsonl", "\ufeff" + "".join(f"{json.dumps(row)}\n" for row in OBJECTS), {}),
    "JSONL whose names differ in case": (
        "t.jsonl",
        [{"User": "x", "user": u, "item": i, "time": t, "details": {"A": 1, "a": 2}} for u, i, t in THREE],
        {},
    ),
    "JSONL, both of two such names wanted": (
        "t.jsonl",
        [{"ID": u, "id": i, "time": t} for u, i, t in THREE],
        {"columns": {"user": "ID", "item": "id"}},
    ),
    "JSONL named .json": ("t.json", OBJECTS, {}),
    "an array of objects": ("t.json", json.dumps(OBJECTS), {}),
    "Parquet whose names differ in case": (
        "t.parquet",
        pa.table({"Time": [9] * 3, "user": list("uuv"), "item": list("aba"), "time": [1, 2, 3]}),
        {},
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_whatever_way_it_is_written(kind):
    name, content, options = TABLES[kind]
    assert read(name, content, **options) == THREE


def test_a_column_that_is_not_mapped_has_no_say_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    rows = "user,item,time,position,split\nu,a,1,3,val\nu,b,2,2,val\nv,a,3,1,val\n"
    assert read("t.csv", rows) == THREE
    assert "t.csv: columns user, item, time; not used: position, split" in caplog.text
    assert [time for *_, time in read("t.csv", rows, columns={"time": None})] == [None] * 3
    assert "t.csv: columns user, item; not used: time, position, split" in caplog.text


def test_a_position_orders_where_it_is_mapped_and_else_time_does(tmp_path):
    (tmp_path / "t.csv").write_text("user,item,time,position\n" + "".join(f"u,i{k},{k},{9 - k}\n" for k in range(6)))

    def sequence(**options):
        args = data.DataArguments(run_dir="run", interactions=str(tmp_path / "t.csv"), **options)
        found = prepare(args)
        return [found.items["item_id"][item].as_py() for item in found.interactions["item"].to_pylist()]

    assert sequence() == [f"i{k}" for k in range(6)]
    assert sequence(columns={"position": "position"}) == [f"i{k}" for k in reversed(range(6))]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("ids", [UUIDS, ["007", "08", "1e5"], ["12:30", "2020-01-01", "true"]])
def test_text_stays_as_it_is(suffix, ids):
    records = [{"user": item, "item": item, "time": 1} for item in ids]
    content = pa.Table.from_pylist(records) if suffix == "parquet" else records
    if suffix == "csv":
        content = "user,item,time\n" + "".join(f"{item},{item},1\n" for item in ids)
    assert read(f"t.{suffix}", content) == [(item, item, 1.0) for item in ids]


def test_long_numbers_are_no_floats():
    assert read("t.jsonl", [{"user": user, "item": 5} for user in LONG]) == [(str(u), "5", None) for u in LONG]


ITEM_FILES = {  # kind -> name, content, options; each holds two items, of a title and a category
    "object of id to object (LETTER, LC-Rec)": (
        "Yelp.item.json",
        json.dumps({"1": {"title": "One", "category": "x, y", "more": 1}, "02": {"title": "Two", "category": None}}),
        {},
    ),
    "nested categories (Amazon 2014)": (
        "meta.jsonl",
        [{"asin": "1", "title": "One", "categories": [["x", "y"]]}, {"asin": "02", "title": "Two", "categories": []}],
        {"item_columns": {"item": "asin", "category": "categories"}},
    ),
    "keys of an object equal but for case (Amazon 2023)": (
        "meta.jsonl",
        [
            {"item": "1", "title": "One", "category": ["x", "y"], "details": {"Item Weight": 1}},
            {"item": "02", "title": "Two", "category": None, "details": {"Item weight": 2}},
        ],
        {},
    ),
    "lists of lists in Parquet": (
        "i.parquet",
        pa.table({"item": ["1", "02"], "title": ["One", "Two"], "category": [[["x"], ["y"]], []]}),
        {},
    ),
    "pipes, no header, Latin-1 (u.item)": (
        "u.item",
        "1|One|x, y\n02|Two|\n".encode("latin-1"),
        {"items_csv": {"separator": "|", "header": ["item", "title", "category"], "encoding": "latin-1"}},
    ),
}


@pytest.mark.parametrize("kind", ITEM_FILES)
def test_an_item_file_of_the_field_is_read(kind):
    name, content, options = ITEM_FILES[kind]
    assert items(name, content, **options) == [("1", "One", "x, y"), ("02", "Two", "")]


def test_an_object_of_ids_may_hold_titles_or_attributes():
    assert items("titles.json", '{"7": "Toy Story", "8": "Heat"}') == [("7", "Toy Story", ""), ("8", "Heat", "")]
    assert items("attributes.json", '{"7": ["a", 3], "8": []}') == [("7", "", "a, 3"), ("8", "", "")]


def test_lists_and_scalars_of_any_kind_become_text():
    row = {"item": "a", "title": ["T", ["u"]], "category": 3, "brand": None, "price": 3.25, "new": True}
    found = items("i.jsonl", [row], "brand", "price", "new", item_columns={"price": "price", "new": "new"})
    assert found == [("a", "T, u", "3", "", "3.25", "true")]


def test_latin_1_is_read_as_such():
    content = "item::title\n1::Les Misérables (1995)\n".encode("latin-1")
    written = {"separator": "::", "encoding": "latin-1"}
    assert items("movies.dat", content, items_csv=written) == [("1", "Les Misérables (1995)", "")]


def test_a_user_on_two_lines_of_sequences_has_two_sessions_in_order():
    taken = read("s.txt", "1 a b c\n2 d\n1 b e f g\n")
    assert [item for user, item, _ in taken if user == "1"] == list("abcbefg")
    assert read("Yelp.inter.json", '{"0": [3, 9], "1": [4]}') == [("0", "3", None), ("0", "9", None), ("1", "4", None)]


@pytest.mark.parametrize("name", ["day=*/*.parquet", "."])
def test_parts_are_read_in_order(tmp_path, name):
    for day, (user, item, time) in enumerate(THREE):
        write(tmp_path / f"day={day}/part-0.parquet", pa.table({"user": [user], "item": [item], "time": [time]}))
    write(tmp_path / "_SUCCESS", "")
    assert read(name) == THREE
    assert [row[1] for row in read(name, columns={"item": "day"})] == ["0", "1", "2"]


def test_files_of_a_glob_may_be_gzipped(tmp_path):
    write(tmp_path / "1.csv", "user,item,time\nu,a,1\n")
    write(tmp_path / "2.csv.gz", "user,item,time\nu,b,2\nv,a,3\n")
    assert read("[12].csv*") == THREE
    (found,) = named_files.record([NamedFile("interactions", "[12].csv*")])  # compared by content, as one file is
    assert named_files.changed([found]) is None
    write(tmp_path / "1.csv", "user,item,time\nu,a,7\n")
    assert "interactions [12].csv*: " in named_files.changed([found])
