"""The contract of rewards/__init__.py over every file of the folder and over a user's own, then numbers by hand.

`pytest tests/test_rewards.py --reward my_rewards.py:novelty --condition my_rewards.py:is_short` checks those too.
"""

import copy
import inspect
import math
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank.plugins import known_names, load_function
from rerank.prompts import completion
from rerank.rows import PromptedRow, RankingRow, reward_columns
from rerank.scoring import TRAINER_COLUMNS
from rewards.auc import auc
from rewards.conditions.not_a_suboptimal_copy import not_a_suboptimal_copy
from rewards.conditions.promoted_or_first import promoted_or_first
from rewards.conditions.promoted_or_kept_first import promoted_or_kept_first
from rewards.conditions.valid_ranking import valid_ranking
from rewards.grounded import grounded
from rewards.ndcg import ndcg
from rewards.overlong import overlong
from rewards.rank_promotion import rank_promotion
from rewards.well_formed import well_formed

REWARDS = known_names("rewards")
CONDITIONS = known_names("rewards.conditions")

LABELS = [f"<s_a_{n}><s_b_{n % 3}>" for n in range(5)]
PROMPT = "Rank:\nHistory:<s_a_9><s_b_0>\nCandidates:\n" + "\n".join(f"{label} Title {label[5]}" for label in LABELS)
TRACE = "the last item calls for <s_a_2><s_b_2>"


def pytest_generate_tests(metafunc):
    rewards = [*REWARDS, *metafunc.config.getoption("reward")]
    conditions = [*CONDITIONS, *metafunc.config.getoption("condition")]
    plugins = [(name, "rewards") for name in rewards] + [(name, "rewards.conditions") for name in conditions]
    for argument, values in (("reward", rewards), ("condition", conditions), ("plugin", plugins)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, values, ids=lambda value: value if isinstance(value, str) else value[0])


LIMIT = 4100  # tokens of a completion: the punishment of the paper's 4,096 last ones begins after four


