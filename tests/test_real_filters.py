"""Files as people have them: what is filtered, what is refused, and whether a cure that is advised works."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from real_files import prepare, read_interactions, read_items, write

from rerank import data
from rerank.baselines import Counts
from rerank.next_item.held_out_sets import metrics_of_sets

RATED = "user,item,time,rating,kind\n" + "".join(f"u,i{n},{n},{n}.5,{'ab'[n % 2]}\n" for n in range(6))
CONDITIONS = {  # condition -> numbers of the items that stay
    "rating >= 4": "45",
    "rating > 10 / 4 - 1 AND NOT item = 'i3'": "245",
    "kind IN ('a', 'c') OR time BETWEEN 4 AND 5": "0245",
    "item LIKE '%4' or item ilike 'I5'": "45",
    "time >= '1970-01-01 00:00:04'": "45",
    "rating IS NOT NULL and (kind <> 'b')": "024",
    "time < rating and -rating < -4": "45",
}
BAD_CONDITIONS = {  # condition -> message
    "rating >=": "no condition",
    "5": "a value and no condition",
    "stars > 3": "t.csv has no column 'stars'; it has user, item, time, rating, kind",
    "1 = 1": "names no column of t.csv",
    "length(item) > 2": r"calls a function: LENGTH\(item\); it may hold comparisons, AND",
    "item IN (SELECT 1)": "holds more than a condition may",
    "rating > 1; DROP TABLE x": "holds more than a condition may",
    "read_csv('x.csv') IS NULL": "calls a function",
    "rating > 3 AND 2": "2 stands in the wrong place",
    "rating > 9": "holds for none of 6 rows of t.csv",
    "kind > 3": "t.csv line 2: kind is 'a', which where compares with a number; correct the row or where",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("where", CONDITIONS)
def test_a_condition_keeps_the_rows_for_which_it_holds(where):
    rows, left_out = read_interactions("t.csv", RATED, where=where)
    assert "".join(item[1] for _, item, _ in rows) == CONDITIONS[where]
    assert left_out == {f"not {where}": 6 - len(rows)}


@pytest.mark.parametrize("where", BAD_CONDITIONS)
def test_a_bad_condition_is_refused(where):
    refused(BAD_CONDITIONS[where], "t.csv", RATED, where=where)


def test_a_row_that_a_condition_excludes_may_hold_anything():
    rows = [{"user": "u", "item": "a", "buy": True}, {"user": None, "item": "b", "buy": False}]
    assert read_interactions("t.jsonl", rows, where="buy") == ([("u", "a", None)], {"not buy": 1})


def refused(message, name, content=None, error=ValueError, **options):
    """The line with which interactions are refused."""
    with pytest.raises(error, match=message) as caught:
        read_interactions(name, content, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_rows_are_left_out_and_counted_by_reason():
    rows = "user,item,time\nu,a,1\nu,b\n,c,3\nu,,4\nu,d,noon\nu,e,5,6,7\nu,f,7\n"
    refused(
        "t.csv cannot be read: CSV Error on Line: 3, .*Expected Number of Columns: 3 Found: 2; .*drop", "t.csv", rows
    )
    kept, left_out = read_interactions("t.csv", on_bad_rows="drop")
    assert [item for _, item, _ in kept] == ["a", "f"]
    assert left_out == {
        "line with missing columns": 1, "line with too many columns": 1, "user is empty": 1, "item is empty": 1,
        "time is not a number of seconds or a date": 1,
    }  # fmt: skip
    write(Path("t.jsonl"), '{"user": "u", "item": "a"}\n[1]\n{"user": \n')
    assert read_interactions("t.jsonl", on_bad_rows="drop") == ([("u", "a", None)], {"line that is no JSON object": 2})
    refused("has no row that can be used: user is empty .1 rows", "t.csv", "user,item\n,a\n", on_bad_rows="drop")


def test_a_line_is_counted_as_an_editor_does():
    refused("t.csv line 6: time is 'x'", "t.csv", 'user,item,time\nu,"a\nb",1\n\nu,c,2\nu,d,x\n')
    write(Path("1.jsonl"), [{"user": "u", "item": "a", "time": 1}])
    write(Path("2.jsonl"), '\n{"user": "u", "item": "b", "time": "x"}\n')
    refused("^2.jsonl line 2: time is 'x', not a number", "*.jsonl")
    refused(
        "^p.parquet row 2: time is 'x'",
        "p.parquet",
        pa.table({"user": ["u"] * 2, "item": ["a"] * 2, "time": ["1", "x"]}),
    )


HEADERLESS = "".join(f"{user}\t{item}\t{881250949 + item}\n" for user in (196, 186) for item in range(242, 248))


def test_each_cure_for_a_table_without_a_header_works():
    """As somebody follows the messages one after the other, no interaction is lost."""
    line = refused("u.data, whose suffix tells no format; set the format: one of csv, tsv", "u.data", HEADERLESS)
    assert 'csv: {separator: "::"}' in line
    line = refused("it has 196\t242\t881251191; its first line is one column", "u.data", format="csv")
    assert line.endswith('set csv: {separator: "\\t"}')
    for columns in ({}, {"columns": {"user": 196, "item": "242", "time": 881251191}}):
        line = refused("its first line looks like data, no header", "u.data", csv={"separator": "\\t"}, **columns)
        assert line.endswith("name its columns in csv: {header: [user, item, ...]}")
    line = refused(
        "Expected Number of Columns: 2 Found: 3; correct csv: {header",
        "u.data",
        format="tsv",
        csv={"header": ["user", "item"]},
    )
    written = {"separator": "\\t", "header": ["user", "item", "time"]}
    rows, left_out = read_interactions("u.data", csv=written)
    assert len(rows) == 12 and left_out == {} and rows[0] == ("196", "242", 881251191.0)


def test_words_that_stand_in_their_column_again_are_no_header():
    refused(
        "maps user to 'u0', but its first line looks like data",
        "t.csv",
        "u0,i0\nu0,i1\nu1,i0\n",
        columns={"user": "u0", "item": "i0"},
    )


ENCODED = "user;item\nü;é\n".encode("latin-1")
LATE = b"user,item\n" + b"u,a\n" * 9000 + "u,é\n".encode("latin-1")
FILES = {  # kind -> name, content, options, message
    "another encoding": ("t.csv", ENCODED, {}, "t.csv is not UTF-8 text.*; set csv: {encoding: latin-1}"),
    "an encoding in the middle": ("t.csv", LATE, {}, "Line: 9002, .*not utf-8.*; set csv: {encoding"),
    "an encoding that is none": ("t.csv", ENCODED, {"csv": {"encoding": "latin-x"}}, "'latin-x', which there is no"),
    "a wrong encoding": ("t.csv", ENCODED, {"csv": {"encoding": "ascii"}}, "t.csv is not ascii text"),
    "a key of csv": ("t.csv", RATED, {"csv": {"sep": ";"}}, "csv has the unknown key 'sep'; known: separator"),
    "no separator": ("t.csv", RATED, {"csv": {"separator": ""}}, "csv has the separator ''; give 1 to 4 characters"),
    "no header": ("t.csv", RATED, {"csv": {"header": False}}, "csv has the header False; give the names of"),
    "csv of Parquet": ("t.parquet", RATED, {"format": "parquet", "csv": {"separator": ";"}}, "read as parquet; rem"),
    "a table in .txt": ("t.txt", "1 a 5 4\n1 b 3 9\n", {}, '4 words.*; set csv: {separator: " "}.*; or format: s3rec'),
    "ratings in .txt": ("t.txt", "1 a 5.0\n2 b 3.5\n", {}, "each line has 3 words, a time or a rating among them"),
    "tabs in .txt (Gowalla)": ("t.txt", "1\t2010\t30.2\n1\t2010\t4\n", {}, 'of a table; set csv: {separator: "\\\\t"'),
    "a sequence of nothing": ("t.txt", "1 a b\n2\n", {}, "t.txt line 2: a sequence without an item"),
    "numbers of items": ("item2id.json", '{"a": 0}', {}, "the value of 'a' is 0, but .* are lists of items"),
    "a column twice": ("t.csv", "user,item,item\nu,a,b\n", {}, "names a column twice in its header .user, item, item"),
    "a needed column without a say": ("t.csv", RATED, {"columns": {"user": None}}, "null for user, which is needed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_read_right_is_refused(kind):
    name, content, options, message = FILES[kind]
    refused(message, name, content, **options)


def test_a_pattern_a_folder_of_two_tables_and_a_script_are_refused():
    refused("logs/[*].csv, a pattern that no file matches", "logs/*.csv", error=FileNotFoundError)
    write(Path("two/inter.csv"), RATED), write(Path("two/items.csv"), "item,title\na,b\n")
    refused("whose files are no parts of one table: two/inter.csv has user.* and two/items.csv has item, title", "two")
    write(Path("two/items.csv"), "user,item,kind,time,rating\n")
    refused("whose files are no parts of one table", "two")
    write(Path("kinds/a.csv"), RATED), write(Path("kinds/b.jsonl"), [{}])
    refused("holds files of several formats: a.csv .csv., b.jsonl .jsonl.", "kinds")
    write(Path("script/script.py"), "")
    refused("script, which datasets cannot load: .*; name its files", "script")


def test_sequences_are_no_items_and_items_twice_are_told_or_dropped():
    with pytest.raises(ValueError, match="items is s.txt, and a text file of sequences has no items' columns; set it"):
        read_items("s.txt", "1 a b\n2 c d e\n")
    rows = "item,title\na,A\n,x\na,B\n"
    with pytest.raises(ValueError, match="i.csv line 3: item is empty; fill it"):
        read_items("i.csv", rows)
    kept, left_out = read_items("i.csv", rows, on_bad_rows="drop")
    assert (kept, left_out) == ([("a", "A", "")], {"item is empty": 1, "item stands there before": 1})


def prepared(rows, **options):
    """The stage's tables of (user, item) in order of time; sequences by user."""
    text = "".join(f"{user},{item},{time}\n" for time, (user, item) in enumerate(rows))
    write(Path("t.csv"), f"user,item,time\n{text}")
    found = prepare(data.DataArguments(run_dir="run", interactions="t.csv", **{"min_history": 1, **options}))
    items, taken = found.items["item_id"].to_pylist(), found.interactions
    users = found.users["user_id"].to_pylist()
    sequences = {user: "" for user in users}
    for row in taken.to_pylist():
        sequences[users[row["user"]]] += items[row["item"]]
    return found, sequences


