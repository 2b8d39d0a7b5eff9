"""Bad input: `rerank` ends with exit code 2 and one line, before a model is loaded or anything is launched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quirks
import transformers
from tiny_model import save_tiny_model
from toy_recipe import TOY, environment, refusal
from toy_run import NUM_ITEMS, finish, write_run

from rerank.launch import recipe, run_dir
from rerank.prompts import PromptSettings
from rerank.semantic_ids import SemanticIds

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


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sft.max_step=10", "TOY/recipes/6_sft.yaml: unknown key 'max_step'; did you mean max_steps"),
        ("rerank.k=1", "'rerank.k=1': there is no stage 'rerank'; stages of this recipe are data, semantic_ids"),
        ("midtrain.model_name_or_path=TOY/x", "model_name_or_path TOY/x is not there; give a model's folder, i"),
        ("data.items=TOY/x.csv", "items is TOY/x.csv, which does not exist; correct the path"),
        ("data.columns={user: customer}", "TOY/data/interactions.csv has no column 'customer' for user; it has user"),
        (
            "dapo.report_to=clearml",
            "TOY/recipes/7_dapo.yaml: report_to names clearml: ClearMLCallback requires 'clearml'",
        ),
        ("sft.report_to=[tracio]", "TOY/recipes/6_sft.yaml: report_to names tracio: tracio is not supported, only "),
        ("dapo.rewards=[{name: ndgc}]", "rewards has no 'ndgc' (did you mean ndcg?); it has auc, grounded, ndcg, "),
    ],
)
def test_a_bad_override(toy, capfd, word, message):
    assert message.replace("TOY", str(toy)) in refused_run(toy, capfd, word.replace("TOY", str(toy)))


def test_more_candidates_than_letters(toy, capfd):
    words = ("candidates.num_candidates=27", "traces.ranking=letter")
    assert refused_run(toy, capfd, *words).startswith(
        "rerank: num_candidates is 27 but ranking: letter of the traces recipe names at most 26; lower it, or set tra"
    )


def test_a_loss_on_the_first_label_beside_stages_that_do_not_go_with_it(toy, capfd):
    words = ("sft.losses=[{name: soft_targets}]", "sft.with_trace=false", "sft.no_trace_control=false")
    line = refused_run(toy, capfd, *words, "traces.ranking=letter")
    assert "losses of the sft recipe has soft_targets, after which a model writes no ranking to reward; leave" in line
    teacher = ("traces.teacher=vllm", "traces.teacher_model=org/model")
    line = refused_run(toy, capfd, *words, "traces.ranking=letter", *teacher)
    assert "loss soft_targets: weight is 0.8 but the rows have no teacher's scores; set teacher: evidence in" in line
    line = refused_run(toy, capfd, "sft.losses=[{name: nll}, {name: ranknet}]")
    assert "reads the first label as one token, but ranking: semantic_id of the traces recipe has labels of se" in line


@pytest.mark.parametrize("word", ["midtrain.model_name_or_path=BASE", "sft.model_name_or_path=BASE"])
def test_a_model_that_cannot_be_prompted_is_refused_before_the_stages_ahead_of_it(toy, capfd, word):
    base = save_tiny_model(toy / "base")
    (base / "chat_template.jinja").unlink()
    line = refused_run(toy, capfd, word.replace("BASE", str(base)))
    assert f"the tokenizer of {base} has no chat template; save one as chat_template.jinja in that folder" in line


def test_a_model_whose_groups_cannot_be_one_row(toy, capfd):
    base = quirks.save_pretrained("mistral", toy / "base")
    line = refused_run(toy, capfd, f"midtrain.model_name_or_path={base}", "dapo.group_forward=true")
    assert "MistralForCausalLM cannot run a group as one row: sliding_window is 64; use a model with full" in line
    assert "or set group_forward: auto" in line


def test_a_forced_stage_that_the_recipe_lacks(toy, capfd):
    line = refused_run(toy, capfd, "--force", "dappo")
    assert "--force dappo: there is no stage 'dappo' (did you mean dapo?); stages of this recipe are data, sem" in line
    assert "--force dapo: only data, semantic_ids are selected; " in refused_run(
        toy, capfd, "--force", "dapo", "--to", "semantic_ids"
    )


def test_semantic_ids_of_another_catalogue_than_the_models(toy, capfd):
    run = write_run(toy / "run")
    for stage in ("sft", "dapo"):
        shutil.rmtree(run / stage)
    (run / "traces").mkdir(exist_ok=True)
    PromptSettings().save(run / "traces")
    finish(run / "traces")
    SemanticIds(np.array([[item, 0] for item in range(NUM_ITEMS)]), NUM_ITEMS).save(run / "semantic_ids")
    line = refusal(capfd, "run", toy / "recipes", "--out", run, "--only", "sft")
    assert "semantic ids of another catalogue than the model's: " in line
    assert "midtrain/model lacks <s_a_3>; run the stages from midtrain on again" in line
    assert not (run / "sft").exists()


def test_an_output_folder_begun_or_made_by_another_recipe(toy, capfd):
    keys = {**recipe.load(toy / "recipes/1_data.yaml"), "run_dir": str(toy / "run"), "num_test": 2}
    run_dir.partial_dir(toy / "run", "data").mkdir(parents=True)
    run_dir.begin(toy / "run", "data", keys, ())
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run", "--only", "data")
    assert "data.partial was begun by another recipe: num_test is 2 there and 1 here; delete it to start" in line
    run_dir.finish(toy / "run", "data", keys, keys, (), {})
    line = refusal(capfd, "run", toy / "recipes", "--out", toy / "run")
    assert f"{toy}/run/data was made by another recipe: num_test is 2 there and 1 here; delete {toy}/run/data" in line


def test_a_recipe_folder_and_an_accelerate_file_that_are_not_there(toy, capfd):
    assert f"recipe folder {toy}/nowhere is not there; recipes/ml100k is one" in refusal(capfd, "run", toy / "nowhere")
    line = refused_run(toy, capfd, "--to", "data", "--accelerate", "nowhere.yaml")
    assert "accelerate file nowhere.yaml is not there; recipes/accelerate holds some" in line


def test_the_command_itself_writes_one_line(toy):
    words = [sys.executable, "-m", "rerank.cli", "run", toy / "recipes", "--out", toy / "run", "dapo.no_such_key=1"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"rerank: {toy}/recipes/7_dapo.yaml: unknown key 'no_such_key'; ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_under_a_bare_launch_our_line_comes_before_accelerates_own(toy):
    (toy / "data/interactions.csv").write_text("")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU, "-m", "rerank.data"]
    words += ["--config", toy / "recipes/1_data.yaml", "--run_dir", toy / "run"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    ours = f"rerank: {toy}/data/interactions.csv is empty; give a file with at least one row\n"
    assert done.returncode == 1  # accelerate's own, whatever the stage's is
    assert done.stderr.startswith(ours) and "CalledProcessError" in done.stderr.removeprefix(ours)
    assert not (toy / "run/data").exists()
