"""`rerank run`: which stages, with which overrides, checked before any is launched."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy_run import RECIPES, finish, write_recipes

from rerank.launch import gpus, pipeline, recipe, run_dir, signals
from rerank.launch.gpus import gpu_words
from rerank.launch.stages import STAGES

CPU = "recipes/accelerate/cpu.yaml"

NINTH = """
from dataclasses import dataclass

from rerank.launch import recipe
from rerank.launch.stages import STAGES, Stage
from rerank.launch.values import check_range


@dataclass
class PruneArguments(recipe.StageArguments):
    share: float = 0.5


def check(args):
    check_range("share", args.share, above=0, most=1)


def main(args, out_dir):
    (out_dir / "pruned.txt").write_text(str(args.share))
    return {"share": args.share}


STAGE = Stage("prune", (PruneArguments,), main, check, ("data",), trains=True, renamed_keys={"part": "write `share`"})
if __name__ == "__main__":
    STAGES["prune"] = "ninth"
    recipe.launch("prune")
"""


def stages(steps: list[pipeline.Step]) -> list[str]:
    return [step.stage for step in steps]


@pytest.fixture
def folder(tmp_path):
    return write_recipes(tmp_path / "toy")


def test_recipes_come_in_the_order_of_the_stages_and_variants_are_left_alone(folder):
    (folder / "4_candidates_other.yaml").write_text("no recipe")
    (folder / "RESULTS-dapo.md").write_text("no recipe")
    steps = pipeline.read_steps(folder, None, [])
    assert stages(steps) == ["data", "semantic_ids", "candidates", "evaluate"]
    assert steps[0].keys == {"run_dir": "runs/toy", "interactions": "toy.csv"}
    assert steps[0].overrides == {} and steps[0].run_dir == "runs/toy"


def test_overrides_reach_their_stage_and_out_reaches_every_stage(folder):
    steps = pipeline.read_steps(folder, "elsewhere", ["candidates.num_candidates=5", "data.columns={user: u=1}"])
    assert {step.run_dir for step in steps} == {"elsewhere"}
    assert steps[2].keys["num_candidates"] == 5
    assert steps[0].keys["columns"] == {"user": "u=1"}
    assert steps[2].overrides == {"num_candidates": "5", "run_dir": "elsewhere"}
    words = ["--config_file", CPU, "-m", "rerank.candidates", "--config", str(folder / "4_candidates.yaml")]
    assert pipeline.launch_words(steps[2], CPU) == [*words, "--num_candidates=5", "--run_dir=elsewhere"]


def test_an_override_without_a_stage_of_the_recipe_or_a_value_is_refused(folder):
    for word in ("num_candidates=5", "candidates=5", "candidates.=5", "candidates.num_candidates"):
        with pytest.raises(ValueError, match=f"'{word}' is not an override; write STAGE.key=value, such as dapo.max"):
            pipeline.read_steps(folder, None, [word])
    with pytest.raises(ValueError, match="there is no stage 'dapo'; stages of this recipe are data, semantic_ids, ca"):
        pipeline.read_steps(folder, None, ["dapo.max_steps=1"])


def test_a_folder_that_is_no_recipe_folder_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="holds no recipe such as 1_data.yaml; stages are data, semantic_ids"):
        pipeline.read_steps(tmp_path, None, [])
    (folder / "1_data.yaml").write_text("interactions: toy.csv\n")
    with pytest.raises(ValueError, match="1_data.yaml: run_dir is missing; add it, or give --out"):
        pipeline.read_steps(folder, None, [])
    (folder / "02_data.yaml").write_text("interactions: toy.csv\n")
    with pytest.raises(ValueError, match="02_data.yaml and 1_data.yaml are both recipes of data; keep one"):
        pipeline.read_steps(folder, "run", [])


def test_stages_of_several_runs_are_refused_unless_one_is_given_for_all(folder):
    (folder / "1_data.yaml").write_text("run_dir: runs/mine\n")
    with pytest.raises(ValueError, match="2_semantic_ids.yaml: run_dir is runs/toy but runs/mine in 1_data.yaml; g"):
        pipeline.read_steps(folder, None, [])
    assert {step.run_dir for step in pipeline.read_steps(folder, "elsewhere", [])} == {"elsewhere"}


def test_stages_are_selected_by_their_names(folder):
    steps = pipeline.read_steps(folder, None, [])
    assert pipeline.select(steps, None, None, None) == steps
    assert stages(pipeline.select(steps, "semantic_ids", "candidates", None)) == ["semantic_ids", "candidates"]
    assert stages(pipeline.select(steps, "candidates", None, None)) == ["candidates", "evaluate"]
    assert stages(pipeline.select(steps, None, "semantic_ids", None)) == ["data", "semantic_ids"]
    assert stages(pipeline.select(steps, None, None, "candidates")) == ["candidates"]
    with pytest.raises(ValueError, match="there is no stage 'sft'; stages of this recipe are data, semantic_ids"):
        pipeline.select(steps, None, "sft", None)
    with pytest.raises(ValueError, match="--from evaluate comes after --to data; swap them"):
        pipeline.select(steps, "evaluate", "data", None)


def test_finished_stages_are_not_checked_again_but_must_be_of_this_recipe_and_these_inputs(tmp_path, folder):
    run = tmp_path / "run"
    steps = pipeline.read_steps(folder, str(run), [])[:2]
    finish(run / "data", given=steps[0].keys)
    finish(run / "semantic_ids", given=steps[1].keys, inputs=("data",))
    assert pipeline.check_steps(steps) == {}  # toy.csv is not there, and nobody looks for it
    with pytest.raises(ValueError, match="run/data was made by another recipe: num_test is its default there and 2"):
        pipeline.check_steps(pipeline.read_steps(folder, str(run), ["data.num_test=2"])[:2])
    with pytest.raises(ValueError, match=r"num_tset.*num_test"):  # rather a misspelt key
        pipeline.check_steps(pipeline.read_steps(folder, str(run), ["data.num_tset=2"])[:2])
    (run / "data").rename(run / "old")  # so that it will be made anew
    with pytest.raises(ValueError, match="run/semantic_ids was made from another data folder than the run's; delete"):
        pipeline.check_steps(steps)


def test_a_misspelt_key_of_a_late_stage_is_named_before_the_files_of_an_early_one_are_read(tmp_path, folder):
    words = ["evaluate.num_bootstraps=9"]  # and toy.csv is not there
    with pytest.raises(ValueError, match=r"8_evaluate.yaml: unknown key 'num_bootstraps'; did you mean num_bootstrap"):
        pipeline.check_steps(pipeline.read_steps(folder, str(tmp_path / "run"), words))


def test_the_dry_run_prints_a_launch_line_a_stage(tmp_path, folder):
    run = tmp_path / "a run"
    steps = pipeline.read_steps(folder, str(run), [])
    finish(run / "data", given=steps[0].keys)
    lines = pipeline.describe(steps, CPU)
    assert lines[0].startswith(f"# finished: accelerate launch --config_file {CPU} -m rerank.data --config ")
    assert [shlex.split(line) for line in lines[1:]] == [
        ["accelerate", "launch", *pipeline.launch_words(step, CPU)] for step in steps[1:]
    ]


def test_the_dry_run_prints_the_line_of_the_server_that_rollouts_come_from(tmp_path, monkeypatch):
    keys = {"vllm_mode": "server", "vllm_server_port": 8123, "vllm_max_model_length": 2048}
    steps = pipeline.read_steps(write_recipes(tmp_path / "toy", {"7_dapo": keys}), "run", [])
    server, launch = pipeline.describe(steps, CPU)
    words = shlex.split(server)
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "run/sft/model"]
    assert words[4:10] == ["--host", "localhost", "--port", "8123", "--max-model-len", "2048"] and words[-1] == "&"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_num_gpus", lambda: 0)
    for where in ("zero3", "multi_node"):  # eight of a machine train, on 0 to 7
        [server, _] = pipeline.describe(steps, f"recipes/accelerate/{where}.yaml")
        assert server.startswith("CUDA_VISIBLE_DEVICES=8 VLLM_SERVER_DEV_MODE=1 vllm serve ")
    (tmp_path / "two.yaml").write_text("num_processes: 2\ngpu_ids: '0,2'\n")
    assert pipeline.describe(steps, str(tmp_path / "two.yaml"))[0].startswith("CUDA_VISIBLE_DEVICES=1 ")
    assert json.loads(words[words.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert launch.startswith("accelerate launch ")
    url = pipeline.read_steps(tmp_path / "toy", "run", ["dapo.vllm_server_base_url=http://gpu7:9000/"])
    assert shlex.split(pipeline.describe(url, CPU)[0])[4:8] == ["--host", "gpu7", "--port", "9000"]


def test_the_gpu_of_the_environment_goes_before_that_of_the_accelerate_file(monkeypatch):
    one, many = (recipe.load(f"recipes/accelerate/{name}.yaml") for name in ("one_gpu", "ddp"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_words(one) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpu_words(one) == ["--gpu_ids", "3"] and gpu_words(many) == []


@pytest.mark.parametrize(
    ("visible", "where", "free"),
    [
        ("3,5", {"gpu_ids": "0", "num_processes": 1}, "5"),
        ("2,3,4", {"num_processes": 2}, "4"),
        ("0,1", {"num_processes": 2}, "2"),
        ("", {"gpu_ids": "0,2", "num_processes": 2}, "1"),
        ("", {"num_processes": 4, "num_machines": 2}, "2"),
        ("GPU-a,GPU-b", {"num_processes": 1}, "GPU-b"),
    ],
)
def test_the_server_gets_a_gpu_that_the_launch_leaves_free(monkeypatch, visible, where, free):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus, "_num_gpus", lambda: 8)
    assert gpus.free_gpu(where) == free


def test_a_machine_whose_gpus_all_train_is_said_to_have_none_for_the_server(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    steps = pipeline.read_steps(write_recipes(tmp_path / "toy", {"7_dapo": {"vllm_mode": "server"}}), "run", [])
    for num_gpus, said in ((8, True), (9, False), (0, False)):
        monkeypatch.setattr(gpus, "_num_gpus", lambda num_gpus=num_gpus: num_gpus)
        first = pipeline.describe(steps, "recipes/accelerate/multi_node.yaml")[0]
        assert first.startswith("# this machine has no GPU 8, which training leaves to the server: lower") == said


def test_the_printed_line_trains_on_the_gpu_that_the_run_would(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    step = pipeline.read_steps(folder, str(tmp_path / "run"), [])[0]
    [line] = pipeline.describe([step], "recipes/accelerate/one_gpu.yaml")
    assert line.startswith("accelerate launch --gpu_ids 3 --config_file recipes/accelerate/one_gpu.yaml -m rerank.dat")


def test_a_failing_stage_ends_the_run_with_its_exit_code(tmp_path, folder):
    """The launch itself fails: its accelerate file is no such file's content."""
    run, said = tmp_path / "run", []
    (tmp_path / "toy.csv").write_text("user,item,time\n" + "".join(f"u,i{n},{n}\n" for n in range(8)))
    (tmp_path / "bad.yaml").write_text("no_such_key: 1\n")
    steps = pipeline.read_steps(folder, str(run), [f"data.interactions={tmp_path / 'toy.csv'}"])[:1]
    assert pipeline.run(steps, str(tmp_path / "bad.yaml"), said.append) == 1
    assert said == ["[1/1] data ...", "[1/1] data failed with exit code 1; the same command continues from here"]
    assert not run_dir.is_finished(run, "data")


