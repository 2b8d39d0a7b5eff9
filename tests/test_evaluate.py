import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from toy_run import CATALOGUE, ID_TOKENS, NUM_ITEMS, SEMANTIC_IDS, SETTINGS, toy_sequences, write_run

from rerank import evaluate
from rerank.baselines import Counts, ItemFacts
from rerank.compare.evaluations import ListEvaluation
from rerank.compare.tables import list_lines
from rerank.launch import recipe
from rerank.models import base as base_model
from rerank.models.ranker import Batch, RankingModel, ask, read_answer
from rerank.next_item.model import NextItemModel, likelihood_orders
from rerank.prompts import clean, render
from rerank.results import overview, rankers
from rerank.results.rankers import Ranker
from rerank.results.rankings import EvaluatedRows, Ranking, make_results
from rerank.rows import RankingRow, read_rows

# Four rows of three candidates; the relevant item stands at rank 1, 2, 3, 2 of the input order.
RELEVANCE = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
NUM_TEST_ROWS = 30
LABELS = ["<s_a_0>", "<s_a_1>", "<s_a_2>"]
SECOND = 1 / np.log2(3)  # NDCG of a relevant item at rank 2; at rank 3 it is 1 / log2(4) = 0.5


def toy_rankings(rows):
    # a copy, rank 1; rank 1; no answer; cut off
    ranked = ("<s_a_0><s_a_1><s_a_2>", "<s_a_1><s_a_0><s_a_2>", "", "<s_a_1><s_a_0>")
    texts = [f"<think>as it is</think>{text}" for text in ranked]
    answers = [read_answer(text, 10, text.endswith("<s_a_0>"), LABELS) for text in texts]
    return [
        Ranking("no_op", [[0, 1, 2]] * 4),
        Ranking("random", None),
        Ranking("oracle", rankers.oracle(None, rows)),
        Ranking.of_answers("sft", answers, seconds=2.0),
        Ranking("dapo", [[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]], answers, seconds=2.0),
    ]


def toy_results(users=(0, 0, 1, 1), split="test"):
    rows = [
        RankingRow(number, (9,), (0, 1, 2), tuple(gains), user=user)
        for number, (gains, user) in enumerate(zip(RELEVANCE, users, strict=True))
    ]
    return make_results(toy_rankings(rows), EvaluatedRows(split, rows, 4, 16), num_bootstrap=500)


def test_a_parse_failure_scores_zero_and_has_the_input_order_as_its_fallback():
    row = toy_results()["rows"]["sft"]
    assert row["R@1"] == row["N@5"] == row["MRR"] == 2 / 4  # ranks 1, 1 and two failures
    assert row["N@5_fallback"] == pytest.approx((1 + 1 + 0.5 + SECOND) / 4)
    assert row["parse_failures"] == 2 and row["parse_failure_share"] == 0.5
    assert row["parse_failure_kinds"] == {"empty": {"count": 1, "share": 0.25}, "too_few": {"count": 1, "share": 0.25}}
    assert row["truncated"] == 1
    assert row["copy_rate"] == 0.5  # one of the two orders that could be read
    assert row["tokens_per_row"] == 10 and row["seconds_per_row"] == 0.5


