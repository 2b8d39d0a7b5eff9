"""Histories of rows: those of interactions are stretches of their users' sequences, those of requests their own."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import finish, write_semantic_ids

from rerank import candidates, data
from rerank.candidates.row_lists import RowLists, as_table
from rerank.rows import Histories, TargetRows, read_records, read_rows
from rerank.rows.sequences import SEQUENCES, STARTS, history_columns

NUM_USERS = 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose data stage read users of 3 to 20 interactions, every training one a row."""
    folder = tmp_path_factory.mktemp("sequences")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), rng.integers(3, 21, NUM_USERS))
    lines = [f"u{user},i{rng.integers(12)},{time}" for time, user in enumerate(users)]
    (folder / "t.csv").write_text("\n".join(["user,item,time", *rng.permutation(lines)]))
    args = data.DataArguments(run_dir=str(folder), interactions=str(folder / "t.csv"), num_rerank="all")
    made = folder / "data"
    made.mkdir()
    finish(made, data.main(args, made))
    write_semantic_ids(folder / "semantic_ids")
    finish(folder / "semantic_ids")
    return folder


@pytest.fixture(scope="module")
def lists(run):
    """The candidates stage of that run, each training row with two lists, the second after a cut history."""
    made = run / "candidates"
    made.mkdir()
    options = dict(num_candidates=3, lists_per_row=2, cut_histories=True, exclude_seen=False)
    finish(made, candidates.main(candidates.CandidatesArguments(run_dir=str(run), **options), made))
    return made


def slow_histories(run):
    """row_id -> (history, target) by a loop over the interactions."""
    taken, found = {}, {}
    rows = {
        (row["user"], row["position"]): row["row_id"] for row in pq.read_table(run / "data/rows.parquet").to_pylist()
    }
    for row in pq.read_table(run / "data/interactions.parquet").to_pylist():
        before = taken.setdefault(row["user"], [])
        if (row["user"], row["position"]) in rows:
            found[rows[row["user"], row["position"]]] = (list(before), row["item"])
        before.append(row["item"])
    return found


def test_a_row_has_the_items_before_its_place(run):
    rows, wanted = TargetRows.load(run), slow_histories(run)
    assert len(rows) == len(wanted) > 50
    for row_id, history, target in zip(rows.row_ids.tolist(), rows.histories, rows.targets.tolist(), strict=True):
        assert (history.tolist(), target) == wanted[row_id] and history.dtype == np.int64
    assert rows.histories.lengths.tolist() == [len(wanted[row][0]) for row in rows.row_ids.tolist()]
    some = rows.take([7, 3]).histories
    assert [len(some), some[0].tolist(), some[-1].tolist()] == [2, *(wanted[rows.row_ids[row]][0] for row in (7, 3))]
    assert [history.tolist() for history in rows.histories[1:3]] == [wanted[row][0] for row in rows.row_ids[1:3]]


def test_files_hold_each_interaction_once(run, lists):
    items = np.load(run / "data" / SEQUENCES, mmap_mode="r")
    assert items.dtype == np.int32 and len(items) == pq.read_metadata(run / "data/interactions.parquet").num_rows
    assert np.load(run / "data" / STARTS)[[0, -1]].tolist() == [0, len(items)]
    for path in (run / "data/rows.parquet", lists / "train.parquet"):
        assert history_columns(pq.read_schema(path).names) == ("position", "history_length")


def test_lists_are_read_with_the_histories_that_they_were_made_after(run, lists):
    wanted, first_id = slow_histories(run), len(pq.read_table(run / "data/rows.parquet"))
    records, cut = read_records(lists / "train.parquet"), 0
    for row in records:
        history, _ = wanted[row["row_id"] % first_id]
        if row["list_number"]:
            assert row["history"] and row["history"] == history[-len(row["history"]) :]
            cut += row["history"] != history
        else:
            assert row["history"] == history
    assert cut > 3
    assert [row.history for row in read_rows(lists / "test.parquet")] == [
        tuple(row["history"]) for row in read_records(lists / "test.parquet") if row["relevance"].count(1.0)
    ]


def test_own_histories_are_written_and_read_alike(tmp_path):
    column = pa.chunked_array([[[3, 1], None], [[], [2]]], pa.list_(pa.int64()))
    own = Histories.of_column(column).take([3, 0, 1, 2])
    assert [history.tolist() for history in own] == [[2], [3, 1], [], []]
    one = np.array([1, 0])
    rows = TargetRows(np.arange(4), np.arange(4), own, np.zeros(4, dtype=int), np.array(["test"] * 4))
    made = RowLists.of_first_stage(rows, [one] * 4, [one] * 4)
    table = as_table(rows, replace(made, features=[np.zeros((2, 1), dtype=np.float32)] * 4))
    pq.write_table(table, tmp_path / "test.parquet")
    assert [row.history for row in read_rows(tmp_path / "test.parquet")] == [(2,), (3, 1), (), ()]


def test_rows_without_their_sequences_are_refused(run, lists, tmp_path):
    other = tmp_path / "run"
    for name in ("data", "candidates"):
        shutil.copytree(run / name, other / name)
    table = pq.read_table(other / "candidates/test.parquet")
    lost = table.drop_columns("position")
    pq.write_table(lost, other / "candidates/test.parquet")
    with pytest.raises(ValueError, match="test.parquet has neither a column history nor .*; run the stage"):
        read_rows(other / "candidates/test.parquet")
    far = np.full(len(table), 99)
    moved = table.set_column(table.column_names.index("position"), "position", pa.array(far))
    pq.write_table(moved, other / "candidates/test.parquet")
    with pytest.raises(ValueError, match="test.parquet, row 0: user 0 has no position 99 in .*sequences.npy; run"):
        read_rows(other / "candidates/test.parquet")
    (other / "data" / SEQUENCES).unlink()
    with pytest.raises(FileNotFoundError, match="data/sequences.npy is not there, .*--force data"):
        TargetRows.load(other)
