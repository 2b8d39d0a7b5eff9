"""A recipe's rewards: read, loaded, called, checked and added up."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rerank import scoring
from rerank.scoring import Reward, load_rewards, read_rewards

ROWS = {
    "row_id": [70, 71],
    "relevance": [[0.0, 1.0, 0.0]] * 2,
    "candidate_labels": [["1", "2", "3"]] * 2,
    "first_stage_ranks": [[1, 2, 3]] * 2,
    "target_rank": [2, 2],
}
GOLD, DEMOTED, JUNK = "<think></think>2,1,3", "<think></think>1,3,2", "best is 2"
FORM = {"name": "well_formed", "weight": -0.2, "condition": "promoted_or_kept_first"}


def test_rewards_carry_weight_and_condition_and_are_named_for_the_trainer():
    rank, form = load_rewards([{"name": "rank_promotion"}, FORM])
    assert (rank.__name__, rank.weight, rank.condition) == ("rank_promotion", 1.0, None)
    assert (form.__name__, form.weight, form.condition.__name__) == ("well_formed", -0.2, "promoted_or_kept_first")


def test_a_reward_is_zero_where_its_condition_fails():
    (form,) = load_rewards([FORM])
    assert form(prompts=["", ""], completions=[GOLD, DEMOTED], completion_ids=[[], []], **ROWS) == [1.0, 0.0]
    assert form.evaluate([GOLD, JUNK], ROWS) == ([1.0, 0.0], [True, False])
    partly = Reward("r", lambda completions, **_: [None, None], 1.0, lambda completions, **_: [True, np.bool_(False)])
    assert partly(["a", "b"]) == [None, 0.0]


def test_a_total_is_the_weighted_sum_of_the_rewards_that_apply():
    calls = []

    def half(completions, **columns):
        calls.append("half")
        return [0.5, None]

    def always(completions, **columns):
        calls.append("always")
        return [True, True]

    absent = Reward("absent", lambda completions, **columns: [None, None])
    scores = scoring.score([*load_rewards([FORM]), Reward("half", half, 3.0, always), absent], [GOLD, DEMOTED], ROWS)
    assert scores.names == ("well_formed", "half", "absent") and calls == ["always", "half"]  # each of them once
    nan = float("nan")
    np.testing.assert_array_equal(scores.values, [[1.0, 0.5, nan], [0.0, nan, nan]])
    np.testing.assert_array_equal(scores.conditions, [[True, True, True], [False, True, True]])
    np.testing.assert_allclose(scores.totals, [-0.2 * 1.0 + 3.0 * 0.5, 0.0])
    np.testing.assert_array_equal(scoring.total(np.full((1, 2), nan), [1.0, 1.0]), [nan])  # nothing applies


def test_a_user_reward_from_two_lines_works(tmp_path):
    path = tmp_path / "lengths.py"
    path.write_text(
        "def length(completions, scale=1.0, **_):\n    return [scale * len(text) for text in completions]\n"
    )
    (reward,) = load_rewards([{"name": f"{path}:length", "kwargs": {"scale": 0.5}}])
    assert reward.name == "length"
    assert reward(completions=["ab", "abcd"], **ROWS, trainer_state=None) == [1.0, 2.0]


def test_rewards_are_a_list_or_a_file_with_one_or_a_recipe_that_names_such_a_file(tmp_path):
    entries = [{"name": "ndcg"}]
    file, recipe, itself = tmp_path / "rewards.yaml", tmp_path / "7_dapo.yaml", tmp_path / "itself.yaml"
    file.write_text("rewards:\n  - {name: ndcg}\n")
    recipe.write_text(f"rewards: {file}\nmax_steps: 2\n")
    itself.write_text(f"rewards: {itself}\n")
    assert read_rewards(entries, "a") == read_rewards(str(file), "a") == read_rewards(str(recipe), "a") == entries
    (tmp_path / "old.yaml").write_text("rewards: [{name: ndcg}]\noverlong_tokens: 8\n")
    (tmp_path / "none.yaml").write_text("max_steps: 2\n")
    for value, message in {
        str(tmp_path / "old.yaml"): r"old.yaml: .*'overlong_tokens'.*\{name: overlong, kwargs: \{cache_tokens: N\}\}",
        str(tmp_path / "none.yaml"): "none.yaml: rewards is None but must be a list of at least one reward",
        str(itself): "itself.yaml: rewards is .* but must be a list",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_rewards(value, "a")
    for value in ([], {"name": "ndcg"}, 3):
        with pytest.raises(ValueError, match="^a: rewards is .* but must be a list of at least one reward"):
            read_rewards(value, "a")
    with pytest.raises(FileNotFoundError, match="naive.yml does not exist"):
        read_rewards("naive.yml", "a")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["ndcg"], "reward 'ndcg' has no name"),
        ([{"name": 3}], "reward {'name': 3} has no name"),
        (
            [{"name": "ndcg", "wieght": 1}],
            r"unknown key 'wieght' \(did you mean weight\?\); known: name, weight, kwargs",
        ),
        ([{"name": "ndcg", "weight": "1e-1"}], "weight of reward ndcg is '1e-1', not a finite number"),
        ([{"name": "ndcg", "weight": float("nan")}], "weight of reward ndcg is nan"),
        ([{"name": "ndcg", "weight": True}], "weight of reward ndcg is True"),
        ([{"name": "ndcg", "kwargs": [5]}], r"kwargs of reward ndcg is \[5\] but must be a mapping"),
        ([{"name": "ndcg", "condition": ["a"]}], r"condition of reward ndcg is \['a'\] but must be the name of one"),
        (
            [{"name": "ndcg", "when": "valid_ranking"}],
            "reward ndcg has the key 'when', which is called 'condition' now",
        ),
        ([{"name": "ndcg", "kwargs": {"j": 5}}], "ndcg has no parameter 'j'"),
        ([{"name": "ndcg", "kwargs": {"relevance": []}}], "holds 'relevance', but the column of that name wins"),
        ([{"name": "ndcg", "kwargs": {"completions": []}}], "holds 'completions', but the column"),
        ([{"name": "ndcg"}, {"name": "ndcg", "kwargs": {"k": 5}}], "two rewards are called ndcg"),
        ([{"name": "ndcgg"}], r"did you mean ndcg\?"),
        ([{"name": "ndcg", "condition": "promoted"}], "rewards.conditions has no 'promoted'.*promoted_or_kept_first"),
    ],
)
def test_bad_entries_are_refused_by_name(specs, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(specs)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(completions):\n    return []\n", r"reward .*broken.py:f must take \*\*columns"),
        ("def f(completions, price, **columns):\n    return []\n", "needs a column 'price', but rows have row_id, "),
        ("async def f(completions, **columns):\n    return []\n", "must be a plain function"),
        ("class f:\n    def __init__(self, **columns):\n        pass\n", "must be a plain function"),
    ],
)
def test_functions_that_the_first_step_would_break_on_are_refused(tmp_path, body, message):
    (tmp_path / "broken.py").write_text(body)
    with pytest.raises(ValueError, match=message):
        load_rewards([{"name": f"{tmp_path}/broken.py:f"}])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **_: [1.0], "reward r returned 1 values for 2 completions"),
        (lambda completions, **_: (1.0, 1.0), "reward r returned tuple, not a list of numbers"),
        (lambda completions, **_: [1.0, "1"], "reward r returned '1' for row_id 71, not a list of numbers"),
        (lambda completions, **_: [float("nan"), 1], "reward r returned nan for row_id 70"),
        (lambda completions, **_: [1, float("inf")], "reward r returned inf for row_id 71"),
        (
            lambda completions, row_id, **_: [1 / (71 - row) for row in row_id],
            r"reward r raised ZeroDivisionError: division by zero \(row_id 71\); repair it",
        ),
    ],
)
def test_a_broken_reward_stops_the_run_with_its_name_and_row(function, message):
    with pytest.raises(ValueError, match=message):
        Reward("r", function)(completions=["a", "b"], **ROWS)


def test_a_condition_must_give_booleans():
    def always(completions, **columns):
        return [1.0 for _ in completions]

    with pytest.raises(
        ValueError, match="condition always of reward r returned 1.0 for row_id 70, not a list of bool"
    ):
        Reward("r", lambda completions, **_: [1, 1], condition=always)(completions=["a", "b"], **ROWS)


def test_trainer_columns_are_those_of_the_installed_trl():
    source = (Path(find_spec("trl").origin).parent / "trainer/grpo_trainer.py").read_text()
    passed = re.findall(r'\breward_kwargs\["(\w+)"\] = ', source)
    assert {*passed, "prompts", "completions", "completion_ids"} == set(scoring.TRAINER_COLUMNS)