def test_the_baselines_have_their_hand_computed_values():
    rows = toy_results()["rows"]
    assert rows["no_op"]["R@1"] == 1 / 4
    assert rows["no_op"]["N@5"] == pytest.approx((1 + SECOND + 0.5 + SECOND) / 4)
    assert rows["no_op"]["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert rows["no_op"]["N@5_interval"] == [0, 0] and rows["no_op"]["copy_rate"] == 1
    assert rows["random"]["N@5"] == pytest.approx((1 + SECOND + 0.5) / 3)
    assert rows["random"]["copy_rate"] is None and rows["random"]["parse_failures"] is None
    assert all(rows["oracle"][name] == 1 for name in ("R@1", "R@5", "N@5", "N@10", "MRR"))


def test_end_to_end_values_count_missed_lists_as_zero():
    results = toy_results()
    assert results["n"] == 4 and results["n_all"] == 16
    json.dumps(results)  # nothing in it is a numpy type
    assert results["rows"]["sft"]["end_to_end"]["N@5"] == 0.5 * 4 / 16


def test_differences_to_the_input_and_between_models_are_paired_and_whole_users_are_drawn():
    results = toy_results(users=[7, 7, 7, 7])
    row = results["rows"]["sft"]
    difference = (2 - (1 + SECOND + 0.5 + SECOND)) / 4
    assert row["N@5_minus_no_op"] == pytest.approx(difference)
    assert row["N@5_interval"] == pytest.approx([difference, difference])  # one user: every draw is all rows
    assert row["R@1_minus_no_op"] == 1 / 4
    two = toy_results()["rows"]["sft"]  # the draws are 00, 01, 11: the ends are each user's own mean
    assert two["R@1_interval"] == [0, 0.5]
    comparisons = results["comparisons"]
    assert list(comparisons) == ["dapo_vs_sft"]  # nothing to compare without the other rows
    # dapo ranks the last two rows 1 and 3 where sft fails: (1 + 0.5) / 4
    assert comparisons["dapo_vs_sft"]["N@5"] == {"difference": 0.375, "interval": [0.375, 0.375]}
    assert comparisons["dapo_vs_sft"]["R@1"]["difference"] == 0.25


def test_markdown_and_terminal_show_the_same_row_and_say_when_it_is_not_test():
    text = overview.markdown(toy_results())
    line = next(line for line in text.splitlines() if line.startswith("| sft |"))
    assert "0.5000" in line and "2 (50.0 %): empty 1, too_few 1" in line and "500.0" in line
    assert "4 test rows whose list holds a relevant item, of 16 (list recall 25.0 %)" in text and "NOT" not in text
    assert "of one training seed: another seed may lie outside." in text
    assert "NOT the test split" in overview.markdown(toy_results(split="valid"))
    console = Console(width=80, record=True, file=io.StringIO())  # nothing may be cut off
    console.print(overview.results_table(toy_results(split="valid")))
    shown = " ".join(console.export_text().split())
    assert "NOT the test split" in shown and "50.0 %" in shown and "dapo minus sft" in shown and "…" not in shown


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("toy") / "run")


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(toy_run, tmp_path / "run")


def test_transitions_rank_as_the_first_stage_did_whatever_order_the_list_is_in(toy_run):
    rng = np.random.default_rng(1)
    rows = EvaluatedRows.load(toy_run / "candidates", "test").rows
    shown = [row.shuffled(rng.permutation(4).tolist()) for row in rows]
    orders = rankers.transitions(toy_run / "candidates", shown)
    for row, mixed, order in zip(rows, shown, orders, strict=True):
        assert [mixed.candidates[position] for position in order] == list(row.candidates)


def test_only_rows_with_a_hit_are_read_and_max_rows_draws_the_same_ones_again(toy_run):
    evaluated = EvaluatedRows.load(toy_run / "candidates", "test")
    assert all(row.is_hit for row in evaluated.rows) and 3 < len(evaluated.rows) < NUM_TEST_ROWS
    assert evaluated.num_all == NUM_TEST_ROWS and evaluated.hit_share == len(evaluated.rows) / NUM_TEST_ROWS
    drawn, again = (EvaluatedRows.load(toy_run / "candidates", "test", max_rows=3) for _ in range(2))
    assert len(drawn.rows) == 3 and drawn.hit_share == evaluated.hit_share and drawn == again
    assert [row.row_id for row in drawn.rows] == sorted(row.row_id for row in drawn.rows)


def test_a_split_without_any_hit_is_refused(toy_run, tmp_path):
    missed = pq.read_table(toy_run / "candidates/test.parquet", filters=[("hit", "==", False)])
    pq.write_table(missed, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"test.parquet: none of its \d+ rows lists a relevant item"):
        EvaluatedRows.load(tmp_path, "test")


