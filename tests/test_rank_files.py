"""Files of rows to rank: what comes in comes back as it came, and what cannot be written is refused beforehand."""

import datetime
import json
import shutil
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import write_run

from rerank import cli, rank
from rerank.models.ranker import Answer
from rerank.rank.files import ADDED, FORMATS, open_output, read_rows_file

ROWS = [
    {"row_id": "5", "history": ["m0", "m1"], "candidates": ["m2", "m3", "m4", "m5"]},
    {"row_id": "9", "history": ["m7"], "candidates": ["m8", "m9", "m1", "m0"]},
]
DONE = {"ranking": ["m5", "m4", "m3", "m2"], "failure": None, "trace": "because"}
FAILED = {"ranking": None, "failure": "no item", "trace": None}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("rank") / "run") / "sft/model"


def write_rows(folder, suffix, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        lines = [f"{row['row_id']},{' '.join(row['history'])},{' '.join(row['candidates'])}" for row in rows]
        path.write_text("\n".join(["row_id,history,candidates", *lines]) + "\n")
    return path


def written(path, out, added):
    """The text or table that is written of a file's rows."""
    open_output(read_rows_file(path), out)(added)
    return pq.read_table(out) if out.suffix == ".parquet" else out.read_text()


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_read_alike_and_written_with_rankings_in_every_format(tmp_path, suffix):
    path = write_rows(tmp_path, suffix)
    assert read_rows_file(path).rows == ROWS
    table = written(path, tmp_path / "out.parquet", [DONE, FAILED])
    assert [row["ranking"] for row in table.to_pylist()] == [DONE["ranking"], None]
    lines = [json.loads(line) for line in written(path, tmp_path / "out.jsonl", [DONE, FAILED]).splitlines()]
    assert [line["row_id"] for line in lines] == ["5", "9"] and lines[0]["trace"] == "because"
    assert written(path, tmp_path / "out.csv", [DONE, FAILED]).splitlines() == [
        "row_id,history,candidates,ranking,failure,trace",
        "5,m0 m1,m2 m3 m4 m5,m5 m4 m3 m2,,because",
        "9,m7,m8 m9 m1 m0,,no item,",
    ]
    failed = written(path, tmp_path / "out.parquet", [FAILED, FAILED])  # columns of null keep their type
    assert (
        failed.schema.field("ranking").type == pa.list_(pa.string()) and failed.schema.field("trace").type == "string"
    )


def test_text_of_csv_comes_back_as_it_was(tmp_path):
    header = "session,time,title,history,candidates,flag"
    lines = ['007,12:30,"a ""b"",\nc",00 01,12345678901234567890 2,TRUE', "1e5, x ,,,3  4,"]
    (tmp_path / "rows.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8-sig")
    assert read_rows_file(tmp_path / "rows.csv").rows[0]["candidates"] == ["12345678901234567890", "2"]
    text = written(tmp_path / "rows.csv", tmp_path / "out.csv", [FAILED, FAILED])
    assert text == "\n".join([f"{header},{','.join(ADDED)}", *(f"{line},,no item," for line in lines)]) + "\n"


def test_values_of_json_come_back_as_they_were_of_mixed_types_too(tmp_path):
    rows = [
        {"history": [], "candidates": ["B0", 2], "session": 12345678901234567890123, "more": {"A": 1, "a": None}},
        {"history": ["0A-F"], "candidates": ["\ud800", 7], "session": "007", "price": 0.1, "more": [1, "x"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = written(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", [FAILED, DONE])
    assert [json.loads(line) for line in text.splitlines()] == [{**rows[0], **FAILED}, {**rows[1], **DONE}]
    message = r"rows.jsonl: column 'candidates' does not fit into Parquet: .*; give an --out that ends in .jsonl"
    with pytest.raises(ValueError, match=message):
        open_output(read_rows_file(tmp_path / "rows.jsonl"), tmp_path / "out.parquet")


def test_types_of_parquet_come_back_as_they_were(tmp_path):
    columns = {
        "history": pa.array([[1]], pa.list_(pa.int16())),
        "candidates": pa.array([[2, 3]], pa.list_(pa.int16())),
    }
    columns |= {"at": pa.array([datetime.datetime(2026, 1, 2)], pa.timestamp("ms", "UTC"))}
    columns |= {"price": pa.array([Decimal("1.10")]), "kind": pa.array(["x"]).dictionary_encode()}
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "rows.parquet")
    out = written(tmp_path / "rows.parquet", tmp_path / "out.parquet", [{**DONE, "ranking": [3, 2]}])
    assert out.select(table.column_names).equals(table)
    assert out.schema.field("ranking").type == pa.list_(pa.int16()) and out["ranking"].to_pylist() == [[3, 2]]
    message = r"rows.parquet, row 1 does not fit into JSON: .*datetime.*; give an --out that ends in .parquet"
    with pytest.raises(ValueError, match=message):
        open_output(read_rows_file(tmp_path / "rows.parquet"), tmp_path / "out.jsonl")


def test_numbers_of_json_lines_come_back_as_they_were_written(tmp_path):
    lines = [
        '{"history": [], "candidates": ["a", "b"], "price": [1.10, Infinity] }',
        '{"candidates":["c"],"history":[],"price":1e5}',
    ]
    (tmp_path / "rows.jsonl").write_text("\r\n".join(lines))
    text = written(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", [FAILED, FAILED])
    added = ', "ranking": null, "failure": "no item", "trace": null}'
    assert text.splitlines() == [lines[0].removesuffix(" }") + added, lines[1].removesuffix("}") + added]


@pytest.mark.parametrize("values", [[1, 2.5], [{"a": 1}, {"a": 2.5}], [[1], [2.5]]])
def test_whole_numbers_among_others_are_refused_for_parquet(tmp_path, values):
    rows = [{"history": [], "candidates": ["a", "b"], "price": value} for value in values]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"column 'price' does not fit into Parquet: .*; give an --out .* .jsonl"):
        open_output(read_rows_file(tmp_path / "rows.jsonl"), tmp_path / "out.parquet")


def test_what_json_lacks_of_parquet_is_null_and_a_name_that_two_columns_have_is_refused(tmp_path):
    numbers = [float("nan"), 1.0]
    columns = {"history": [["a"]], "candidates": [["b", "c"]], "price": numbers[:1], "more": [{"scores": numbers}]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    text = written(tmp_path / "rows.parquet", tmp_path / "out.jsonl", [DONE])
    assert '"price": null, "more": {"scores": [null, 1.0]}, "ranking"' in text and "NaN" not in text
    pq.write_table(
        pa.table([[["a"]], [["b"]], [1], [2]], ["history", "candidates", "x", "x"]), tmp_path / "rows.parquet"
    )
    with pytest.raises(
        ValueError, match=r"rows.parquet names a column twice \(history, candidates, x, x\); rename one"
    ):
        read_rows_file(tmp_path / "rows.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("out", FORMATS)
def test_a_row_that_cannot_be_read_has_its_reason_and_the_others_are_kept(tmp_path, suffix, out):
    path = write_rows(tmp_path, suffix)
    bad = '{"row_id": "7", "history": ["m' if suffix == ".jsonl" else "7,m0,m1 m2,m3"
    lines = path.read_text().rstrip().split("\n")
    path.write_text("\n".join([*lines[:-1], bad, lines[-1]]))
    rows = read_rows_file(path)
    assert [rows.rows[0], rows.rows[2]] == ROWS
    reason = (
        "line 2 is not JSON: Unterminated string" if suffix == ".jsonl" else "line 3 has 4 cells but the header has 3"
    )
    assert rows.rows[1].problem.startswith(reason)
    found = written(path, tmp_path / f"out{out}", [DONE, {**FAILED, "failure": "bad"}, FAILED])
    if out == ".parquet":
        assert found["failure"].to_pylist() == [None, "bad", "no item"]
        assert found["row_id"].to_pylist() == ["5", "7" if suffix == ".csv" else None, "9"]
    else:
        assert "bad" in found.splitlines()[-2] and "no item" in found.splitlines()[-1]
    path.write_text("\n".join([*lines[: 1 if suffix == ".csv" else 0], bad, bad]))
    with pytest.raises(ValueError, match=r"rows\..*, line \d (is not JSON|has 4 cells)"):
        read_rows_file(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"history": ["m0"]}', r"rows.jsonl: column 'candidates' is missing; it has history"),
        ("rows.csv", "user,candidates\n1,m1 m2\n", r"rows.csv: column 'history' is missing; it has user, candidates"),
        ("rows.jsonl", '{"history": [], "candidates": [], "trace": 1}', r"has a column 'trace' already"),
        ("rows.jsonl", "", r"rows.jsonl has no rows"),
        ("rows.csv", "history,candidates\n", r"rows.csv has no rows"),
        ("rows.jsonl", '\n{"a"\n{', r"rows.jsonl, line 2 is not JSON"),
        ("rows.jsonl", "[1]", r"rows.jsonl, line 1 is not an object"),
        ("rows.csv", "history,candidates\nm1\n", r"rows.csv, line 2 has 1 cells but the header has 2"),
        ("rows.csv", "history,candidates,history\nm1,m2,m3\n", r"rows.csv names a column twice"),
        ("rows.csv", b"history,candidates\n\xe9,m1 m2\n", r"rows.csv is not UTF-8 text"),
        ("rows.parquet", "text", r"rows.parquet is not Parquet"),
        ("rows.txt", "text", r"rows.txt must end in .parquet, .jsonl, .csv"),
    ],
)
def test_a_file_that_cannot_be_ranked_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_rows_file(tmp_path / name)


def test_what_is_not_there_or_cannot_be_written_is_refused_before_a_model_runs(model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "evidence.npz").unlink()
    write_rows(tmp_path, ".csv")
    (tmp_path / "spaced.jsonl").write_text('{"history": [], "candidates": ["a b", "c"]}')
    (tmp_path / "folder.csv").mkdir()
    for rows, out, message in (
        ("none.csv", "out.csv", "none.csv does not exist; give a file of rows to rank"),
        ("rows.csv", "nowhere/out.csv", "nowhere is not a folder; make it"),
        ("rows.csv", "folder.csv", "folder.csv cannot be written; choose another"),
        ("rows.csv", "out.xlsx", "out.xlsx must end in"),
        ("spaced.jsonl", "out.csv", "row 1: candidates holds 'a b', but CSV parts ids by spaces; give an --out"),
        ("rows.csv", "out.csv", "evidence.npz is missing, but the model's prompts show evidence"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            rank.rank_rows(model, tmp_path / rows, tmp_path / out)


def test_the_exit_code_says_that_rows_have_no_ranking(model_dir, tmp_path, monkeypatch, capsys):
    def answers(model, rows, constrained, one_token):
        return [Answer([1, 0], None, "so", "", 3, False) for _ in rows], 0.0

    monkeypatch.setattr(rank, "generate_answers", answers)
    (tmp_path / "rows.jsonl").write_text(
        '{"history": [], "candidates": ["m1", "m1"]}\n{"history": ["m0"], "candidates": ["m2", "m3"]}\n{"history"'
    )
    words = ["rank", str(model_dir), "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.main(words) == 3
    assert "2 rows have no ranking; see the column failure" in capsys.readouterr().err
    bad, good, unread = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert bad["failure"] == "candidates holds 'm1' twice; give each item once." and bad["ranking"] is None
    assert good["ranking"] == ["m3", "m2"] and good["failure"] is None and good["trace"] == "so"
    assert unread["failure"].startswith("line 3 is not JSON: ") and unread["ranking"] is None
    (tmp_path / "rows.jsonl").write_text('{"history": ["m0"], "candidates": ["m2", "m3"]}\n')
    assert cli.main(words) == 0
