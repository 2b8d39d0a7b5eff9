"""One-token ranking: its scores, what it refuses, and a model that is trained for it, evaluated and used."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_model import ID_TOKENS, SHAPE, sft_config, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_recipe import run_command
from toy_run import (
    NUM_ITEMS,
    finish,
    toy_rows,
    toy_sequences,
    write_candidates,
    write_interactions,
    write_items,
    write_traces,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig

from rerank import cli, dapo, evaluate, sft
from rerank.baselines import FEATURES, Counts, fit_edges
from rerank.losses import load_losses
from rerank.models import base, engine, one_token
from rerank.models.ranker import RankingModel, generate_answers
from rerank.prompts import PromptSettings, prompt_ids
from rerank.rows import PromptedRow, Prompter, RankingRow, read_rows, training_rows
from rerank.rows.teacher_scores import read_scores, write_scores
from rerank.sft.rows import examples, gold_order
from rerank.sft.start import check_start

LETTERS = list("ABCDEF")
SETTINGS = PromptSettings(task="short", item_fields=["title"], ranking="letter")
SOFT = [{"name": "soft_targets", "kwargs": {"weight": 0.5}}, {"name": "ranknet", "kwargs": {"weight": 1.0}}]


@pytest.fixture(scope="module")
def tokenizer():
    """One that has letters and the digits from 1 to 9 as one token each."""
    texts = [f"Rank: History: Candidates: Title drama {item}" for item in range(9)]
    made = base.train_tokenizer(texts, 400, [*LETTERS, *"123456789"])
    base.extend_vocabulary(made, ["<think>", "</think>", *ID_TOKENS])
    return made


def make_model(tokenizer):
    return base.make_small_model(replace(SHAPE, num_layers=2), tokenizer, seed=0).eval()


def asked(text, labels):
    return PromptedRow(RankingRow(7, (), tuple(range(len(labels)))), text, labels, 16)


# --- scores and refusals


def test_scores_are_those_of_a_plain_forward_pass_of_each_row_alone(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    texts = [f"Rank: {'drama ' * number}Title {number}" for number in (1, 30, 2, 9, 2)]
    rows = [asked(text, LETTERS[:size]) for text, size in zip(texts, (2, 3, 6, 4, 1), strict=True)]
    for most in ({"MAX_ROWS": 2}, {"MAX_TOKENS": 90}, {}):
        with monkeypatch.context() as patch:
            for name, value in most.items():
                patch.setattr(one_token, name, value)
            found = one_token.first_label_logps(model, tokenizer, rows)
        for row, logps in zip(rows, found, strict=True):
            ids = prompt_ids(tokenizer, [row.prompt + "<think></think>"])
            with torch.no_grad():
                probabilities = model(torch.tensor(ids)).logits[0, -1].softmax(0)
            labels = tokenizer.convert_tokens_to_ids([f"Ġ{label}" for label in row.labels])
            plain = probabilities[labels] / probabilities[labels].sum()
            assert np.abs(logps - plain.log().numpy()).max() < 1e-4
    best = [[int(place) for place in np.argsort(-logps)] for logps in found]
    assert one_token.orders_of(model, tokenizer, rows) == best


def test_of_equal_labels_the_one_shown_first_comes_first(tokenizer):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert one_token.orders_of(model, tokenizer, [asked("Rank:", LETTERS)]) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*"123456789", "10"], "'10' is 2 tokens to .*; set ranking: letter or token in the traces recipe, or rank"),
        (["<s_a_0><s_b_0>", "<s_a_1><s_b_1>"], "'<s_a_0><s_b_0>' is 2 tokens to .*; set ranking: letter or token"),
        (["A", "Q"], "one-token ranking needs a token for each label, but 'Q' is 2 tokens to the model; rank by gen"),
    ],
)
def test_the_first_label_that_is_not_one_token_is_named(tokenizer, labels, message):
    with pytest.raises(ValueError, match=f"^row 7: .*{message}"):
        one_token.tokens_of([asked("", labels[:1]), asked("", labels)], tokenizer)


def test_ids_of_one_token_rank_and_labels_that_are_one_token_to_the_model_do_not(tokenizer):
    ids = ["<s_a_0>", "<s_a_1>", "<s_a_0>"]  # two items of one id
    assert one_token.label_tokens(tokenizer, ids) == tokenizer.convert_tokens_to_ids(ids)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "A": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_tokens(["</think>"])
    with pytest.raises(ValueError, match="'C' is the same token as 'B' to the model; rank by generation"):
        one_token.label_tokens(PreTrainedTokenizerFast(tokenizer_object=words), ["A", "B", "C"])


# --- the stages


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A run up to the traces stage, whose teacher is the trees, and a model of random weights."""
    folder = tmp_path_factory.mktemp("one_token")
    run, model = folder / "run", folder / "base"
    write_items(run / "data", title=[f"Title {item}" for item in range(NUM_ITEMS)])
    write_interactions(run / "data", items=NUM_ITEMS, users=30, interactions=240)
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    splits = {name: toy_rows(counts, seed) for seed, name in enumerate(("train", "valid", "test"))}
    values = np.concatenate([row["features"] for row in splits["train"]])
    edges = {name: fit_edges(values[:, column]) for column, name in enumerate(FEATURES)}
    write_candidates(run / "candidates", edges, **splits)
    counts.save(run / "candidates/evidence.npz")
    finish(run / "candidates")
    hits = [row["row_id"] for row in splits["train"] if row["hit"]]
    write_traces(run / "traces", dict.fromkeys(hits[:8], "sft"), SETTINGS)
    write_scores(run / "traces", {row_id: np.arange(4) * 0.7 * (-1) ** row_id for row_id in hits})
    accepted = [{"row_id": row_id, "trace": " A top B bad", "order": [0, 2, 1, 3]} for row_id in hits[:5]]
    pq.write_table(pa.Table.from_pylist(accepted), run / "traces/accepted.parquet")
    finish(run / "traces")
    make_model(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return run, model


def train(made, losses, with_trace=False, steps=40, out="sft"):
    """Train into RUN/`out`; the metrics and the model's folder."""
    run, model = made
    args = sft.SftArguments(run_dir=str(run), losses=losses, with_trace=with_trace, eval_rows=4, keep="last")
    folder = run / f"{out}.partial"
    folder.mkdir()
    config = sft_config(
        folder / "checkpoints", max_steps=steps, max_length=256, learning_rate=0.01, per_device_train_batch_size=8,
        lr_scheduler_type="constant",
    )  # fmt: skip
    model_args = ModelConfig(model_name_or_path=str(model))
    sft.check(args, config, model_args)
    metrics = sft.main(args, config, model_args, folder)
    finish(folder.rename(run / out))
    return metrics, run / out / "model"


@pytest.fixture(scope="module")
def trained(made):
    return train(made, SOFT)


def test_eight_rows_are_learned_to_the_last_rank_without_vllm(made, trained, monkeypatch):
    monkeypatch.delattr(engine, "open_engine")
    (run, _), (metrics, folder) = made, trained
    rows, scores = training_rows(run, "sft"), read_scores(run)
    model = RankingModel.load(folder)
    answers, _ = generate_answers(model, rows)
    gold = [gold_order(row, np.argsort(-np.array(scores[row.row_id]), kind="stable").tolist()) for row in rows]
    assert len({tuple(order) for order in gold}) > 3 and metrics["rows"] == 8 and metrics["max_completion_tokens"] == 1
    assert [answer.order for answer in answers] == gold
    assert model.one_token and answers[0].num_tokens == 1 and answers[0].trace == "" and answers[0].failure is None
    assert answers[0].text == "<think></think> " + " ".join("ABCD"[place] for place in gold[0])
    assert "ranks them by the probabilities of their labels as the next token" in (folder / "README.md").read_text()
    log = json.loads((folder.parent / "log_history.json").read_text())
    checks = [entry for entry in log if "eval_N@5" in entry]
    assert checks[-1]["eval_parse_failures"] == 0 and all("loss_ranknet" in line for line in log if "loss" in line)


def test_evaluation_ranks_such_a_model_by_one_token_in_every_way_without_vllm(made, trained, monkeypatch):
    monkeypatch.delattr(engine, "open_engine")
    run, out_dir = made[0], made[0] / "evaluate"
    out_dir.mkdir()
    options = {"orders": 2, "constrained": True, "one_token": True, "num_bootstrap": 20}
    args = evaluate.EvaluateArguments(run_dir=str(run), models=["sft"], **options)
    evaluate.check(args)
    evaluate.main(args, out_dir)
    results = json.loads((out_dir / "results.json").read_text())
    assert list(results["rows"])[-1] == "sft"  # it has one way to rank
    assert results["rows"]["sft"]["parse_failures"] == 0 and results["rows"]["sft"]["tokens_per_row"] == 1
    ranked = pq.read_table(out_dir / "rankings.parquet", filters=[("ranker", "==", "sft")]).to_pylist()
    rows = {row.row_id: row for row in read_rows(run / "candidates/test.parquet")}
    model = RankingModel.load(trained[1])
    prompter = replace(model.prompter, tokenizer=model.load_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(trained[1])
    shown = [prompter.ask(rows[line["row_id"]], 3) for line in ranked]
    assert [line["order"] for line in ranked] == one_token.orders_of(plain, prompter.tokenizer, shown)


def test_the_command_ranks_new_rows_by_one_token(made, trained, tmp_path, capsys):
    lines = [{"history": ["m3"], "candidates": [f"m{item}" for item in range(size)]} for size in (6, 3, 7)]
    for name, shown in (("rows", lines[:2]), ("long", lines)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown))
    words = ("rank", trained[1], "--one-token", "--out", tmp_path / "ranked.jsonl", "--rows")
    run_command(*words, tmp_path / "rows.jsonl")
    for line, text in zip(lines, (tmp_path / "ranked.jsonl").read_text().splitlines(), strict=False):
        assert sorted(json.loads(text)["ranking"]) == sorted(line["candidates"])
    assert cli.main([str(word) for word in (*words, tmp_path / "long.jsonl")]) == 3
    *_, long = (tmp_path / "ranked.jsonl").read_text().splitlines()
    assert json.loads(long)["failure"].startswith("one-token ranking needs a token for each label, but 'G' is 2")


def test_what_cannot_be_trained_or_used_so_is_refused_before_a_model_loads(made, trained, tmp_path):
    run, model = made
    with pytest.raises(ValueError, match="loss soft_targets trains on rankings' first labels, without traces; set wi"):
        sft.SftArguments(run_dir=str(run), losses=SOFT)
    with pytest.raises(ValueError, match="with_trace is false but no_trace_control is true; take one of the two out"):
        sft.SftArguments(run_dir=str(run), with_trace=False, no_trace_control=True)
    with pytest.raises(
        ValueError, match="sft/model was trained on rankings' first labels alone, so that it writes no"
    ):
        dapo.refuse_one_token(trained[1])
    args = sft.SftArguments(run_dir=str(run), losses=SOFT, with_trace=False)
    check_start(args, ModelConfig(model_name_or_path=str(model)))
    (tmp_path / "split").mkdir()
    split = tiny_tokenizer()
    split.save_pretrained(tmp_path / "split")
    base.make_small_model(SHAPE, split, 0).save_pretrained(tmp_path / "split")
    with pytest.raises(ValueError, match="each label, but 'A' is 2 tokens to .*split; rank by generation"):
        check_start(args, ModelConfig(model_name_or_path=str(tmp_path / "split")))


def test_rows_without_a_teachers_scores_are_refused_by_the_dry_run(made, tmp_path):
    run, model = made
    config, model_args = sft_config(tmp_path, max_length=256), ModelConfig(model_name_or_path=str(model))
    args = sft.SftArguments(run_dir=str(run), losses=SOFT, with_trace=False)
    scores = run / "traces/scores.parquet"
    kept = scores.rename(tmp_path / "scores.parquet")
    try:
        with pytest.raises(
            ValueError, match="weight is 0.5 but the rows have no teacher's scores; set teacher: evidence"
        ):
            sft.check(args, config, model_args)
        one_hot = [{"name": "soft_targets", "kwargs": {"weight": 0}}]
        sft.check(sft.SftArguments(run_dir=str(run), losses=one_hot, with_trace=False), config, model_args)
    finally:
        kept.rename(scores)


def test_an_attempt_teaches_the_gold_order_or_its_own(made, tokenizer, tmp_path):
    run, losses = made[0], load_losses([{"name": "nll"}, {"name": "ranknet"}], "rerank")
    prompter, orders = Prompter.of_run(run, tokenizer), []
    for as_accepted in (False, True):
        chosen, encoded = examples(prompter, str(run), True, losses, tmp_path, as_accepted)
        orders.append([np.argsort(example["ranks"]).tolist() for example in encoded])
    assert orders[0] == [gold_order(row, [0, 2, 1, 3]) for row in chosen]
    assert orders[1] == [[0, 2, 1, 3]] * 5 != orders[0]


@pytest.mark.parametrize("with_trace", [True, False])
def test_ranknet_goes_beside_nll_behind_a_trace_or_without_one(made, tokenizer, with_trace, tmp_path):
    run, losses = made[0], load_losses([{"name": "nll"}, {"name": "ranknet"}], "rerank")
    prompter = Prompter.of_run(run, tokenizer)
    chosen, encoded = examples(prompter, str(run), with_trace, losses, tmp_path)
    assert len(chosen) == 5  # accepted attempts
    for row, example in zip(chosen, encoded, strict=True):
        first, order = example["first_label"], gold_order(row, [0, 2, 1, 3])
        text = tokenizer.decode(example["input_ids"][:first])
        assert text.endswith("<think> A top B bad</think>" if with_trace else "<think></think>")
        assert example["input_ids"][first] == example["label_tokens"][order[0]] == example["labels"][first]
        assert [example["ranks"][place] for place in order] == [1, 2, 3, 4] and example["labels"][-1] != -100