def test_the_working_folder_is_where_plugins_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert pipeline._python_path() == f"{tmp_path}:elsewhere"


def test_a_signal_reaches_the_stage_and_not_its_launcher(tmp_path):
    child = "import signal, sys, time; signal.signal(2, lambda *_: (print('asked', flush=True), sys.exit())); "
    child += "print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]) + 7)"
    words = [sys.executable, "-c", parent, "accelerate.commands.launch"]  # the last word makes it look like a launcher
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert launcher.stdout.readline() == "ready\n"
    signals.signal_tree(launcher.pid, 2, lambda line: not signals.is_launcher(line))
    assert launcher.stdout.read() == "asked\n"
    assert launcher.wait(30) == 7


@pytest.fixture
def finished(tmp_path) -> list[pipeline.Step]:
    """The steps of a recipe of two stages, both finished: data, which can be made again, and candidates."""
    (tmp_path / "toy.csv").write_text("user,item,time\n" + "".join(f"u{n % 3},i{n},{n}\n" for n in range(30)))
    recipes = {"1_data": {"interactions": str(tmp_path / "toy.csv")}, "4_candidates": {"num_candidates": 2}}
    steps = pipeline.read_steps(write_recipes(tmp_path / "toy", recipes), str(tmp_path / "run"), [])
    for step in steps:
        finish(run_dir.stage_dir(step.run_dir, step.stage), given=step.keys)
        (run_dir.stage_dir(step.run_dir, step.stage) / "old.txt").touch()
    return steps


