import pickle
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rerank import plugins
from rerank.plugins import Reward, RewardSpec, load_function, load_rewards

COLUMNS = [
    *("row_id", "user", "history", "candidates", "relevance"),
    *("candidate_labels", "first_stage_ranks", "target_rank"),
]
ROWS = {
    "row_id": [70, 71],
    "relevance": [[0.0, 1.0, 0.0]] * 2,
    "candidate_labels": [["1", "2", "3"]] * 2,
    "first_stage_ranks": [[1, 2, 3]] * 2,
    "target_rank": [2, 2],
}
GOLD, DEMOTED, JUNK = "<think></think>2,1,3", "<think></think>1,3,2", "best is 2"


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """Write a user's module and make its folder the working folder, as the command does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, name="my_rewards.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    known = set(sys.modules)
    yield write
    for name in set(sys.modules) - known:
        if name.startswith(("my_", "plugin")):
            del sys.modules[name]


LENGTH = "def length(completions, scale=1.0, **columns):\n    return [scale * len(text) for text in completions]\n"


def test_a_short_name_is_a_file_of_the_folder():
    from rewards.ndcg import ndcg

    assert load_function("ndcg", "rewards") is ndcg
    assert load_function("promoted_or_kept_first", "rewards.conditions").__name__ == "promoted_or_kept_first"


def test_kwargs_are_bound_and_the_function_keeps_its_name_and_can_be_pickled():
    function = pickle.loads(pickle.dumps(load_function("ndcg", "rewards", k=1)))
    assert function.__name__ == "ndcg"
    # ndcg@1 of a ranking whose second item is relevant
    assert function([DEMOTED], [["1", "2", "3"]], [[0.0, 1.0, 0.0]]) == [0.0]


def test_own_code_is_found_by_module_and_by_file(own_file):
    own_file(LENGTH)
    own_file(LENGTH, "folder/statistics.py")  # a standard-library name does no harm
    assert load_function("my_rewards:length", "rewards")(["ab"]) == [2.0]
    assert load_function("folder/statistics.py:length", "rewards", scale=2)(["ab"]) == [4]
    assert sys.modules.get("statistics") is None or "folder" not in sys.modules["statistics"].__file__


def test_a_file_is_loaded_once(own_file):
    path = own_file(LENGTH)
    assert load_function(f"{path}:length", "rewards") is load_function("my_rewards.py:length", "rewards")


def test_unknown_names_list_what_exists():
    with pytest.raises(
        ValueError, match=r"rewards has no 'ndgc' \(did you mean ndcg\?\); it has auc, grounded, ndcg, "
    ):
        load_function("ndgc", "rewards")
    with pytest.raises(
        ValueError, match=r"rewards.conditions has no 'x'; it has .*promoted_or_kept_first.*write module"
    ):
        load_function("x", "rewards.conditions")


def test_what_cannot_be_loaded_is_named(own_file):
    own_file(LENGTH + "limit = 3\n")
    own_file("import nothing_of_that_name\n", "my_broken.py")
    own_file("def f(:\n", "my_syntax.py")
    cases = {
        "my_rewards:lenght": r"my_rewards.py has no 'lenght' \(did you mean length\?\); it has length",
        "my_rewards:limit": "is int, not a function",
        "my_absent:f": "my_absent:f cannot be imported: ModuleNotFoundError.*is its folder the working folder",
        "my_broken:f": "my_broken:f cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'$",
        "my_broken.py:f": "my_broken.py cannot be imported: ModuleNotFoundError",
        "my_syntax.py:f": "cannot be imported: SyntaxError",
        "my rewards:f": "neither a short name, module.path:function nor",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_function(name, "rewards")
    with pytest.raises(FileNotFoundError, match=r"absent.py is not a file \(looked for "):
        load_function("absent.py:f", "rewards")


def test_unknown_kwargs_are_refused_although_rewards_take_any_column():
    with pytest.raises(ValueError, match=r"ndcg has no parameter 'kk' \(did you mean k\?\); it takes completions, "):
        load_function("ndcg", "rewards", kk=5)


def test_rewards_carry_weight_and_condition_and_are_named_for_the_trainer():
    specs = [{"name": "rank_promotion"}, {"name": "well_formed", "weight": -0.2, "when": "promoted_or_kept_first"}]
    rank, form = load_rewards(specs, COLUMNS)
    assert (rank.__name__, rank.weight, rank.when) == ("rank_promotion", 1.0, None)
    assert (form.__name__, form.weight) == ("well_formed", -0.2)


def test_a_gated_reward_is_zero_where_its_condition_fails():
    (form,) = load_rewards([RewardSpec("well_formed", when="promoted_or_kept_first")], COLUMNS)
    assert form(prompts=["", ""], completions=[GOLD, DEMOTED], completion_ids=[[], []], **ROWS) == [1.0, 0.0]
    assert form.gates([GOLD, JUNK], **ROWS) == [True, False]


def test_none_passes_through_an_open_gate_and_is_zero_behind_a_closed_one():
    reward = Reward("r", lambda completions, **_: [None, None], when=lambda completions, **_: [True, np.bool_(False)])
    assert reward(["a", "b"]) == [None, 0.0]


def test_a_user_reward_from_ten_lines_works(own_file):
    own_file(LENGTH)
    (reward,) = load_rewards([{"name": "my_rewards:length", "kwargs": {"scale": 0.5}}], COLUMNS)
    assert reward.name == "length"
    assert reward(completions=["ab", "abcd"], **ROWS, trainer_state=None) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "rewards is .* but must be a list of at least one reward"),
        ({"name": "ndcg"}, "must be a list"),
        (["ndcg"], "reward 'ndcg' has no name"),
        ([{"name": 3}], "a reward's name is 3"),
        (
            [{"name": "ndcg", "wieght": 1}],
            r"unknown key 'wieght' \(did you mean weight\?\); known: name, weight, kwargs",
        ),
        ([{"name": "ndcg", "weight": "1e-1"}], "weight of reward ndcg is '1e-1', not a finite number"),
        ([{"name": "ndcg", "weight": float("nan")}], "weight of reward ndcg is nan"),
        ([{"name": "ndcg", "weight": True}], "weight of reward ndcg is True"),
        ([{"name": "ndcg", "kwargs": [5]}], r"kwargs of reward ndcg is \[5\] but must be a mapping"),
        ([{"name": "ndcg", "when": ["a"]}], "`when` of reward ndcg"),
        ([{"name": "ndcg", "kwargs": {"j": 5}}], "ndcg has no parameter 'j'"),
        ([{"name": "ndcg", "kwargs": {"relevance": []}}], "holds 'relevance', but the column of that name would win"),
        ([{"name": "ndcg", "kwargs": {"completions": []}}], "holds 'completions', but the column"),
        ([{"name": "ndcg"}, {"name": "ndcg", "kwargs": {"k": 5}}], "two rewards are called ndcg"),
        ([{"name": "ndcgg"}], r"did you mean ndcg\?"),
        ([{"name": "ndcg", "when": "promoted"}], "rewards.conditions has no 'promoted'.*promoted_or_kept_first"),
    ],
)
def test_bad_entries_are_refused_by_name(specs, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(specs, COLUMNS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(completions):\n    return []\n", r"reward my_rewards:f must take \*\*columns"),
        ("def f(completions, price, **columns):\n    return []\n", "needs a column 'price', but rows have row_id, "),
        ("async def f(completions, **columns):\n    return []\n", "must be a plain function"),
        ("class f:\n    def __init__(self, **columns):\n        pass\n", "must be a plain function"),
    ],
)
def test_functions_that_the_first_step_would_break_on_are_refused(own_file, body, message):
    own_file(body)
    with pytest.raises(ValueError, match=message):
        load_rewards([{"name": "my_rewards:f"}], COLUMNS)


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
        Reward("r", lambda completions, **_: [1, 1], when=always)(completions=["a", "b"], **ROWS)


def test_trainer_columns_are_those_of_the_installed_trl():
    source = (Path(find_spec("trl").origin).parent / "trainer/grpo_trainer.py").read_text()
    passed = re.findall(r'\breward_kwargs\["(\w+)"\] = ', source)
    assert {*passed, "prompts", "completions", "completion_ids"} == set(plugins.TRAINER_COLUMNS)
