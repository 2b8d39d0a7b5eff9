"""Rows that are made when they are read train, resume and are refused as rows that were made beforehand."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_dapo import rows as dapo_rows
from scripted_dapo import stream
from tiny_model import sft_config
from toy_run import finish, toy_sequences, write_interactions, write_run, write_traces
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rerank import sft
from rerank.baselines import Counts
from rerank.rows import RankingRow, on_read, read_rows, training_rows
from rerank.rows.dataset import RowDataset
from rerank.rows.on_read import MadeOnRead, joined, places_to_check, read_parts
from rerank.rows.stored import HitLists, TrainingLists, hits

GRADES = [
    [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [None, 1.0], [None, 1.0, 0.0], [math.nan, 2.0, 1.0], [], None, [-1.0, 0.0],
    [2.0, 1.0, 1.0, 0.0],
]  # fmt: skip


def test_a_sequence_makes_its_entries_each_time_that_they_are_read():
    read = []
    squares = MadeOnRead(4, lambda place: read.append(place) or place**2)
    assert (len(squares), squares[-1], squares[1:3], list(squares)) == (4, 9, [1, 4], [0, 1, 4, 9])
    assert read == [3, 1, 2, 0, 1, 2, 3]
    with pytest.raises(IndexError):
        squares[4]
    assert list(joined([[1], [], [2, 3], squares])) == [1, 2, 3, 0, 1, 4, 9]


def test_few_rows_are_all_checked_beforehand_and_of_more_a_seeded_sample(monkeypatch):
    monkeypatch.setattr(on_read, "CHECKED_ROWS", 10)
    monkeypatch.setattr(on_read, "SAMPLED_ROWS", 5)
    assert places_to_check(10) == list(range(10))
    sample = places_to_check(1000)
    assert len(set(sample)) == 5 and sample == sorted(sample) == places_to_check(1000) and max(sample) < 1000


def test_a_dataset_reads_the_rows_that_it_is_asked_for():
    dataset = RowDataset.of(MadeOnRead(3, lambda place: {"input_ids": [place] * (place + 1)}))
    assert len(dataset) == 3 and next(iter(dataset)) == {"input_ids": [0]}
    assert dataset.__getitems__([2, 0]) == [{"input_ids": [2, 2, 2]}, {"input_ids": [0]}] == [dataset[2], dataset[0]]


def test_hits_of_a_column_are_those_of_the_rows():
    records = [
        {"row_id": 0, "history": [], "candidates": list(range(len(of or []))), "relevance": of} for of in GRADES
    ]
    assert hits(pa.array(GRADES)).tolist() == [RankingRow.of(record).is_hit for record in records]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Finished stages up to traces, with an accepted attempt on each sft row; rows stand in no order of row_id."""
    run = write_run(tmp_path_factory.mktemp("on_read") / "run")
    write_interactions(run / "data", items=12, users=30, interactions=240)
    path = run / "candidates/train.parquet"
    table = pq.read_table(path)
    table = table.append_column("list_number", pa.array([user % 2 for user in table["user"].to_pylist()]))
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    Counts.fit(toy_sequences(), 12).save(run / "candidates/evidence.npz")
    row_ids = [row.row_id for row in read_rows(path)]
    write_traces(run / "traces", {row_id: ("sft", "sft", "dapo")[row_id % 3] for row_id in row_ids})
    chosen = [row.row_id for row in training_rows(run, "sft")]
    accepted = [
        {"row_id": row_id, "trace": f"because {row_id}", "order": [2, 0, 1, 3]} for row_id in [*chosen[::-1], -1]
    ]
    pq.write_table(pa.Table.from_pylist(accepted), run / "traces/accepted.parquet")
    finish(run / "traces")
    return run


@pytest.mark.parametrize("use", ["sft", "dapo", "all"])
def test_stored_rows_are_those_that_are_read_into_memory(run, tmp_path, use):
    lists, wanted = TrainingLists.find(run, use), training_rows(run, use, needs_features=True)
    stored = lists.stored(tmp_path / "rows.arrow", needs_features=True)
    assert list(stored) == wanted and len(wanted) > 5
    assert all(np.array_equal(one.features, other.features) for one, other in zip(stored, wanted, strict=True))
    assert lists.used.tolist() == [row.row_id for row in wanted]
    assert lists.list_numbers.tolist() == [row.list_number for row in wanted]
    assert lists.num_positives.tolist() == [len(row.positives) for row in wanted]
    assert lists.first_only().used.tolist() == [row.row_id for row in wanted if row.list_number == 0]


