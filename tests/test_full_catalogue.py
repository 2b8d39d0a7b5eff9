"""The next item among all items: metrics, baselines, the split by what counting finds, and the whole evaluation."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import CATALOGUE, NUM_ITEMS, toy_sequences, write_model, write_run

from rerank import cli, metrics, run_dir
from rerank.baselines import Counts
from rerank.evaluate import full_catalogue
from rerank.evaluate.likelihood import candidate_logps
from rerank.midtrain import next_item_prompt
from rerank.next_items import NextItemModel


def test_metrics_of_lists_are_those_of_one_ranking_at_a_time():
    rng = np.random.default_rng(0)
    lists = np.array([rng.permutation(30)[:10] for _ in range(200)])
    targets = rng.integers(0, 30, 200)
    values = full_catalogue.metrics_of_lists(lists, targets)
    for row, (items, target) in enumerate(zip(lists, targets, strict=True)):
        gains = [float(item == target) for item in items] + [float(target not in items)]  # found beyond the list
        for cut in (5, 10):
            assert values[f"R@{cut}"][row] == metrics.recall_at_k(gains, cut)
            assert values[f"N@{cut}"][row] == pytest.approx(metrics.ndcg_at_k(gains, cut))


def test_a_hit_at_the_sixth_place_counts_among_ten():
    values = full_catalogue.metrics_of_lists(np.array([[9, 8, 7, 6, 5, 4, -1, -1, -1, -1]]), np.array([4]))
    # place 6: 1 / log2(7) against an ideal of 1
    assert {name: value[0] for name, value in values.items()} == pytest.approx(
        {"R@5": 0.0, "R@10": 1.0, "N@5": 0.0, "N@10": 1 / np.log2(7)}
    )


def test_popular_lists_leave_out_the_history():
    popularity = np.array([5, 1, 9, 1, 7])
    lists = full_catalogue.popular_lists(popularity, [np.array([2]), np.array([4, 0, 1])], 2)
    assert lists.tolist() == [[4, 0], [2, 3]]
    assert full_catalogue.popular_lists(popularity, [np.array([1, 2, 4, 3])], 2).tolist() == [[0, -1]]


def test_a_target_is_one_hop_away_when_it_is_among_the_most_frequent_successors(monkeypatch):
    sequences = {0: np.array([0, 1, 2]), 1: np.array([0, 1, 3]), 2: np.array([0, 3]), 3: np.array([5, 0, 4, 3])}
    counts = Counts.fit(sequences, 6)
    # after 0: 1 twice, 3 and 4 once; 3 is more popular than 4. After 1: 2 and 3 once. After 5: 0.
    histories = [np.array([0]), np.array([0]), np.array([0]), np.array([5, 0, 0]), np.array([2])]
    targets = np.array([1, 3, 4, 4, 0])
    assert full_catalogue.is_one_hop(counts, histories, targets).tolist() == [True, True, True, True, False]
    monkeypatch.setattr(full_catalogue, "MOST_SUCCESSORS", 2)
    assert full_catalogue.is_one_hop(counts, histories, targets).tolist() == [True, True, False, False, False]


def make_run(folder):
    """A run of thirty users who are all training, and thirty with three items: training, validation and test."""
    run = write_run(folder)
    interactions = {"user": [], "item": [], "position": [], "split": []}
    rows = {"row_id": [], "user": [], "split": [], "history": [], "target": []}
    walks = [list(dict.fromkeys(walk.tolist())) for walk in toy_sequences().values()]
    sequences = [(walk, ["train"] * len(walk)) for walk in walks]
    sequences += [(walk[:3], ["train", "valid", "test"]) for walk in walks]
    for user, (items, splits) in enumerate(sequences):
        for place, (item, split) in enumerate(zip(items, splits, strict=True)):
            for name, value in zip(interactions, (user, item, place, split), strict=True):
                interactions[name].append(value)
            if split != "train":
                values = (len(rows["row_id"]), user, split, items[:place], item)
                for name, value in zip(rows, values, strict=True):
                    rows[name].append(value)
    pq.write_table(pa.table(interactions), run / "data/interactions.parquet")
    pq.write_table(pa.table(rows), run / "data/rows.parquet")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("catalogue") / "run")


def test_the_model_finds_what_scoring_every_item_finds(run):
    asked = NextItemModel.load_midtrained(run).with_max_history(3)
    model, tokenizer = asked.model, asked.rows.tokenizer
    histories = [np.array([3, 4]), np.array([0, 1, 2, 7, 11])]
    found = asked.by_beams(histories, 5, NUM_ITEMS)
    for history, items in zip(histories, found.items, strict=True):
        prompt = next_item_prompt(history, CATALOGUE, 3, tokenizer)
        logps = candidate_logps(model, tokenizer, [prompt], [CATALOGUE.semantic_ids])[0]
        logps[history] = -np.inf
        assert items == np.argsort(-logps)[:5].tolist()


def test_a_model_made_from_other_ids_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    for stage, inputs in (("semantic_ids", {}), ("midtrain", {"semantic_ids": "another"})):
        run_dir.write_json(run / stage / "stage.json", {"id": "x", "given": {}, "inputs": inputs})
        run_dir.write_json(run / stage / "metrics.json", {})
    with pytest.raises(ValueError, match="midtrain was made from another semantic_ids folder than the run's; delete"):
        NextItemModel.load_midtrained(run)


def test_the_beam_search_of_the_readme_runs(run, capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import beam_search" in part]
    exec(code.replace("runs/ml100k", str(run)), {})
    assert re.match(r"\[\[\d+, \d+, \d+, \d+, \d+\], \[", capsys.readouterr().out)


def test_recall_of_a_sample_is_that_of_its_rows(run):
    asked = NextItemModel.load_midtrained(run)
    model, tokenizer = asked.model, asked.rows.tokenizer
    sample = full_catalogue.ValidationRecall.load(run, tokenizer, 12, 5)
    assert len(sample.histories) == len(sample.dataset()) == 12
    found = asked.by_beams(sample.histories, 10, 20)  # its recipe has max_items 5 too
    hits = [target in items for target, items in zip(sample.targets.tolist(), found.items, strict=True)]
    assert sample(model)["R@10"] == pytest.approx(np.mean(hits))
    again = full_catalogue.ValidationRecall.load(run, tokenizer, 12, 5)
    assert again.targets.tolist() == sample.targets.tolist()
    assert len(full_catalogue.ValidationRecall.load(run, tokenizer, 999, 5).targets) == 30


def test_the_evaluation_ranks_every_row_and_its_groups_add_up(run, tmp_path, monkeypatch):
    monkeypatch.setattr(full_catalogue, "MOST_SUCCESSORS", 2)
    rows = pq.read_table(run / "data/rows.parquet", filters=[("split", "==", "test")]).to_pylist()
    best = [[row["target"], *(i for i in range(NUM_ITEMS) if i != row["target"])][:10] for row in rows]
    lists = {"row_id": [row["row_id"] for row in rows]}
    lists["candidates"] = [[CATALOGUE.item_ids[item] for item in items] for items in best]
    pq.write_table(pa.table(lists), tmp_path / "best.parquet")
    made = full_catalogue.evaluate_full_catalogue([run], "test", {"best": tmp_path / "best.parquet"}, 50)
    assert made["n"]["all"] == 30 == made["n"]["one_hop"] + made["n"]["rest"] and made["n"]["rest"] > 0
    assert set(made["rows"]) == {"popularity", "transitions", "best", "midtrained"}
    assert made["rows"]["best"]["all"]["R@5"] == made["rows"]["best"]["rest"]["N@10"] == 1.0
    transitions = made["rows"]["transitions"]
    assert transitions["all"]["R@5_minus_transitions"] == 0.0
    weighted = sum(made["n"][group] * transitions[group]["R@5"] for group in ("one_hop", "rest")) / 30
    assert transitions["all"]["R@5"] == pytest.approx(weighted)
    low, high = made["rows"]["best"]["all"]["R@5_interval"]
    assert low <= 1 - transitions["all"]["R@5"] <= high
    text = full_catalogue.markdown(made)
    assert f"| best | {1:.4f} | {1:.4f} |" in text and "the rest" in text


def test_runs_of_several_seeds_are_averaged(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "midtrain/model")
    write_model(other / "midtrain/model", with_ranking_files=False, seed=1)
    alone = [full_catalogue.evaluate_full_catalogue([one], "valid", {}, 5) for one in (run, other)]
    both = full_catalogue.evaluate_full_catalogue([run, other], "valid", {}, 5)
    assert len({made["rows"]["midtrained"]["all"]["N@10"] for made in alone}) == 2
    values = [made["rows"]["midtrained"]["all"]["R@5"] for made in alone]
    assert both["rows"]["midtrained"]["all"]["R@5"] == pytest.approx(np.mean(values))
    assert both["rows"]["midtrained"]["all"]["R@5_spread"] == pytest.approx(np.std(values, ddof=1))
    assert "R@5_spread" not in both["rows"]["transitions"]["all"]


def test_the_command_writes_the_table(run, tmp_path, capsys):
    assert cli.main(["recall", str(run), "--num_beams", "12", "--out", str(tmp_path / "out.md")]) == 0
    text = (tmp_path / "out.md").read_text()
    assert "30 valid rows, 1 seed, 12 beams" in text and text in capsys.readouterr().out


def test_what_does_not_fit_is_refused(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"split is 'train' but must be one of test, valid"):
        full_catalogue.evaluate_full_catalogue([run], "train", {})
    other = make_run(tmp_path / "other")
    table = pq.read_table(other / "data/rows.parquet")
    pq.write_table(table.slice(1), other / "data/rows.parquet")
    with pytest.raises(ValueError, match=r"other has other data than .*run; give runs of one data folder"):
        full_catalogue.evaluate_full_catalogue([run, other], "test", {})
    assert cli.main(["recall", str(run), "--lists", "nothing"]) == 2
    assert "--lists nothing: write NAME=FILE, with a Parquet file that is there" in capsys.readouterr().err