def test_likelihood_orders_are_those_of_scoring_each_candidate_alone_in_any_batch(toy_run):
    rows = EvaluatedRows.load(toy_run / "candidates", "test").rows
    orders = [likelihood_orders(NextItemModel.load_midtrained(toy_run), rows, size) for size in (1, 7)]
    assert orders[0] == orders[1]
    model, tokenizer = base_model.load_pretrained(str(toy_run / "midtrain/model"))
    prompt = render(tokenizer, "Next items:")
    for row, order in zip(rows[:5], orders[0], strict=False):
        history = "".join(SEMANTIC_IDS[item] for item in row.history[-4:])  # documents hold five items
        logps = []
        for item in row.candidates:
            ids = tokenizer(prompt + history + SEMANTIC_IDS[item], return_tensors="pt").input_ids
            with torch.no_grad():
                steps = model(ids).logits.log_softmax(-1)[0]
            logps.append(sum(float(steps[place - 1, ids[0, place]]) for place in (-2, -1)))
        ordered = [logps[position] for position in order]
        assert sorted(order) == [0, 1, 2, 3] and all(np.diff(ordered) < 1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"split": "train"}, r"split is 'train' but must be one of test, valid"),
    ({"models": ["sft", "gpt"]}, r"models is 'gpt' but must be one of midtrained, sft, sft_no_trace, dapo"),
    ({"models": ["dapo"], "task": "next_item"}, r"models holds dapo, but task next_item asks midtrained and sft"),
    ({"models": ["dapo"], "task": "held_out_sets"}, r"models holds dapo, but task held_out_sets asks sft only"),
    ({"max_rows": -1}, r"max_rows is -1 but must be at least 0"),
    ({"orders": -1}, r"orders is -1 but must be at least 0"),
    ({"shuffle_texts": True, "task": "next_item"}, r"shuffle_texts goes with task rerank, but task is next_item"),
    ({"batch_size": 0}, r"batch_size is 0 but must be at least 1"),
    ({"num_bootstrap": 0}, r"num_bootstrap is 0 but must be at least 1"),
])  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateArguments(run_dir="run", **options)


def test_a_model_folder_must_be_complete(run):
    for name in ("generation.json", "config.json"):
        (run / "sft/model" / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing; give a model folder of the sft or dapo"):
            RankingModel.load(run / "sft/model")


def test_semantic_ids_of_another_catalogue_are_refused_before_a_model_is_loaded(run):
    args = evaluate.EvaluateArguments(run_dir=str(run))
    evaluate.check(args)
    ids = [text.replace("<s_b_3>", "<s_b_9>") for text in SEMANTIC_IDS]
    replace(CATALOGUE, semantic_ids=ids).save(run / "dapo/model")
    with pytest.raises(ValueError, match=r"another catalogue than the model's: .*dapo/model lacks <s_b_9>"):
        evaluate.check(args)


def test_answers_too_short_for_the_longest_list_are_refused_before_anything_is_ranked(run):
    args = evaluate.EvaluateArguments(run_dir=str(run), constrained=True)
    evaluate.check(args)
    path = run / "sft/model/generation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_completion_tokens": 5}))
    evaluate.check(replace(args, constrained=False))
    with pytest.raises(
        ValueError, match=r"row \d+: a ranking of \d+ of \d+ candidates takes up to \d+ tokens but a c"
    ):
        evaluate.check(args)


def test_an_id_token_that_is_special_is_refused(run):
    model = RankingModel.load(run / "sft/model")
    tokenizer = model.load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ID_TOKENS[:1]})
    tokenizer.save_pretrained(run / "sft/model")
    with pytest.raises(ValueError, match=r"has as a special token, which decoding drops, <s_a_0>"):
        model.load_tokenizer()


