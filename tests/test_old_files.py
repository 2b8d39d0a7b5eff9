"""A run of an earlier version, tests/data/toy_run: its files are read, or refused with one line that says what to do.

It is the toy's run, without checkpoints, page and the sft models. Its rollouts have schema version 2, its recipes say
`when` and `overlong_tokens`.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from toy_recipe import TOY, refusal, run_command

from rerank.launch import recipe, run_dir
from rerank.launch.stages import STAGES
from rerank.models.ranker import RankingModel
from rerank.next_item.model import NextItemModel
from rerank.rollouts.groups import RolloutGroups
from rerank.rollouts.schema import RENAMED, SCHEMA
from rerank.rollouts.store import open_rollouts, read_rollouts
from rerank.rows import read_rows

OLD = Path(__file__).with_name("data") / "toy_run"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def test_old_rollouts_are_read_under_the_new_names():
    parts = [pq.read_table(path).to_pylist() for path in sorted((OLD / "dapo/rollouts").iterdir())]
    written, read = sum(parts, []), read_rollouts(OLD)
    assert read.schema == SCHEMA and read.num_rows == len(written) == 24
    for name in written[0]:
        assert read[RENAMED.get(name, name)].to_pylist() == [row[name] for row in written], name
    first = open_rollouts(OLD).connection.sql("select target_rank, conditions from rollouts").fetchall()[0]
    assert first == (written[0]["target_rank_before"], dict(written[0]["reward_gates"]))
    improved = open_rollouts(OLD).query(
        "select target_rank from rollouts where target_rank > 1 and conditions['ndcg']"
    )
    assert 0 < improved.num_rows < 24 and min(improved["target_rank"].to_pylist()) == 2


def test_old_rollouts_are_shown_by_group_and_on_a_page(run):
    groups = RolloutGroups(OLD)
    assert groups.num_groups == 6 and groups.read(groups.page()[0])[0]["conditions"] is not None
    printed = run_command("inspect", OLD, "--limit", 1)
    assert "The title" in printed and "share_of_ids" in printed
    run_command("report", run, "--out", run / "page.html")
    assert "The title" in (run / "page.html").read_text()


def test_old_rollouts_are_exported(run):
    run_command("export", run, "--format", "trl")
    tables = [pq.read_table(path) for path in sorted((run / "completions").iterdir())]
    read = read_rollouts(OLD)
    assert sum(table.num_rows for table in tables) == read.num_rows
    ndcg = [value for table in tables for value in table["ndcg"].to_pylist()]
    wanted = [dict(components)["ndcg"] for components in read["reward_components"].to_pylist()]
    assert sorted(ndcg) == sorted(wanted)


def test_old_rollouts_earn_under_the_same_rewards_what_they_earned(tmp_path):
    rewards = {"rewards": [{"name": "ndcg", "kwargs": {"k": 4}}, {"name": f"{TOY}/rewards.py:share_of_ids"}]}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({**rewards, "outcome": "share_of_ids"}))
    run_command("replay", OLD, "--rewards", tmp_path / "rewards.yaml", "--out", tmp_path / "scored.parquet")
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert scored.num_rows == 24
    for name in ("ndcg", "share_of_ids"):
        stored = scored[f"stored/{name}"].to_pylist()
        assert scored[f"new/{name}"].to_pylist() == pytest.approx(stored, abs=1e-6)
    assert min(stored) > 0  # of share_of_ids


def test_an_old_model_asks_as_it_was_asked_in_training():
    model = RankingModel.load(OLD / "dapo/model")
    prompter = replace(model.prompter, tokenizer=model.load_tokenizer())
    assert (len(prompter.catalogue), model.max_completion_tokens) == (24, 36)
    rows = {row.row_id: row for row in read_rows(OLD / "candidates/train.parquet")}
    for stored in read_rollouts(OLD).to_pylist():
        row = rows[stored["row_id"]]
        assert prompter.prompt(row) == stored["prompt"] and prompter.labels(row) == stored["candidate_labels"]
        assert row.target_rank == stored["target_rank"]


def test_an_old_mid_trained_model_scores_items():
    model = NextItemModel.load_midtrained(OLD)
    (logps,) = model.token_logps([np.array([1, 2, 3])], [[4, 5]])
    assert len(logps) == 2 and (logps < 0).all()
    with pytest.raises(FileNotFoundError, match="give a model of the sft stage with task next_item"):
        NextItemModel.load(OLD / "dapo/model")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "dapo"])
def test_an_old_stage_is_finished_under_the_recipe_that_made_it(stage):
    given = json.loads((OLD / stage / "stage.json").read_text())["given"]
    assert recipe.resolve(stage, given, "old.yaml")[0].run_dir == "runs/toy"
    run_dir.check_finished(OLD, stage, given)


def test_old_keys_of_a_recipe_are_refused_with_the_new_ones():
    given = json.loads((OLD / "dapo/stage.json").read_text())["given"]
    with pytest.raises(ValueError, match="'overlong_tokens' is gone; write {name: overlong, kwargs: {cache_tokens: N"):
        recipe.resolve("dapo", given, "old.yaml")
    del given["overlong_tokens"]
    with pytest.raises(ValueError, match="reward well_formed has the key 'when', which is called 'condition' now"):
        recipe.resolve("dapo", given, "old.yaml")


def test_an_old_dapo_folder_is_refused_under_todays_recipe(run, capsys):
    line = refusal(capsys, "run", TOY, "--out", run, "--dry-run")
    assert f"{run}/data was made by another recipe: interactions is ${{TOY_DATA}}/interactions.csv there" in line
    words = [f"data.{name}=${{TOY_DATA}}/{name}.csv" for name in ("interactions", "items")]
    words += [
        "traces.max_attempts=8",
        "semantic_ids.embeddings=${TOY_DATA}/embeddings.npy",
        "sft.keep=best",
        "dapo.keep=best",
    ]
    line = refusal(capsys, "run", TOY, "--out", run, "--dry-run", *words)
    assert f"{run}/dapo was made by another recipe: overlong_tokens is 8 there and its default here (overlong" in line
    assert f" among the rewards); delete {run}/dapo and the stages after it" in line and "--only" not in line


def test_the_old_recipe_is_refused_where_rewards_are_asked_for(run, capsys):
    old = run / "dapo/recipe.yaml"
    for words in (("replay", run, "--rewards", old), ("probe", old, "--run-dir", run)):
        assert "overlong" in refusal(capsys, *words)
