"""The candidates stage a part of the rows at a time: the same tables whatever the size of a part."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from request_run import draw_requests, write_requests
from toy_run import finish, toy_sequences, write_interactions, write_items, write_semantic_ids

from rerank import candidates
from rerank.baselines import Counts, feature_names, regression
from rerank.candidates import CandidatesArguments, counting, making
from rerank.rows import TargetRows

SIZE = 3
SEQUENCES = toy_sequences()
SPLITS = ["train"] * 4 + ["rerank"] * 2 + ["valid", "test"]
FURTHER = {"lists_per_row": 3, "pool_size": 5, "first_stages": ["transitions", "ease"], "cut_histories": True}
FURTHER |= {"shuffle_candidates": True}


def tables_of(run, out, **options):
    """The stage's metrics and tables."""
    out.mkdir()
    args = CandidatesArguments(run_dir=str(run), **options)
    candidates.check(args)
    metrics = candidates.main(args, out)
    assert sorted(path.name for path in out.iterdir()) == [
        *("evidence.npz", "features.json", "test.parquet", "train.parquet", "valid.parquet")
    ]
    tables = {name: pq.read_table(out / f"{name}.parquet") for name in candidates.FILES.values()}
    return {**metrics, "seconds": 0, "counts_seconds": 0}, tables, (out / "features.json").read_text()


@pytest.fixture
def run(tmp_path):
    write_items(tmp_path / "run/data")
    write_interactions(tmp_path / "run/data", SEQUENCES, SPLITS * len(SEQUENCES))
    write_semantic_ids(tmp_path / "run/semantic_ids")
    finish(tmp_path / "run/semantic_ids")
    return tmp_path / "run"


@pytest.mark.parametrize("options", [FURTHER, {"source": "lambdamart"}])
def test_tables_do_not_depend_on_the_size_of_a_part(run, tmp_path, monkeypatch, options):
    whole = tables_of(run, tmp_path / "whole", num_candidates=SIZE, **options)
    monkeypatch.setattr(counting, "PART", 7)
    parts = tables_of(run, tmp_path / "parts", num_candidates=SIZE, **options)
    assert whole[0] == parts[0] and whole[2] == parts[2]
    for name, table in whole[1].items():
        assert parts[1][name].combine_chunks().equals(table.combine_chunks())
    groups = pq.read_metadata(tmp_path / "parts/train.parquet").num_row_groups
    assert groups >= 60 // 7 > pq.read_metadata(tmp_path / "whole/train.parquet").num_row_groups


@pytest.mark.parametrize("first_stage", ["lists", "model_dir"])
def test_trees_reorder_lists_of_a_file_or_a_model(run, tmp_path, monkeypatch, first_stage):
    rows, ids = TargetRows.load(run), np.array(making.read_item_ids(run))
    items = np.array([np.random.default_rng(row).permutation(12)[:4] for row in rows.row_ids])
    pq.write_table(pa.table({"row_id": rows.row_ids, "candidates": ids[items].tolist()}), tmp_path / "lists.parquet")
    monkeypatch.setattr(candidates, "check_model_dir", lambda *given: None)
    monkeypatch.setattr(candidates, "refuse_seen_targets", lambda *given: None)
    logps = np.tile(-np.arange(4.0), (len(rows), 1))
    monkeypatch.setattr(making, "model_lists", lambda args, rows: [(np.arange(len(rows)), items, logps)])
    given = {"lists": str(tmp_path / "lists.parquet"), "model_dir": "next/model"}
    options = {"num_candidates": 4, first_stage: given[first_stage]}
    _, tables, names = tables_of(run, tmp_path / "out", source="lambdamart", **options)
    places = {row_id: place for place, row_id in enumerate(rows.row_ids.tolist())}
    moved = 0
    for row in (row for table in tables.values() for row in table.to_pylist()):
        shown = items[places[row["row_id"]]].tolist()
        assert sorted(row["candidates"]) == sorted(shown)
        assert row["first_stage_scores"] == sorted(row["first_stage_scores"], reverse=True)
        place = json.loads(names)["names"].index("place")
        assert [facts[place] for facts in row["features"]] == [1, 2, 3, 4]
        moved += row["candidates"] != shown
    assert moved > len(rows) / 2


def test_tables_of_requests_do_not_depend_on_the_size_of_a_part(tmp_path, monkeypatch):
    write_requests(tmp_path / "run", draw_requests(), split="by_user")
    finish(tmp_path / "run/semantic_ids")
    options = {"source": "requests", "lists_per_row": 2, "shuffle_candidates": True}
    whole = tables_of(tmp_path / "run", tmp_path / "whole", **options)
    monkeypatch.setattr(counting, "PART", 5)
    parts = tables_of(tmp_path / "run", tmp_path / "parts", **options)
    assert whole[0] == parts[0] and whole[2] == parts[2]
    for name, table in whole[1].items():
        assert repr(parts[1][name].to_pylist()) == repr(table.to_pylist())  # a fact that is unknown is nan


def test_counts_of_the_stage_keep_the_neighbours_asked_for(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tables_of(run, tmp_path / "cut", num_candidates=SIZE, neighbours=2)
    counts = Counts.load(tmp_path / "cut/evidence.npz")
    assert np.diff(counts.near.indptr).max() == 2 == counts.neighbours
    assert "counts keep the 2 best neighbours of each item (neighbours)" in caplog.text
    with pytest.raises(ValueError, match="neighbours is 0"):
        CandidatesArguments(run_dir=str(run), neighbours=0)


def test_items_without_weights_have_no_fact_of_the_linear_model(run, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(regression, "MAX_ITEMS", 9)
    monkeypatch.setattr(regression, "MANY_ITEMS", 12)  # all of them
    _, tables, _ = tables_of(run, tmp_path / "few", num_candidates=SIZE)
    assert "fit_history and fit_recent are of the 9 most popular items; 3 have no weights" in caplog.text
    counts = Counts.load(tmp_path / "few/evidence.npz")
    names = feature_names(counts)
    for row in tables["test"].to_pylist():
        fits = np.array(row["features"])[:, names.index("fit_history")]
        assert np.array_equal(np.isnan(fits), counts.regression.places[row["candidates"]] < 0)
    assert np.isnan(np.concatenate(tables["train"]["features"].to_pylist())).any()