def test_a_forced_stage_and_those_after_it_are_made_again_and_nothing_is_lost_before(tmp_path, finished):
    run, said = tmp_path / "run", []
    run_dir.partial_dir(run, "data").mkdir()
    run_dir.begin(run, "data", {"num_test": 7}, ())  # of another recipe, which does not matter any more
    remake = pipeline.forced(finished, finished, "data")
    assert remake == ["data", "candidates"]
    steps = pipeline.read_steps(tmp_path / "toy", str(run), ["candidates.source=model"])
    # a model's lists need the stage semantic_ids, which this recipe lacks: refused before anything is moved
    with pytest.raises(FileNotFoundError, match="candidates needs .*semantic_ids, which is not there"):
        pipeline.run(steps, CPU, said.append, remake)
    assert {path.name for path in run.iterdir()} == {"data", "data.partial", "candidates"} and not said

    (tmp_path / "bad.yaml").write_text("no_such_key: 1\n")
    first = finished[:1]
    assert pipeline.run(first, str(tmp_path / "bad.yaml"), said.append, ["data"]) == 1
    assert said[-1].endswith("failed with exit code 1; the same command without --force continues from here")
    assert (run / "data.replaced/old.txt").is_file() and not (run / "data").exists()
    assert not (run / "data.partial").exists() and (run / "candidates/old.txt").is_file()

    assert pipeline.run(first, CPU, said.append) == 0
    assert (run / "data/rows.parquet").is_file() and not (run / "data/old.txt").exists()
    assert {path.name for path in run.iterdir()} == {"data", "candidates"}
    before = run_dir.read_record(run, "data").id
    assert pipeline.run(first, CPU, said.append, ["data"]) == 0
    assert run_dir.read_record(run, "data").id != before


