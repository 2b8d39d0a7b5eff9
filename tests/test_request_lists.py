"""The candidates stage on requests: the lists of the log, and counts that a training row may know."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from request_run import DAY, draw_requests, liked, write_requests
from toy_run import finish

from rerank import candidates
from rerank.baselines import EMBEDDING_FEATURES, FEATURES, Counts, ItemFacts, feature_names, list_features
from rerank.baselines.interactions import engine
from rerank.candidates import CandidatesArguments, counting, reordering
from rerank.candidates.counting import Events, counted_rows, item_facts
from rerank.candidates.making import asked_parts, make, stored_lists
from rerank.rows import TargetRows, read_rows

SOURCES = ("requests", "lambdamart")


@pytest.fixture(params=["by_user", "by_time"])
def run(request, tmp_path):
    """A run with a data stage of requests and no semantic ids."""
    write_requests(tmp_path, draw_requests(), split=request.param)
    finish(tmp_path / "semantic_ids")
    return tmp_path


@pytest.fixture
def con():
    with engine() as con:
        yield con


def run_stage(run, **options):
    """The stage's metrics and the rows of each of its tables."""
    args = CandidatesArguments(run_dir=str(run), **{"source": "requests", **options})
    candidates.check(args)
    (run / "out").mkdir()
    metrics = candidates.main(args, run / "out")
    return metrics, {
        name: pq.read_table(run / f"out/{name}.parquet").to_pylist() for name in ("train", "valid", "test")
    }


def features_with(run, events, rows):
    """Features of all rows by these events, and their names."""
    counts = events.counts(item_facts(run, ["year"], None))
    names, features = feature_names(counts, list(rows.lists.columns)), [None] * len(rows)
    lists = stored_lists(None, rows, run)
    for counted in counted_rows(run, rows, counts, events, window=DAY, seed=0):
        for asked in asked_parts(lists, counted, makes_lists=False):
            found = make(asked, counted.counts, names, 0, exclude_seen=True).features
            for place, of_row in zip(asked.places.tolist(), found, strict=True):
                features[place] = of_row
    return features, names


def test_tables_hold_the_lists_of_the_log_whatever_their_length(run):
    metrics, tables = run_stage(run, item_numbers=["year"])
    logged = {row["row_id"]: row for row in draw_requests()}
    assert {len(row["candidates"]) for row in tables["train"]} == {2, 3, 7, 12}
    for row in [row for rows in tables.values() for row in rows]:
        mine = logged.pop(row["row_id"])
        for name in ("user", "history", "candidates", "relevance", "request_id", "time", "history_times", "fields"):
            assert row[name] == mine[name]
        size = len(mine["candidates"])
        assert row["first_stage_ranks"] == list(range(1, size + 1)) and row["target"] is None and row["hit"]
        assert row["first_stage_scores"] == (mine["scores"] or list(range(size, 0, -1)))
        assert np.shape(row["features"])[0] == size
    assert not logged and metrics["num_candidates"] == 12
    assert metrics["splits"]["train"]["rows"] == 53 and metrics["splits"]["test"]["hits"] == 14


def test_features_are_those_that_the_data_allow(run):
    metrics, tables = run_stage(run, item_numbers=["year"])
    names = json.loads((run / "out/features.json").read_text())["names"]
    known = [name for name in FEATURES if name not in EMBEDDING_FEATURES]  # nothing is embedded
    assert names == [*known, "shown", "click_rate", "item_year", "candidate_price"]
    assert metrics["constant_features"] == ["same_brand"]  # items have no brand
    row = tables["test"][0]
    by_name = dict(zip(names, np.array(row["features"]).T, strict=True))
    wanted = [1990 + item if item < 39 else np.nan for item in row["candidates"]]
    assert np.array_equal(by_name["item_year"], wanted, equal_nan=True)
    wanted = [np.nan if item % 5 == 0 else item for item in row["candidates"]]
    assert np.array_equal(by_name["candidate_price"], wanted, equal_nan=True)
    counts = Counts.load(run / "out/evidence.npz")
    assert np.array_equal(counts.facts.numbers["item_year"], [*range(1990, 2029), np.nan], equal_nan=True)


def test_facts_are_cut_into_the_buckets_asked_for(run):
    run_stage(run, num_buckets=20)
    stored = json.loads((run / "out/features.json").read_text())
    edges = stored["edges"]["click_rate"]
    rows = pq.read_table(run / "out/train.parquet")["features"].to_pylist()
    rates = [line[stored["names"].index("click_rate")] for row in rows for line in row]
    buckets, sizes = np.unique(np.searchsorted(edges, rates, side="right"), return_counts=True)
    assert len(edges) == 19 and buckets.max() == 19 and len(buckets) > 15
    assert sizes[1:-1].max() < 2 * len(rates) / 19


