"""Order robustness: rankings of the same rows in other orders, against loops over rows, orders and pairs."""

import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import kendalltau
from toy_run import write_run

from rerank.metrics import reciprocal_rank_fusion
from rerank.results import orders, rankers
from rerank.results.orders import ShuffledRows
from rerank.results.rankings import EvaluatedRows
from rerank.results.tables import order_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("orders") / "run", upto="candidates")


@pytest.fixture(scope="module")
def rows(run):
    return EvaluatedRows.load(run / "candidates", "test").rows


def ranked_by_place(shuffled: ShuffledRows) -> list[list[list[int] | None]]:
    """A ranker with a bias: by item, but what is shown first stays first; no ranking where item 3 is shown last."""
    found = []
    for row in shuffled.all_shown:
        items = list(row.candidates)
        rest = sorted(range(1, len(items)), key=lambda place: items[place])
        found.append(None if items[-1] == 3 else [0, *rest])
    return shuffled.as_given(found)


def test_reciprocal_ranks_are_added_up_and_ties_go_to_the_first_item():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rankings = [rng.permutation(6).tolist() for _ in range(rng.integers(1, 6))]
        sums = [round(sum(1 / (60 + ranking.index(item) + 1) for ranking in rankings), 12) for item in range(6)]
        assert reciprocal_rank_fusion(rankings) == sorted(range(6), key=lambda item: (-sums[item], item))
    assert reciprocal_rank_fusion([[2, 0, 1]]) == [2, 0, 1]
    # 1 is first and last, 0 twice second, 2 last and first: 1/61 + 1/63 > 2/62, and 1 ties with 2
    assert reciprocal_rank_fusion([[1, 0, 2], [2, 0, 1]]) == [1, 2, 0]


def test_rows_in_other_orders_keep_ranks_and_facts_and_their_rankings_come_back(rows):
    shuffled = ShuffledRows.of(rows, 3)
    assert shuffled.rows == rows and [len(of_order) for of_order in shuffled.shown] == [len(rows)] * 3
    assert any(row.candidates != shown.candidates for row, shown in zip(rows, shuffled.shown[0], strict=True))
    assert shuffled.shown[0] != shuffled.shown[1]
    for row, shown in zip(rows, shuffled.shown[2], strict=True):
        for place, item in enumerate(shown.candidates):
            given = row.candidates.index(item)
            assert shown.ranks[place] == given + 1 and shown.relevance[place] == row.relevance[given]
            assert (shown.features[place] == row.features[given]).all()
    by_item = [sorted(range(4), key=row.candidates.__getitem__) for row in shuffled.all_shown]
    for of_order in shuffled.as_given(by_item):
        for row, order in zip(rows, of_order, strict=True):
            assert [row.candidates[place] for place in order] == sorted(row.candidates)
    assert ShuffledRows.of(rows, 0).all_shown == []


def test_of_many_rows_a_sample_is_shown_again_and_the_same_one_in_every_run(rows, monkeypatch):
    monkeypatch.setattr(orders, "MAX_ROWS", 5)
    found, again = ShuffledRows.of(rows, 2), ShuffledRows.of(rows, 2)
    assert len(found.rows) == 5 and found == again
    assert [rows[place] for place in found.places] == found.rows