def test_the_stage_on_models_with_random_weights_counts_every_failure(run, monkeypatch):
    for name, value in recipe.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    out_dir = run / "evaluate.partial"
    out_dir.mkdir()
    counts = Counts.fit(toy_sequences(), NUM_ITEMS, ItemFacts.of(NUM_ITEMS, categories=list("abcabcabcabc")))
    counts.save(run / "candidates/evidence.npz")
    args = evaluate.EvaluateArguments(run_dir=str(run), num_bootstrap=50, orders=2, shuffle_texts=True)
    evaluate.check(args)
    metrics = evaluate.main(args, out_dir)
    results = json.loads((out_dir / "results.json").read_text())
    rows, controls = results["rows"], ["lambdamart_shuffled_texts", "sft_shuffled_texts", "dapo_shuffled_texts"]
    rankers_shown = ["no_op", "random", "oracle", "transitions", "lambdamart", "midtrained", "sft", "dapo", *controls]
    assert list(rows) == rankers_shown and "dapo_vs_dapo_shuffled_texts" in results["comparisons"]
    for name in ("sft", "dapo"):
        assert rows[name]["N@5"] == 0 and rows[name]["parse_failure_share"] == 1
        assert rows[name]["N@5_fallback"] == rows["no_op"]["N@5"]
        assert 1 <= rows[name]["tokens_per_row"] <= 16
    assert rows["transitions"]["N@5"] == rows["no_op"]["N@5"] < rows["oracle"]["N@5"] == 1
    assert results["dapo"]["max_logp_gap"] == 0.001 and results["dapo"]["rollout_engine"] == "vllm"
    assert metrics["N@5"]["no_op"] == rows["no_op"]["N@5"] and metrics["n"] == results["n"]
    ranked = pq.read_table(out_dir / "rankings.parquet").to_pylist()
    assert len(ranked) == 10 * results["n"]  # all but random
    assert {line["failure"] for line in ranked if line["ranker"] == "sft"} <= {"no_trace_end", "junk", "empty"}
    check_orders(out_dir, results)
    text = (out_dir / "results.md").read_text()
    for words in (
        "First-stage rank of the target.",
        "Slices.",
        "N@5 on slices.",
        "Order robustness.",
        "| sft, merged |",
    ):
        assert words in text
    assert "no two items share a semantic id" in text and "\n| lambdamart_shuffled_texts | " in text


def check_orders(out_dir, results):
    """Trees do not move, models with random weights never rank, and the stored rankings give the same numbers."""
    found = results["orders"]
    assert list(found["rankers"]) == ["lambdamart", "sft", "dapo"] and found["rows"] == results["n"]
    trees, model = found["rankers"]["lambdamart"], found["rankers"]["sft"]
    assert trees["by_order"] == [results["rows"]["lambdamart"]["N@5"]] * 2 and trees["kendall_tau"] == 1
    assert model["both_ranked"] == 0 and model["kendall_tau"] is None and model["merged"]["N@5"] == 0
    stored = pq.read_table(out_dir / "orders.parquet").to_pylist()
    assert len(stored) == 3 * 2 * results["n"]
    first = [line["order"] for line in stored if line["ranker"] == "lambdamart" and line["number"] == 1]
    given = pq.read_table(out_dir / "rankings.parquet", filters=[("ranker", "==", "lambdamart")])
    assert first == given["order"].to_pylist()
    assert all(line["order"] is None for line in stored if line["ranker"] == "sft")


def test_candidate_lines_move_with_their_facts_and_the_control_shows_other_texts(run):
    model = RankingModel.load(run / "sft/model")
    tokenizer = model.load_tokenizer()
    row = EvaluatedRows.load(run / "candidates", "test").rows[0]

    def lines(row, catalogue=None):
        (asked,) = ask(model, Batch([row], catalogue), tokenizer)
        return asked.prompt.split("Candidates:\n")[1].split("<|assistant|>")[0].splitlines()

    shown, order = lines(row), [2, 0, 3, 1]
    assert lines(row.shuffled(order)) == [shown[place] for place in order]
    others = lines(row, CATALOGUE.with_texts_of([*range(1, NUM_ITEMS), 0]))
    for item, line, other in zip(row.candidates, shown, others, strict=True):
        own, given = (f"{SEMANTIC_IDS[item]} {clean(CATALOGUE.titles[k % NUM_ITEMS])} |" for k in (item, item + 1))
        assert line.startswith(own) and other == given + line.removeprefix(own)


def test_a_control_of_texts_that_no_prompt_shows_is_refused(run):
    settings = replace(SETTINGS, item_fields=["semantic_id"], evidence_names=["popularity"])
    for stage in ("sft", "dapo"):
        settings.save(run / stage / "model")
    evaluate.check(evaluate.EvaluateArguments(run_dir=str(run)))
    with pytest.raises(ValueError, match=r"prompts of .*sft/model show no title, category or text fact, so that"):
        evaluate.check(evaluate.EvaluateArguments(run_dir=str(run), shuffle_texts=True))


