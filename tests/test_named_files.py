"""A stage is skipped or resumed only while the files that its recipe names hold what they held."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_recipe import TOY, environment
from toy_run import finish, write_recipes

from rerank.launch import named_files, pipeline, recipe, run_dir
from rerank.launch.files import fingerprint, write_json
from rerank.launch.named_files import NamedFile
from rerank.launch.stages import load_stage

CPU = "recipes/accelerate/cpu.yaml"
DATA = {"interactions": "${HERE}/interactions.csv", "items": "${HERE}/items.csv"}
REQUESTS = {"requests": "${HERE}/requests.jsonl", "test_users": "${HERE}/users.txt", "split": "by_user"}
IN_A_FILE = {"rewards": "HERE/mine.yaml", "outcome": "rank_gain"}
INPUTS = {  # file: the stage whose recipe names it, the key, and what the toy's recipe has to say for it
    "interactions.csv": ("data", "interactions", DATA),
    "items.csv": ("data", "items", DATA),
    "requests.jsonl": ("data", "requests", REQUESTS),
    "users.txt": ("data", "test_users", REQUESTS),
    "embeddings.npy": ("semantic_ids", "embeddings", {"embeddings": "${HERE}/embeddings.npy"}),
    "encoder/config.json": ("semantic_ids", "encoder", {"encoder": "HERE/encoder", "embeddings": None}),
    "old/semantic_ids/stage.json": ("semantic_ids", "extends", {"extends": "HERE/old"}),
    "accelerate.yaml": ("midtrain", "the accelerate file", {}),
    "base/config.json": ("midtrain", "model_name_or_path", {"model_name_or_path": "HERE/base"}),
    "general.txt": ("midtrain", "general_text", {"general_text": "HERE/general.txt"}),
    "ds.json": ("midtrain", "deepspeed", {"deepspeed": "HERE/ds.json"}),
    "lists.parquet": ("candidates", "lists", {"source": "lists", "lists": "HERE/lists.parquet"}),
    "next/model.bin": ("candidates", "model_dir", {"source": "model", "model_dir": "HERE/next"}),
    "teacher/config.json": ("traces", "teacher_model", {"teacher": "vllm", "teacher_model": "HERE/teacher"}),
    "modules/my_losses.py": ("sft", "losses", {"losses": [{"name": "my_losses:mine"}]}),
    "rewards.py": ("dapo", "rewards", {"rewards": [{"name": "HERE/rewards.py:share_of_ids"}]}),
    "mine.yaml": ("dapo", "rewards", IN_A_FILE),
    "in_a_file.py": ("dapo", "rewards", IN_A_FILE),
    "a_condition.py": ("dapo", "rewards", IN_A_FILE),
    "other.parquet": ("evaluate", "lists", {"task": "next_item", "lists": {"other": "HERE/other.parquet"}}),
}
CONTENTS = {
    "modules/my_losses.py": "def mine(inputs):\n    return -inputs.label_logps()\n",
    "in_a_file.py": "def mine(completions, **columns):\n    return [0.5] * len(completions)\n",
    "a_condition.py": "def always(completions, **columns):\n    return [True] * len(completions)\n",
    "mine.yaml": "rewards: [{name: 'HERE/in_a_file.py:mine', condition: 'HERE/a_condition.py:always'}]\n",
    "ds.json": '{"zero_optimization": {"stage": 2}}\n',
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with every file of INPUTS, those of the toy among them."""
    for name in INPUTS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "accelerate.yaml" or (TOY / name).is_file():
            shutil.copy(CPU if name == "accelerate.yaml" else TOY / name, path)
        else:
            path.write_text(CONTENTS.get(name, f"the content of {name}").replace("HERE", str(tmp_path)))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return tmp_path


def step_of(here: Path, name: str) -> pipeline.Step:
    """The step of the toy's recipe of the stage whose recipe names a file."""
    stage, _, changes = INPUTS[name]
    (path,) = TOY.glob(f"*_{stage}.yaml")
    changed = yaml.safe_load(yaml.safe_dump({**recipe.load(path), **changes}).replace("HERE/", f"{here}/"))
    changed = yaml.safe_load(yaml.safe_dump(changed).replace(f"${{{here}/", "${HERE}/"))
    write_recipes(here / "recipes", {path.stem: changed})
    return pipeline.read_steps(here / "recipes", str(here / "run"), [])[0]


