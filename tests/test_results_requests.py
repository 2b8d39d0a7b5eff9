"""Results of requests: graded lists of several lengths with unseen candidates, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import finish, write_items, write_semantic_ids

from rerank import evaluate, report
from rerank.baselines import FEATURES, fit_lambdamart
from rerank.catalogue import Catalogue
from rerank.evaluate import EvaluateArguments, rankers_of
from rerank.launch.files import write_json
from rerank.report.rows import SHOWN_CANDIDATES, read_ranked_rows, sample_rows
from rerank.results import overview, rankers, tables
from rerank.results.rankings import EvaluatedRows, Ranking, difficulty, make_results
from rerank.results.slices import SplitLists
from rerank.rows import read_feature_names, read_rows

NAMES = [*(name for name in FEATURES if not name.startswith("cosine")), "click_rate", "shown"]
METRICS = ("R@1", "N@5", "AUC", "MRR", "N@10", "R@2")
SECOND = 1 / math.log2(3)  # the discount of rank 2; that of rank 3 is 1/2
# Row 0 to 2 are hits, 3 and 6 hold nothing relevant, 4 and 5 nothing that is judged and not relevant.
GRADES = [[0, 1, None], [2, 0], [None, 0, 1, 2], [0, 0], [1, 1], [1, None, 2], [None, None]]
NO_OP_N5 = [SECOND, 1.0, (SECOND + 3 / 2) / (3 + SECOND)]  # gains 0 1; 3 0; 0 1 3
LENGTHS = (2, 7, 24, 300)


def request(row_id: int, candidates, grades, user: int = 0, **columns) -> dict:
    """A record of a candidates table; features are 0 but for those given by name, one value a candidate."""
    features = np.zeros((len(candidates), len(NAMES)))
    features[:, NAMES.index("place")] = np.arange(1, len(candidates) + 1)
    for name in set(columns) & set(NAMES):
        features[:, NAMES.index(name)] = columns.pop(name)
    row = {"row_id": row_id, "list_number": 0, "user": user, "history": [0], "candidates": list(candidates)}
    row |= {"relevance": [None if grade is None else float(grade) for grade in grades], "target": None}
    return {**row, "request_id": f"r{row_id}", "fields": "{}", "features": features.tolist(), **columns}


def hand_made() -> list[dict]:
    """The rows of GRADES, of items 0, 1, 2 ... and users 0, 0, 1 ..."""
    rows, item = [], 0
    for number, grades in enumerate(GRADES):
        rows.append(request(number, range(item, item + len(grades)), grades, number // 2))
        item += len(grades)
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    schema = pa.Table.from_pylist(rows).schema
    for name, kind in (("target", pa.int64()), ("relevance", pa.list_(pa.float64()))):
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_run(run: Path, num_items: int, clicks=(), **splits: list[dict]) -> Path:
    """A run up to its candidates, which a page finds without ids; `clicks` are the training items."""
    write_items(run / "data", num_items)
    taken = [{"user": 0, "item": int(item), "position": place, "split": "rerank"} for place, item in enumerate(clicks)]
    by_place = [{"place": 1, "shown": 8, "clicked": 4, "share": 0.5}, {"place": 2, "shown": 8, "clicked": 1}]
    by_place[1]["share"] = 0.125
    finish(run / "data", {"click_rate_by_place": by_place}, interactions=pa.Table.from_pylist(taken))
    write_semantic_ids(run / "semantic_ids", np.stack(np.divmod(np.arange(num_items), 20), axis=1))
    for name, rows in splits.items():
        write_table(run / f"candidates/{name}.parquet", rows)
    write_json(run / "candidates/features.json", {"names": NAMES, "edges": {}})
    finish(run / "candidates")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    rows = hand_made()
    clicks = [*[3] * 9, *[8] * 4, 7, 1, 1]  # items 7 and 8 are graded 1 and 2 in row 2, item 3 is the 2 of row 1
    return write_run(tmp_path_factory.mktemp("requests") / "run", 20, clicks, test=rows, train=rows)


@pytest.fixture(scope="module")
def evaluated(run) -> EvaluatedRows:
    return EvaluatedRows.load(run / "candidates", "test", metrics=METRICS)


def results_of(evaluated: EvaluatedRows, **orders) -> dict:
    no_op = Ranking("no_op", rankers.no_op(Path(), evaluated.rows))
    return make_results([no_op, *(Ranking(name, of) for name, of in orders.items())], evaluated, 100)


def test_lists_are_hits_without_a_relevant_item_or_of_relevant_items_alone(evaluated):
    assert [row.row_id for row in evaluated.rows] == [0, 1, 2]
    results = results_of(evaluated)
    counts = [results[name] for name in ("n", "n_all", "n_without_relevant", "n_all_relevant")]
    assert counts == [3, 7, 2, 2]
    assert results["hit_share"] == 3 / 5 and results["list_recall"] == 5 / 7
    json.dumps(results)


def test_metrics_are_those_of_the_judged_candidates_alone(evaluated):
    results = results_of(evaluated, random=None, oracle=rankers.oracle(Path(), evaluated.rows))
    no_op, random, oracle = (results["rows"][name] for name in ("no_op", "random", "oracle"))
    assert no_op["N@5"] == pytest.approx(np.mean(NO_OP_N5))
    assert no_op["R@1"] == pytest.approx((0 + 1 + 0) / 3) and no_op["R@2"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert no_op["MRR"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3) and no_op["AUC"] == pytest.approx((0 + 1 + 0) / 3)
    assert [oracle[name] for name in ("R@1", "N@5", "AUC", "MRR")] == pytest.approx([(1 + 1 + 1 / 2) / 3, 1, 1, 1])
    # two orders of the first two rows; of row 2 the first relevant item is first with chance 2/3, else second
    assert random["MRR"] == pytest.approx((3 / 4 + 3 / 4 + 2 / 3 + 1 / 6) / 3) and random["AUC"] == 0.5
    assert no_op["end_to_end"]["N@5"] == pytest.approx(sum(NO_OP_N5) / 5)  # row 3 and 6 count zero
    unseen_first = results_of(evaluated, sft=[[2, 0, 1], [0, 1], [0, 1, 2, 3]])
    assert unseen_first["rows"]["sft"] | {"copy_rate": 1.0} == unseen_first["rows"]["no_op"]


def test_tables_say_which_lists_count_and_which_metrics_there_are(evaluated):
    results = results_of(evaluated, sft=[[1, 0, 2], [0, 1], None])
    text = overview.markdown(results)
    assert "3 test rows whose list holds a relevant item and a seen one that is not, of 7 (list recall 71.4 %)" in text
    assert "2 lists without a relevant item count zero, so that 60.0 % is the ceiling" in text
    assert "2 lists of nothing but relevant items left out of both tables" in text
    assert "End to end, 5 of 7 rows:" in text
    assert f"| ranker | {' | '.join(METRICS)} | N@5 − no-op | R@1 − no-op | fall-back N@5 |" in text
    assert "| sft | 0.6667 | 0.6667 | 0.6667 | 0.6667 | 0.6667 | 0.6667 |" in text  # 1, 1 and no ranking, but for R@2
    assert [column.header for column in overview.results_table(results).columns] == [
        *("ranker", "R@1", "N@5", "R@2", "N@5 − no-op", "failed"),
    ]


def test_a_row_has_the_first_stage_rank_and_the_popularity_of_its_best_graded_candidates(run):
    lists = SplitLists.load(run, "test")
    assert lists.ranks.tolist() == [2, 1, 4, 0, 1, 3, 0] and lists.recall == 5 / 7
    assert lists.rank_shares() == pytest.approx(
        {"1": 2 / 7, "2": 1 / 7, "3": 1 / 7, "4": 1 / 7, "not in the list": 2 / 7}
    )
    members = {name: np.flatnonzero(of).tolist() for name, of in lists.slices.members.items()}
    # the 90th percentile of twenty items, of which sixteen have no click, is 2, so that popular begins at 6
    # the best-graded items have 2, 9 and 4 clicks; of row 4 the mean of 0 and 0; row 5 has 0
    assert members["cold"] == [0, 2, 4, 5] and members["popular"] == [1]
    assert lists.slices.meanings["cold"].endswith("training interactions, mean of the best-graded candidates")
    table = tables.rank_table(lists.summary(), 7)
    assert table.text.startswith("Share of all 7 rows (target: the candidate of the highest grade, of equals the one")


def test_the_mean_over_equally_graded_candidates_decides(tmp_path):
    rows = [request(0, [0, 1, 2], [1, 1, 0]), request(1, [0, 2, 1], [1, 2, 1])]
    lists = SplitLists.load(write_run(tmp_path / "run", 3, [0] * 9 + [2] * 3, test=rows), "test")
    # (9 + 0) / 2 = 4.5 training clicks; 3 of the one candidate of grade 2
    assert lists.slices.members["cold"].tolist() == [True, True] and lists.ranks.tolist() == [1, 2]


def column_run(folder: Path) -> Path:
    """Eighty rows of three devices, 50, 21 and 9 of them, the second at half past; none has the column `colour`."""
    devices = ["phone"] * 50 + ["tv"] * 21 + [None] * 9
    rows = [
        request(number, [0, 1], [number % 2, 1 - number % 2], number, fields=json.dumps({"device": device, "hour": 1}))
        for number, device in enumerate(devices)
    ]
    return write_run(folder, 3, [0], test=rows, train=rows)


def test_slices_by_the_values_of_columns(tmp_path):
    run = column_run(tmp_path / "run")
    lists, evaluated = SplitLists.load(run, "test", ["device"]), EvaluatedRows.load(run / "candidates", "test")
    assert lists.slices.columns == {"device": ["device=phone", "device=tv", "device: other values"]}
    rankings = [Ranking("no_op", [[0, 1]] * 80), Ranking("other", [[1, 0]] * 50 + [[0, 1]] * 30)]
    results = make_results(rankings, evaluated, 50) | difficulty(rankings, evaluated, lists, 50)
    slices = results["slices"]
    assert [slices["n"][name] for name in lists.slices.columns["device"]] == [50, 21, 9]
    # the relevant item is second in rows of even numbers: 25 of the phones, 11 of the tvs, 4 of the others
    of_no_op = [slices["rankers"]["no_op"][name]["value"] for name in lists.slices.columns["device"]]
    assert of_no_op == pytest.approx([(25 + 25 * SECOND) / 50, (10 + 11 * SECOND) / 21, (5 + 4 * SECOND) / 9])
    assert slices["rankers"]["other"]["device=tv"]["minus_reference"] == 0
    titles = [table.title for table in overview.further_tables(results)]
    assert titles[-2:] == ["N@5 on slices", "N@5 on slices by device"]
    table = overview.further_tables(results)[-1]
    assert table.heads[1:4] == ["device=phone (n=50)", "device=tv (n=21)", "device: other values (n=9)"]
    assert table.heads[4:] == [f"{name} − no_op" for name in lists.slices.columns["device"]]
    assert "| device: tv | 21 | 100.0 % | 21 |" in overview.markdown(results)


def test_of_many_values_the_most_frequent_ten_have_a_slice_each(tmp_path):
    values = [number % 12 for number in range(600)] + [5]
    rows = [request(number, [0, 1], [1, 0], fields=json.dumps({"age": age})) for number, age in enumerate(values)]
    lists = SplitLists.load(write_run(tmp_path / "run", 3, [0], test=rows), "test", ["age"])
    names = lists.slices.columns["age"]
    assert len(names) == 11 and names[0] == "age=5" and names[-1] == "age: other values"
    assert sum(int(lists.slices.members[name].sum()) for name in names) == 601


def test_slices_by_columns_of_the_best_candidate(tmp_path):
    """Item 0 is a drama, item 1 has no category; the best of a row is the best-placed of the highest grade."""
    graded = [[1, 0]] * 30 + [[1, 2]] * 25 + [[0, 0]] * 20 + [[2, 2]] * 20  # of items 0 and 1
    rows = [request(number, [0, 1], grades, number) for number, grades in enumerate(graded)]
    run = write_run(tmp_path / "run", 3, [0], test=rows)
    write_items(run / "data", 3, category=["drama", "", "x"], year=[1999, 2001, 2001])
    lists = SplitLists.load(run, "test", ["category", "year"])
    assert lists.slices.columns == {
        "category": ["category=drama", "category=none"],
        "year": ["year=1999", "year=2001", "year=none"],
    }
    sizes = {name: int(of.sum()) for name, of in lists.slices.members.items() if "=" in name}
    assert sizes == {"category=drama": 50, "category=none": 45, "year=1999": 50, "year=2001": 25, "year=none": 20}
    assert lists.slices.members["category=drama"].tolist() == [True] * 30 + [False] * 45 + [True] * 20
    of_requests = [{**row, "fields": json.dumps({"category": "of the request"})} for row in rows]
    write_table(run / "candidates/valid.parquet", of_requests)
    assert SplitLists.load(run, "valid", ["category"]).slices.columns == {"category": ["category=of the request"]}


def test_a_column_that_neither_rows_nor_items_have_is_refused_with_those_there_are(tmp_path):
    run = column_run(tmp_path / "run")
    message = (
        r"slices holds 'colour', but the rows of .*test.parquet have device, hour and the items title, category; na"
    )
    with pytest.raises(ValueError, match=message):
        evaluate.check(EvaluateArguments(run_dir=str(run), slices=["device", "colour"], models=[]))
    with pytest.raises(ValueError, match=message):
        SplitLists.load(run, "test", ["colour"])


def test_position_ranks_by_the_mean_gain_of_each_place_of_the_training_lists(tmp_path):
    train = [
        request(0, [0, 1, 2], [0, 2, 1]),
        request(1, [0, 1], [0, 0]),  # a list without a relevant item counts
        request(2, [0, 1, 2], [1, None, 1]),  # an unseen candidate does not
        request(3, [0, 1], [3, 0], list_number=1),  # nor does a further list
    ]
    # gains 0 0 1: 1/3; 3 0: 3/2; 1 1: 1; places 4 and 5 are in no training list
    write_table(tmp_path / "train.parquet", train)
    rows = [request(9, range(5), [1, 0, 0, 0, 0]), request(10, [3, 4], [0, 1])]
    write_table(tmp_path / "test.parquet", rows)
    assert rankers.position(tmp_path, read_rows(tmp_path / "test.parquet")) == [[1, 2, 0, 3, 4], [1, 0]]


def test_popularity_and_click_rate_rank_by_their_feature_with_ties_in_the_order_shown(tmp_path):
    rows = [request(0, range(4), [1, 0, 0, 0], popularity=[2, 5, 2, 7], click_rate=[0.1, 0.3, 0.3, 0.1])]
    write_json(tmp_path / "features.json", {"names": NAMES, "edges": {}})
    write_table(tmp_path / "test.parquet", rows)
    by_name, rows = {ranker.name: ranker for ranker in rankers.RANKERS}, read_rows(tmp_path / "test.parquet")
    assert by_name["popularity"].orders(tmp_path, rows) == [[3, 1, 0, 2]]
    assert by_name["click_rate"].orders(tmp_path, rows) == [[1, 2, 0, 3]]


def test_the_rankers_of_requests_have_a_line_where_candidates_have_a_click_rate(run, tmp_path):
    of_requests = ["no_op", "random", "oracle", "position", "popularity", "click_rate", "transitions", "lambdamart"]
    args = EvaluateArguments(run_dir=str(run), models=[])
    assert [ranker.name for ranker in rankers_of(args)] == of_requests
    (tmp_path / "candidates").mkdir()
    write_json(tmp_path / "candidates/features.json", {"names": list(FEATURES), "edges": {}})
    of_interactions = [name for name in of_requests if name not in ("position", "popularity", "click_rate")]
    assert [r.name for r in rankers_of(EvaluateArguments(run_dir=str(tmp_path), models=[]))] == of_interactions


@pytest.fixture(scope="module")
def long_rows() -> list[dict]:
    """Ninety requests of lengths 2, 7, 24 and 300: places of even numbers are clicked more, every fifth is unseen."""
    rng, rows = np.random.default_rng(0), []
    for number in range(90):
        length = LENGTHS[number % 4]
        items = rng.permutation(400)[:length]
        rates = (items % 10) / 10
        grades = (rng.random(length) < rates / 2) * rng.integers(1, 3, length)
        seen = [None if length > 2 and place % 5 == 4 else int(grade) for place, grade in enumerate(grades)]
        rows.append(request(number, items.tolist(), seen, number // 2, click_rate=rates, popularity=items % 7))
    return rows


def test_unseen_candidates_are_left_out_of_a_fit_and_ranked_all_the_same(tmp_path, long_rows):
    write_json(tmp_path / "features.json", {"names": NAMES, "edges": {}})
    write_table(tmp_path / "train.parquet", long_rows)
    rows = read_rows(tmp_path / "train.parquet", needs_features=True)
    features, grades = [row.features for row in rows], [row.relevance for row in rows]
    seen = [~np.isnan(of_row) for of_row in grades]
    condensed = [of[is_seen] for of, is_seen in zip(features, seen, strict=True)]
    judged = [np.array(of)[is_seen] for of, is_seen in zip(grades, seen, strict=True)]
    assert min(map(len, judged)) < max(map(len, judged)) and any(2 in of_row for of_row in judged)
    users = [row.user for row in rows]
    options = {"min_rows_per_leaf": 20, "max_rounds": 20, "num_fits": 1, "names": NAMES}
    fitted, plain = (fit_lambdamart((f, g), users, **options) for f, g in ((features, grades), (condensed, judged)))
    for one, other in zip(fitted.scores(features), plain.scores(features), strict=True):
        np.testing.assert_array_equal(one, other)
    assert fitted.boosters[0].feature_name() == NAMES
    for row, order in zip(rows, rankers.lambdamart(tmp_path, rows).orders, strict=True):
        assert sorted(order) == list(range(len(row.candidates)))  # unseen ones have their places too
    with pytest.raises(ValueError, match="relevance 40 in the training rows is above 30; use lower grades"):
        fit_lambdamart((features, [[40.0, *of_row[1:]] for of_row in grades]), users, **options)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, long_rows) -> Path:
    """The stage without a model, on lists of 2, 7, 24 and 300."""
    clicks = np.random.default_rng(1).integers(400, size=900)
    run = write_run(tmp_path_factory.mktemp("long") / "run", 400, clicks, test=long_rows, train=long_rows)
    (run / "evaluate").mkdir()
    options = {"metrics": ["N@10", "R@1", "AUC", "N@300"], "num_bootstrap": 50, "orders": 2, "models": []}
    evaluate.main(EvaluateArguments(run_dir=str(run), **options), run / "evaluate")
    return run


def test_lists_of_two_to_three_hundred_go_through_the_stage(long_run):
    results = json.loads((long_run / "evaluate/results.json").read_text())
    rows = results["rows"]
    evaluated = EvaluatedRows.load(long_run / "candidates", "test", metrics=tuple(results["metrics"]))
    assert {len(row.candidates) for row in evaluated.rows} == set(LENGTHS) and results["n"] == len(evaluated.rows)
    expected = {}  # a loop over the rows, by their definition
    for name in ("no_op", "click_rate"):
        values = []
        for row in evaluated.rows:
            rates = row.features[:, NAMES.index("click_rate")] * (name == "click_rate")
            order = sorted(range(len(row.candidates)), key=lambda place: -rates[place])  # noqa: B023
            grades = [row.relevance[place] for place in order if not math.isnan(row.relevance[place])]
            gains = [(2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades)]
            ideal = [(2**g - 1) / math.log2(rank + 2) for rank, g in enumerate(sorted(grades, reverse=True))]
            values.append([sum(gains[:k]) / sum(ideal[:k]) for k in (10, 300)])
        expected[name] = np.mean(values, axis=0)
    for name, (at_ten, at_all) in expected.items():
        assert rows[name]["N@10"] == pytest.approx(at_ten) and rows[name]["N@300"] == pytest.approx(at_all)
    assert rows["no_op"]["N@10"] < rows["click_rate"]["N@10"] <= rows["oracle"]["N@10"] == rows["oracle"]["AUC"] == 1
    assert rows["random"]["AUC"] == 0.5
    trees = results["orders"]["rankers"]["lambdamart"]  # the same in every order
    assert trees["by_order"] == [trees["given"]["N@10"]] * 2 and trees["kendall_tau"] == 1
    assert "101–300" in results["lists"]["target_ranks"]
    assert f"N@10 {tables.MINUS} as given" in overview.markdown(results)
    stored = pq.read_table(long_run / "evaluate/orders.parquet").to_pylist()
    assert {len(line["order"]) for line in stored} == set(LENGTHS)


def test_the_bar_holds_every_difference_with_both_ends(long_run):
    results, bar = (json.loads((long_run / f"evaluate/{name}.json").read_text()) for name in ("results", "bar"))
    names, metrics = list(results["rows"]), results["metrics"]
    found = {(one["ranker"], one["minus"], one["metric"]): one for one in bar["differences"]}
    pairs = [(later, earlier) for place, later in enumerate(names) for earlier in names[:place]]
    assert list(found) == [(*pair, metric) for metric in metrics for pair in pairs]
    for (ranker, minus, metric), one in found.items():
        values = results["rows"][ranker][metric], results["rows"][minus][metric]
        assert (one["value"], one["minus_value"]) == pytest.approx(values) and one["n"] == results["n"]
        assert one["difference"] == pytest.approx(values[0] - values[1])
        assert one["low"] <= one["difference"] + 1e-12 and one["difference"] <= one["high"] + 1e-12
        if minus == "no_op" and metric in ("N@10", "R@1"):
            ends = results["rows"][ranker][f"{metric}_interval"]
            assert [one["low"], one["high"]] == pytest.approx(ends) and one["low"] < one["high"]
    assert bar["n"] == results["n"] and bar["seeds"] == 1 and bar["metrics"] == metrics


def with_generated(run: Path) -> None:
    """Rankings of a model that reverses each list, as if the sft stage had one."""
    folder = run / "evaluate"
    lines = pq.read_table(folder / "rankings.parquet").to_pylist()
    made = [
        {**line, "ranker": "sft", "order": line["order"][::-1], "completion": "2,1", "num_tokens": 2}
        for line in lines
        if line["ranker"] == "no_op"
    ]
    pq.write_table(pa.Table.from_pylist([*lines, *made], schema=evaluate.RANKINGS), folder / "rankings.parquet")
    results = json.loads((folder / "results.json").read_text())
    results["rows"]["sft"] = results["rows"]["no_op"]
    write_json(folder / "results.json", results)


def test_of_a_long_list_the_page_shows_the_first_and_those_that_matter(long_run):
    with_generated(long_run)
    rows, results = read_ranked_rows(long_run, long_run / "evaluate", "test"), {"rows": {"sft": {}}}
    name, samples = sample_rows(rows, results, Catalogue.load(long_run))
    by_id = {ranked.row.row_id: ranked.row for ranked in rows}
    assert name == "sft" and {len(by_id[sample["row_id"]].candidates) for sample in samples} >= {24, 300}
    for sample in samples:
        row = by_id[sample["row_id"]]
        length, relevant = len(row.candidates), {place + 1 for place, grade in enumerate(row.relevance) if grade > 0}
        incoming = [shown["place"] for shown in sample["incoming"] if shown["place"]]
        first, last = set(range(1, SHOWN_CANDIDATES + 1)), set(range(length - SHOWN_CANDIDATES + 1, length + 1))
        assert set(incoming) == {*(first & set(range(1, length + 1))), *relevant, *(last & set(range(1, length + 1)))}
        hidden = sum(shown["left_out"] for shown in sample["incoming"])
        assert len(incoming) + hidden == length and incoming == sorted(incoming)
        assert [shown["before"] for shown in sample["outgoing"] if shown["place"]] == incoming[::-1]
        judged = [place for place, grade in enumerate(row.relevance) if not math.isnan(grade)]
        assert sample["places"][0] == judged.index(min(relevant) - 1) + 1  # among the judged ones
    report.write_report(long_run, long_run / "evaluate", long_run / "page.html")
    page = (long_run / "page.html").read_text()
    for words in (
        *(" more</li>", "★2", "· not seen", "Ranks in brackets leave out"),
        *("Click rate by place shown", "best-placed relevant item moved"),
    ):
        assert words in page
    assert "NDCG@10 minus that of the input order" in page and "NDCG@10 by the order in which" in page


def test_metrics_are_read_by_name(tmp_path):
    for metrics, message in (
        (["R@1", "N@5", "N5"], r"'N5' is no metric; write R@k \(recall\), N@k \(NDCG\), such as N@10, MRR or AUC"),
        (["R@0", "N@5"], r"'R@0' is no metric"),
        (["R@1", "MRR"], r"metrics is R@1, MRR, without any N@k; add one, such as N@5"),
        (["N@5"], r"metrics is N@5, without any R@k"),
        ([], r"metrics is empty, without any N@k"),
        (["R@1", "N@5", "R@1"], r"metrics is R@1, N@5, R@1, with R@1 twice; leave one out"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateArguments(run_dir=str(tmp_path), metrics=metrics)
    for options in ({"metrics": ["R@1", "N@3"]}, {"slices": ["device"]}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} goes with task rerank, but task is next_item"):
            EvaluateArguments(run_dir=str(tmp_path), task="next_item", models=["sft"], **options)


def test_a_split_whose_lists_leave_nothing_to_rank_is_refused(tmp_path):
    write_table(tmp_path / "test.parquet", hand_made()[3:])
    with pytest.raises(ValueError, match=r"none of its 4 rows lists both a relevant item and another one that was"):
        EvaluatedRows.load(tmp_path, "test")


def test_feature_names_are_those_of_the_run(run):
    assert read_feature_names(run / "candidates")[0] == NAMES