def test_click_rates_and_popularity_are_counted_by_hand(run, con):
    rows = TargetRows.load(run)
    features, names = features_with(run, Events.load(con, run, rows), rows)
    logged = draw_requests()
    training = [row for row in logged if row["split"] == "rerank"]
    folds = counting.user_folds([row["user"] for row in training], counting.NUM_FOLDS, 0).tolist()
    is_by_time = counting.is_by_time(run)
    for number, row in enumerate(logged):
        if row["split"] != "rerank":
            known = training
        elif is_by_time:
            known = [other for other in training if other["time"] < row["time"] // DAY * DAY]
        else:
            known = [other for other, fold in zip(training, folds, strict=True) if fold != folds[number]]
        judged = [
            (item, grade)
            for other in known
            for item, grade in zip(other["candidates"], other["relevance"], strict=True)
            if grade is not None
        ]
        mean = np.mean([grade > 0 for _, grade in judged]) if judged else 0
        of_row = features[number]
        for place, item in enumerate(row["candidates"]):
            shown = sum(other == item for other, _ in judged)
            clicked = sum(other == item and grade > 0 for other, grade in judged)
            assert of_row[place, names.index("shown")] == shown
            rate = (clicked + 10 * mean) / (shown + 10)
            assert of_row[place, names.index("click_rate")] == pytest.approx(rate, abs=1e-6)
            assert of_row[place, names.index("popularity")] == clicked


def test_no_number_of_a_row_changes_when_later_events_are_deleted(tmp_path, con):
    write_requests(tmp_path, draw_requests(), split="by_time")
    rows = TargetRows.load(tmp_path)
    events, times = Events.load(con, tmp_path, rows), counting.times_of(rows)
    features, _ = features_with(tmp_path, events, rows)
    for place in range(0, len(rows), 31):
        earlier, _ = features_with(tmp_path, events.part(until=times[place]), rows)
        assert np.array_equal(earlier[place], features[place], equal_nan=True)


def test_no_number_of_a_users_training_rows_changes_when_the_users_events_are_deleted(tmp_path, con):
    write_requests(tmp_path, draw_requests(), split="by_user")
    rows = TargetRows.load(tmp_path)
    events = Events.load(con, tmp_path, rows)
    features, names = features_with(tmp_path, events, rows)
    changed = set()
    for user in (3, 12):
        others, _ = features_with(tmp_path, events.part(without_users=np.array([user])), rows)
        mine = np.flatnonzero((rows.users == user) & (rows.splits == "rerank")).tolist()
        assert mine and all(np.array_equal(others[place], features[place], equal_nan=True) for place in mine)
        held_out = np.flatnonzero(rows.splits == "test").tolist()
        changed |= {place for place in held_out if not np.array_equal(others[place], features[place], equal_nan=True)}
    assert changed  # whose numbers know every training event


def test_lambdamart_orders_the_lists_anew_and_keeps_what_belongs_to_a_candidate(run, caplog):
    before = {row["row_id"]: row for row in draw_requests()}
    _, tables = run_stage(run, source="lambdamart")
    moved, is_by_time = 0, counting.is_by_time(run)
    assert ("53 of 53 training lists stay in the order shown, and their scores are unkn" in caplog.text) == is_by_time
    for row in [row for rows in tables.values() for row in rows]:
        mine = before[row["row_id"]]
        grades = dict(zip(mine["candidates"], mine["relevance"], strict=True))
        assert row["relevance"] == [grades[item] for item in row["candidates"]]
        assert sorted(row["candidates"]) == sorted(mine["candidates"])
        assert row["first_stage_ranks"] == list(range(1, len(grades) + 1))
        if is_by_time and mine["split"] == "rerank":  # fewer than LEAST_ROWS
            assert row["first_stage_scores"] == [None] * len(grades) and row["candidates"] == mine["candidates"]
        else:
            assert row["first_stage_scores"] == sorted(row["first_stage_scores"], reverse=True)
        moved += row["candidates"] != mine["candidates"]
    assert moved > (6 if is_by_time else len(before) / 3)


def by_time_run(run, rows):
    """The training rows that lambdamart writes of these requests, by their ids."""
    write_requests(run, rows, split="by_time")
    finish(run / "semantic_ids")
    _, tables = run_stage(run, source="lambdamart")
    return {row["row_id"]: row for row in tables["train"]}


def test_by_time_lambdamart_ranks_a_training_list_by_trees_of_earlier_lists_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reordering, "LEAST_ROWS", 12)
    caplog.set_level("INFO", logger="rerank")
    rows = draw_requests(num=90)
    for row in rows[5:60:9]:  # no hits: nobody liked anything
        row["relevance"] = [0.0 for _ in row["candidates"]]
    found = by_time_run(tmp_path / "a", rows)
    training = [row for row in rows if row["split"] == "rerank"]
    hits = [row["time"] for row in training if any(row["relevance"])]
    early = {row["row_id"] for row in training if row["time"] < hits[12]}
    assert (
        12 < len(early) < 20
        and f"{len(early)} of {len(training)} training lists stay in the order shown" in caplog.text
    )
    moved = 0
    for row in training:
        mine = found[row["row_id"]]
        if row["row_id"] in early:
            assert mine["candidates"] == row["candidates"] and set(mine["first_stage_scores"]) == {None}
            continue
        assert mine["first_stage_scores"] == sorted(mine["first_stage_scores"], reverse=True)
        moved += mine["candidates"] != row["candidates"]
    assert moved > 15
    names = json.loads((tmp_path / "a/out/features.json").read_text())["names"]
    scores = np.array(found[0]["features"])[:, names.index("first_stage_score")]
    assert np.isnan(scores).all() and 0 in early

    start = hits[24]  # from here on the trees are those of the first 24 hits, whatever comes later
    for row in training:
        if row["time"] > start:
            row["relevance"] = [0.0, 1.0, *[0.0] * (len(row["candidates"]) - 2)]
    other = by_time_run(tmp_path / "b", rows)
    until = [row["row_id"] for row in training if row["time"] <= start]
    assert len(until) > 24
    for row_id in until:
        assert other[row_id]["first_stage_scores"] == found[row_id]["first_stage_scores"]
        assert other[row_id]["candidates"] == found[row_id]["candidates"]