def begin(here: Path, step: pipeline.Step) -> None:
    """Begin a step as a launch does."""
    run_dir.partial_dir(step.run_dir, step.stage).mkdir(parents=True)
    files = named_files.named_files(load_stage(step.stage), step.keys, str(here / "accelerate.yaml"))
    run_dir.begin(step.run_dir, step.stage, step.keys, (), files)


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def edit(path: Path) -> None:
    """Change the last byte: the file stays as long, and keeps its time."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    os.utime(path, ns=times)


def assert_named(line: str, path: Path) -> None:
    """The line names the file (or its folder) and both its fingerprints, on one line."""
    named = path if path.parent.name not in ("encoder", "base", "next", "teacher") else path.parent
    assert str(named) in line and "\n" not in line
    assert f"{path.stat().st_size} bytes, sha256 {fingerprint(named)[:12]} here" in line


@pytest.mark.parametrize("name", INPUTS)
def test_a_finished_stage_is_skipped_only_with_the_files_that_it_was_made_from(here, name):
    step, accelerate = step_of(here, name), str(here / "accelerate.yaml")
    begin(here, step)
    run_dir.finish(step.run_dir, step.stage, step.keys, step.keys, (), {})
    touch(here / name)
    assert pipeline.check_steps([step], accelerate) == {}
    edit(here / name)
    stage, key, _ = INPUTS[name]
    with pytest.raises(ValueError, match=f"run/{stage} was made from another content of {key} ") as refusal:
        pipeline.check_steps([step], accelerate)
    assert_named(str(refusal.value), here / name)
    assert f"delete {step.run_dir}/{stage} and the stages after it, as `rerank run --force {stage}` does" in str(
        refusal.value
    )


@pytest.mark.parametrize("name", INPUTS)
def test_an_unfinished_stage_is_resumed_only_with_the_files_that_it_was_begun_with(here, name):
    step, accelerate = step_of(here, name), str(here / "accelerate.yaml")
    begin(here, step)
    touch(here / name)
    run_dir.refuse_partial_of_another_recipe(step.run_dir, step.stage, step.keys, accelerate)
    edit(here / name)
    stage, key, _ = INPUTS[name]
    with pytest.raises(ValueError, match=f"run/{stage}.partial was begun with another content of {key} ") as refusal:
        run_dir.refuse_partial_of_another_recipe(step.run_dir, step.stage, step.keys, accelerate)
    assert_named(str(refusal.value), here / name)


def test_a_variable_that_points_to_the_same_content_elsewhere_names_the_same_file(here, tmp_path_factory, monkeypatch):
    step = step_of(here, "items.csv")
    begin(here, step)
    run_dir.finish(step.run_dir, step.stage, step.keys, step.keys, (), {})
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("interactions.csv", "items.csv"):
        shutil.copy(here / name, elsewhere / name)
    monkeypatch.setenv("HERE", str(elsewhere))
    assert pipeline.check_steps([step]) == {}
    edit(elsewhere / "items.csv")
    message = r"another content of items \$\{HERE\}/items.csv \(.*elsewhere0/items.csv\): "
    with pytest.raises(ValueError, match=message):
        pipeline.check_steps([step])
    monkeypatch.delenv("HERE")  # what is gone cannot be compared
    assert pipeline.check_steps([step]) == {}


def test_an_accelerate_file_is_compared_with_itself_only(here):
    step = step_of(here, "accelerate.yaml")
    begin(here, step)
    run_dir.finish(step.run_dir, step.stage, step.keys, step.keys, (), {})
    edit(here / "accelerate.yaml")
    assert pipeline.check_steps([step], CPU) == pipeline.check_steps([step]) == {}
    with pytest.raises(ValueError, match=r"the accelerate file .*here \(one of another path is not compared\)"):
        pipeline.check_steps([step], os.path.relpath(here / "accelerate.yaml"))
    data = named_files.named_files(load_stage("data"), {"interactions": "a.csv"}, CPU)
    assert data == [NamedFile("interactions", "a.csv")]  # it trains nothing


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(here):
    step = step_of(here, "interactions.csv")
    finish(here / "run/data", given=step.keys)
    record = run_dir.stage_dir(step.run_dir, "data") / "stage.json"
    old = json.loads(record.read_text())
    del old["files"]
    write_json(record, old)
    edit(here / "interactions.csv")
    assert pipeline.check_steps([step]) == {}
    (here / "run/data").rename(here / "run/data.partial")
    (here / "run/data.partial/stage.json").unlink()
    write_json(here / "run/data.partial/begun.json", {"given": {}, "inputs": {}})
    run_dir.refuse_partial_of_another_recipe(step.run_dir, "data", {})


def test_plugins_are_their_files_and_short_names_those_of_the_package(here):
    rewards = [{"name": "ndcg"}, {"name": "well_formed", "condition": "promoted_or_first"}, {"name": "a.b.c:reward"}]
    found = named_files.named_files(load_stage("dapo"), {"rewards": rewards})
    names = ["rewards.ndcg", "rewards.well_formed", "rewards.conditions.promoted_or_first", "a.b.c"]
    assert found == [NamedFile("rewards", name, is_module=True) for name in names]
    paths = ["rewards/ndcg.py", "rewards/well_formed.py", "rewards/conditions/promoted_or_first.py"]
    assert [file.find() for file in found] == [*(Path(path).resolve() for path in paths), None]
    (default,) = named_files.named_files(load_stage("sft"), {})
    assert default.find() == Path("rerank/losses/nll.py").resolve()
    (here / "modules/a_package").mkdir()
    (here / "modules/a_package/__init__.py").write_text("raise RuntimeError('imported')")
    (here / "modules/a_package/inner.py").write_text(CONTENTS["in_a_file.py"])
    assert NamedFile("rewards", "a_package.inner", is_module=True).find() == here / "modules/a_package/inner.py"


def test_names_that_are_no_files_are_left_alone(here, monkeypatch):
    monkeypatch.chdir(here)
    (here / "packages").mkdir()  # is not what general_text: packages means
    assert named_files.named_files(load_stage("midtrain"), {"general_text": "packages"}) == []
    for name in ("Qwen/Qwen3-8B", "${NO_SUCH_VARIABLE}/a.csv", "package:no_such_package/a.csv", "name:config@split"):
        assert NamedFile("interactions", name).find() is None
    assert NamedFile("interactions", "encoder:config@split").find() == Path("encoder")
    assert named_files.record([NamedFile("items", "nowhere.csv")]) == []


def test_a_folder_is_all_its_files_but_what_python_has_compiled(here):
    folder = NamedFile("encoder", str(here / "encoder"))
    (known,) = named_files.record([folder])
    text = "the content of encoder/config.json"
    assert known.size == len(text)
    assert known.sha256 == hashlib.sha256(f"config.json{text}".encode()).hexdigest()
    (here / "encoder/module.pyc").write_bytes(b"compiled")
    assert named_files.changed([known]) is None
    (here / "encoder/more.json").write_text("{}")
    assert f"encoder {here}/encoder: {len(text)} bytes" in named_files.changed([known])


def test_a_known_file_is_hashed_again_only_when_its_size_or_times_differ(here):
    file = NamedFile("items", str(here / "items.csv"))
    (known,) = named_files.record([file])
    marked = dataclasses.replace(known, sha256="not hashed again")
    assert named_files.record([file], [marked]) == [marked]
    assert named_files.changed([marked]) is None
    touch(here / "items.csv")
    (found,) = named_files.record([file], [marked])
    assert found.sha256 == known.sha256 and found.times != known.times


def test_a_record_of_a_file_that_is_gone_when_a_stage_is_resumed_stays(here):
    step = step_of(here, "items.csv")
    begin(here, step)
    (here / "items.csv").rename(here / "elsewhere.csv")
    files = named_files.named_files(load_stage("data"), step.keys)
    run_dir.begin(step.run_dir, "data", step.keys, (), files)
    (here / "elsewhere.csv").rename(here / "items.csv")
    run_dir.refuse_partial_of_another_recipe(step.run_dir, "data", step.keys)
    edit(here / "items.csv")
    with pytest.raises(ValueError, match="run/data.partial was begun with another content of items "):
        run_dir.refuse_partial_of_another_recipe(step.run_dir, "data", step.keys)


def test_an_input_stage_is_stale_for_every_stage_that_rests_on_it(here):
    """Also where the command names the last stage alone."""
    step = step_of(here, "interactions.csv")
    begin(here, step)
    run_dir.finish(step.run_dir, "data", step.keys, step.keys, (), {})
    read = {"semantic_ids": ["data"], "candidates": ["data", "semantic_ids"], "traces": ["candidates"]}
    for stage, inputs in read.items():
        finish(here / "run" / stage, inputs=inputs, given={"run_dir": step.run_dir})
    write_recipes(here / "last", {"5_traces": {"run_dir": step.run_dir}})
    last = pipeline.read_steps(here / "last", None, [])
    assert pipeline.check_steps(last) == {}
    edit(here / "interactions.csv")
    with pytest.raises(ValueError, match="run/data was made from another content of interactions "):
        pipeline.check_steps(last)
    with pytest.raises(ValueError, match="run/data was made from another content of interactions "):  # to be launched
        recipe.check_inputs("semantic_ids", [recipe.StageArguments(run_dir=step.run_dir)])
    shutil.copy(TOY / "interactions.csv", here / "interactions.csv")
    assert pipeline.check_steps(last) == {}
    (here / "run/semantic_ids").rename(here / "run/old")
    finish(here / "run/semantic_ids", inputs=["data"])
    with pytest.raises(ValueError, match="run/candidates was made from another semantic_ids folder than the run's; "):
        pipeline.check_steps(last)


def test_a_launched_stage_records_what_it_read_as_it_began(here):
    """Through `accelerate launch`, whose accelerate file the command names."""
    step, said = step_of(here, "interactions.csv"), []
    assert pipeline.run([step], CPU, said.append) == 0
    files = {file.key: file for file in run_dir.read_record(step.run_dir, "data").files}
    for key, name in (("interactions", "interactions.csv"), ("items", "items.csv")):
        assert files[key].name == f"${{HERE}}/{name}" and files[key].sha256 == fingerprint(TOY / name)
    assert pipeline.run([step], CPU, said.append) == 0 and said[-1] == "[1/1] data: finished already"
    edit(here / "items.csv")
    words = [sys.executable, "-m", "rerank.data", "--config", str(step.path), f"--run_dir={step.run_dir}"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "run/data was made from another content of items ${HERE}/items.csv" in done.stderr
    shutil.rmtree(here / "run/data")
    begin(here, step)
    edit(here / "interactions.csv")
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "run/data.partial was begun with another content of interactions" in done.stderr
