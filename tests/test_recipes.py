"""Every shipped recipe parses and passes the check that `rerank run` does, and every option of a stage is used."""

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from rerank import cli, scoring
from rerank.compare.seeds import SEEDED
from rerank.launch import pipeline, recipe
from rerank.launch.stages import STAGES, load_stage
from rerank.losses import load_losses
from rerank.results.intervals import LEAVES_SEEDS_OUT
from rerank.results.tables import markdown_table

ACCELERATE = sorted(Path("recipes/accelerate").glob("*.yaml"))
REWARDS = sorted(Path("recipes/rewards").glob("*.yaml"))
RECIPES = sorted({*Path("recipes").glob("*/*.y*ml")} - {*ACCELERATE, *REWARDS})
FOLDERS = sorted({path.parent for path in RECIPES})
LAUNCHED_WITH = {"beauty_qwen3_8b": "zero3"}  # the accelerate file that its recipes name
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


def metarank_events(walks):
    """A list of each user, of which the second item is clicked, and the items that were shown."""
    numbers = ("vote_cnt", "vote_avg", "popularity", "release_date")
    fields = [{"name": name, "value": 7.0} for name in numbers] + [{"name": "genres", "value": ["drama"]}]
    for item in {item for walk in walks.values() for item in walk[:5]}:
        yield {"event": "item", "id": f"e{item}", "item": item, "timestamp": "0", "fields": [*fields]}
    for user, walk in walks.items():
        shared = {"user": f"u{user}", "session": "s", "timestamp": str(1000 * user), "fields": []}
        shown = [{"id": item, "fields": []} for item in walk[:5]]
        yield {"event": "ranking", "id": f"r{user}", "items": shown, **shared}
        yield {
            "event": "interaction",
            "id": f"c{user}",
            "ranking": f"r{user}",
            "item": walk[1],
            "type": "click",
            **shared,
        }


