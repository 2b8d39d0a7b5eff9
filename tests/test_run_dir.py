"""What a stage leaves behind: whole or not at all, under a lock, and never mixed with another recipe's."""

import hashlib
import json
import os

import pytest
import yaml
from toy_run import finish

from rerank.launch import run_dir
from rerank.launch.files import delete_folder, fingerprint, write_json


def test_a_finished_folder_has_all_that_the_next_stage_and_a_reader_need(tmp_path):
    folder = run_dir.partial_dir(tmp_path, "data")
    with run_dir.lock(folder):
        run_dir.begin(tmp_path, "data", {"num_test": 5}, ())
        (folder / "items.parquet").write_text("artifact")
        assert not run_dir.is_finished(tmp_path, "data")
        run_dir.finish(tmp_path, "data", {"num_test": 5}, {"num_test": 5, "num_valid": 1}, (), {"rows": 3})
    assert run_dir.is_finished(tmp_path, "data")
    assert not folder.exists()
    names = {"items.parquet", "recipe.yaml", "versions.json", "metrics.json", "stage.json"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == names
    assert run_dir.read_metrics(tmp_path, "data") == {"rows": 3}
    assert yaml.safe_load((tmp_path / "data/recipe.yaml").read_text()) == {"num_test": 5, "num_valid": 1}
    assert json.loads((tmp_path / "data/versions.json").read_text())["torch"].startswith("2.")


def test_a_folder_that_fails_to_finish_stays_partial(tmp_path):
    folder = run_dir.partial_dir(tmp_path, "data")
    folder.mkdir()
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_dir.finish(tmp_path, "data", {}, {}, (), {"rows": object()})
    assert folder.is_dir()
    assert not run_dir.stage_dir(tmp_path, "data").exists()


def test_json_is_never_seen_half_written(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_a_fingerprint_is_the_sha256_of_a_file_and_of_names_and_contents_of_a_folder(tmp_path):
    (tmp_path / "b").write_text("two")
    assert fingerprint(tmp_path / "b") == hashlib.sha256(b"two").hexdigest()
    (tmp_path / "a").write_text("one")
    both = fingerprint(tmp_path)
    assert both == hashlib.sha256(b"a" + b"one" + b"b" + b"two").hexdigest()
    (tmp_path / "b").rename(tmp_path / "c")
    assert fingerprint(tmp_path) != both


def test_a_lock_names_the_process_that_holds_it(tmp_path):
    with run_dir.lock(tmp_path):
        message = f"is in use by process {os.getpid()}; wait for it, or stop it with"
        with pytest.raises(ValueError, match=message), run_dir.lock(tmp_path):
            pass
    with run_dir.lock(tmp_path):
        pass


SHOWN = {"run_dir": "a", "logging_steps": 1, "report_to": "none", "seed": 0}


@pytest.mark.parametrize(
    ("stage", "made_with", "wanted", "difference"),
    [
        ("data", {"num_test": 5, "min_history": 3}, {"num_test": 5, "min_history": 3}, None),
        ("data", {"num_test": 5, "min_history": 3}, {"num_test": 1}, "min_history is 3 there and its default here"),
        ("data", {"num_test": 5}, {"num_test": 5, "split": "by_time"}, "split is its default there and by_time here"),
        # keys that only change the display may differ
        ("sft", SHOWN, {"run_dir": "b", "disable_tqdm": True, "seed": 0}, None),
        ("sft", SHOWN, {"run_dir": "b", "seed": 1}, "seed is 0 there and 1 here"),
        # a default given and one left out are the same recipe
        ("sft", {"losses": [{"name": "nll"}], "max_items": 20}, {"dropout": 0.0}, None),
        ("sft", {}, {"weight_decay": 0.0, "max_grad_norm": 1.0}, None),
        ("sft", {}, {"dropout": 0.1}, "dropout is its default there and 0.1 here"),
        ("data", {"max_itms": None}, {}, "max_itms is None there and its default here"),
    ],
)
def test_the_difference_between_two_recipes_is_a_key_with_both_values(stage, made_with, wanted, difference):
    assert run_dir.difference(stage, made_with, wanted) == difference


def replace_data(run):
    (run / "data").rename(run / "old")
    finish(run / "data")


def test_a_folder_made_from_inputs_that_were_replaced_is_refused(tmp_path):
    finish(tmp_path / "data")
    finish(tmp_path / "semantic_ids", inputs=("data",))
    run_dir.check_finished(tmp_path, "semantic_ids", {})
    message = "semantic_ids was made from another data folder than the run's; delete"
    with pytest.raises(ValueError, match=message):
        run_dir.check_finished(tmp_path, "semantic_ids", {}, remade=["data"])
    replace_data(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_dir.check_finished(tmp_path, "semantic_ids", {})


def test_a_half_made_folder_is_resumed_by_its_own_recipe_and_from_its_own_inputs_only(tmp_path):
    finish(tmp_path / "data")
    run_dir.refuse_partial_of_another_recipe(tmp_path, "sft", {"seed": 0})
    run_dir.partial_dir(tmp_path, "sft").mkdir()
    run_dir.begin(tmp_path, "sft", {"seed": 0}, ("data",))
    run_dir.refuse_partial_of_another_recipe(tmp_path, "sft", {"seed": 0, "logging_steps": 5})
    with pytest.raises(ValueError, match="sft.partial was begun by another recipe: seed is 0 there and 1 here; del"):
        run_dir.refuse_partial_of_another_recipe(tmp_path, "sft", {"seed": 1})
    replace_data(tmp_path)
    with pytest.raises(ValueError, match="sft.partial was begun with another data folder than the run's"):
        run_dir.refuse_partial_of_another_recipe(tmp_path, "sft", {"seed": 0})


def test_a_stage_is_recorded_with_the_inputs_that_it_began_with(tmp_path):
    """An input that is replaced while the stage runs makes it stale."""
    finish(tmp_path / "data")
    run_dir.partial_dir(tmp_path, "semantic_ids").mkdir()
    run_dir.begin(tmp_path, "semantic_ids", {}, ("data",))
    replace_data(tmp_path)
    run_dir.finish(tmp_path, "semantic_ids", {}, {}, ("data",), {})
    with pytest.raises(ValueError, match="semantic_ids was made from another data folder than the run's; delete"):
        run_dir.check_finished(tmp_path, "semantic_ids", {})


def test_a_stage_is_stale_when_an_input_of_its_input_was_replaced(tmp_path):
    finish(tmp_path / "data")
    finish(tmp_path / "semantic_ids", inputs=("data",))
    finish(tmp_path / "midtrain", inputs=("semantic_ids",))
    run_dir.check_finished(tmp_path, "midtrain", {})
    replace_data(tmp_path)
    with pytest.raises(ValueError, match="/semantic_ids was made from another data folder than the run's; delete"):
        run_dir.check_finished(tmp_path, "midtrain", {})


def test_a_folder_is_deleted_at_once_whatever_an_earlier_deletion_left(tmp_path):
    delete_folder(tmp_path / "nothing")
    for name in ("a", "a.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    delete_folder(tmp_path / "link")
    assert (tmp_path / "a/file").is_file()
    delete_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_yaml_reads_as_text_is_the_number():
    given = {"run_dir": "runs/a", "learning_rate": "3e-4", "max_steps": 10}
    assert run_dir.difference("sft", given, {**given, "learning_rate": 3.0e-4}) is None
    assert run_dir.difference("sft", {**given, "learning_rate": 0.0003}, given) is None
    told = run_dir.difference("sft", given, {**given, "learning_rate": 2.0e-4})
    assert told == "learning_rate is 3e-4 there and 0.0002 here"
    assert run_dir.difference("sft", given, {**given, "max_steps": "ten"}) == "max_steps is 10 there and ten here"