def test_the_lists_that_trees_are_fitted_on_are_those_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(on_read, "CHUNK", 7)
    table = pq.read_table(run / "candidates/train.parquet")
    grades = table["relevance"].to_pylist()
    grades[0][grades[0].index(0.0)] = None  # one that was not seen
    for row in [*range(7, 14), *range(len(table) - 2, len(table))]:
        grades[row] = [0.0] * len(grades[row])  # parts without a hit, in the middle and at the end
    places = [table.column_names.index(name) for name in ("relevance", "user")]
    table = table.set_column(places[0], "relevance", pa.array(grades, pa.list_(pa.float64())))
    table = table.set_column(places[1], "user", pa.array([None, *table["user"].to_pylist()[1:]], pa.int64()))
    path = tmp_path / "data_of/candidates/train.parquet"
    path.parent.mkdir(parents=True)
    (tmp_path / "data_of/data").symlink_to(run / "data")
    pq.write_table(table, path)
    lists, wanted = HitLists.read(path), read_rows(path, needs_features=True)
    assert lists.users == [row.user for row in wanted] and None in lists.users
    for row, features, relevance in zip(wanted, lists.features, lists.relevance, strict=True):
        assert np.array_equal(features, np.asarray(row.features, dtype=np.float32))
        assert np.array_equal(relevance, row.relevance, equal_nan=True)
    assert len(wanted) < len(table) - 7 and any(np.isnan(of_row).any() for of_row in lists.relevance)
    features = [of_row[: 2 + row % 2] for row, of_row in enumerate(table["features"].to_pylist())]
    place = table.column_names.index("features")
    pq.write_table(table.set_column(place, "features", pa.array(features, table["features"].type)), path)
    with pytest.raises(ValueError, match=r"row_id \d+: features has 2 entries but there are 4 candidates; run the"):
        HitLists.read(path)
    pq.write_table(table.drop_columns("user"), path)
    with pytest.raises(ValueError, match="has no column 'user'"):
        HitLists.read(path)


def test_a_file_is_read_in_parts(run, monkeypatch):
    monkeypatch.setattr(on_read, "CHUNK", 7)
    parts = list(read_parts(run / "candidates/train.parquet", ["row_id"]))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]


def train(run, folder, steps=4, **options):
    """The sft stage's log of losses, and the weights."""
    args, folder = sft.SftArguments(run_dir=str(run), eval_rows=0), folder / "sft"
    settings = {"logging_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_length": 512}
    config = sft_config(
        folder / "checkpoints", max_steps=steps, save_strategy="steps", save_steps=2, **settings, **options
    )
    metrics = sft.fit(args, config, ModelConfig(), folder / "model", with_trace=True)
    losses = [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]
    assert not (folder / "checkpoints/rows").exists()
    return losses, AutoModelForCausalLM.from_pretrained(folder / "model").state_dict(), metrics


def few_checked(monkeypatch):
    monkeypatch.setattr(on_read, "CHECKED_ROWS", 3)
    monkeypatch.setattr(on_read, "SAMPLED_ROWS", 3)


def test_rows_that_workers_read_train_and_resume_as_those_in_memory(run, tmp_path, monkeypatch):
    losses, weights, metrics = train(run, tmp_path / "all")
    few_checked(monkeypatch)
    assert train(run, tmp_path / "workers", dataloader_num_workers=2)[0] == losses
    train(run, tmp_path / "resumed", steps=2)
    rest, resumed, others = train(run, tmp_path / "resumed", dataloader_num_workers=1)
    assert rest == losses and others["rows"] == metrics["rows"] == len(training_rows(run, "sft"))
    assert all(value.equal(resumed[name]) for name, value in weights.items())


def test_a_row_beyond_a_limit_is_refused_when_it_is_read_where_the_sample_lacks_it(run, tmp_path, monkeypatch):
    few_checked(monkeypatch)
    path = run / "traces/accepted.parquet"
    table = pq.read_table(path)
    place = next(place for place in range(len(table)) if place not in places_to_check(len(table) - 1))
    traces = table["trace"].to_pylist()
    traces[place] = "because " * 400
    row_id = table["row_id"][place].as_py()
    pq.write_table(table.set_column(1, "trace", pa.array(traces)), path)
    try:
        with pytest.raises(
            ValueError, match=rf"1 of 1 rows are longer than max_length 512; .*in row_id {row_id}, of 4"
        ):
            train(run, tmp_path, steps=len(table))
    finally:
        pq.write_table(table, path)


def test_a_prompt_of_dapo_is_checked_when_it_is_drawn():
    prompts, drawn = stream(), []
    prompts.check = lambda asked: drawn.append(asked.row.row_id)
    taken = prompts.take(0, 7)
    assert drawn == [prompt.asked.row.row_id for prompt in taken] and len(drawn) == 7
    assert {row.row_id for row in dapo_rows()} == set(drawn[:5])
