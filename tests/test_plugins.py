"""A recipe's names to code."""

import pickle
import sys

import pytest

from rerank.plugins import load_function

LENGTH = "def length(completions, scale=1.0, **columns):\n    return [scale * len(text) for text in completions]\n"


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


def test_a_short_name_is_a_file_of_the_folder():
    from rewards.ndcg import ndcg

    assert load_function("ndcg", "rewards") is ndcg
    assert load_function("promoted_or_kept_first", "rewards.conditions").__name__ == "promoted_or_kept_first"


def test_kwargs_are_bound_and_the_function_keeps_its_name_and_can_be_pickled():
    function = pickle.loads(pickle.dumps(load_function("ndcg", "rewards", k=1)))
    assert function.__name__ == "ndcg"
    # ndcg@1 of a ranking whose second item is relevant
    assert function(["<think></think>1,3,2"], [["1", "2", "3"]], [[0.0, 1.0, 0.0]], [0]) == [0.0]


def test_own_code_is_found_by_module_and_by_file(own_file):
    own_file(LENGTH)
    own_file(LENGTH, "folder/statistics.py")  # a standard-library name does no harm
    assert load_function("my_rewards:length", "rewards")(["ab"]) == [2.0]
    assert load_function("folder/statistics.py:length", "rewards", scale=2)(["ab"]) == [4]
    assert sys.modules.get("statistics") is None or "folder" not in sys.modules["statistics"].__file__


def test_a_file_is_loaded_once(own_file):
    path = own_file(LENGTH)
    assert load_function(f"{path}:length", "rewards") is load_function("my_rewards.py:length", "rewards")


def test_what_cannot_be_loaded_is_named(own_file):
    own_file(LENGTH + "limit = 3\n")
    own_file("import nothing_of_that_name\n", "my_broken.py")
    own_file("def f(:\n", "my_syntax.py")
    cases = {
        "ndgc": r"rewards has no 'ndgc' \(did you mean ndcg\?\); it has auc, grounded, ndcg, .*write module",
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
