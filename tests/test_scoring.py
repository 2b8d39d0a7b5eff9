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
    "top_k": [0, 0],
}
GOLD, DEMOTED, JUNK = "<think></think>2,1,3", "<think></think>1,3,2", "best is 2"
FORM = {"name": "well_formed", "weight": -0.2, "condition": "promoted_or_kept_first"}


def returning(values):
    """A reward, or a condition, of these values, which counts its calls."""

    def given(completions, **columns):
        given.num_calls += 1
        return values

    given.num_calls = 0
    return given


def test_a_reward_has_a_weight_and_a_condition_and_is_zero_where_that_fails():
    rank, form = load_rewards([{"name": "rank_promotion"}, FORM])
    assert (rank.__name__, rank.weight, rank.condition) == ("rank_promotion", 1.0, None)
    assert (form.__name__, form.weight, form.condition.__name__) == ("well_formed", -0.2, "promoted_or_kept_first")
    assert form(prompts=["", ""], completions=[GOLD, DEMOTED], completion_ids=[[], []], **ROWS) == [1.0, 0.0]
    assert form.evaluate([GOLD, JUNK], ROWS) == ([1.0, 0.0], [True, False])
    partly = Reward("r", returning([None, None]), condition=returning([True, np.bool_(False)]))
    assert partly(["a", "b"]) == [None, 0.0]


def test_a_total_is_the_weighted_sum_of_the_rewards_that_apply():
    half, always, nan = returning([0.5, None]), returning([True, True]), float("nan")
    others = [Reward("half", half, 3.0, always), Reward("absent", returning([None, None]))]
    scores = scoring.score([*load_rewards([FORM]), *others], [GOLD, DEMOTED], ROWS)
    assert scores.names == ("well_formed", "half", "absent") and half.num_calls == always.num_calls == 1
    np.testing.assert_array_equal(scores.values, [[1.0, 0.5, nan], [0.0, nan, nan]])
    np.testing.assert_array_equal(scores.conditions, [[True, True, True], [False, True, True]])
    np.testing.assert_allclose(scores.totals, [-0.2 * 1.0 + 3.0 * 0.5, 0.0])
    np.testing.assert_array_equal(scoring.total(np.full((1, 2), nan), [1.0, 1.0]), [nan])  # nothing applies


def test_rewards_are_a_list_or_a_file_with_one_or_a_recipe_that_names_such_a_file(tmp_path):
    entries = [{"name": "ndcg"}]
    file, recipe, itself = tmp_path / "rewards.yaml", tmp_path / "7_dapo.yaml", tmp_path / "itself.yaml"
    file.write_text("rewards:\n  - {name: ndcg}\n")
    recipe.write_text(f"rewards: {file}\nmax_steps: 2\n")
    itself.write_text(f"rewards: {itself}\n")
    assert read_rewards(entries, "a") == read_rewards(str(file), "a") == read_rewards(str(recipe), "a") == entries
    (tmp_path / "old.yaml").write_text("rewards: [{name: ndcg}]\ninvalid_reward: -1.0\n")
    (tmp_path / "none.yaml").write_text("max_steps: 2\n")
    is_no_list = "rewards is .* but must be a list of at least one reward"
    for value, message in [
        (str(tmp_path / "old.yaml"), "old.yaml: .*'invalid_reward'.* rank_promotion pays -1 to what is no ranking"),
        (str(tmp_path / "none.yaml"), f"none.yaml: {is_no_list}"),
        (str(itself), f"itself.yaml: {is_no_list}"),
        ("naive.yml", "naive.yml does not exist; give the path of a recipe file"),
        *((value, f"^a: {is_no_list}") for value in ([], {"name": "ndcg"}, 3)),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_rewards(value, "a")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"wieght": 1}, r"unknown key 'wieght' \(did you mean weight\?\); known: name, weight, kwargs"),
        ({"weight": "1e-1"}, "weight of reward ndcg is '1e-1', not a finite number"),
        ({"weight": float("nan")}, "weight of reward ndcg is nan"),
        ({"weight": True}, "weight of reward ndcg is True"),
        ({"kwargs": [5]}, r"kwargs of reward ndcg is \[5\] but must be a mapping"),
        ({"condition": ["a"]}, r"condition of reward ndcg is \['a'\] but must be the name of one"),
        ({"when": "valid_ranking"}, "reward ndcg has the key 'when', which is called 'condition' now"),
        ({"kwargs": {"j": 5}}, "ndcg has no parameter 'j'"),
        ({"kwargs": {"relevance": []}}, "holds 'relevance', but the column of that name wins"),
        ({"kwargs": {"completions": []}}, "holds 'completions', but the column"),
        ({"condition": "promoted"}, "rewards.conditions has no 'promoted'.*promoted_or_kept_first"),
        ({"name": 3}, "reward {'name': 3} has no name"),
        ({"name": "ndcgg"}, r"did you mean ndcg\?"),
    ],
)
def test_bad_entries_are_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        load_rewards([{"name": "ndcg", **keys}])