def test_a_forced_stage_is_checked_as_if_it_were_not_finished(tmp_path, finished):
    """Its inputs and files may be others than those that it was made from, and what is to be replaced is not read."""
    run, steps = tmp_path / "run", finished[:1]
    stale = pipeline.read_steps(tmp_path / "toy", str(run), ["data.num_test=2"])[:1]
    with pytest.raises(
        ValueError, match="run/data was made by another recipe: num_test .* as `rerank run --force data` does"
    ):
        pipeline.check_steps(stale)
    assert list(pipeline.check_steps(stale, remake=["data"])) == stages(stale)
    assert pipeline.describe(steps, CPU)[0].startswith("# finished: accelerate")
    assert pipeline.describe(steps, CPU, ["data"])[0].startswith("accelerate")
    finish(run / "semantic_ids")  # an old data folder, without rows.parquet, which candidates' check would read
    assert list(pipeline.check_steps(finished, remake=["data", "candidates"])) == stages(finished)
    with pytest.raises(FileNotFoundError, match="run/data/rows.parquet"):
        pipeline.check_steps(finished, remake=["candidates"])
    with run_dir.lock(run_dir.partial_dir(run, "data")), pytest.raises(ValueError, match="data.partial is in use by"):
        pipeline.check_steps(steps, remake=["data"])


def test_a_link_to_a_stage_of_another_run_is_set_aside_and_the_other_run_is_left_alone(tmp_path, finished):
    run, other = tmp_path / "run", tmp_path / "other/data"
    other.parent.mkdir()
    (run / "data").rename(other)
    (run / "data").symlink_to(other)
    run_dir.set_aside(run, "data")
    assert (run / "data.replaced").is_symlink() and (other / "old.txt").is_file()
    finish(run / "data")
    assert not (run / "data.replaced").is_symlink() and (other / "old.txt").is_file()