@pytest.fixture
def data_dirs(tmp_path, monkeypatch):
    """What the recipes' variables name, in small: sixteen users of a circle of 300 items."""
    walks = {user: [f"i{(20 * user + place) % 300}" for place in range(20)] for user in range(16)}
    taken = [f"u{user},{item},{place},{place}" for user, walk in walks.items() for place, item in enumerate(walk)]
    kinds = {"brand": "some", "categories": ["Beauty", "Hair Care"]}
    items = [json.dumps({"item": f"i{item}", "title": f"Title {item}", **kinds}) for item in range(300)]
    windows = [(user, " ".join(walk[start : start + 11])) for user, walk in walks.items() for start in range(6)]
    rows = [f"{'test' if n > 80 else 'train'},u{user},{n},{items}" for n, (user, items) in enumerate(windows)]
    for name, lines in (
        ("interactions.csv.gz", ["user,item,pos,timestamp", *taken]),
        ("items.jsonl.gz", items),
        ("rows.csv.gz", ["split,user,timestamp,items", *rows]),
        ("events.jsonl.gz", [json.dumps(event) for event in metarank_events(walks)]),
    ):
        (tmp_path / name).write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    (tmp_path / "test_users.txt").write_text("u0\nu1\n")
    for variable in ("BEAUTY_DATA", "OFFICE_DATA", "RANKLENS_DATA"):
        monkeypatch.setenv(variable, str(tmp_path))


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_recipe_folder_passes_its_dry_run(folder, data_dirs, tmp_path, capsys):
    """On any machine: without a GPU, a server or a model of eight billion parameters."""
    where = f"recipes/accelerate/{LAUNCHED_WITH.get(folder.name, 'cpu')}.yaml"
    assert cli.main(["run", str(folder), "--out", str(tmp_path / "run"), "--accelerate", where, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    launched = [line.split()[5] for line in lines if line.startswith("accelerate launch ")]
    stages = [stage for stage in STAGES if list(folder.glob(f"*_{stage}.yaml"))]
    assert launched == [f"rerank.{stage}" for stage in stages]
    assert len(stages) == {"ranklens": 7, "beauty_next": 5, "office_next": 5, "beauty_sets": 5}.get(folder.name, 8)
    assert [line.endswith("&") for line in lines].count(True) == (folder.name == "beauty_qwen3_8b")  # a server
    assert not (tmp_path / "run").exists()


# --- options

# Options that no recipe and no shown command sets.
KEPT = {
    "dapo.group_forward": "true to be refused where a model cannot run packed rows, false to compare",
    "dapo.max_logp_gap": "a bfloat16 engine on a large model needs a wider bound",
    "midtrain.context_length": "of the small model, for long histories",
    "midtrain.general_text": "a text of one's own",
    "midtrain.token_epochs": "GR2 phase one, longer for many new tokens",
    "midtrain.token_learning_rate": "GR2 phase one",
    "semantic_ids.batch_size": "RQ-VAE training",
    "semantic_ids.commitment_weight": "RQ-VAE training",
    "semantic_ids.contrastive_temperature": "technique of GR2",
    "semantic_ids.ema_decay": "technique of GR2",
    "semantic_ids.learning_rate": "RQ-VAE training",
    "traces.batch_size": "attempts between two saves",
    "traces.teacher_dtype": "teacher: vllm on a machine without bfloat16",
    "traces.teacher_max_length": "teacher: vllm on a machine with little memory",
}
# Kept with a test of their own.
TESTED = {
    "candidates.model_dir",
    "candidates.neighbours",
    "semantic_ids.encoder_batch_size",
    "traces.max_concurrency",
    "traces.max_retries",
}
MOST = 15


def own_options() -> set[str]:
    """STAGE.key of every option that a stage declares itself, TRL's left out."""
    classes = [(stage, cls) for stage in STAGES for cls in load_stage(stage).arguments]
    found = set()
    for stage, cls in classes:
        bases = [base for base in cls.__mro__ if base.__module__.startswith("trl")]
        theirs = {field.name for base in bases for field in dataclasses.fields(base)}
        found |= {f"{stage}.{field.name}" for field in dataclasses.fields(cls) if field.name not in theirs}
    return found


def options_in_use() -> set[str]:
    """STAGE.key of what recipes, the toy and the commands in README.md and results files set."""
    paths = [path for folder in ("recipes", "tests/toy") for path in Path(folder).rglob("*.yaml")]
    stages = {path: match[2] for path in paths if (match := NAME.fullmatch(path.name))}
    used = {f"{stage}.{key}" for path, stage in stages.items() for key in recipe.load(path)}
    for path in (Path("README.md"), *Path("recipes").rglob("RESULTS*.md")):
        text = path.read_text()
        used |= set(re.findall(rf"\b(?:{'|'.join(STAGES)})\.\w+(?==)", text))
        if "rerank compare" in text:  # which sets these by --seeds, --seed-from and --minutes_per_run
            used |= {f"{stage}.seed" for stage in SEEDED}
            used |= {f"{stage}.max_minutes" for stage in STAGES if load_stage(stage).trains}
    return used


@pytest.mark.parametrize("path", sorted(Path("recipes").rglob("RESULTS*.md")), ids=str)
def test_a_results_file_with_intervals_says_whether_they_hold_seeds(path):
    text = path.read_text()
    if re.search(r"\[[+-]\d\.\d+, [+-]\d", text):
        is_of_seeds = re.search(r"^Intervals: 95 %, over users and \d+ training seeds\.", text, re.MULTILINE)
        leaves_out = f"Intervals: 95 %, {LEAVES_SEEDS_OUT}." in text
        assert is_of_seeds or leaves_out or text.splitlines()[2].startswith("The intervals below leave training seeds")


def test_every_option_is_set_somewhere_or_kept_for_a_reason(capsys):
    unused = own_options() - options_in_use()
    with capsys.disabled():
        print("", *markdown_table(("option that nothing sets", "reason"), sorted(KEPT.items())), sep="\n")
    assert unused == KEPT.keys() | TESTED
    assert len(KEPT) <= MOST
