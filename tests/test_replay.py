"""Stored rollouts under other rewards: totals and advantages by hand, and as the trainer has them."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from toy_recipe import TOY, refusal
from toy_run import rollout
from toy_run import write_rollouts as write

from rerank import cli, scoring
from rerank.rollouts import rescore
from rerank.rollouts.store import read_rollouts
from rerank.rows import column_names

BEST, SAME, WORST = "<think>a</think> 2 1 3", "<think>a</think> 1 2 3", "<think>a</think> 1 3 2"


def rewards_file(folder, *rewards, **keys):
    path = folder / "other.yaml"
    path.write_text(json.dumps({"rewards": rewards, **keys}))  # JSON is YAML
    return path


def rescored(folder, *rewards, **keys):
    return rescore.rescore(folder, rescore.read_scoring(rewards_file(folder, *rewards, **keys), folder))


def plugin(folder, body):
    (folder / "plugin.py").write_text(f"SEEN = {{}}\ndef novelty(completions, **columns):\n    {body}\n")
    return {"name": f"{folder}/plugin.py:novelty"}


@pytest.fixture
def store(tmp_path):
    """Two groups of two: the first keeps its order of totals under rank_promotion, the second turns it around."""
    totals = {"reward": 0.2, "advantage": 0.7}, {"reward": 0.1, "advantage": -0.7}
    write(
        tmp_path / "rollouts",
        rollout(completion=BEST, **totals[0]),
        rollout(completion=WORST, **totals[1]),
        rollout(group=1, completion=WORST, **totals[0]),
        rollout(group=1, completion=SAME, **totals[1]),
    )
    return tmp_path


def test_totals_and_advantages_are_those_that_the_trainer_would_make(store):
    found = rescored(store, {"name": "rank_promotion", "weight": 3.0})
    # the target stands second; rank_promotion is (2 - 1)/3, (2 - 3)/3, (2 - 3)/3, 0
    assert found["new/rank_promotion"].tolist() == pytest.approx([1 / 3, -1 / 3, -1 / 3, 0])
    assert found["new/reward"].tolist() == pytest.approx([1, -1, -1, 0])
    # standard deviations with n - 1: of 1, -1 sqrt(2), of -1, 0 sqrt(1/2)
    first, second = 1 / (2**0.5 + 1e-4), 0.5 / (0.5**0.5 + 1e-4)
    assert found["new/advantage"].tolist() == pytest.approx([first, -first, -second, second])
    assert found["stored/advantage"].tolist() == [0.7, -0.7, 0.7, -0.7]
    assert found["sign_changes"].tolist() == [False, False, True, True]
    assert found["member"].tolist() == [1, 2, 1, 2] and found["row_id"].tolist() == [40, 40, 41, 41]


def test_conditions_count_as_in_training_and_what_was_stored_of_each_reward_stands_beside(store):
    found = rescored(store, {"name": "well_formed", "condition": "promoted_or_kept_first"})
    assert found["new/well_formed"].tolist() == found["new/reward"].tolist() == [1, 0, 0, 0]
    assert found["stored/well_formed"].isna().all()
    assert found["stored/rank_promotion"].tolist() == pytest.approx([1 / 3] * 4)
    assert found["stored/differs"].tolist() == [True] * 4
    assert found["new/differs"].tolist() == [True, True, False, False]
    assert not found["sign_changes"].any()  # a group that learns nothing has no sign


@pytest.mark.parametrize(
    ("scale", "divisor"), [("none", 1), ("group", 2**0.5 + 1e-4), ("batch", (20 / 3) ** 0.5 + 1e-4)]
)
def test_scales_of_advantages(scale, divisor):
    # groups of 0, 2 and 4, 6, of two rounds: deviations sqrt(2), and of the four kept sqrt((9 + 1 + 1 + 9)/3)
    kept, rewards = [True] * 4 + [False] * 2, [0.0, 2.0, 4.0, 6.0, 9.0, 9.0]
    places = {"step": 0, "round": [0, 0, 1, 1, 1, 1], "group": [0, 0, 0, 0, 1, 1]}
    frame = pd.DataFrame({**places, "kept": kept, "reward": rewards})
    signs = np.array([-1, 1, -1, 1, 0, 0])
    assert rescore.advantages(frame, "reward", scale).tolist() == pytest.approx(signs / divisor)


def test_a_reward_that_does_not_apply_is_left_out(store):
    nothing = plugin(store, "return [None] * len(completions)")
    assert rescored(store, nothing, {"name": "well_formed"})["new/reward"].tolist() == [1] * 4
    found = rescored(store, nothing)
    assert found["new/reward"].isna().all() and found["new/advantage"].tolist() == [0] * 4


def test_a_reward_gets_the_columns_of_the_contract(tmp_path):
    write(tmp_path / "rollouts", rollout(completion=BEST))
    module = plugin(tmp_path, "SEEN.update(columns)\n    return [0.0] * len(completions)")
    rewards = rescore.read_scoring(rewards_file(tmp_path, module), tmp_path)
    rescore.rescore(tmp_path, rewards)
    wanted = {name: [rollout()[name]] for name in (*column_names(), "completion_ids")}
    assert rewards.rewards[0].function.__globals__["SEEN"] == wanted | {"prompts": [rollout()["prompt"]]}


def test_the_scale_is_that_of_the_dapo_stage(tmp_path):
    from rerank.dapo import DapoConfig

    config = DapoConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    assert config.scale_rewards == rescore.SCALE_REWARDS
    assert config.multi_objective_aggregation == "sum_then_normalize"


def test_scoring_in_batches_is_scoring_each_rollout_alone(tmp_path, monkeypatch):
    """Groups of two whose targets stand at different places, one group cut by a batch, one drawn again later."""
    completions = [BEST, SAME, WORST, "junk", "<think></think> 3 2 1", BEST, SAME, WORST]
    of_groups = [{"group": 0}, {"group": 1, "relevance": [0.0, 0.0, 1.0], "target_rank": 3}]
    records = [rollout(n // 6, completion=text, **of_groups[n // 2 % 2]) for n, text in enumerate(completions)]
    write(tmp_path / "rollouts", *records)
    rewards, names = scoring.load_rewards([{"name": "rank_promotion"}, {"name": "ndcg"}]), column_names()
    table = read_rollouts(tmp_path)
    alone = [rescore.score(table.slice(place, 1), rewards, names) for place in range(len(completions))]
    for size in (3, 100):
        monkeypatch.setattr(rescore, "BATCH_SIZE", size)
        for name, values in rescore.score(table, rewards, names).items():
            assert values.tolist() == [found[name].item() for found in alone]
            assert len(set(values.tolist())) > 2


def test_a_reward_that_needs_a_column_which_an_old_store_lacks_is_refused(store, capsys):
    for path in (store / "rollouts").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["max_completion_tokens"]), path)
    path = rewards_file(store, {"name": "overlong"}, {"name": "ndcg"})
    line = refusal(capsys, "replay", store, "--rewards", path)
    assert f"reward overlong needs the column max_completion_tokens, which the rollouts of {store} lack" in line
    assert "leave that reward out, or run the dapo stage again" in line
    assert rescored(store, {"name": "ndcg"})["new/ndcg"].notna().all()


def test_the_command_prints_and_writes_what_changes(store, capsys):
    path = rewards_file(store, {"name": "rank_promotion", "weight": 3.0})
    line = ["replay", str(store), "--rewards", str(path), "--top", "1", "--out", str(store / "out.parquet")]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in text.split("│")[1:-1]] for text in printed.splitlines() if text.startswith("│")]
    assert ["rank_promotion, mean", "0.3333", "-0.0833"] in rows and ["well_formed, mean", "-", "-"] in rows
    assert ["total, mean", "0.1500", "-0.2500"] in rows and ["groups whose totals differ", "2", "2"] in rows
    assert "2 of 4 rollouts (50.0%) change the sign of their advantage" in printed
    assert rows[-1] == ["0", "0", "1", "1", "41", "0.200", "-1.000", "0.700", "-0.707"]
    written = pq.read_table(store / "out.parquet").to_pandas()
    assert written["new/reward"].tolist() == [1.0, -1.0, -1.0, 0.0] and len(written) == 4


def test_the_recipe_of_a_run_gives_what_its_training_had(toy_run):
    found = rescore.rescore(toy_run.run, rescore.read_scoring(TOY / "7_dapo.yaml", toy_run.run))
    for name, rounding in (("reward", 1e-6), ("advantage", rescore.ROUNDING)):
        assert found[f"new/{name}"].to_numpy() == pytest.approx(found[f"stored/{name}"].to_numpy(), abs=rounding)
    assert found["stored/differs"].any() and not found["sign_changes"].any()


def test_groups_are_kept_by_the_outcome_that_a_file_names(tmp_path):
    worse, none = {"target_rank_after": 3}, {"target_rank_after": None, "order": None, "failure": "junk"}
    mixed = [rollout(completion=WORST, **worse), rollout(completion=SAME)]
    equal = [rollout(group=1, completion=WORST, **worse)] * 2
    failed = [rollout(group=2, completion=text, **none) for text in ("junk", "more junk")]
    one_failed = [rollout(group=3, completion=SAME), rollout(group=3, completion="junk", **none)]
    write(tmp_path / "rollouts", *mixed, *equal, *failed, *one_failed)
    length = plugin(tmp_path, "return [len(text) % 7 for text in completions]")
    assert len("junk") % 7 != len("more junk") % 7 and len(WORST) == len(SAME)
    found = rescored(tmp_path, length)
    assert found["stored/useful"].tolist() == found["new/useful"].tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert rescored(tmp_path, length, outcome="novelty")["new/useful"].tolist() == [False] * 4 + [True] * 4
    with pytest.raises(ValueError, match="other.yaml: outcome is 'auc', .* report only rank_gain, novelty"):
        rescored(tmp_path, length, outcome="auc")


def test_scale_and_outcome_are_those_of_the_run_where_the_file_has_none(store):
    (store / "dapo").mkdir()
    (store / "dapo/recipe.yaml").write_text("{rewards: [{name: ndcg}], scale_rewards: none, outcome: ndcg}")
    for keys, wanted in (
        ({}, ("none", "ndcg")),
        ({"scale_rewards": "batch", "outcome": "auc"}, ("batch", "auc")),
        ({"scale_rewards": True}, ("group", "ndcg")),
    ):
        found = rescore.read_scoring(rewards_file(store, {"name": "ndcg"}, {"name": "auc"}, **keys), store)
        assert (found.scale_rewards, found.outcome) == wanted


@pytest.mark.parametrize(
    ("words", "keys", "message"),
    [
        (["--top", "-1"], {}, "top is -1 but must be at least 0"),
        (["--out", "no/out.parquet"], {}, "--out no/out.parquet: no is not a folder"),
        (["--rewards", "none.yaml"], {}, "none.yaml does not exist"),
        ([], {"rewards": None}, "other.yaml: rewards is None but must be a list"),
        ([], {"scale_rewards": "rows"}, "scale_rewards is 'rows'; choose group, batch or none"),
        ([], {"scale_reward": "none"}, "unknown key 'scale_reward'; did you mean scale_rewards?"),
        ([], {"multi_objective_aggregation": "normalize_then_sum"}, "totals are known for sum_then_normalize only"),
        ([], {"overlong_tokens": 5}, "write {name: overlong, kwargs: {cache_tokens: N}} among the rewards"),
    ],
)
def test_what_cannot_be_rescored_is_refused_in_one_line(store, capsys, words, keys, message):
    path = rewards_file(store, {"name": "ndcg"}, **keys)
    assert message in refusal(capsys, "replay", store, "--rewards", path, *words)