def test_a_stage_is_forced_only_where_the_recipe_has_it_and_it_is_selected(finished):
    assert pipeline.forced(finished, finished, None) == []
    assert pipeline.forced(finished, finished, "candidates") == ["candidates"]
    message = (
        r"--force candidate: there is no stage 'candidate' \(did you mean candidates\?\); stages of this recipe are da"
    )
    with pytest.raises(ValueError, match=message):
        pipeline.forced(finished, finished, "candidate")
    with pytest.raises(ValueError, match="--force candidates: only data are selected; change --from, --to or --only"):
        pipeline.forced(finished, finished[:1], "candidates")


@pytest.fixture
def ninth_stage(tmp_path, monkeypatch):
    """A stage `prune` between data and semantic_ids, in a module of its own; traces and dapo are left out."""
    (tmp_path / "ninth.py").write_text(NINTH)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(STAGES)
    kept = {name: module for name, module in before.items() if name not in ("traces", "dapo")}
    STAGES.clear()
    STAGES.update({"data": kept.pop("data"), "prune": "ninth", **kept})
    yield
    STAGES.clear()
    STAGES.update(before)
    sys.modules.pop("ninth", None)


def test_a_ninth_stage_and_two_left_out_follow_from_the_list_of_stages(tmp_path, monkeypatch, ninth_stage):
    recipes = {**RECIPES, "5_traces": {}, "7_dapo": {}, "2_prune": {"share": 0.25}}
    folder = write_recipes(tmp_path / "toy", recipes)
    run, said, cpu = tmp_path / "run", [], str(Path(CPU).resolve())
    steps = pipeline.read_steps(folder, str(run), [])
    assert stages(steps) == ["data", "prune", "semantic_ids", "candidates", "evaluate"]
    with pytest.raises(ValueError, match="2_prune.yaml: the key 'part' is gone; write `share`"):
        pipeline.check_steps(pipeline.read_steps(folder, str(run), ["prune.part=1"])[1:2])
    with pytest.raises(FileNotFoundError, match="prune needs .*run/data, which is not there; run the stage data"):
        pipeline.check_steps(steps[1:2])
    finish(run / "data", given=steps[0].keys)
    with pytest.raises(ValueError, match="share is 2 but must be above 0 and at most 1"):
        pipeline.check_steps(pipeline.read_steps(folder, str(run), ["prune.share=2"])[:2])
    monkeypatch.chdir(tmp_path)  # where the launched process finds the module
    assert pipeline.run(steps[:2], cpu, said.append) == 0
    assert [line.partition(":")[0] for line in said] == ["[1/2] data", "[2/2] prune ...", "[2/2] prune"]
    assert (run / "prune/pruned.txt").read_text() == "0.25"
    record = run_dir.read_record(run, "prune")
    assert record.inputs == {"data": run_dir.read_record(run, "data").id}
    assert [(file.key, file.name) for file in record.files] == [("the accelerate file", cpu)]
    assert f"-m ninth --config {folder}/2_prune.yaml" in pipeline.describe(steps, CPU)[1]


def test_a_finished_evaluation_of_lists_gets_its_page_once_and_one_of_the_whole_catalogue_none(tmp_path):
    folder = write_recipes(tmp_path / "toy", {"8_evaluate": {}})
    pages, said = [], []
    for name, words in (("run", []), ("other", ["evaluate.task=next_item"])):
        steps = pipeline.read_steps(folder, str(tmp_path / name), words)
        finish(tmp_path / name / "data")
        finish(tmp_path / name / "evaluate", given=steps[0].keys)
        assert pipeline.run(steps, CPU, said.append) == 0
        pages.append(tmp_path / name / "evaluate/report.html")
    assert "There is no evaluation of this run yet" in pages[0].read_text() and not pages[1].exists()
    pages[0].write_text("kept")
    assert pipeline.run(pipeline.read_steps(folder, str(tmp_path / "run"), []), CPU, said.append) == 0
    assert pages[0].read_text() == "kept" and said == ["[1/1] evaluate: finished already"] * 3