WALK = [("u", item) for item in "aabcabbdca"]


@pytest.mark.parametrize(("dedupe", "kept"), [("first", "abcd"), ("last", "bdca"), ("consecutive", "abcabdca")])
def test_repetitions_are_dropped(dedupe, kept):
    found, sequences = prepared(WALK, dedupe=dedupe)
    assert sequences == {"u": kept} and found.left_out == {f"dedupe: {dedupe}": 10 - len(kept)}


def test_items_need_metadata_only_in_the_core_and_may_do_without():
    rows = [("u", item) for item in "abcdex"] + [("v", item) for item in "edcbay"]
    write(Path("i.csv"), "item,title\n" + "".join(f"{item},T{item}\n" for item in "abcdz"))
    with pytest.raises(
        ValueError, match="t.csv line 6: item 'e' is not in i.csv; .* 3 items in 4 of 12 inter.*: set w"
    ):
        prepared(rows, items="i.csv")
    with pytest.raises(ValueError, match="t.csv line 6: item 'e' is not in i.csv; .* 1 items in 2 of 12 inter"):
        prepared(rows, items="i.csv", min_item_interactions=2)
    found, sequences = prepared(rows, items="i.csv", min_item_interactions=2, without_metadata="drop")
    assert sequences == {"u": "abcd", "v": "dcba"} and found.left_out == {"item without metadata": 2}
    found, sequences = prepared(rows, items="i.csv", without_metadata="keep")
    assert sequences == {"u": "abcdex", "v": "edcbay"}
    assert dict(zip(*(found.items[name].to_pylist() for name in ("item_id", "title")), strict=True)) == {
        **{item: f"T{item}" for item in "abcdz"},
        **dict.fromkeys("exy", ""),
    }


