"""Bad input: `rerank` ends with exit code 2 and one line, before a model is loaded or anything is launched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from toy_recipe import TOY, environment, write_toy_data
from toy_run import NUM_ITEMS, write_run

from rerank import cli, recipe, run_dir

CPU = "recipes/accelerate/cpu.yaml"


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def toy(tmp_path, toy_data, monkeypatch) -> Path:
    """A folder with `recipes`, the toy's, and `data`, which they read; no model can be loaded."""
    shutil.copytree(TOY, tmp_path / "recipes")
    shutil.copytree(toy_data, tmp_path / "data")
    monkeypatch.setenv("TOY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # the command puts the working folder first
    for name in recipe.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, recipe.ENVIRONMENT[name]))
    for cls in (transformers.PreTrainedModel, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    return tmp_path


def refusal(capfd, *words: object) -> str:
    """The one line with which the command refuses."""
    capfd.readouterr()  # what making the input wrote
    assert cli.main([str(word) for word in words]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rerank: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def refused_run(toy: Path, capfd, *words: str) -> str:
    """The line with which `rerank run` refuses, having made nothing."""
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run", *words)
    assert not (toy / "run").exists()
    return line


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_an_unknown_key_of_a_recipe(toy, capfd):
    with (toy / "recipes/6_sft.yaml").open("a") as file:
        file.write("learning_rat: 1.0e-3\n")
    line = refused_run(toy, capfd)
    assert f"{toy}/recipes/6_sft.yaml: unknown key 'learning_rat'; did you mean learning_rate" in line


def test_a_misspelt_reward(toy, capfd):
    replace(toy / "recipes/7_dapo.yaml", "name: ndcg", "name: ndgc")
    line = refused_run(toy, capfd)
    assert "rewards has no 'ndgc' (did you mean ndcg?); it has auc, grounded, ndcg, not_a_copy, " in line


def test_a_misspelt_condition_and_a_misspelt_parameter_of_a_reward(toy, capfd):
    replace(toy / "recipes/7_dapo.yaml", "when: promoted_or_kept_first", "when: promoted")
    assert "rewards.conditions has no 'promoted'" in refused_run(toy, capfd)
    replace(toy / "recipes/7_dapo.yaml", "when: promoted", "when: promoted_or_kept_first")
    replace(toy / "recipes/7_dapo.yaml", "kwargs: {k: 4}", "kwargs: {kk: 4}")
    assert "ndcg has no parameter 'kk' (did you mean k?)" in refused_run(toy, capfd)


def test_a_missing_column(toy, capfd):
    replace(toy / "data/interactions.csv", "user,item,time", "customer,item,time")
    line = refused_run(toy, capfd)
    assert "data/interactions.csv has no column 'user' for user; it has customer, item, time; correct columns" in line


def test_text_where_a_time_should_be(toy, capfd):
    path = toy / "data/interactions.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].rsplit(",", 1)[0] + ",yesterday"
    path.write_text("\n".join(lines) + "\n")
    line = refused_run(toy, capfd)
    assert f"{path} line 4: time is 'yesterday', not a number of seconds" in line and "; correct the row" in line


def test_an_interaction_with_an_item_that_items_lacks(toy, capfd):
    with (toy / "data/interactions.csv").open("a") as file:
        file.write("u0,i999,99\n")
    num_lines = len((toy / "data/interactions.csv").read_text().splitlines())
    line = refused_run(toy, capfd)
    assert f"interactions.csv line {num_lines}: item 'i999' is not in {toy}/data/items.csv; add it there" in line


def test_an_empty_and_a_missing_file(toy, capfd):
    path = toy / "data/items.csv"
    path.write_text("")
    assert f"{path} is empty; give a file with at least one row" in refused_run(toy, capfd)
    path.unlink()
    assert f"items is {path}, which does not exist; correct the path" in refused_run(toy, capfd)


def test_a_split_that_leaves_no_user(toy, capfd):
    line = refused_run(toy, capfd, "data.min_history=50")
    assert "split: per_user leaves no user with a rerank row (min_history 50, 12 users); give longer sequences" in line


def test_a_model_folder_that_is_not_there(toy, capfd):
    line = refused_run(toy, capfd, f"midtrain.model_name_or_path={toy}/nowhere")
    assert f"model folder {toy}/nowhere is not there; give a folder with a config.json, or a hub name" in line
    line = refusal(capfd, "rank", toy / "nowhere", "--rows", "rows.csv", "--out", "ranked.csv")
    assert f"{toy}/nowhere/config.json is missing; give a model folder of the sft or dapo stage" in line


def test_semantic_ids_of_another_catalogue_than_the_models(toy, capfd):
    run = write_run(toy / "run")
    for stage in ("sft", "dapo"):
        shutil.rmtree(run / stage)
    (run / "traces").mkdir()
    run_dir.write_json(run / "traces/stage.json", {})
    ids = [f"<s_a_{item}><s_b_0>" for item in range(NUM_ITEMS)]  # the model knows <s_a_0> to <s_a_2>
    pq.write_table(pa.table({"item": range(NUM_ITEMS), "semantic_id": ids}), run / "semantic_ids/semantic_ids.parquet")
    line = refusal(capfd, "run", toy / "recipes", "--out", run, "--only", "sft")
    assert "semantic ids of another catalogue than the model's: " in line
    assert "midtrain/model lacks <s_a_3>; run the stages from midtrain on again" in line
    assert not (run / "sft").exists()


def test_an_output_folder_made_by_another_recipe(toy, capfd):
    keys = {**recipe.load(toy / "recipes/1_data.yaml"), "run_dir": str(toy / "run"), "num_test": 2}
    run_dir.partial_dir(toy / "run", "data").mkdir(parents=True)
    run_dir.finish(toy / "run", "data", keys, keys, (), {})
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run")
    assert f"{toy}/run/data was made by another recipe: num_test is 2 there and 1 here; delete {toy}/run/data" in line


def test_an_output_folder_begun_by_another_recipe(toy, capfd):
    run_dir.partial_dir(toy / "run", "data").mkdir(parents=True)
    run_dir.begin(toy / "run", "data", {"num_test": 2}, ())
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run", "--only", "data")
    assert "data.partial was begun by another recipe: " in line and "; delete it to start the stage anew" in line


OVERRIDES: dict[str, Callable[[Path], str]] = {
    "max_steps=10": lambda toy: "'max_steps=10' is not an override; write STAGE.key=value, such as dapo.max_steps=10",
    "sft.max_step=10": lambda toy: f"{toy}/recipes/6_sft.yaml: unknown key 'max_step'; did you mean max_steps",
    "rerank.k=1": lambda toy: "'rerank.k=1': there is no stage 'rerank'; stages of this recipe are data, semantic_ids",
    "sft.max_steps=many": lambda toy: f"{toy}/recipes/6_sft.yaml: max_steps is 'many' but must be int",
    "candidates.num_candidates=1": lambda toy: "4_candidates.yaml: num_candidates is 1 but a list to re-rank has at",
    "sft.max_items=1": lambda toy: "6_sft.yaml: max_items is 1 but must be at least 2",
    "data.interactions=${NOWHERE}/x.csv": lambda toy: "NOWHERE is not set; `export NOWHERE=...` first",
}


@pytest.mark.parametrize("word", OVERRIDES)
def test_a_bad_override(toy, capfd, word):
    assert OVERRIDES[word](toy) in refused_run(toy, capfd, word)


def test_a_recipe_folder_and_an_accelerate_file_that_are_not_there(toy, capfd):
    assert f"recipe folder {toy}/nowhere is not there; recipes/ml100k is one" in refusal(capfd, "run", toy / "nowhere")
    line = refused_run(toy, capfd, "--to", "data", "--accelerate", "nowhere.yaml")
    assert "accelerate file nowhere.yaml is not there; recipes/accelerate holds some" in line


def test_the_command_itself_writes_one_line(toy):
    words = ["run", str(toy / "recipes"), "--out", str(toy / "run"), "dapo.no_such_key=1"]
    line = [sys.executable, "-m", "rerank.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(toy / "data"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"rerank: {toy}/recipes/7_dapo.yaml: unknown key 'no_such_key'; ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_under_a_bare_launch_our_line_comes_before_accelerates_own(toy):
    (toy / "data/interactions.csv").write_text("")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU, "-m", "rerank.data"]
    line += ["--config", str(toy / "recipes/1_data.yaml"), "--run_dir", str(toy / "run")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(toy / "data"))
    ours = f"rerank: {toy}/data/interactions.csv is empty; give a file with at least one row\n"
    assert done.returncode == 1  # accelerate's own, whatever the stage's is
    assert done.stderr.startswith(ours) and "CalledProcessError" in done.stderr.removeprefix(ours)
    assert not (toy / "run/data").exists()