def test_a_name_alone_and_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="reward 'ndcg' has no name"):
        load_rewards(["ndcg"])
    with pytest.raises(ValueError, match="two rewards are called ndcg"):
        load_rewards([{"name": "ndcg"}, {"name": "ndcg", "kwargs": {"k": 5}}])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(completions):\n    return []\n", r"reward .*broken.py:f must take \*\*columns"),
        ("def f(completions, price, **columns):\n    return []\n", "needs a column 'price', but rows have row_id, "),
        ("async def f(completions, **columns):\n    return []\n", "must be a callable that"),
        ("class f:\n    def __init__(self, **columns):\n        pass\n", "must be a callable that"),
    ],
)
def test_functions_that_the_first_step_would_break_on_are_refused(tmp_path, body, message):
    (tmp_path / "broken.py").write_text(body)
    with pytest.raises(ValueError, match=message):
        load_rewards([{"name": f"{tmp_path}/broken.py:f"}])


def by_row(completions, row_id, **columns):
    return [1 / (71 - row) for row in row_id]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Reward("r", returning([1.0])), "reward r returned 1 values for 2 completions"),
        (Reward("r", returning((1.0, 1.0))), "reward r returned tuple, not a list of numbers"),
        (Reward("r", returning([1.0, "1"])), "reward r returned '1' for row_id 71, not a list of numbers"),
        (Reward("r", returning([float("nan"), 1])), "reward r returned nan for row_id 70"),
        (Reward("r", returning([1, float("inf")])), "reward r returned inf for row_id 71"),
        (Reward("r", by_row), r"reward r raised ZeroDivisionError: division by zero \(row_id 71\); repair it"),
        (
            Reward("r", returning([1, 1]), condition=returning([1.0, 1.0])),
            "condition given of reward r returned 1.0 for row_id 70, not a list of booleans",
        ),
    ],
)
def test_a_broken_reward_or_condition_stops_the_run_with_its_name_and_row(reward, message):
    with pytest.raises(ValueError, match=message):
        reward(completions=["a", "b"], **ROWS)


def test_trainer_columns_are_those_of_the_installed_trl():
    source = (Path(find_spec("trl").origin).parent / "trainer/grpo_trainer.py").read_text()
    passed = re.findall(r'\breward_kwargs\["(\w+)"\] = ', source)
    assert {*passed, "prompts", "completions", "completion_ids"} == set(scoring.TRAINER_COLUMNS)


ANY_CALLABLES = """
from functools import partial

def first(completions, k=3, **columns):
    return [float(k)] * len(completions)

first_one = partial(first, k=1)

class Fixed:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **columns):
        return [self.value] * len(completions)

fixed = Fixed(2.0)
"""


@pytest.mark.parametrize(
    ("name", "kwargs", "value"), [("first_one", {}, 1), ("first_one", {"k": 5}, 5), ("fixed", {}, 2)]
)
def test_a_reward_may_be_any_callable_under_its_name_in_the_file(tmp_path, name, kwargs, value):
    (tmp_path / "callables.py").write_text(ANY_CALLABLES)
    entry = {"name": f"{tmp_path}/callables.py:{name}", "kwargs": kwargs}
    [reward] = scoring.load_rewards([entry])
    assert reward.name == name
    assert scoring.score([reward], [GOLD, JUNK], ROWS).totals.tolist() == [value, value]