def make_row(row_id, relevance, first_stage_ranks):
    """The columns of a row over five candidates."""
    candidates = tuple(10 + n for n in range(len(LABELS)))
    row = RankingRow(row_id, (9, 8), candidates, tuple(relevance), row_id // 2, tuple(first_stage_ranks))
    return {name: values[0] for name, values in reward_columns([PromptedRow(row, PROMPT, LABELS, LIMIT)]).items()}


ROWS = [
    make_row(0, [0.0, 0.0, 1.0, 0.0, 0.0], [1, 2, 3, 4, 5]),  # target third
    make_row(1, [1.0, 0.0, 0.0, 0.0, 0.0], [1, 2, 3, 4, 5]),  # target first already
    make_row(2, [0.0, 1.0, 0.0, 2.0, 0.0], [4, 2, 5, 1, 3]),  # two relevant, candidates shuffled
    make_row(3, [1.0, 0.0, 2.0, 2.0, 0.0], [1, 2, 3, 4, 5]),  # the first stage has a less relevant one first
]
ORDERS = [[0, 1, 2, 3, 4], [2, 0, 1, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 4, 3]]
WRONG = [
    *("", "junk", "</think>", "<think></think>", "\udcff\x00<think>"),
    completion(TRACE, [0, 1], LABELS),
    completion(TRACE, [0, 0, 1, 2, 3], LABELS),
    completion(TRACE, [0, 1, 2, 3, 4], LABELS) + " done",
]
TEXTS = [completion(TRACE, order, LABELS) for order in ORDERS] + WRONG


def gold(row):
    order = sorted(range(len(LABELS)), key=lambda n: -row["relevance"][n])
    return completion(TRACE, order, LABELS)


def score(function, pairs):
    """Values of (row, completion) pairs as one batch, called as the trainer calls it."""
    columns = {key: [copy.deepcopy(row[key]) for row, _ in pairs] for key in ROWS[0]}
    texts = [text for _, text in pairs]
    trainer = dict.fromkeys(("trainer_state", "log_extra", "log_metric"))
    trainer["completion_ids"] = [list(map(ord, text)) for text in texts]
    before = repr(columns)
    values = function(completions=texts, **trainer, **columns)
    assert repr(columns) == before, "the columns are changed"
    return values


PAIRS = [(row, text) for row in ROWS for text in [*TEXTS, gold(row)]]


def stated_range(function):
    found = re.search(r"Range: (-?[0-9.]+[0-9]|-?[0-9]) to (-?[0-9.]+[0-9]|-?[0-9])", function.__doc__ or "")
    assert found, "the docstring does not say `Range: 0 to 1`"
    return float(found[1]), float(found[2])


def test_a_plugin_takes_columns_and_names_its_own_parameters_with_defaults(plugin):
    parameters = inspect.signature(load_function(*plugin)).parameters.values()
    assert any(p.kind is p.VAR_KEYWORD and p.name == "columns" for p in parameters)
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required[0] == "completions"
    assert set(required[1:]) <= {*ROWS[0], *TRAINER_COLUMNS}


def test_a_plugin_gives_a_list_of_one_value_a_completion(plugin):
    function = load_function(*plugin)
    values = score(function, PAIRS)
    assert isinstance(values, list) and len(values) == len(PAIRS)
    assert score(function, []) == []


def test_a_plugin_is_row_local_and_keeps_the_order(plugin):
    function = load_function(*plugin)
    together = score(function, PAIRS)
    assert together == [score(function, [pair])[0] for pair in PAIRS]
    shuffled = list(range(len(PAIRS)))
    random.Random(0).shuffle(shuffled)
    assert score(function, [PAIRS[n] for n in shuffled]) == [together[n] for n in shuffled]


def test_a_plugin_is_pure(plugin):
    function = load_function(*plugin)
    assert pickle.loads(pickle.dumps(function)) is function, "not a function of its module"
    state, numpy_state = random.getstate(), repr(np.random.get_state())
    assert score(function, PAIRS) == score(function, PAIRS)
    assert random.getstate() == state and repr(np.random.get_state()) == numpy_state


def test_no_completion_scores_above_the_gold_answer(reward):
    function = load_function(reward, "rewards")
    if "punishes only" in " ".join(function.__doc__.split()):
        return
    for row in ROWS:
        best = score(function, [(row, gold(row))])[0]
        values = score(function, [(row, text) for text in TEXTS])
        assert all(value is None or value <= best for value in values)


def test_a_reward_keeps_the_range_that_it_states(reward):
    function = load_function(reward, "rewards")
    low, high = stated_range(function)
    values = [value for value in score(function, PAIRS) if value is not None]
    assert all(math.isfinite(value) and low <= value <= high for value in values)


def test_a_condition_gives_booleans_and_false_for_junk(condition):
    function = load_function(condition, "rewards.conditions")
    assert {type(value) for value in score(function, PAIRS)} == {bool}
    assert not any(score(function, [(row, text) for row in ROWS for text in WRONG]))


OWN = """
import random

def half(completions, **columns):
    \"\"\"Half. Range: 0 to 1.\"\"\"
    return [0.5 for _ in completions]

def place(completions, **columns):
    \"\"\"Its index. Range: 0 to 1.\"\"\"
    return [float(index > 0) for index, _ in enumerate(completions)]

def large(completions, **columns):
    \"\"\"Too large. Range: 0 to 1.\"\"\"
    return [2.0 for _ in completions]

def noise(completions, **columns):
    \"\"\"Noise. Range: 0 to 1.\"\"\"
    return [random.random() for _ in completions]
"""


def test_the_contract_is_checked_on_a_users_own_file(tmp_path):
    (tmp_path / "my_rewards.py").write_text(OWN)
    names = ("half", "place", "large", "noise")
    words = [word for name in names for word in ("--reward", f"{tmp_path}/my_rewards.py:{name}")]
    line = [sys.executable, "-m", "pytest", __file__, *words, "-k", "my_rewards", "-p", "no:cacheprovider"]
    done = subprocess.run(line, capture_output=True, text=True)
    failed = sorted(re.findall(r"^FAILED .*::test_(\w+)\[.*:(\w+)\]", done.stdout, re.MULTILINE))
    assert failed == [
        ("a_plugin_is_pure", "noise"),
        ("a_plugin_is_row_local_and_keeps_the_order", "noise"),
        ("a_plugin_is_row_local_and_keeps_the_order", "place"),
        ("a_reward_keeps_the_range_that_it_states", "large"),
        ("no_completion_scores_above_the_gold_answer", "noise"),
        ("no_completion_scores_above_the_gold_answer", "place"),
    ], done.stdout
    assert "6 failed, 18 passed" in done.stdout  # six tests of each of the four


ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from([*LABELS, "<think>", "</think>", "<s_a_1>", "<s_b_2>", '"', " (", ")", "next:8", "1", " "]),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(ANY_TEXT, st.permutations(LABELS), st.booleans())
def test_any_text_keeps_the_range_of_every_reward(text, ranking, is_ranking):
    text = f"<think>{text.replace('</think>', '')}</think>{''.join(ranking)}" if is_ranking else text
    for name in REWARDS:
        function = load_function(name, "rewards")
        low, high = stated_range(function)
        assert all(low <= value <= high for value in score(function, [(row, text) for row in ROWS]))
    for name in CONDITIONS:
        values = score(load_function(name, "rewards.conditions"), [(row, text) for row in ROWS])
        assert {type(value) for value in values} == {bool}


THIRD, FIRST, GRADED, _ = ROWS
NOT_A_COPY = {tau: load_function("not_a_copy", "rewards", max_tau=tau) for tau in (0.5, 1, 1.5)}
BY_HAND = [  # a ranking is written as the positions in their order
    # the target is third of five: (3 - 1) / 5, (3 - 3) / 5, (3 - 5) / 5, and what is no ranking
    (rank_promotion, THIRD, {"20134": 0.4, "01234": 0.0, "01342": -0.4, "junk": -1.0}),
    # positions 1 and 3 are relevant, ranked 2 and 1 by the first stage: 3 falls to rank 2, whatever 1 wins
    (rank_promotion, GRADED, {"13024": (1 - 2) / 5}),
    (ndcg, THIRD, {"01234": 1 / math.log2(3 + 1), "junk": 0.0}),
    (load_function("ndcg", "rewards", k=2), THIRD, {"01234": 0.0}),
    # gains 1 and 3, at best the other way round
    (
        ndcg,
        {**THIRD, "relevance": [1.0, 2.0, 0.0, 0.0, 0.0]},
        {"01234": (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))},
    ),
    (ndcg, {**THIRD, "relevance": [0.0] * 5}, {"01234": None, "junk": None}),
    # one of five, third: 2 of 4 pairs; first: all; last: none
    (auc, THIRD, {"01234": 0.5, "20134": 1.0, "01342": 0.0, "junk": 0.0}),
    (auc, GRADED, {"13024": 1.0, "10324": 5 / 6}),  # whatever their grades, 5 of 6 pairs are in order
    (auc, {**THIRD, "relevance": [0.0] * 5}, {"01234": None, "junk": None}),
    (auc, {**THIRD, "relevance": [1.0] * 5}, {"01234": None, "junk": None}),
    # tau of five items falls by 2/10 with each pair out of order; (1 - tau) / (1 - 0.5) of none, one, two and all
    (NOT_A_COPY[0.5], THIRD, {"01234": 0.0, "01243": 0.2 / 0.5, "10243": 0.4 / 0.5, "43210": 1.0}),
    (NOT_A_COPY[0.5], THIRD, {"02134": 1.0, "01324": 0.4}),  # one pair, and the target is second or fourth now
    (NOT_A_COPY[0.5], FIRST, {"01234": 1.0, "10234": 1.0, "junk": 0.0}),  # there is nothing to gain
    (NOT_A_COPY[1], THIRD, {"01234": 0.0, "01243": 1.0, "01342": 1.0}),  # the identity check alone
    (promoted_or_kept_first, THIRD, {"20134": True, "02134": True, "01234": False, "01324": False}),
    (promoted_or_kept_first, FIRST, {"04321": True, "10234": False}),  # the literal reading would pay a demotion
    (promoted_or_first, THIRD, {"02134": True, "01234": False}),
    (promoted_or_first, FIRST, {"04321": True, "10234": True}),
    # a copy that could be better, a near-copy, and a copy of an order that is best already
    (not_a_suboptimal_copy, THIRD, {"01234": False, "01243": True}),
    (not_a_suboptimal_copy, FIRST, {"01234": True}),
]


