"""The order of prompts, and which groups of completions are useful."""

import math

import pytest

from rerank.dapo import groups as grouping
from rerank.dapo.groups import Group, Rollout
from rerank.dapo.prompt_stream import DrawnPrompt, PromptStream


class Encoder:
    """Prompts and labels that show the candidates in their order."""

    def prompt(self, row):
        return "Rank: " + " ".join(map(str, row["candidates"]))

    catalogue = None

    def labels(self, row):
        return [f"<s_a_{item}>" for item in row["candidates"]]


def rows(count=5):
    """Rows of four candidates, the third of which is the target."""
    lists = {"relevance": [0.0, 0.0, 1.0, 0.0], "first_stage_scores": [4.0, 3.0, 2.0, 1.0]}
    return [
        {"row_id": 10 + i, "user": i, "history": [1], "candidates": [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3], **lists}
        for i in range(count)
    ]


def stream(seed=0, shuffle=False, count=5):
    return PromptStream(rows(count), Encoder(), seed, shuffle)


def row_ids(drawn):
    return [prompt.row["row_id"] for prompt in drawn]


def test_prompts_come_in_one_order_however_many_are_drawn_at_once():
    whole, parts = stream().draw(13), stream()
    assert row_ids(whole) == row_ids([*parts.draw(4), *parts.draw(1), *parts.draw(8)])
    for epoch in (0, 1):  # each epoch is a permutation of all rows
        assert sorted(row_ids(whole)[5 * epoch : 5 * epoch + 5]) == [10, 11, 12, 13, 14]
    assert [prompt.draw for prompt in whole] == [0] * 5 + [1] * 5 + [2] * 3
    assert row_ids(stream(seed=1).draw(13)) != row_ids(whole)


def test_a_stream_goes_on_at_the_prompt_it_was_left_at():
    first, second = stream(shuffle=True), stream(shuffle=True)
    first.draw(7)
    second.num_drawn = first.num_drawn
    assert second.draw(4) == first.draw(4)


def test_the_rows_of_a_stream_do_not_depend_on_their_order():
    other = PromptStream(rows()[::-1], Encoder(), 0)
    assert row_ids(other.draw(5)) == row_ids(stream().draw(5))


def test_a_drawn_row_has_what_rewards_get():
    row = stream().draw(1)[0].row
    base = 4 * (row["row_id"] - 10)
    assert row["prompt"] == f"Rank: {base} {base + 1} {base + 2} {base + 3}"
    assert row["candidate_labels"] == [f"<s_a_{base + i}>" for i in range(4)]
    assert (row["first_stage_ranks"], row["target_rank"]) == ([1, 2, 3, 4], 3)


def test_shuffled_candidates_keep_their_relevance_and_first_stage_rank():
    shown = set()
    for prompt in stream(shuffle=True).draw(20):
        row = prompt.row
        base = 4 * (row["row_id"] - 10)
        places = [item - base for item in row["candidates"]]
        shown.add(tuple(places))
        assert sorted(places) == [0, 1, 2, 3]
        assert row["first_stage_ranks"] == [place + 1 for place in places]
        assert row["relevance"] == [float(place == 2) for place in places]
        assert row["candidate_labels"] == [f"<s_a_{item}>" for item in row["candidates"]]
        assert row["prompt"] == "Rank: " + " ".join(map(str, row["candidates"])) and row["target_rank"] == 3
    assert len(shown) > 5  # another order with every draw


def group(*orders, outcomes=None, target_rank=3):
    """A group over four candidates, the target third; an order of None is no ranking."""
    row = {"relevance": [0.0, 0.0, 1.0, 0.0], "first_stage_ranks": [1, 2, 3, 4], "target_rank": target_rank}
    drawn = DrawnPrompt(row, 0)
    outcomes = outcomes or [grouping.rank_gain(drawn, order) for order in orders]
    rollouts = [
        Rollout([1], [2], "", None, [0.0], {}, order, None if order else "no_ranking", False, outcome)
        for order, outcome in zip(orders, outcomes, strict=True)
    ]
    return Group(drawn, rollouts, 0, 0)


FIRST, SAME, LAST = [2, 0, 1, 3], [0, 1, 2, 3], [0, 1, 3, 2]


def test_the_gain_is_the_places_moved_up_and_no_ranking_is_below_all():
    drawn = group(SAME).drawn
    assert [grouping.rank_gain(drawn, order) for order in (FIRST, SAME, LAST)] == [2.0, 0.0, -1.0]
    assert grouping.rank_gain(drawn, None) == -math.inf


@pytest.mark.parametrize(
    ("outcomes", "useful"),
    [
        ([0.1, 0.1, 0.1], False),
        ([0.1, 0.1, 0.1 + 1e-12], True),  # exactly, where a standard deviation would round
        ([-math.inf, -math.inf], False),
        ([-math.inf, -3.0], True),
        ([None, 1.0, 1.0], False),
        ([None, None], False),
        ([None, 1.0, 2.0], True),
    ],
)
def test_a_group_is_useful_when_its_outcomes_differ(outcomes, useful):
    assert group(*[SAME] * len(outcomes), outcomes=outcomes).is_useful() is useful


def test_groups_are_split_in_the_order_sampled():
    useful = [group(SAME, FIRST), group(SAME, LAST), group(FIRST, LAST)]
    useless = [group(SAME, SAME), group(None, None)]
    sampled = [useful[0], useless[0], useful[1], useless[1], useful[2]]
    assert grouping.split(sampled, 2) == (useful[:2], useful[2:], useless)


@pytest.mark.parametrize(
    ("missing", "share", "drawn"),
    [(32, 1.0, 32), (32, 0.975, 33), (4, 0.5, 8), (1, 0.97, 2), (32, 0.1, 64), (4, 0.0, 64)],
)
def test_as_many_prompts_are_drawn_as_should_do_but_not_more_than_two_batches(missing, share, drawn):
    assert grouping.prompts_to_draw(missing, share, 32) == drawn


def test_every_completion_has_a_seed_of_its_own_that_repeats():
    seeds = [
        grouping.request_seed(seed, row, draw, member)
        for seed in (0, 1)
        for row in (10, 11)
        for draw in (0, 1)
        for member in range(8)
    ]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0
    assert grouping.request_seed(1, 11, 1, 7) == seeds[-1]
