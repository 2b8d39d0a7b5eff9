"""Every shipped recipe parses, names known keys, and the demo's passes the check that `rerank run` does."""

import gzip
import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from rerank import cli, scoring
from rerank.launch import pipeline, recipe
from rerank.launch.stages import STAGES
from rerank.losses import load_losses

ACCELERATE = sorted(Path("recipes/accelerate").glob("*.yaml"))
REWARDS = sorted(Path("recipes/rewards").glob("*.yaml"))
RECIPES = sorted({*Path("recipes").glob("*/*.y*ml")} - {*ACCELERATE, *REWARDS})
FOLDERS = sorted({path.parent for path in RECIPES})
NAME = re.compile(rf"(\d+)_({'|'.join(sorted(STAGES, key=len, reverse=True))})(_\w+)?\.yaml")  # a variant has a suffix


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_is_named_after_its_stage_and_resolves(path):
    match = NAME.fullmatch(path.name)
    assert match, f"{path} is not named as <number>_<stage>[_<variant>].yaml"
    assert int(match[1]) == list(STAGES).index(match[2]) + 1
    arguments = recipe.resolve(match[2], recipe.load(path), str(path))
    if match[2] == "dapo":
        assert scoring.load_rewards(arguments[0].rewards)
    if match[2] == "sft":
        assert load_losses(arguments[0].losses, arguments[0].task)
    if match[3]:  # which `rerank run` leaves alone
        assert path not in [step.path for step in pipeline.read_steps(path.parent, None, [])]


def test_reward_files_hold_the_published_rewards_with_their_sources():
    assert [path.stem for path in REWARDS] == ["literal", "naive", "report"]
    for path in REWARDS:
        keys = recipe.load(path)
        assert list(keys) == ["rewards"] and scoring.load_rewards(keys["rewards"])
        comment = path.read_text().partition("rewards:")[0]
        assert "R = " in comment and "arXiv:" in comment


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_the_recipes_of_a_folder_share_a_run_of_its_name(folder):
    assert {recipe.load(path)["run_dir"] for path in RECIPES if path.parent == folder} == {f"runs/{folder.name}"}


def test_every_place_to_run_has_its_file():
    names = "cpu cpu_2proc one_gpu ddp fsdp2 zero2 zero3 multi_node"
    assert sorted(path.stem for path in ACCELERATE) == sorted(names.split())
    for command in ("run", "compare"):
        assert Path(cli._parser().parse_args([command, "recipes/ml100k"]).accelerate) in ACCELERATE


@pytest.mark.parametrize("path", ACCELERATE, ids=str)
def test_an_accelerate_file_parses_and_its_keys_are_known(path):
    config = load_config_from_file(str(path))  # refuses unknown keys at the top level
    options = {action.dest for action in launch_command_parser()._actions}
    for section in (config.deepspeed_config, config.fsdp_config):
        assert set(section or {}) <= options
    assert config.use_cpu == path.stem.startswith("cpu"), "a recipe leaves the device to this file"


@pytest.fixture
def data_dirs(tmp_path, monkeypatch):
    """What BEAUTY_DATA and OFFICE_DATA name, in small: sixteen users of a circle of 300 items."""
    rows = [f"u{user},i{(20 * user + place) % 300},{place},{place}" for user in range(16) for place in range(20)]
    write_gzip(tmp_path / "interactions.csv.gz", ["user,item,pos,timestamp", *rows])
    kinds = {"brand": "some", "categories": ["Beauty", "Hair Care"]}
    items = [json.dumps({"item": f"i{item}", "title": f"Title {item}", **kinds}) for item in range(300)]
    write_gzip(tmp_path / "items.jsonl.gz", items)
    monkeypatch.setenv("BEAUTY_DATA", str(tmp_path))
    windows = [" ".join(f"i{(20 * user + place) % 300}" for place in range(start, start + 11))
               for user in range(16) for start in range(6)]  # fmt: skip
    lines = [
        f"{'test' if place > 80 else 'train'},u{place // 6},{place},{items}" for place, items in enumerate(windows)
    ]
    write_gzip(tmp_path / "rows.csv.gz", ["split,user,timestamp,items", *lines])
    monkeypatch.setenv("OFFICE_DATA", str(tmp_path))


def write_gzip(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_recipe_folder_passes_its_dry_run(folder, data_dirs, tmp_path, capsys):
    """On any machine: without a GPU, a server or a model of eight billion parameters."""
    assert cli.main(["run", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    launched = [line.split()[5] for line in lines if line.startswith("accelerate launch ")]
    stages = [stage for stage in STAGES if list(folder.glob(f"*_{stage}.yaml"))]
    assert launched == [f"rerank.{stage}" for stage in stages] and len(stages) == (
        5 if folder.name.endswith(("_next", "_sets")) else 8
    )
    is_served = folder.name == "beauty_qwen3_8b"
    assert [line.endswith("&") for line in lines].count(True) == is_served
    assert not (tmp_path / "run").exists()