@pytest.mark.parametrize(("function", "row", "values"), BY_HAND)
def test_values_are_those_by_hand(function, row, values):
    texts = [text if text == "junk" else completion(None, [int(place) for place in text], LABELS) for text in values]
    assert score(function, [(row, text) for text in texts]) == pytest.approx(list(values.values()))


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (rank_promotion, {"target_rank": None}, "None is not in list"),
        (NOT_A_COPY[1.5], {}, r"max_tau is 1.5 but must be in \[-1, 1\]"),
        (overlong, {"max_completion_tokens": 20}, "cache_tokens is 4096 but must be from 0 to the .* completion, 20"),
    ],
)
def test_a_bad_row_or_parameter_is_an_exception(function, changes, message):
    with pytest.raises(ValueError, match=message):
        score(function, [({**THIRD, **changes}, gold(THIRD))])


def test_well_formed_and_valid_ranking_hold_for_a_permutation_after_a_trace():
    texts = [(THIRD, text) for text in TEXTS]
    assert score(well_formed, texts) == score(valid_ranking, texts) == [True] * len(ORDERS) + [False] * len(WRONG)


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("<s_a_0><s_b_0> suits, <s_a_7><s_b_7> does not", 0.5),
        ("<s_a_9><s_b_0>", 1.0),  # of the history
        ("<s_a_1><s_b_1><s_a_2><s_b_2>", 1.0),  # two ids without a space
        ("<s_a_1><s_b_2>", 0.0),  # both tokens stand there, the id does not
        ("<s_a_1>", 0.0),  # half an id
        ('they took "Title 1" and “Title 8”', 0.5),
        ("<s_a_1><s_b_1> (Title 1)", 1.0),
        ("<s_a_1><s_b_1> (Title (8))", 0.5),
        ('"e", "Title", " ", "Candidates" and "Rank"', 0.0),  # parts of a title, and what is no title
        ("4 of them", 0.0),  # no citation where candidates have ids
        ("", 0.0),
    ],
)
def test_grounded_is_the_share_of_citations_that_the_prompt_holds(trace, expected):
    assert score(grounded, [(ROWS[0], completion(trace, range(5), LABELS))]) == [expected]
    assert score(grounded, [(ROWS[0], completion(trace, range(4), LABELS))]) == [0.0]  # no ranking


