"""The next item among all items: metrics, baselines, the split by what counting finds, and the whole evaluation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import CATALOGUE, NUM_ITEMS, toy_codes, toy_sequences, write_interactions, write_run

from rerank import evaluate, metrics
from rerank.baselines import Counts
from rerank.launch.files import write_json
from rerank.next_item import one_hop, recall
from rerank.next_item.encoder import SETTINGS
from rerank.next_item.model import NextItemModel
from rerank.semantic_ids import SemanticIds


def test_metrics_of_lists_are_those_of_one_ranking_at_a_time():
    rng = np.random.default_rng(0)
    lists = np.array([rng.permutation(30)[:10] for _ in range(200)])
    targets = rng.integers(0, 30, 200)
    values = recall.metrics_of_lists(lists, targets)
    for row, (items, target) in enumerate(zip(lists, targets, strict=True)):
        gains = [float(item == target) for item in items] + [float(target not in items)]  # found beyond the list
        for cut in (5, 10):
            assert values[f"R@{cut}"][row] == metrics.recall_at_k(gains, cut)
            assert values[f"N@{cut}"][row] == pytest.approx(metrics.ndcg_at_k(gains, cut))


def test_popular_lists_leave_out_the_history():
    popularity = np.array([5, 1, 9, 1, 7])
    lists = recall.popular_lists(popularity, [np.array([2]), np.array([4, 0, 1])], 2)
    assert lists.tolist() == [[4, 0], [2, 3]]
    assert recall.popular_lists(popularity, [np.array([1, 2, 4, 3])], 2).tolist() == [[0, -1]]


def test_a_history_of_nearly_all_items_shortens_its_own_list_alone(tmp_path):
    write_interactions(tmp_path / "data", {0: [0, 1, 2, 3, 4], 1: [1, 2, 0], 2: [3, 0]}, ["train"] * 10)
    histories = [np.array([0]), np.array([0, 1, 2, 0]), np.arange(5)]
    _, lists = recall.baseline_lists(tmp_path, 5, histories, 3)
    alone = [recall.baseline_lists(tmp_path, 5, [history], 3)[1] for history in histories]
    for name, found in lists.items():
        assert found.tolist() == [single[name][0].tolist() for single in alone]
        assert [sum(item >= 0 for item in line) for line in found] == [3, 2, 0]
    # after 0, in sixtieths: 1 by user 0 next and by user 1 two before (60 + 9), 2: 30 + 18, 3: 20 + 18
    assert lists["transitions"].tolist() == [[1, 2, 3], [3, 4, -1], [-1, -1, -1]]


def test_a_target_is_one_hop_away_when_it_is_among_the_most_frequent_successors(monkeypatch):
    sequences = {0: np.array([0, 1, 2]), 1: np.array([0, 1, 3]), 2: np.array([0, 3]), 3: np.array([5, 0, 4, 3])}
    counts = Counts.fit(sequences, 6)
    # after 0: 1 twice, 3 and 4 once; 3 is more popular than 4. After 1: 2 and 3 once. After 5: 0.
    histories = [np.array([0]), np.array([0]), np.array([0]), np.array([5, 0, 0]), np.array([2])]
    targets = np.array([1, 3, 4, 4, 0])
    assert one_hop.is_one_hop(counts, histories, targets).tolist() == [True, True, True, True, False]
    monkeypatch.setattr(one_hop, "MOST_SUCCESSORS", 2)
    assert one_hop.is_one_hop(counts, histories, targets).tolist() == [True, True, False, False, False]


def one_hop_by_loop(counts, histories, targets, most):
    """The definition, row by row."""
    found = []
    for history, target in zip(histories, targets.tolist(), strict=True):
        times = sum((counts.successors[[item]].toarray()[0] for item in set(history.tolist())), np.zeros(40, int))
        followers = sorted(np.flatnonzero(times).tolist(), key=lambda i: (-times[i], -counts.popularity[i], i))
        found.append(target in followers[:most])
    return found


@pytest.mark.parametrize("at_once", [1, 500, 2**24])
def test_one_hop_is_that_of_a_loop_over_rows(at_once, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(one_hop, "SUCCESSORS_AT_ONCE", at_once)
    monkeypatch.setattr(one_hop, "MOST_SUCCESSORS", 6)
    sequences = {user: rng.integers(0, 40, rng.integers(1, 9)) for user in range(60)}  # few: ties are many
    histories = [rng.integers(0, 40, size) for size in rng.integers(0, 7, 200)]  # some are empty
    targets, counts = rng.integers(0, 40, 200), Counts.fit(sequences, 40)
    wanted = one_hop_by_loop(counts, histories, targets, 6)
    assert one_hop.is_one_hop(counts, histories, targets).tolist() == wanted
    assert 20 < sum(wanted) < 180


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of thirty users who are all training, and thirty with three items: training, validation and test."""
    run = write_run(tmp_path_factory.mktemp("catalogue") / "run")
    walks = [list(dict.fromkeys(walk.tolist())) for walk in toy_sequences().values()]
    splits = ["train"] * sum(map(len, walks)) + ["train", "valid", "test"] * len(walks)
    write_interactions(run / "data", dict(enumerate(walks + [walk[:3] for walk in walks])), splits)
    return run


