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
    rewards, conditions = ([*names, *metafunc.config.getoption(option)]
                           for names, option in ((REWARDS, "reward"), (CONDITIONS, "condition")))  # fmt: skip
    if "reward" in metafunc.fixturenames:
        metafunc.parametrize("reward", rewards)
    if "condition" in metafunc.fixturenames:
        metafunc.parametrize("condition", conditions)
    if "plugin" in metafunc.fixturenames:
        pairs = [(name, "rewards") for name in rewards] + [(name, "rewards.conditions") for name in conditions]
        metafunc.parametrize("plugin", pairs, ids=[name for name, _ in pairs])


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
    "",
    "junk",
    "</think>",
    "<think></think>",
    completion(TRACE, [0, 1], LABELS),
    completion(TRACE, [0, 0, 1, 2, 3], LABELS),
    completion(TRACE, [0, 1, 2, 3, 4], LABELS) + " done",
    "\udcff\x00<think>",
]
TEXTS = [completion(TRACE, order, LABELS) for order in ORDERS] + WRONG


def gold(row):
    order = sorted(range(len(LABELS)), key=lambda n: -row["relevance"][n])
    return completion(TRACE, order, LABELS)


def score(function, pairs):
    """Values of (row, completion) pairs as one batch, called as the trainer calls it."""
    columns = {key: [copy.deepcopy(row[key]) for row, _ in pairs] for key in ROWS[0]}
    texts = [text for _, text in pairs]
    trainer = {
        "completion_ids": [list(map(ord, text)) for text in texts],
        "trainer_state": None,
        "log_extra": None,
        "log_metric": None,
    }
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


def test_rank_promotion_is_the_share_of_places_won():
    row = ROWS[0]  # third of five
    texts = [completion(None, order, LABELS) for order in ([2, 0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 3, 4, 2])]
    # (3 - 1) / 5, (3 - 3) / 5, (3 - 5) / 5, and what is no ranking
    assert score(rank_promotion, [(row, text) for text in [*texts, "junk"]]) == [0.4, 0.0, -0.4, -1.0]


def test_rank_promotion_of_ten_candidates_spans_nine_tenths():
    labels = [str(n) for n in range(1, 11)]
    last_to_first, first_to_last = [9, *range(9)], [*range(1, 10), 0]
    values = rank_promotion(
        [completion(None, last_to_first, labels), completion(None, first_to_last, labels)],
        candidate_labels=[labels] * 2,
        first_stage_ranks=[list(range(1, 11))] * 2,
        target_rank=[10, 1],
    )
    assert values == [0.9, -0.9]


def test_rank_promotion_follows_the_best_ranked_of_several_relevant_items():
    row = ROWS[2]  # positions 1 and 3 are relevant, ranked 2 and 1 by the first stage
    # position 3 falls from rank 1 to rank 2, whatever position 1 wins: (1 - 2) / 5
    assert score(rank_promotion, [(row, completion(None, [1, 3, 0, 2, 4], LABELS))]) == [-0.2]


def test_rank_promotion_refuses_a_row_without_a_relevant_item():
    row = {**ROWS[0], "target_rank": None}
    with pytest.raises(ValueError, match="None is not in list"):
        score(rank_promotion, [(row, gold(ROWS[0]))])


def test_well_formed_is_one_for_a_permutation_after_a_trace():
    values = score(well_formed, [(ROWS[0], text) for text in TEXTS])
    assert values == [1.0] * len(ORDERS) + [0.0] * len(WRONG)


def test_ndcg_reads_the_order_and_the_cut_off():
    row = ROWS[0]
    third = completion(None, [0, 1, 2, 3, 4], LABELS)
    assert score(ndcg, [(row, third)]) == pytest.approx([0.5])  # 1 / log2(3 + 1)
    assert score(load_function("ndcg", "rewards", k=2), [(row, third)]) == [0.0]
    assert score(ndcg, [(row, "junk")]) == [0.0]
    graded = {**row, "relevance": [1.0, 2.0, 0.0, 0.0, 0.0]}  # gains 1 and 3, at best the other way round
    best = 3 + 1 / math.log2(3)
    assert score(ndcg, [(graded, third)]) == pytest.approx([(1 + 3 / math.log2(3)) / best])
    nothing = {**row, "relevance": [0.0] * 5}
    assert score(ndcg, [(nothing, third), (nothing, "junk")]) == [None, None]


def test_promoted_or_kept_first_is_the_safe_reading():
    first, third = ROWS[1], ROWS[0]
    cases = [
        (third, [2, 0, 1, 3, 4], True),  # 3 -> 1
        (third, [0, 2, 1, 3, 4], True),  # 3 -> 2
        (third, [0, 1, 2, 3, 4], False),  # copied
        (third, [0, 1, 3, 2, 4], False),  # 3 -> 4
        (first, [0, 4, 3, 2, 1], True),  # kept first
        (first, [1, 0, 2, 3, 4], False),  # was first and is demoted: the literal reading would pay
    ]
    pairs = [(row, completion(None, order, LABELS)) for row, order, _ in cases]
    assert score(promoted_or_kept_first, pairs) == [expected for *_, expected in cases]