def test_a_random_split_never_puts_one_pair_on_both_sides():
    rows = [("u", item) for item in "abcdefgh" * 5] + [("v", item) for item in "abcabcabcdddd"]
    found, _ = prepared(rows, split="random", seed=3, valid_fraction=0.2, test_fraction=0.2)
    sides = {}
    for row in found.interactions.to_pylist():
        sides.setdefault((row["user"], row["item"]), set()).add(row["split"].replace("rerank", "train"))
    assert {len(of_pair) for of_pair in sides.values()} == {1}
    of_u = [next(iter(side)) for (user, _), side in sides.items() if user == 0]
    assert [of_u.count(split) for split in ("train", "valid", "test")] == [4, 2, 2]


def test_the_summary_tells_how_many_targets_stand_in_their_own_history():
    found, _ = prepared(
        [("u", item) for item in "abcad"] + [("v", item) for item in "abcdef"], min_history=2, num_rerank=2
    )
    summary = found.summary  # u: c (rerank), a (valid), d; v: c d e f
    assert summary["share_of_targets_in_history"] == pytest.approx(1 / 7)
    assert "14.3% of targets are in their own history" in " ".join(found.notes)


def test_lists_hold_items_of_the_history_where_they_may():
    counts = Counts.fit({0: np.array([0, 1, 2, 0, 1]), 1: np.array([0, 1, 0, 1, 3])}, 5)
    histories = [np.array([0, 1] * 20)]
    assert {*counts.top_rows(histories, 3)[0][0].tolist()} == {2, 3, 4}
    assert {0, 1} < {*counts.top_rows(histories, 3, exclude_seen=False)[0][0].tolist()}  # which follow each other
    with pytest.raises(ValueError, match="row 0 has seen all but 3 of 5 items"):
        counts.top_rows(histories, 4)
    assert sorted(counts.top_rows(histories, 5, exclude_seen=False)[0][0].tolist()) == [0, 1, 2, 3, 4]


def test_recall_counts_distinct_targets():
    found = metrics_of_sets(np.array([[7, 8, -1]]), [np.array([7, 7, 7, 9])])
    assert found["R@20"].tolist() == [0.5]


def test_requests_are_read_with_keys_of_their_own():
    lines = "".join(f"r{n};u{n % 3};{n};a b c;{n % 2} 1 0\n" for n in range(12))
    write(Path("log.txt"), lines)
    header = ["request", "user", "time", "candidates", "relevance"]
    options = {"split": "by_time", "requests_csv": {"separator": ";", "header": header}, "valid_fraction": 0.2}
    found = prepare(data.DataArguments(run_dir="run", requests="log.txt", **options))
    assert len(found.log) == 12 and found.items["item_id"].to_pylist() == list("abc")
    assert found.log.request_ids.to_pylist() == [f"r{n}" for n in range(12)]
