"""The contract of rewards/__init__.py over every file of the folder, then each reward's numbers by hand."""

import inspect
import math
import random

import pytest

from rerank.plugins import known_names, load_function
from rerank.prompts import completion
from rewards.conditions.promoted_or_kept_first import promoted_or_kept_first
from rewards.ndcg import ndcg
from rewards.rank_promotion import rank_promotion
from rewards.well_formed import well_formed

REWARDS = known_names("rewards")
CONDITIONS = known_names("rewards.conditions")
PLUGINS = [(name, "rewards") for name in REWARDS] + [(name, "rewards.conditions") for name in CONDITIONS]

LABELS = [f"<s_a_{n}><s_b_{n % 3}>" for n in range(5)]
TRACE = "the last item calls for it"


def make_row(row_id, relevance, first_stage_ranks):
    relevant = [rank for rank, gain in zip(first_stage_ranks, relevance, strict=True) if gain > 0]
    return {
        "row_id": row_id,
        "user": row_id // 2,
        "history": [9, 8],
        "candidates": [10 + n for n in range(len(LABELS))],
        "relevance": relevance,
        "candidate_labels": LABELS,
        "first_stage_ranks": first_stage_ranks,
        "target_rank": min(relevant),
    }


ROWS = [
    make_row(0, [0.0, 0.0, 1.0, 0.0, 0.0], [1, 2, 3, 4, 5]),  # target third
    make_row(1, [1.0, 0.0, 0.0, 0.0, 0.0], [1, 2, 3, 4, 5]),  # target first already
    make_row(2, [0.0, 1.0, 0.0, 2.0, 0.0], [4, 2, 5, 1, 3]),  # two relevant, candidates shuffled
]
ORDERS = [[0, 1, 2, 3, 4], [2, 0, 1, 3, 4], [4, 3, 2, 1, 0]]
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
    columns = {key: [row[key] for row, _ in pairs] for key in ROWS[0]}
    texts = [text for _, text in pairs]
    trainer = {"prompts": [""] * len(texts), "completion_ids": [[1]] * len(texts), "trainer_state": None}
    return function(completions=texts, **trainer, log_metric=None, **columns)


PAIRS = [(row, text) for row in ROWS for text in [*TEXTS, gold(row)]]


@pytest.mark.parametrize(("name", "folder"), PLUGINS)
def test_a_plugin_takes_columns_and_names_its_own_parameters_with_defaults(name, folder):
    parameters = inspect.signature(load_function(name, folder)).parameters.values()
    assert any(p.kind is p.VAR_KEYWORD and p.name == "columns" for p in parameters)
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required[0] == "completions"
    assert set(required[1:]) <= set(ROWS[0])


@pytest.mark.parametrize(("name", "folder"), PLUGINS)
def test_a_plugin_is_row_local_and_keeps_the_order(name, folder):
    function = load_function(name, folder)
    together = score(function, PAIRS)
    assert isinstance(together, list) and len(together) == len(PAIRS)
    assert together == [score(function, [pair])[0] for pair in PAIRS]
    shuffled = list(range(len(PAIRS)))
    random.Random(0).shuffle(shuffled)
    assert score(function, [PAIRS[n] for n in shuffled]) == [together[n] for n in shuffled]


@pytest.mark.parametrize(("name", "folder"), PLUGINS)
def test_a_plugin_is_pure(name, folder):
    function = load_function(name, folder)
    state, before = random.getstate(), repr(ROWS)
    assert score(function, PAIRS) == score(function, PAIRS)
    assert random.getstate() == state and repr(ROWS) == before


@pytest.mark.parametrize(("name", "folder"), PLUGINS)
def test_a_plugin_of_no_completions_gives_no_values(name, folder):
    assert load_function(name, folder)(completions=[], **{key: [] for key in ROWS[0]}) == []


@pytest.mark.parametrize("name", REWARDS)
def test_no_completion_scores_above_the_gold_answer(name):
    function = load_function(name, "rewards")
    for row in ROWS:
        best = score(function, [(row, gold(row))])[0]
        values = score(function, [(row, text) for text in TEXTS])
        assert all(value is None or (math.isfinite(value) and value <= best) for value in values)


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_says_its_range(name):
    assert "Range" in load_function(name, "rewards").__doc__


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_gives_booleans_and_false_for_junk(name):
    function = load_function(name, "rewards.conditions")
    assert {type(value) for value in score(function, PAIRS)} == {bool}
    assert not any(score(function, [(row, text) for row in ROWS for text in WRONG]))


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
