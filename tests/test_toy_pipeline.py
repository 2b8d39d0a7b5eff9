"""All eight stages of a toy, each as a user runs it: real TRL, real vLLM."""

import json
import math

import numpy as np
import pytest
import torch
from toy_recipe import TOY, environment, run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank import cli
from rerank.launch import run_dir
from rerank.launch.stages import STAGES, load_stage
from rerank.rollouts import store as rollouts

ROWS = "no_op random oracle transitions lambdamart midtrained sft sft_no_trace dapo".split()
STEPS, BATCH = 3, 8  # of the dapo recipe


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


def logged(run, stage, name="loss"):
    """The entries of a stage's log that have a value of this name."""
    return [entry for entry in json.loads((run / stage / "log_history.json").read_text()) if name in entry]


@pytest.fixture
def toy_environment(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("stage", [name for name in STAGES if load_stage(name).trains])
def test_the_loss_of_every_step_is_finite(toy_run, stage):
    losses = [entry["loss"] for entry in logged(toy_run.run, stage)]
    assert len(losses) == run_dir.read_metrics(toy_run.run, stage)["steps"] > 0
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("before", "after"),
    [("midtrain/model", "sft/model"), ("midtrain/model", "sft/model_no_trace"), ("sft/model", "dapo/model")],
)
def test_every_parameter_moves_in_training(toy_run, before, after):
    old, new = weights(toy_run.run / before), weights(toy_run.run / after)
    assert old.keys() == new.keys()
    assert [name for name in old if torch.equal(old[name], new[name])] == []


def test_the_sft_loss_falls(toy_run):
    losses = [entry["loss"] for entry in logged(toy_run.run, "sft")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_every_rollout_is_stored_with_what_it_was_worth_and_every_reward_is_logged(toy_run):
    stored = rollouts.read_rollouts(toy_run.run).to_pylist(maps_as_pydicts="strict")
    assert all(len(row["completion_ids"]) == len(row["sampling_logps"]) for row in stored)
    steps = {entry["step"]: entry for entry in logged(toy_run.run, "dapo", "reward")}
    assert len(stored) == STEPS * BATCH and list(steps) == [1, 2, 3]
    for step, entry in steps.items():  # the log names the step done with the rollouts sampled before it
        mine = [row for row in stored if row["step"] == step - 1]
        assert sum(row["reward"] for row in mine) / BATCH == pytest.approx(entry["reward"], abs=1e-5)
        for name in ("ndcg", "well_formed", "share_of_ids", "overlong"):
            mean = sum(row["reward_components"][name] for row in mine) / BATCH
            assert mean == pytest.approx(entry[f"rewards/{name}/mean"], abs=1e-5), name


def test_results_name_every_ranker_and_the_rollout_engine(toy_run):
    results = json.loads((toy_run.run / "evaluate/results.json").read_text())
    assert list(results["rows"]) == ROWS
    assert results["dapo"]["rollout_engine"] == "vllm"
    assert 0 <= results["dapo"]["max_logp_gap"] <= 0.02
    metrics = run_dir.read_metrics(toy_run.run, "dapo")
    assert metrics["group_forward"] and metrics["group_forward_obstacle"] is None  # the toy's model can
    assert (toy_run.run / "evaluate/report.html").stat().st_size > 10_000
    assert all(name in toy_run.printed for name in ROWS) and "report.html" in toy_run.printed


def test_a_second_run_skips_everything_and_prints_the_table(toy_run, toy_environment):
    printed = run_command("run", TOY, "--out", toy_run.run)
    assert printed.count("finished already") == len(STAGES) and not list(toy_run.run.glob("*.partial"))
    assert "sft_no_trace" in printed and "report.html" in printed


def test_rank_reranks_new_rows_and_new_items_with_the_trained_model(toy_run, toy_environment, tmp_path):
    lists = [[f"i{k}" for k in range(first, first + 4)] for first in (2, 9, 15)] + [["new", "i3", "i4"], ["i1", "i1"]]
    rows = [{"history": ["i0", "i1"], "candidates": candidates} for candidates in lists]
    given, out, items = tmp_path / "rows.jsonl", tmp_path / "ranked.jsonl", tmp_path / "items.csv"
    given.write_text("\n".join(json.dumps(row) for row in rows))
    items.write_text("item,title,category\nnew,The title new,drama\n")
    np.save(tmp_path / "new.npy", np.load(TOY / "embeddings.npy")[3:4])
    words = ["rank", toy_run.run / "dapo/model", "--rows", given, "--out", out, "--items", items]
    assert cli.main([str(word) for word in [*words, "--embeddings", tmp_path / "new.npy"]]) == 3  # of the last row
    *ranked, bad = [json.loads(line) for line in out.read_text().splitlines()]
    assert bad["failure"] == "candidates holds 'i1' twice; give each item once."
    assert [row["candidates"] for row in ranked] == lists[:-1]
    for row in ranked:
        assert (row["ranking"] is None) == (row["failure"] is not None)
        assert row["ranking"] is None or sorted(row["ranking"]) == sorted(row["candidates"])


@pytest.mark.parametrize(
    ("folder", "stages", "answer"),
    [
        ("midtrain/model", "midtrain\n", "knows a catalogue"),
        ("sft/model", "midtrain, sft\n", "its reasons and then"),
        ("sft/model_no_trace", "midtrain, sft\n", "writes the candidates, best first"),
        ("dapo/model", "midtrain, sft, dapo\n", "its reasons and then"),
    ],
)
def test_a_trained_folder_loads_by_itself_and_has_a_card_with_the_terms_of_its_data(toy_run, folder, stages, answer):
    model = AutoModelForCausalLM.from_pretrained(toy_run.run / folder)
    tokenizer = AutoTokenizer.from_pretrained(toy_run.run / folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert tokenizer.decode(tokenizer("<s_a_1><s_b_7>").input_ids, skip_special_tokens=True) == "<s_a_1><s_b_7>"
    card = (toy_run.run / folder / "README.md").read_text()
    assert "Made by a test; anybody may do anything with it." in card
    assert stages in card and answer in card and "Items: 24; users: 12" in card
