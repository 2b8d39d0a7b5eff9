"""Stored rollouts under other rewards: totals and advantages by hand, and as the trainer has them."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_rollouts import make_rollout, write
from toy_recipe import TOY

from rerank import cli, dapo, plugins, replay, rollouts

LABELS = ["1", "2", "3"]
BEST, SAME, WORST = "<think>a</think> 2 1 3", "<think>a</think> 1 2 3", "<think>a</think> 1 3 2"


def rewards_file(folder, *rewards, **keys):
    path = folder / "other.yaml"
    path.write_text(json.dumps({"rewards": list(rewards), **keys}))  # JSON is YAML
    return path


def replayed(folder, *rewards, **keys):
    return replay.replay(folder, replay.read_scoring(rewards_file(folder, *rewards, **keys), folder))


def plugin(folder, text):
    (folder / "plugin.py").write_text(text)
    return {"name": f"{folder}/plugin.py:novelty"}


@pytest.fixture
def store(tmp_path):
    """Two groups of two: the first keeps its order of totals under rank_promotion, the second turns it around."""
    totals = {"reward": 0.2, "advantage": 0.7}, {"reward": 0.1, "advantage": -0.7}
    write(
        tmp_path / "rollouts",
        make_rollout(completion=BEST, **totals[0]),
        make_rollout(completion=WORST, **totals[1]),
        make_rollout(group=1, completion=WORST, **totals[0]),
        make_rollout(group=1, completion=SAME, **totals[1]),
    )
    return tmp_path


def test_totals_and_advantages_are_those_that_the_trainer_would_make(store):
    found = replayed(store, {"name": "rank_promotion", "weight": 3.0})
    # the target stands second; rank_promotion is (2 - 1)/3, (2 - 3)/3, (2 - 3)/3, 0
    assert found["new/rank_promotion"].tolist() == pytest.approx([1 / 3, -1 / 3, -1 / 3, 0])
    assert found["new/reward"].tolist() == pytest.approx([1, -1, -1, 0])
    # standard deviations with n - 1: of 1, -1 sqrt(2), of -1, 0 sqrt(1/2)
    first, second = 1 / (2**0.5 + 1e-4), 0.5 / (0.5**0.5 + 1e-4)
    assert found["new/advantage"].tolist() == pytest.approx([first, -first, -second, second])
    assert found["stored/advantage"].tolist() == [0.7, -0.7, 0.7, -0.7]
    assert found["sign_changes"].tolist() == [False, False, True, True]
    assert found["member"].tolist() == [1, 2, 1, 2] and found["row_id"].tolist() == [40, 40, 41, 41]


def test_what_was_stored_of_each_reward_stands_beside(store):
    found = replayed(store, {"name": "ndcg", "kwargs": {"k": 1}}, {"name": "well_formed"})
    assert found["stored/rank_promotion"].tolist() == pytest.approx([1 / 3] * 4)
    assert found["stored/well_formed"].isna().all()
    assert found["new/ndcg"].tolist() == [1, 0, 0, 0] and found["new/well_formed"].tolist() == [1] * 4


def test_conditions_count_as_in_training(store):
    found = replayed(store, {"name": "well_formed", "when": "promoted_or_kept_first"})
    assert found["new/reward"].tolist() == [1, 0, 0, 0]
    assert found["stored/differs"].tolist() == [True] * 4
    assert found["new/differs"].tolist() == [True, True, False, False]
    assert not found["sign_changes"].any()  # a group that learns nothing has no sign


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [("none", None), (False, None), ("group", 2**0.5), (True, 2**0.5), ("batch", (20 / 3) ** 0.5)],
)
def test_scales_of_advantages(scale, divisor):
    # groups of 0, 2 and 4, 6: deviations sqrt(2), and of the four that are kept sqrt((9 + 1 + 1 + 9)/3)
    kept, rewards = [True] * 4 + [False] * 2, [0.0, 2.0, 4.0, 6.0, 9.0, 9.0]
    frame = pd.DataFrame({"step": 0, "round": 0, "group": [0, 0, 1, 1, 2, 2], "kept": kept, "reward": rewards})
    signs = np.array([-1, 1, -1, 1, 0, 0])
    wanted = signs if divisor is None else signs / (divisor + 1e-4)
    scale = {True: "group", False: "none"}.get(scale, scale)
    assert replay.advantages(frame, "reward", scale).tolist() == pytest.approx(wanted)


def test_groups_of_two_rounds_are_two():
    frame = pd.DataFrame({"step": 0, "round": [0, 0, 1, 1], "group": 0, "reward": [0.0, 2.0, 4.0, 6.0]})
    assert replay.advantages(frame, "reward", "none").tolist() == [-1, 1, -1, 1]


def test_a_reward_that_does_not_apply_is_left_out(store):
    nothing = plugin(store, "def novelty(completions, **columns):\n    return [None] * len(completions)")
    found = replayed(store, nothing, {"name": "well_formed"})
    assert found["new/reward"].tolist() == [1] * 4
    found = replayed(store, nothing)
    assert found["new/reward"].isna().all() and found["new/advantage"].tolist() == [0] * 4


def test_a_reward_gets_the_columns_of_the_contract(tmp_path):
    write(tmp_path / "rollouts", make_rollout(completion=BEST))
    body = "    SEEN.update(columns)\n    return [0.0] * len(completions)"
    module = plugin(tmp_path, f"SEEN = {{}}\ndef novelty(completions, **columns):\n{body}")
    scoring = replay.read_scoring(rewards_file(tmp_path, module), tmp_path)
    replay.replay(tmp_path, scoring)
    rollout = make_rollout()
    names = ("row_id", "user", "history", "candidates", "relevance", "candidate_labels", "first_stage_ranks")
    wanted = {name: [rollout[name]] for name in (*names, "completion_ids")}
    seen = scoring.rewards[0].function.__globals__["SEEN"]
    assert seen == wanted | {"target_rank": [2], "prompts": [rollout["prompt"]]}


def test_columns_and_scale_are_those_of_the_dapo_stage(tmp_path):
    assert set(replay.STORED) == set(dapo.REWARD_COLUMNS)
    config = dapo.DapoConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    assert config.scale_rewards == replay.SCALE_REWARDS
    assert config.multi_objective_aggregation == "sum_then_normalize"


def test_scoring_in_batches_is_scoring_each_rollout_alone(tmp_path, monkeypatch):
    """Groups of two whose targets stand at different places, one group cut by a batch, one drawn again later."""
    completions = [BEST, SAME, WORST, "junk", "<think></think> 3 2 1", BEST, SAME, WORST]
    of_groups = [{"relevance": [0.0, 1.0, 0.0]}, {"relevance": [0.0, 0.0, 1.0], "target_rank_before": 3}]
    records = (
        make_rollout(step=n // 6, group=n // 2 % 2, completion=text, **of_groups[n // 2 % 2])
        for n, text in enumerate(completions)
    )
    write(tmp_path / "rollouts", *records)
    rewards = plugins.load_rewards([{"name": "rank_promotion"}, {"name": "ndcg"}], tuple(replay.STORED))
    table = rollouts.read_rollouts(tmp_path)
    alone = [replay.score(table.slice(place, 1), rewards) for place in range(len(completions))]
    for size in (3, 100):
        monkeypatch.setattr(replay, "BATCH_SIZE", size)
        for name, values in replay.score(table, rewards).items():
            assert values.tolist() == [found[name].item() for found in alone]
            assert len(set(values.tolist())) > 2


def test_the_overlong_punishment_counts_with_the_limit_of_the_recipe_or_the_run(tmp_path):
    write(tmp_path / "rollouts", *(make_rollout(completion_ids=[0] * length) for length in (15, 16, 20, 21)))
    wanted = pytest.approx([0.0, -0.2, -1.0, -1.0])  # eq. 13 of DAPO, as in test_dapo
    found = replayed(tmp_path, {"name": "well_formed", "weight": 0}, overlong_tokens=5, max_completion_length=20)
    assert found["new/reward"].tolist() == wanted
    with pytest.raises(ValueError, match="has overlong_tokens but no max_completion_length, nor has"):
        replayed(tmp_path, {"name": "well_formed"}, overlong_tokens=5)
    (tmp_path / "sft/model").mkdir(parents=True)
    (tmp_path / "sft/model/generation.json").write_text('{"max_completion_tokens": 20}')
    found = replayed(tmp_path, {"name": "well_formed", "weight": 0}, overlong_tokens=5)
    assert found["new/reward"].tolist() == wanted


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
    found = replay.replay(toy_run.run, replay.read_scoring(TOY / "7_dapo.yaml", toy_run.run))
    assert found["new/reward"].to_numpy() == pytest.approx(found["stored/reward"].to_numpy(), abs=1e-6)
    assert found["new/advantage"].to_numpy() == pytest.approx(
        found["stored/advantage"].to_numpy(), abs=replay.ROUNDING
    )
    assert found["stored/differs"].any() and not found["sign_changes"].any()


def test_groups_are_kept_by_the_outcome_that_a_file_names(tmp_path):
    worse, none = {"target_rank_after": 3}, {"target_rank_after": None, "order": None, "failure": "junk"}
    equal = [make_rollout(group=1, completion=text, **worse) for text in (WORST, WORST)]
    mixed = [make_rollout(completion=WORST, **worse), make_rollout(completion=SAME)]
    failed = [make_rollout(group=2, completion=text, **none) for text in ("junk", "more junk")]
    one_failed = [make_rollout(group=3, completion=SAME), make_rollout(group=3, completion="junk", **none)]
    write(tmp_path / "rollouts", *mixed, *equal, *failed, *one_failed)
    length = plugin(
        tmp_path, "def novelty(completions, **columns):\n    return [len(text) % 7 for text in completions]"
    )
    assert len("junk") % 7 != len("more junk") % 7 and len(WORST) == len(SAME)
    found = replayed(tmp_path, length)
    assert found["stored/useful"].tolist() == found["new/useful"].tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert replayed(tmp_path, length, outcome="novelty")["new/useful"].tolist() == [False] * 4 + [True] * 4
    with pytest.raises(ValueError, match="other.yaml: outcome is 'auc', .* report only rank_gain, novelty"):
        replayed(tmp_path, length, outcome="auc")


def test_scale_and_outcome_are_those_of_the_run_where_the_file_has_none(store):
    (store / "dapo").mkdir()
    (store / "dapo/recipe.yaml").write_text("{rewards: [{name: ndcg}], scale_rewards: none, outcome: ndcg}")
    path = rewards_file(store, {"name": "ndcg"}, {"name": "auc"})
    found = replay.read_scoring(path, store)
    assert (found.scale_rewards, found.outcome) == ("none", "ndcg")
    found = replay.read_scoring(rewards_file(store, {"name": "auc"}, scale_rewards="batch", outcome="auc"), store)
    assert (found.scale_rewards, found.outcome) == ("batch", "auc")


def refusal(capsys, *words):
    assert cli.main(["replay", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_replayed_is_refused_in_one_line(store, capsys):
    path = rewards_file(store, {"name": "ndcg"})
    assert "absent is not a folder" in refusal(capsys, store / "absent", "--rewards", path)
    assert "none.yaml does not exist" in refusal(capsys, store, "--rewards", store / "none.yaml")
    assert "no/out.parquet" in refusal(capsys, store, "--rewards", path, "--out", store / "no/out.parquet")
    (store / "sft.yaml").write_text("learning_rate: 1.0\n")
    assert "sft.yaml has no rewards; give a dapo recipe" in refusal(capsys, store, "--rewards", store / "sft.yaml")
    path = rewards_file(store, {"name": "ndcg"}, scale_rewards="rows")
    assert "scale_rewards is 'rows'; choose group, batch or none" in refusal(capsys, store, "--rewards", path)
    path = rewards_file(store, {"name": "ndcg"}, invalid_rewards=-1.0)
    assert "unknown key 'invalid_rewards'; did you mean invalid_reward?" in refusal(capsys, store, "--rewards", path)
    path = rewards_file(store, {"name": "ndcg"})
    assert "top is -1 but must be at least 0" in refusal(capsys, store, "--rewards", path, "--top", "-1")
    (store / "empty").mkdir()
    pq.write_table(rollouts.to_table([]), store / "empty/part-00000000-0.parquet")
    assert "empty holds no rollouts" in refusal(capsys, store / "empty", "--rewards", path)
    path = rewards_file(store, {"name": "ndcg"}, multi_objective_aggregation="normalize_then_sum")
    assert "replay knows sum_then_normalize only" in refusal(capsys, store, "--rewards", path)
    path = rewards_file(store, {"name": "ndcg"}, invalid_reward=-1.0)
    assert "replay knows no invalid_reward; remove it" in refusal(capsys, store, "--rewards", path)
    path = rewards_file(store, plugin(store, "def novelty(completions, title, **columns):\n    return []"))
    line = refusal(capsys, store, "--rewards", path)
    assert "reward " in line and "needs a column 'title', but rows have row_id, user, history" in line
