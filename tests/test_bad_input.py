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
from toy_recipe import TOY, environment, refusal
from toy_run import NUM_ITEMS, write_run

from rerank.launch import recipe, run_dir
from rerank.launch.files import write_json

CPU = "recipes/accelerate/cpu.yaml"


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A folder with `recipes`, the toy's, and `data`, which they read; no model can be loaded."""
    for name in ("recipes", "data"):
        shutil.copytree(TOY, tmp_path / name)
    for path in (tmp_path / "recipes").glob("[12]_*.yaml"):
        path.write_text(path.read_text().replace(f"{TOY}/", f"{tmp_path}/data/"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # the command puts the working folder first
    for name in recipe.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, recipe.ENVIRONMENT[name]))
    for cls in (transformers.PreTrainedModel, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    return tmp_path


def refused_run(toy: Path, capfd, *words: str) -> str:
    """The line with which `rerank run` refuses, having made nothing."""
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run", *words)
    assert not (toy / "run").exists()
    return line


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def write_text_as_time(toy: Path) -> None:
    lines = (toy / "data/interactions.csv").read_text().splitlines()
    lines[3] = lines[3].rsplit(",", 1)[0] + ",yesterday"
    (toy / "data/interactions.csv").write_text("\n".join(lines) + "\n")


# what is done to the toy's recipes or data -> what the line says, TOY standing for its folder
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an unknown key": (
        lambda toy: append(toy / "recipes/6_sft.yaml", "learning_rat: 1.0e-3"),
        "TOY/recipes/6_sft.yaml: unknown key 'learning_rat'; did you mean learning_rate",
    ),
    "a misspelt reward": (
        lambda toy: replace(toy / "recipes/7_dapo.yaml", "name: ndcg", "name: ndgc"),
        "rewards has no 'ndgc' (did you mean ndcg?); it has auc, grounded, ndcg, not_a_copy, ",
    ),
    "a misspelt condition": (
        lambda toy: replace(toy / "recipes/7_dapo.yaml", "promoted_or_kept_first", "promoted"),
        "rewards.conditions has no 'promoted'",
    ),
    "a misspelt parameter of a reward": (
        lambda toy: replace(toy / "recipes/7_dapo.yaml", "kwargs: {k: 4}", "kwargs: {kk: 4}"),
        "ndcg has no parameter 'kk' (did you mean k?)",
    ),
    "a missing column": (
        lambda toy: replace(toy / "data/interactions.csv", "user,item,time", "customer,item,time"),
        "data/interactions.csv has no column 'user' for user; it has customer, item, time; correct columns",
    ),
    "text where a time should be": (
        write_text_as_time,
        "TOY/data/interactions.csv line 4: time is 'yesterday', not a number of seconds",
    ),
    "an item that items lacks": (
        lambda toy: append(toy / "data/interactions.csv", "u0,i999,99"),
        "interactions.csv line 134: item 'i999' is not in TOY/data/items.csv; add it there",
    ),
    "an empty file": (
        lambda toy: (toy / "data/items.csv").write_text(""),
        "TOY/data/items.csv is empty; give a file with at least one row",
    ),
    "a missing file": (
        lambda toy: (toy / "data/items.csv").unlink(),
        "items is TOY/data/items.csv, which does not exist; correct the path",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_recipe_or_file(toy, capfd, change):
    make, message = CHANGES[change]
    make(toy)
    assert message.replace("TOY", str(toy)) in refused_run(toy, capfd)


OVERRIDES = {
    "max_steps=10": "'max_steps=10' is not an override; write STAGE.key=value, such as dapo.max_steps=10",
    "sft.max_step=10": "TOY/recipes/6_sft.yaml: unknown key 'max_step'; did you mean max_steps",
    "rerank.k=1": "'rerank.k=1': there is no stage 'rerank'; stages of this recipe are data, semantic_ids",
    "sft.max_steps=many": "TOY/recipes/6_sft.yaml: max_steps is 'many' but must be int",
    "candidates.num_candidates=1": "4_candidates.yaml: num_candidates is 1 but must be at least 2",
    "sft.max_items=1": "6_sft.yaml: max_items is 1 but must be at least 2",
    "data.interactions=${NOWHERE}/x.csv": "NOWHERE is not set; `export NOWHERE=...` first",
    "data.min_history=50": "split: per_user leaves no user with a rerank row (min_history 50, 12 users); give longer",
    "midtrain.model_name_or_path=TOY/nowhere": "model_name_or_path TOY/nowhere is not there; give a model's folder, i",
    "dapo.overlong_tokens=8": "TOY/recipes/7_dapo.yaml: the key 'overlong_tokens' is gone; ",
}


@pytest.mark.parametrize("word", OVERRIDES)
def test_a_bad_override(toy, capfd, word):
    assert OVERRIDES[word].replace("TOY", str(toy)) in refused_run(toy, capfd, word.replace("TOY", str(toy)))


def test_a_ranking_model_that_is_not_there(toy, capfd):
    line = refusal(capfd, "rank", toy / "nowhere", "--rows", "rows.csv", "--out", "ranked.csv")
    assert f"{toy}/nowhere/config.json is missing; give a model folder of the sft or dapo stage" in line


def test_semantic_ids_of_another_catalogue_than_the_models(toy, capfd):
    run = write_run(toy / "run")
    for stage in ("sft", "dapo"):
        shutil.rmtree(run / stage)
    (run / "traces").mkdir()
    write_json(run / "traces/stage.json", {})
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


def test_a_recipe_folder_and_an_accelerate_file_that_are_not_there(toy, capfd):
    assert f"recipe folder {toy}/nowhere is not there; recipes/ml100k is one" in refusal(capfd, "run", toy / "nowhere")
    line = refused_run(toy, capfd, "--to", "data", "--accelerate", "nowhere.yaml")
    assert "accelerate file nowhere.yaml is not there; recipes/accelerate holds some" in line


def test_the_command_itself_writes_one_line(toy):
    words = ["run", str(toy / "recipes"), "--out", str(toy / "run"), "dapo.no_such_key=1"]
    line = [sys.executable, "-m", "rerank.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"rerank: {toy}/recipes/7_dapo.yaml: unknown key 'no_such_key'; ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_under_a_bare_launch_our_line_comes_before_accelerates_own(toy):
    (toy / "data/interactions.csv").write_text("")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU, "-m", "rerank.data"]
    line += ["--config", str(toy / "recipes/1_data.yaml"), "--run_dir", str(toy / "run")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    ours = f"rerank: {toy}/data/interactions.csv is empty; give a file with at least one row\n"
    assert done.returncode == 1  # accelerate's own, whatever the stage's is
    assert done.stderr.startswith(ours) and "CalledProcessError" in done.stderr.removeprefix(ours)
    assert not (toy / "run/data").exists()
