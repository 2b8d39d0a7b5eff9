"""Rollouts in the files of another tool: those that TRL's own trainer writes for the same completions."""

import re
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pytest
import trl
from scripted_trainer import make_trainer, plain_trainer
from toy_recipe import refusal, run_command
from toy_run import rollout, write_rollouts

from rerank.rollouts.export import ADDED

CARD = Path(trl.__file__).parent / "templates/completions_dataset_card.md"


def frames(folder):
    return {path.name: pd.read_parquet(path) for path in sorted(Path(folder, "completions").iterdir())}


def export(folder, *words):
    return run_command("export", folder, "--format", "trl", *words)


def test_the_files_are_those_that_trl_writes(tmp_path):
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, rounds=0, **batch).train()
    plain_trainer(tmp_path / "trl", **batch, log_completions=True).train()
    assert export(tmp_path) == f"files: 2 in {tmp_path / 'completions'}\n"
    ours, theirs = frames(tmp_path), frames(tmp_path / "trl/out")
    assert ours.keys() == theirs.keys()
    for name, frame in ours.items():
        pd.testing.assert_frame_equal(frame.drop(columns=[*ADDED]), theirs[name], rtol=1e-4)
        assert [*frame.columns][-len(ADDED) - 1 :] == [*ADDED, "advantage"] and frame["kept"].all()


def test_the_documented_columns_open_them(tmp_path):
    write_rollouts(
        tmp_path / "dapo/rollouts", rollout(step=0), rollout(step=7, discard_reason="all_equal", kept=False)
    )
    export(tmp_path)
    card = CARD.read_text()
    assert 'datasets.load_dataset("' in card  # which reads the files of a folder
    opened = datasets.load_dataset(str(tmp_path / "completions"), cache_dir=str(tmp_path / "cache"))["train"]
    documented = re.findall(r"(?m)^- `(\S+)`:", card)
    rewards = ["rank_promotion", "well_formed"]
    wanted = [of for name in documented for of in (rewards if name == "<reward_function_name>" else [name])]
    assert [name for name in opened.column_names if name not in ADDED] == wanted
    assert opened["step"][:] == [1, 8] and opened["kept"][:] == [True, False]


def test_what_is_masked_or_discarded_and_what_never_applied_is_null(tmp_path):
    masked = rollout(reward=None, reward_components={}, kept=False, discard_reason="truncated", outcome=None)
    equal = rollout(group=1, advantage=None, policy_logps=None, kept=False, discard_reason="all_equal")
    write_rollouts(tmp_path / "dapo/rollouts", masked, equal, rollout(group=2))
    export(tmp_path)
    frame = frames(tmp_path)["completions_00001.parquet"]
    assert frame["group"].tolist() == [0, 1, 2] and frame["well_formed"].isna().all()
    assert frame["rank_promotion"].isna().tolist() == [True, False, False]
    assert frame["advantage"].isna().tolist() == [False, True, False]
    assert frame["discard_reason"].tolist()[:2] == ["truncated", "all_equal"] and frame["kept"].tolist()[2]


def test_an_export_is_whole_and_of_one_run(tmp_path, capsys):
    write_rollouts(tmp_path / "dapo/rollouts", *(rollout(step=step) for step in range(3)))
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):  # the second writes over the first
        export(tmp_path, "--out", tmp_path / "elsewhere")
    assert [*frames(tmp_path / "elsewhere")] == [f"completions_0000{step}.parquet" for step in (1, 2, 3)]
    (tmp_path / "dapo/rollouts/part-00000002-0.parquet").unlink()
    line = refusal(capsys, "export", tmp_path, "--format", "trl", "--out", tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere/completions"
    assert f"{folder}/completions_00003.parquet is of a step that {tmp_path} lacks; delete {folder}, or give" in line
    shutil.rmtree(folder)
    export(tmp_path, "--out", tmp_path / "elsewhere")
    assert len(frames(tmp_path / "elsewhere")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "holds no rollouts; run the dapo stage, or give the folder of a run that did"),
        ("kept", "a reward is called kept, and so is a column of the export; give it another name"),
        ("novelty", "nowhere is not a folder; make it first"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, capsys, name, message):
    if name:
        write_rollouts(tmp_path / "dapo/rollouts", rollout(reward_components={name: 1.0}, conditions={name: True}))
    out = tmp_path / "nowhere" if name == "novelty" else tmp_path
    assert message in refusal(capsys, "export", tmp_path, "--format", "trl", "--out", out)
    assert not (tmp_path / "completions").exists()
