"""Recipes: read, overridden, typed, and refused with one line where they are wrong."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_run import finish

from rerank.candidates import CandidatesArguments
from rerank.launch import recipe, run_dir
from rerank.launch.values import check_choice, check_range

# Three launches of one stage in one process, each as `python -m rerank.data` would be.
LAUNCH = """
import sys
from rerank.launch import recipe
for words in (sys.argv[1:], sys.argv[1:], [*sys.argv[1:], "--num_test=2"]):
    sys.argv[1:] = words
    try:
        recipe.launch("data")
        print("code 0", flush=True)
    except SystemExit as end:
        print(f"code {end.code}", flush=True)
"""


def test_a_recipe_is_a_yaml_mapping(tmp_path):
    path = tmp_path / "1_data.yaml"
    with pytest.raises(FileNotFoundError, match="1_data.yaml does not exist; give the path of a recipe file"):
        recipe.load(path)
    path.write_text("num_test: 5\nsplit: by_time\n")
    assert recipe.load(path) == {"num_test": 5, "split": "by_time"}
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="1_data.yaml holds list, not `key: value` lines"):
        recipe.load(path)
    path.write_text("a: 1\nb: [1\n")
    with pytest.raises(ValueError, match="1_data.yaml is not YAML: .*line 2.*$"):  # one line: `.` is no line break
        recipe.load(path)


def test_overrides_are_read_as_yaml_reads_them():
    words = ["--seed", "3", "--split=by_time", "--rewards=[{name: ndcg}]", "--lists=null", "--mark=: :"]
    read = {"seed": 3, "split": "by_time", "rewards": [{"name": "ndcg"}], "lists": None, "mark": ": :"}
    assert recipe.read_overrides(words) == read


@pytest.mark.parametrize("words", [["seed=3"], ["--seed"], ["--=3"], ["--seed=3", "4"]])
def test_a_word_that_is_no_override_is_refused(words):
    with pytest.raises(ValueError, match="is not an override; write --key value or --key=value"):
        recipe.read_overrides(words)


def test_text_becomes_a_number_and_a_number_text_where_that_is_wanted():
    keys = {"run_dir": 7, "learning_rate": "2e-5", "max_minutes": "1e1"}  # YAML reads 2e-5 as text
    args, training_args, _ = recipe.resolve("sft", keys, "6_sft.yaml")
    assert (args.run_dir, training_args.learning_rate, args.max_minutes) == ("7", 2.0e-5, 10.0)
    assert training_args.output_dir == "7/sft.partial/checkpoints"


REFUSED = [
    ("candidates", {"num_candidates": 3.7}, "num_candidates is 3.7 but must be int"),
    ("candidates", {"num_candidates": True}, "num_candidates is True but must be int"),
    ("traces", {"teacher": "evidence", "item_fields": "title"}, "item_fields is 'title' but must be list\\[str\\]"),
    ("sft", {"learning_rate": "fast"}, "learning_rate is 'fast' but must be float"),
    ("sft", {"max_minutes": []}, "max_minutes is \\[\\] but must be float | None"),
    ("candidates", {"num_candidate": 5}, "unknown key 'num_candidate'; did you mean num_candidates"),
    ("candidates", {"xyzzy": 5}, "unknown key 'xyzzy'; `--help` of the stage lists its keys"),
    ("data", {}, "neither requests nor interactions is set; name the file of one"),
    ("candidates", {"run_dir": ""}, "run_dir is empty; name the folder of the run"),
    ("candidates", {"num_candidates": 1}, "num_candidates is 1 but must be at least 2"),
]


@pytest.mark.parametrize(("stage", "keys", "message"), REFUSED)
def test_a_key_or_value_that_does_not_fit_is_refused_with_the_recipes_name(stage, keys, message):
    with pytest.raises(ValueError, match=f"^9.yaml: {message}"):
        recipe.resolve(stage, {"run_dir": "run"} | keys, "9.yaml")


def test_a_key_that_every_recipe_needs_is_asked_for():
    with pytest.raises(ValueError, match="^9.yaml: run_dir is missing; add it to the recipe or give --run_dir"):
        recipe.resolve("data", {"interactions": "a.csv"}, "9.yaml")


def test_a_choice_and_a_range_name_what_is_allowed():
    with pytest.raises(ValueError, match="^split is 'train' but must be one of test, valid$"):
        check_choice("split", "train", ("test", "valid"))
    check_range("share", 1, least=1, most=1)
    check_range("share", 0.5, above=0, below=1)
    for value, bounds, words in (
        (2, {"least": 0, "most": 1}, "at least 0 and at most 1"),
        (0, {"above": 0, "most": 1}, "above 0 and at most 1"),
        (1, {"least": 0, "below": 1}, "at least 0 and below 1"),
        (float("nan"), {"above": 0}, "above 0"),
        (float("inf"), {"least": 0}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=f"^share is {value} but must be {words}$"):
            check_range("share", value, **bounds)


def test_the_resolved_recipe_has_the_defaults_of_the_stage_and_what_was_given_to_the_trainer():
    keys = recipe.load(Path("recipes/ml100k/6_sft.yaml")) | {"max_items": 7}
    resolved = recipe.resolved_recipe(recipe.resolve("sft", keys, "6_sft.yaml"), keys)
    assert resolved["max_items"] == 7 and resolved["max_minutes"] is None
    assert resolved["learning_rate"] == keys["learning_rate"] and "adam_beta1" not in resolved


def test_an_input_is_there_or_made_before(tmp_path):
    args = [SimpleNamespace(run_dir=str(tmp_path))]
    assert recipe.check_inputs("semantic_ids", args, made=["data"]) == ["data"]
    with pytest.raises(FileNotFoundError, match="semantic_ids needs .*data, which is not there; run the stage data"):
        recipe.check_inputs("semantic_ids", args)
    finish(tmp_path / "data")
    recipe.check_inputs("semantic_ids", args)
    for source, extra in (("model", ["midtrain"]), ("transitions", [])):  # lists of a model need it, others do not
        args = [CandidatesArguments(run_dir=str(tmp_path), source=source)]
        inputs = recipe.check_inputs("candidates", args, made=["semantic_ids", "midtrain"])
        assert inputs == ["data", "semantic_ids", *extra]


def test_a_launched_stage_finishes_once_and_refuses_another_recipe(tmp_path):
    rows = [f"u{user},i{(user + place) % 9},{place}" for user in range(3) for place in range(8)]
    (tmp_path / "toy.csv").write_text("\n".join(["user,item,time", *rows]))
    config = tmp_path / "1_data.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\ninteractions: {tmp_path / 'toy.csv'}\n")
    words = [sys.executable, "-c", LAUNCH, "--config", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["code 0", "code 0", "code 2"], done.stderr
    assert "run/data is finished already" in done.stderr
    assert "was made by another recipe: num_test is its default there and 2 here; delete" in done.stderr
    assert run_dir.read_metrics(tmp_path / "run", "data")["interactions"] == 24
    assert not run_dir.partial_dir(tmp_path / "run", "data").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_trains_on_its_cpu():
    keys = {"run_dir": "run", "bf16": True}  # which transformers refuses without a GPU, unless told to use the CPU
    assert recipe.resolve("sft", keys, "6.yaml")[1].use_cpu
    with pytest.raises(ValueError, match="6.yaml: Your setup doesn't support bf16/gpu. You need to assign use_cpu"):
        recipe.resolve("sft", {**keys, "use_cpu": False}, "6.yaml")


def test_an_accelerate_file_for_the_cpu_holds_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    keys = {"run_dir": "run", "bf16": False}
    assert not recipe.resolve("sft", keys, "6.yaml")[1].use_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as accelerate launch and `rerank run` set it
    assert recipe.resolve("sft", keys, "6.yaml")[1].use_cpu


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("capability", "bf16", "warns"), [("AVX2", True, 1), ("AVX2", False, 0), ("AVX512", True, 0)])
def test_a_cpu_that_is_slow_in_bfloat16_is_told_of(monkeypatch, caplog, capability, bf16, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    recipe.resolve("sft", {"run_dir": "run", "bf16": bf16}, "6.yaml")
    assert caplog.text.count("6.yaml: bf16 is true, which this CPU is many times slower in") == warns


def test_what_our_code_refuses_is_told_from_what_a_library_raises():
    for call, is_ours in ((lambda: recipe.read_overrides(["word"]), True), (lambda: np.zeros(2).reshape(3), False)):
        with pytest.raises(ValueError) as caught:
            call()
        assert recipe._is_ours(caught.value) == is_ours
