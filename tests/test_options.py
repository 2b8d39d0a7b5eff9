"""Every option of a stage is used: set by a recipe or a command that is shown, or kept for a stated reason."""

import dataclasses
import re
from pathlib import Path

from rerank.compare import SEEDED_STAGES
from rerank.launch import recipe
from rerank.launch.stages import STAGES, load_stage
from rerank.results.tables import markdown_table

# Options that no recipe and no shown command sets.
KEPT = {
    "dapo.group_forward": "false for a model whose attention cannot run packed rows",
    "dapo.max_logp_gap": "a bfloat16 engine on a large model needs a wider bound",
    "data.seed": "split: random",
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
    *("candidates.model_dir", "semantic_ids.encoder_batch_size", "traces.max_concurrency", "traces.max_retries"),
}
MOST = 15
RECIPE = re.compile(rf"\d+_({'|'.join(sorted(STAGES, key=len, reverse=True))})(_\w+)?\.yaml")


def own_options() -> set[str]:
    """STAGE.key of every option that a stage declares itself, TRL's left out."""
    found = set()
    for stage in STAGES:
        for cls in load_stage(stage).arguments:
            bases = [base for base in cls.__mro__ if base.__module__.startswith("trl")]
            others = {field.name for base in bases for field in dataclasses.fields(base)}
            found |= {f"{stage}.{field.name}" for field in dataclasses.fields(cls)} - {f"{stage}.{n}" for n in others}
    return found


def options_in_use() -> set[str]:
    """STAGE.key of what recipes, the toy and the commands in README.md and results files set."""
    paths = [path for folder in ("recipes", "tests/toy") for path in Path(folder).rglob("*.yaml")]
    stages = {path: match[1] for path in paths if (match := RECIPE.fullmatch(path.name))}
    used = {f"{stage}.{key}" for path, stage in stages.items() for key in recipe.load(path)}
    for path in (Path("README.md"), *Path("recipes").rglob("RESULTS*.md")):
        text = path.read_text()
        used |= set(re.findall(rf"\b(?:{'|'.join(STAGES)})\.\w+(?==)", text))
        if "rerank compare" in text:  # which sets these by --seeds and --minutes_per_run
            used |= {f"{stage}.seed" for stage in SEEDED_STAGES}
            used |= {f"{stage}.max_minutes" for stage in STAGES if load_stage(stage).trains}
    return used


def test_every_option_is_set_somewhere_or_kept_for_a_reason(capsys):
    unused = own_options() - options_in_use()
    with capsys.disabled():
        print("", *markdown_table(("option that nothing sets", "reason"), sorted(KEPT.items())), sep="\n")
    assert unused == KEPT.keys() | TESTED
    assert len(KEPT) <= MOST