def test_every_number_is_that_of_a_loop(rows):
    shuffled = ShuffledRows.of(rows, 4)
    again = ranked_by_place(shuffled)
    given = [sorted(range(4), key=row.candidates.__getitem__) for row in rows]
    found = orders.summarize(given, again, shuffled, 100)
    json.dumps(found)

    def gain(row, order):  # lists are no longer than five: NDCG@5 of the one relevant item
        return 0.0 if order is None else 1 / np.log2(row.place_of_target(order) + 1)

    by_order = [np.mean([gain(*pair) for pair in zip(rows, of_order, strict=True)]) for of_order in again]
    assert found["by_order"] == pytest.approx(by_order)
    assert found["spread"] == pytest.approx(np.std(by_order, ddof=1)) and found["spread"] > 0
    assert found["shuffled"]["N@5"] == pytest.approx(np.mean(by_order))
    as_given = np.mean([gain(*pair) for pair in zip(rows, given, strict=True)])
    assert found["given"]["N@5"] == pytest.approx(as_given)
    assert found["shuffled"]["minus_given"] == pytest.approx(np.mean(by_order) - as_given)
    taus, same, pairs = [], [], 0
    for first, second in itertools.combinations(again, 2):
        for a, b in zip(first, second, strict=True):
            pairs += 1
            if a is not None and b is not None:
                taus.append(kendalltau([a.index(item) for item in range(4)], [b.index(item) for item in range(4)])[0])
                same.append(a[0] == b[0])
    assert found["kendall_tau"] == pytest.approx(np.mean(taus)) and 0 < found["kendall_tau"] < 1
    assert found["same_first"] == pytest.approx(np.mean(same)) and 0 < found["same_first"] < 1
    assert found["both_ranked"] == len(taus) / pairs < 1
    merged = []
    for row, of_row in zip(rows, zip(*again, strict=True), strict=True):
        ranked = [order for order in of_row if order is not None]
        merged.append(gain(row, reciprocal_rank_fusion(ranked) if ranked else None))
    assert found["merged"]["N@5"] == pytest.approx(np.mean(merged))
    assert found["merged"]["minus_given"] == pytest.approx(np.mean(merged) - as_given)
    for kind in ("shuffled", "merged"):
        low, high = found[kind]["interval"]
        assert low <= found[kind]["minus_given"] <= high


def test_a_ranker_that_never_ranks_and_one_order_alone_have_no_agreement(rows):
    shuffled = ShuffledRows.of(rows, 2)
    nothing = orders.summarize([None] * len(rows), [[None] * len(rows)] * 2, shuffled, 10)
    assert nothing["kendall_tau"] is nothing["same_first"] is None and nothing["merged"]["N@5"] == 0
    alone = ShuffledRows.of(rows, 1)
    found = orders.summarize([[0, 1, 2, 3]] * len(rows), ranked_by_place(alone), alone, 10)
    assert found["spread"] is found["kendall_tau"] is None
    table = order_table({"num_orders": 1, "rows": len(rows), "rankers": {"sft": found}})
    assert [row[0] for row in table.rows] == ["sft", "sft, mean of orders", "sft, merged"]
    assert table.rows[1][-3:] == ["–"] * 3 and f"{len(rows)} rows" in table.text and "1 random order;" in table.text


def test_trees_rank_alike_in_every_order_even_where_they_tie(run, rows, tmp_path):
    shuffled = ShuffledRows.of(rows, 4)
    candidates = shutil.copytree(run / "candidates", tmp_path / "candidates")
    for times, copies in ((1, True), (20, False)):  # the toy's own rows are too few for a tree: all candidates tie
        records = pq.read_table(run / "candidates/train.parquet").to_pylist()
        repeated = [{**record, "row_id": record["row_id"] + 1000 * k} for k in range(times) for record in records]
        pq.write_table(pa.Table.from_pylist(repeated), candidates / "train.parquet")
        given = rankers.lambdamart(candidates, rows).orders
        assert all(order == [0, 1, 2, 3] for order in given) == copies
        again = shuffled.as_given(rankers.lambdamart(candidates, shuffled.all_shown).orders)
        assert all(of_order == given for of_order in again)


def test_stored_rankings_say_what_was_shown(rows):
    shuffled = ShuffledRows.of(rows, 2)
    again = ranked_by_place(shuffled)
    records = shuffled.records("sft", again)
    assert len(records) == 2 * len(rows)
    for record, (number, place) in zip(records, itertools.product(range(2), range(len(rows))), strict=True):
        row, shown = rows[place], shuffled.shown[number][place]
        assert record["row_id"] == row.row_id and record["number"] == number + 1 and record["user"] == row.user
        assert [row.candidates[k] for k in record["shown"]] == list(shown.candidates)
        assert record["order"] == again[number][place]