def test_without_semantic_ids_or_a_model_that_knows_them_there_is_no_likelihood(run):
    args = evaluate.EvaluateArguments(run_dir=str(run))
    by_name = {ranker.name: ranker for ranker in rankers.RANKERS}
    without_ids = replace(CATALOGUE, semantic_ids=[""] * NUM_ITEMS)
    assert evaluate.can_rank(by_name["midtrained"], args, CATALOGUE)
    assert not evaluate.can_rank(by_name["midtrained"], args, without_ids)
    assert all(evaluate.can_rank(by_name[name], args, without_ids) for name in ("no_op", "lambdamart", "sft"))
    shutil.rmtree(run / "midtrain/model")
    assert not evaluate.can_rank(by_name["midtrained"], args, CATALOGUE)


def test_without_orders_there_is_no_table_of_them(run):
    (run / "evaluate").mkdir()
    args = evaluate.EvaluateArguments(run_dir=str(run), models=[], num_bootstrap=5, orders=0)
    evaluate.main(args, run / "evaluate")
    assert json.loads((run / "evaluate/results.json").read_text())["orders"] is None
    assert "Order robustness" not in (run / "evaluate/results.md").read_text()
    assert not (run / "evaluate/orders.parquet").exists()


def test_lambdamart_rests_on_training_rows_alone_in_any_order(run):
    folder, table = run / "candidates", pq.read_table(run / "candidates/train.parquet")
    rows = EvaluatedRows.load(folder, "valid").rows
    found = rankers.lambdamart(folder, read_rows(folder / "valid.parquet", needs_features=True))
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), folder / "train.parquet")
    given = read_rows(folder / "valid.parquet", needs_features=True)
    (folder / "valid.parquet").unlink()  # rows that are ranked do not choose the number of trees
    assert rankers.lambdamart(folder, given) == found
    assert len(found.of_fits) == 5 and len(found.orders) == len(rows)


def test_results_say_how_far_the_fits_of_a_baseline_differ():
    rows = [RankingRow(n, (9,), (0, 1, 2), tuple(gains), user=n) for n, gains in enumerate(RELEVANCE)]
    orders = [[[0, 1, 2]] * 4, [[1, 0, 2]] * 4]
    ranking = Ranking.of_baseline("lambdamart", rankers.FittedOrders(orders[0], orders))
    rankings = [Ranking("no_op", [[0, 1, 2]] * 4), ranking]
    results = make_results(rankings, EvaluatedRows("test", rows, 4, 4), num_bootstrap=5)
    # the relevant item at ranks 1, 2, 3, 2 by one fit and at 2, 1, 3, 1 by the other
    alone = (1 + SECOND + 0.5 + SECOND) / 4, (SECOND + 1 + 0.5 + 1) / 4
    spread = abs(alone[0] - alone[1]) / np.sqrt(2)
    assert results["fits"] == {"lambdamart": {"num": 2, "N@5_spread": pytest.approx(spread)}}
    assert results["rows"]["lambdamart"]["N@5"] == pytest.approx(alone[0])
    assert f"2 fits, whose N@5 alone have a standard deviation of {spread:.4f}" in overview.markdown(results)
    results["fits"] = {}
    assert "fits" not in overview.markdown(results)


def test_a_ranker_is_added_in_one_place(run, monkeypatch):
    def reverse(candidates_dir, rows):
        return [list(range(len(row.candidates)))[::-1] for row in rows]

    more = (
        Ranker("reverse", "input order turned round", ("rerank",), orders=reverse),
        Ranker("grpo", "another policy", ("rerank",), "generates", stage="dapo", folder="grpo"),
    )
    monkeypatch.setattr(rankers, "RANKERS", (*rankers.RANKERS, *more))
    assert evaluate.EvaluateArguments(run_dir="run").models[-1] == "grpo"
    with pytest.raises(FileNotFoundError, match=r"dapo/grpo/config.json is missing"):
        evaluate.check(evaluate.EvaluateArguments(run_dir=str(run), models=["grpo"]))
    (run / "evaluate").mkdir()
    metrics = evaluate.main(evaluate.EvaluateArguments(run_dir=str(run), models=[], num_bootstrap=5), run / "evaluate")
    assert metrics["N@5"]["reverse"] < metrics["N@5"]["oracle"]
    assert "\n| reverse | " in (run / "evaluate/results.md").read_text()
    assert "| – | reverse | 1 |" in "\n".join(list_lines({"a": [run]}))
    assert ListEvaluation.load(run).folders["grpo"] == (run / "dapo").resolve()