def test_grounded_reads_numbers_and_facts_of_numbered_candidates():
    prompt = "Candidates:\n 1.<s_a_4><s_b_5> next:1 like:8\n 2.<s_a_6><s_b_7> next:0 like:2"
    texts = [f"<think>{trace}</think> 2 1" for trace in (" 1 weak 2 top best 2 like:2", " 2 next:8", " 3 best 10")]
    values = grounded(texts, prompts=[prompt] * 3, candidate_labels=[["1", "2"]] * 3, top_k=[0] * 3)
    assert values == [1.0, 0.5, 0.0]


def test_grounded_reads_fields_of_items_without_ids_and_facts_by_name():
    prompt = "Rank:\nHistory:\n Dune | Sci-fi | 2d\nCandidates:\n A. Alien | brand: Fox candidate_price:3\n B. Heat"
    traces = ['like "Dune"', '"Alien" by "Fox"', '"Heat"', '"Covenant"', "candidate_price:3", "candidate_price:4", "A"]
    texts = [completion(trace, [1, 0], ["A", "B"]) for trace in traces]
    values = grounded(texts, prompts=[prompt] * 7, candidate_labels=[["A", "B"]] * 7, top_k=[0] * 7)
    assert values == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_overlong_follows_the_cases_of_its_equation():
    function = load_function("overlong", "rewards", cache_tokens=20)
    ids = [[7] * length for length in (0, 80, 85, 90, 100, 101, 45)]
    limits = [100] * 6 + [50]  # each row by its own
    # (80 - 85) / 20, (80 - 90) / 20, (80 - 100) / 20, and (30 - 45) / 20
    values = function([""] * 7, completion_ids=ids, max_completion_tokens=limits)
    assert values == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -0.75]
    papers = overlong([""] * 2, [[7] * 16384, [7] * 18432], max_completion_tokens=[20480] * 2)
    assert papers == [0.0, -0.5]