def rankings(row, *orders):
    return [(row, completion(None, order, LABELS)) for order in orders]


def test_auc_is_the_share_of_pairs_in_order():
    # one of five, third: 2 of 4 pairs; first: all; last: none
    orders = ([0, 1, 2, 3, 4], [2, 0, 1, 3, 4], [0, 1, 3, 4, 2])
    assert score(auc, [*rankings(ROWS[0], *orders), (ROWS[0], "junk")]) == [0.5, 1.0, 0.0, 0.0]
    # relevant are 1 and 3, whatever their grades: in [1, 0, 3, 2, 4] 5 of 6 pairs are in order
    assert score(auc, rankings(ROWS[2], [1, 3, 0, 2, 4], [1, 0, 3, 2, 4])) == [1.0, pytest.approx(5 / 6)]
    for relevance in ([0.0] * 5, [1.0] * 5):
        row = {**ROWS[0], "relevance": relevance}
        assert score(auc, [*rankings(row, orders[0]), (row, "junk")]) == [None, None]


def test_not_a_copy_pays_distance_from_the_order_shown_unless_the_ranking_is_better():
    third, first = ROWS[0], ROWS[1]
    # tau of five items falls by 2/10 with each pair out of order; (1 - tau) / (1 - 0.5)
    cases = [
        (third, [0, 1, 2, 3, 4], 0.0),  # a copy
        (third, [0, 1, 2, 4, 3], 0.4),  # one pair: 0.2 / 0.5
        (third, [1, 0, 2, 4, 3], 0.8),  # two pairs
        (third, [4, 3, 2, 1, 0], 1.0),
        (third, [0, 2, 1, 3, 4], 1.0),  # one pair, but the target is second now
        (third, [0, 1, 3, 2, 4], 0.4),  # one pair, and the target fourth
        (first, [0, 1, 2, 3, 4], 1.0),  # there is nothing to gain
        (first, [1, 0, 2, 3, 4], 1.0),
    ]
    half = load_function("not_a_copy", "rewards", max_tau=0.5)
    pairs = [(row, completion(None, order, LABELS)) for row, order, _ in cases]
    assert score(half, pairs) == pytest.approx([value for *_, value in cases])
    assert score(half, [(first, "junk")]) == [0.0]


def test_not_a_copy_at_a_tau_of_one_is_the_identity_check_alone():
    identity_check = load_function("not_a_copy", "rewards", max_tau=1)
    orders = ([0, 1, 2, 3, 4], [0, 1, 2, 4, 3], [0, 1, 3, 4, 2])
    assert score(identity_check, rankings(ROWS[0], *orders)) == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"max_tau is 1.5 but must be in \[-1, 1\]"):
        score(load_function("not_a_copy", "rewards", max_tau=1.5), rankings(ROWS[0], orders[0]))


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
    values = grounded(texts, prompts=[prompt] * 3, candidate_labels=[["1", "2"]] * 3)
    assert values == [1.0, 0.5, 0.0]


def test_overlong_follows_the_cases_of_its_equation():
    function = load_function("overlong", "rewards", cache_tokens=20)
    ids = [[7] * length for length in (0, 80, 85, 90, 100, 101, 45)]
    limits = [100] * 6 + [50]  # each row by its own
    # (80 - 85) / 20, (80 - 90) / 20, (80 - 100) / 20, and (30 - 45) / 20
    values = function([""] * 7, completion_ids=ids, max_completion_tokens=limits)
    assert values == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -0.75]
    assert overlong([""] * 2, [[7] * 16384, [7] * 18432], max_completion_tokens=[20480] * 2) == [
        0.0,
        -0.5,
    ]  # the paper's
    with pytest.raises(
        ValueError, match="cache_tokens is 30 but must be from 0 to the token limit of a completion, 20"
    ):
        overlong([""], completion_ids=[[7]], max_completion_tokens=[20], cache_tokens=30)


def test_promoted_or_first_pays_whatever_becomes_of_a_first_target():
    third, first = ROWS[0], ROWS[1]
    assert score(promoted_or_first, rankings(third, [0, 2, 1, 3, 4], [0, 1, 2, 3, 4])) == [True, False]
    assert score(promoted_or_first, rankings(first, [0, 4, 3, 2, 1], [1, 0, 2, 3, 4])) == [True, True]


def test_not_a_suboptimal_copy_is_the_identity_check():
    third, first = ROWS[0], ROWS[1]
    # a copy that could be better, a near-copy, and a copy of an order that is best already
    assert score(not_a_suboptimal_copy, rankings(third, [0, 1, 2, 3, 4], [0, 1, 2, 4, 3])) == [False, True]
    assert score(not_a_suboptimal_copy, rankings(first, [0, 1, 2, 3, 4])) == [True]


def test_valid_ranking_is_well_formed():
    texts = [(ROWS[0], text) for text in TEXTS]
    assert score(valid_ranking, texts) == [value == 1 for value in score(well_formed, texts)]