def test_a_model_made_from_other_ids_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    for stage, inputs in (("semantic_ids", {}), ("midtrain", {"semantic_ids": "another"})):
        write_json(run / stage / "stage.json", {"id": "x", "given": {}, "inputs": inputs})
        write_json(run / stage / "metrics.json", {})
    with pytest.raises(ValueError, match="midtrain was made from another semantic_ids folder than the run's; delete"):
        NextItemModel.load_midtrained(run)


def test_the_beam_search_of_the_readme_runs(run, capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import beam_search" in part]
    exec(code.replace("runs/ml100k", str(run)), {})
    assert re.match(r"\[\[\d+, \d+, \d+, \d+, \d+\], \[", capsys.readouterr().out)


def test_recall_of_a_sample_is_that_of_its_rows(run):
    asked = NextItemModel.load_midtrained(run)
    model, tokenizer = asked.model, asked.encoder.tokenizer
    sample = recall.ValidationRecall.load(run, tokenizer, 12, 5)
    assert len(sample.rows) == 12
    found = asked.by_beams(sample.rows.histories, 10, 20)  # its recipe has max_items 5 too
    hits = [target in items for target, items in zip(sample.rows.targets.tolist(), found.items, strict=True)]
    assert sample(model)["R@10"] == pytest.approx(np.mean(hits))
    again = recall.ValidationRecall.load(run, tokenizer, 12, 5)
    assert again.rows.targets.tolist() == sample.rows.targets.tolist()
    assert len(recall.ValidationRecall.load(run, tokenizer, 999, 5).rows) == 30


def test_items_of_one_id_are_found_together_and_hit_one_by_one(run, tmp_path):
    """A hit is the item itself, at the place that it has in the list."""
    own, codes = shutil.copytree(run, tmp_path / "run"), toy_codes()
    targets = pq.read_table(run / "data/rows.parquet", filters=[("split", "==", "test")])["target"].to_pylist()
    first, second = sorted(sorted(set(targets), key=targets.count)[-2:])
    codes[second] = codes[first]
    SemanticIds(codes, codebook_size=4).save(own / "semantic_ids")
    found = recall.find_lists(own, "test", {}, ["midtrained"], num_beams=NUM_ITEMS)
    assert found.rows.targets.tolist() == targets
    values, num_together = recall.metrics_of_lists(found.lists["midtrained"], found.rows.targets), 0
    for row, (items, target) in enumerate(zip(found.lists["midtrained"].tolist(), targets, strict=True)):
        place = items.index(target) if target in items else 99
        assert values["R@5"][row] == float(place < 5) and values["R@10"][row] == float(place < 10)
        if {first, second} <= set(items):
            num_together += 1
            assert items.index(second) == items.index(first) + 1  # one answer, two places
    assert num_together
    results = recall.summarise(found, own, NUM_ITEMS, 10)
    sharing = sum(target in (first, second) for target in targets)
    assert results["shared_texts"] == {"semantic_id": {"items": 2, "rows": sharing}}
    assert f"(sharing a semantic id: 2 items, the targets of {sharing} rows)" in recall.markdown(results)


def test_items_that_a_model_writes_by_one_title_are_counted(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    write_json(own / "sft/model" / SETTINGS, {"item_text": "title"})
    titles = pq.read_table(own / "data/items.parquet").to_pydict()
    titles["title"][3] = f" {titles['title'][7]} "
    pq.write_table(pa.table(titles), own / "data/items.parquet")
    targets, by_id = np.array([3, 3, 7, 1]), {"semantic_id": {"items": 0, "rows": 0}}
    found = recall.shared_texts(own, targets, ["midtrained", "sft"])
    assert found == {**by_id, "title": {"items": 2, "rows": 3}}
    assert recall.shared_texts(own, targets, ["midtrained"]) == by_id  # no input of this evaluation


@pytest.fixture
def best(run, tmp_path):
    """A file of lists for the test rows, each with its target first."""
    rows = pq.read_table(run / "data/rows.parquet", filters=[("split", "==", "test")]).to_pylist()
    lists = [[row["target"], *(i for i in range(NUM_ITEMS) if i != row["target"])][:10] for row in rows]
    columns = {"row_id": [row["row_id"] for row in rows]}
    columns["candidates"] = [[CATALOGUE.item_ids[item] for item in items] for items in lists]
    pq.write_table(pa.table(columns), tmp_path / "best.parquet")
    return str(tmp_path / "best.parquet")


def check_slices(run, made, text):
    """Each slice as a loop over its rows finds it."""
    taken = pq.read_table(run / "data/interactions.parquet", filters=[("split", "==", "train")])["item"].to_pylist()
    rows = pq.read_table(run / "data/rows.parquet", filters=[("split", "==", "test")]).to_pylist()
    short = sorted(len(row["history"]) for row in rows)[int(0.25 * 29)]
    counts = sorted(taken.count(item) for item in range(NUM_ITEMS))
    popular = max(6, counts[int(np.ceil(0.9 * (NUM_ITEMS - 1)))])
    members = {"cold": [row for row in rows if taken.count(row["target"]) <= 5]}
    members["popular"] = [row for row in rows if taken.count(row["target"]) >= popular]
    members["short"] = [row for row in rows if len(row["history"]) <= short]
    assert members["popular"] and members["short"]
    slices = made["slices"]
    for name, inside in members.items():
        assert slices["of"][name]["rows"] == len(inside)
        assert slices["rankers"]["best"][name]["value"] == (1.0 if inside else None)
        assert f"{name} (n={len(inside)})" in text
    assert f"at least {popular} training interactions" in text and f"at most {short} items" in text


def test_every_row_is_ranked_and_the_groups_add_up(run, best, tmp_path, monkeypatch):
    monkeypatch.setattr(one_hop, "MOST_SUCCESSORS", 2)
    args = evaluate.EvaluateArguments(
        run_dir=str(run), task="next_item", models=["midtrained"], lists={"best": best}, num_bootstrap=50
    )
    evaluate.check(args)
    assert evaluate.main(args, tmp_path)["R@10"]["best"] == 1.0
    made, text = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "results.md").read_text()
    assert made["n"]["all"] == 30 == made["n"]["one_hop"] + made["n"]["rest"] and made["n"]["rest"] > 0
    assert set(made["rows"]) == {"popularity", "transitions", "best", "midtrained"}
    assert made["rows"]["best"]["all"]["R@5"] == made["rows"]["best"]["rest"]["N@10"] == 1.0
    transitions = made["rows"]["transitions"]
    assert transitions["all"]["R@5_minus_transitions"] == 0.0
    weighted = sum(made["n"][group] * transitions[group]["R@5"] for group in ("one_hop", "rest")) / 30
    assert transitions["all"]["R@5"] == pytest.approx(weighted)
    low, high = made["rows"]["best"]["all"]["R@5_interval"]
    assert low <= 1 - transitions["all"]["R@5"] <= high
    assert f"| best | {1:.4f} | {1:.4f} |" in text and "the rest" in text and "30 test rows, 1 seed, 10 beams" in text
    check_slices(run, made, text)
    assert "of one training seed: another seed may lie outside." in text
    bar = json.loads((tmp_path / "bar.json").read_text())
    found = {(one["ranker"], one["minus"], one["metric"]): one for one in bar["differences"]}
    assert len(found) == 6 * len(recall.METRICS) and bar["n"] == 30
    against = found["best", "transitions", "R@5"]
    assert [against["low"], against["high"]] == pytest.approx([low, high])
    lines = pq.read_table(tmp_path / "lists.parquet").to_pylist()
    assert len(lines) == 4 * 30
    assert all(line["items"][0] == line["target"] for line in lines if line["ranker"] == "best")


def test_a_sample_of_rows_keeps_its_own_lists_of_other_rankers(run, best):
    found = recall.find_lists(run, "test", {"best": best}, ["sft"], max_rows=12)  # its sft stage ranks no catalogue
    assert [*found.lists] == ["popularity", "transitions", "best"]
    assert len(found.rows) == 12 and (found.lists["best"][:, 0] == found.rows.targets).all()


def test_lists_of_other_rankers_that_do_not_fit_are_refused(run, tmp_path):
    for changes in ({"task": "rerank"}, {"lists": {"transitions": "x.parquet"}}):
        keys = {"run_dir": str(run), "task": "next_item", "lists": {"other": "x.parquet"}, **changes}
        with pytest.raises(ValueError, match="lists names .*; it goes with task next_item, and with other names than"):
            evaluate.EvaluateArguments(**keys)
    args = evaluate.EvaluateArguments(run_dir=str(run), task="next_item", lists={"other": "x.parquet"})
    with pytest.raises(FileNotFoundError, match="lists: other is x.parquet, which is not there; give a Parquet file"):
        evaluate.check(args)
    pq.write_table(pa.table({"row_id": [0], "candidates": [["m0"] * 10]}), tmp_path / "few.parquet")
    with pytest.raises(ValueError, match="few.parquet, row 1: row_id 0 is not in data/rows.parquet"):
        recall.find_lists(run, "test", {"few": str(tmp_path / "few.parquet")}, ["midtrained"])


def test_next_items_of_the_midtrained_model_alone_need_no_sft_stage(run):
    def inputs(**keys):
        return evaluate.STAGE.inputs_of(evaluate.EvaluateArguments(run_dir=str(run), **keys))

    assert inputs(task="next_item", models=["midtrained"]) == ["data", "semantic_ids", "midtrain"]
    assert inputs(task="next_item") == inputs(task="held_out_sets") == ["data", "semantic_ids", "midtrain", "sft"]
    assert inputs(task="held_out_sets", models=[])[-1] == "sft"  # which ranks the sets whatever `models` says
    assert inputs() == ["data", "sft", "candidates", "dapo"]  # lists are ranked in a run without semantic ids, too
    assert evaluate.STAGE.inputs_if_made == ("semantic_ids", "midtrain")
