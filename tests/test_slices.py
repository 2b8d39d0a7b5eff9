"""Slices of rows, list recall and first-stage ranks, by a loop over the rows."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_run import NUM_ITEMS, toy_sequences, write_run

from rerank.catalogue import shared
from rerank.results import slices
from rerank.results.intervals import Sampling
from rerank.results.rankings import EvaluatedRows, Ranking, difficulty, metrics_per_row, shared_ids
from rerank.results.slices import Slices, SplitLists, measure, training_interactions
from rerank.rows import RankingRow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("slices") / "run", upto="candidates")


@pytest.fixture(scope="module")
def lists(run):
    return SplitLists.load(run, "test")


@pytest.fixture(scope="module")
def records(run):
    return pq.read_table(run / "candidates/test.parquet").to_pylist()


def test_slices_have_thresholds_that_are_stated_and_no_target_is_cold_and_popular():
    interactions = np.array([0, 1, 5, 6, 7, 8, 9, 10, 11, 400])
    targets, lengths = np.arange(10), np.array([3, 9, 4, 7, 5, 30, 5, 8, 6, 2])
    found = Slices.of(interactions, targets, lengths)
    # the 90th percentile of ten values is the tenth, next above 8.1; the 25th of the lengths the third, at 2.25
    assert {name: np.flatnonzero(of).tolist() for name, of in found.members.items()} == {
        "cold": [0, 1, 2],
        "popular": [9],
        "short": [0, 2, 9],
    }
    assert "at most 5 training" in found.meanings["cold"] and "at least 400 training" in found.meanings["popular"]
    assert "at most 4 items" in found.meanings["short"]
    few = Slices.of(np.array([0, 1, 2, 3, 6]), np.arange(5), np.ones(5))
    assert few.members["popular"].tolist() == [False] * 4 + [True] and "at least 6" in few.meanings["popular"]


def test_only_training_interactions_count(run, tmp_path):
    taken = Counter(int(item) for items in toy_sequences().values() for item in items)
    assert training_interactions(run).tolist() == [taken[item] for item in range(NUM_ITEMS)]


def test_list_recall_and_ranks_are_those_of_the_rows_one_by_one(lists, records):
    places = [row["candidates"].index(row["target"]) + 1 if row["target"] in row["candidates"] else 0
              for row in sorted(records, key=lambda row: row["row_id"])]  # fmt: skip
    assert lists.ranks.tolist() == places and lists.length == 4
    assert lists.recall == np.mean([place > 0 for place in places])
    expected = {str(rank): places.count(rank) / len(places) for rank in range(1, 5)}
    assert lists.rank_shares() == pytest.approx(expected | {slices.MISSED: places.count(0) / len(places)})


def test_ranks_of_long_lists_are_grouped_and_add_up_to_one():
    ranks = np.array([*range(1, 131), *[0] * 70])
    nothing = Slices.of(np.ones(1, dtype=int), np.zeros(200, dtype=int), np.ones(200))
    shares = SplitLists(np.arange(200), ranks, 130, nothing).rank_shares()
    assert list(shares) == [*map(str, range(1, 11)), "11–20", "21–50", "51–100", "101–130", slices.MISSED]
    assert shares["11–20"] == 10 / 200 and shares["21–50"] == 30 / 200 and shares["101–130"] == 30 / 200
    assert sum(shares.values()) == pytest.approx(1)
    assert list(SplitLists(np.arange(200), ranks % 13, 12, nothing).rank_shares())[-2:] == ["11–12", slices.MISSED]


def test_results_hold_each_slice_as_a_loop_over_its_rows_finds_it(run, lists, records, monkeypatch):
    monkeypatch.setattr(slices, "COLD_MOST", 19)  # the toy's items have between 15 and 24 interactions
    lists = SplitLists.load(run, "test")
    evaluated = EvaluatedRows.load(run / "candidates", "test")
    rng = np.random.default_rng(0)
    orders = [rng.permutation(4).tolist() for _ in evaluated.rows]
    rankings = [Ranking("no_op", [[0, 1, 2, 3]] * len(orders)), Ranking("other", orders)]
    found = difficulty(rankings, evaluated, lists, 100)
    taken = Counter(int(item) for items in toy_sequences().values() for item in items)
    counts = sorted(taken[item] for item in range(NUM_ITEMS))
    popular = max(20, counts[int(np.ceil(0.9 * (NUM_ITEMS - 1)))])
    short = sorted(len(row["history"]) for row in records)[int(0.25 * (len(records) - 1))]
    rules = {
        "cold": lambda row: taken[row["target"]] <= 19,
        "popular": lambda row: taken[row["target"]] >= popular,
        "short": lambda row: len(row["history"]) <= short,
    }
    by_id = {row["row_id"]: row for row in records}
    for name, rule in rules.items():
        inside = [row for row in records if rule(row)]
        facts = found["lists"]["slices"][name]
        assert facts["rows"] == len(inside)
        assert facts["list_recall"] == pytest.approx(np.mean([row["hit"] for row in inside]))
        places = [k for k, row in enumerate(evaluated.rows) if rule(by_id[row.row_id])]
        assert 0 < found["slices"]["n"][name] == len(places) < len(orders)
        gains = {}
        for ranking in rankings:
            ranks = [ranking.orders[k].index(evaluated.rows[k].relevance.index(1.0)) + 1 for k in places]
            gains[ranking.name] = np.mean([1 / np.log2(rank + 1) for rank in ranks])  # no list is longer than five
            cell = found["slices"]["rankers"][ranking.name][name]
            assert cell["value"] == pytest.approx(gains[ranking.name])
        assert cell["minus_reference"] == pytest.approx(gains["other"] - gains["no_op"])
        low, high = cell["interval"]
        assert low <= cell["minus_reference"] <= high


def test_a_slice_of_several_seeds_has_the_interval_of_its_rows():
    rng = np.random.default_rng(1)
    values, reference, users = rng.random((3, 40)), rng.random(40), np.arange(40) // 2
    members = {"some": rng.random(40) < 0.5, "none": np.zeros(40, dtype=bool), "one": users == 3}
    found = measure({"a": values}, reference, members, users)["a"]
    chosen = members["some"]
    difference, bounds = Sampling(users[chosen]).difference(values[:, chosen], reference[chosen])
    assert found["some"] == {"value": values[:, chosen].mean(), "minus_reference": difference, "interval": bounds}
    assert found["none"] == dict.fromkeys(("value", "minus_reference", "interval"))
    assert found["one"]["value"] == values[:, 6:8].mean() and found["one"]["interval"] is None


def test_items_that_share_an_id_are_counted_one_by_one(run):
    from rerank.models.ranker import read_answer
    from rerank.rows import Prompter

    evaluated = EvaluatedRows.load(run / "candidates", "test")
    from toy_run import CATALOGUE, SETTINGS

    ids = list(CATALOGUE.semantic_ids)
    first, second = evaluated.rows[0].candidates[:2]
    ids[second] = ids[first]
    catalogue = type(CATALOGUE)(CATALOGUE.item_ids, ids, CATALOGUE.titles, CATALOGUE.categories)
    both = [row for row in evaluated.rows if {first, second} <= set(row.candidates)]
    assert shared(ids).count(True) == 2
    assert shared_ids(catalogue, evaluated.rows) == {"items": 2, "rows": len(both)}
    assert shared_ids(CATALOGUE, evaluated.rows) == {"items": 0, "rows": 0}
    labels = Prompter(catalogue, SETTINGS).labels(evaluated.rows[0])
    for target in (0, 1):  # one answer names the shared id first and last: each item has a place of its own
        relevance = tuple(float(place == target) for place in range(4))
        row = RankingRow(0, (1,), evaluated.rows[0].candidates, relevance)
        text = f"<think></think>{labels[0]}{labels[2]}{labels[3]}{labels[0]}"
        answer = read_answer(text, 9, False, labels)
        rank = {0: 1, 1: 4}[target]
        assert row.place_of_target(answer.order) == rank
        values = metrics_per_row(Ranking("sft", [answer.order]), [relevance])
        assert values["MRR"].tolist() == [1 / rank] and values["R@1"].tolist() == [float(rank == 1)]