def test_further_lists_of_requests_are_the_same_candidates_in_other_orders(run):
    _, tables = run_stage(run, lists_per_row=3, shuffle_candidates=True)
    first = {row["row_id"]: row for row in tables["train"] if row["list_number"] == 0}
    assert len(tables["train"]) == 3 * len(first)
    orders = set()
    for row in tables["train"]:
        mine = first[row["row_id"] % 80]
        assert row["row_id"] == mine["row_id"] + 80 * row["list_number"]
        ranks = [mine["candidates"].index(item) + 1 for item in row["candidates"]]
        assert row["first_stage_ranks"] == ranks and row["relevance"] == [mine["relevance"][r - 1] for r in ranks]
        features = [mine["features"][r - 1] for r in ranks]
        assert np.array_equal(np.array(row["features"]), np.array(features), equal_nan=True)
        orders.add(tuple(ranks))
    assert len(orders) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "transitions"}, "source is transitions but the rows of the data stage are requests.*requests or"),
        (
            {"lists_per_row": 2, "pool_size": 30},
            "pool_size, cut_histories and first_stages draw lists from a first st",
        ),
        ({"item_numbers": ["title"]}, "title of item 'i0' is 'Film 0', no number; correct it, or take title out"),
        ({"count_window": 0}, "count_window is 0"),
    ],
)
def test_options_that_do_not_go_with_requests_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run_stage(run, **options)


def test_requests_as_source_of_rows_without_lists_are_refused(tmp_path):
    from toy_run import write_interactions, write_items

    write_items(tmp_path / "data")
    write_interactions(tmp_path / "data", {0: [0, 1, 2]}, ["train", "train", "rerank"])
    with pytest.raises(
        ValueError, match="source is requests but the rows of the data stage are no requests; set sour"
    ):
        candidates.check(CandidatesArguments(run_dir=str(tmp_path), source="requests"))


def test_rows_are_read_with_what_was_not_seen(run):
    run_stage(run)
    row = next(row for row in read_rows(run / "out/test.parquet") if len(row.candidates) > 3)
    assert np.isnan(row.relevance[1]) and row.is_hit


def test_features_of_lists_of_one_length_and_of_several_agree():
    rng = np.random.default_rng(0)
    counts = Counts.fit({0: rng.permutation(20)[:8], 1: rng.permutation(20)[:8]}, 20, ItemFacts.of(20))
    histories = [rng.permutation(20)[: 1 + row % 3] for row in range(9)]
    lists = [rng.permutation(20)[: (2, 5)[row % 2]] for row in range(9)]
    scores = [rng.random(len(items)) for items in lists]
    names = feature_names(counts)
    together = list_features(names, counts, histories, lists, scores, None, {})
    for row in range(9):
        alone = list_features(names, counts, [histories[row]], [lists[row]], [scores[row]], None, {})[0]
        assert np.array_equal(together[row], alone)


def test_liked_items_of_the_drawn_requests_are_the_interactions(tmp_path):
    rows = draw_requests()
    write_requests(tmp_path, rows)
    assert len(pq.read_table(tmp_path / "data/interactions.parquet")) == sum(len(liked(row)) for row in rows)
