"""Reward-hacking metrics, by hand and against loops."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from toy_run import rollout

from rerank.catalogue import Catalogue
from rerank.rollouts import metrics
from rerank.rollouts.store import to_table

WEIGHTS = {"rank_promotion": 1.0, "well_formed": 0.2}


def ranked(order, place, group=0, **changes):
    """A rollout of three candidates, the target second of them."""
    return rollout(group=group, order=order, target_rank_after=place, **changes)


def unranked(failure="junk", **changes):
    return rollout(order=None, target_rank_after=None, failure=failure, **changes)


def overall(*records, **options):
    return metrics.overall(to_table(records), **options)


def test_conditions_that_held_are_counted():
    unmet, met = ({"conditions": {"rank_promotion": True, "well_formed": held}} for held in (False, True))
    found = overall(rollout(**unmet), rollout(**unmet), rollout(**met))
    assert found["condition/well_formed"] == pytest.approx(1 / 3) and found["condition/rank_promotion"] == 1


def test_rankings_are_held_against_the_first_stages_order_and_the_order_shown():
    shuffled = {"first_stage_ranks": [3, 1, 2], "candidates": [30, 1, 20]}
    found = overall(ranked([0, 1, 2], 2, **shuffled), ranked([1, 2, 0], 1, **shuffled), unranked())
    assert (found["copy_rate"], found["shown_copy_rate"]) == (0.5, 0.5)
    assert found["kendall_tau"] == pytest.approx(((1 - 2) / 3 + 1) / 2)  # 3 1 2 has two of three pairs turned
    assert (found["first_from/1"], found["first_from/2"], found["first_from/3"]) == (0.5, 0.0, 0.5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 7).flatmap(lambda n: st.permutations(range(n))), min_size=1, max_size=8))
def test_rankings_of_any_lengths_agree_with_a_loop(orders):
    records = []
    for order in orders:
        n = len(order)
        lists = {"candidates": [*range(n)], "candidate_labels": [str(i) for i in range(n)], "target": 0}
        records.append(ranked(order, 1, first_stage_ranks=[*range(1, n + 1)], relevance=[1.0] * n, **lists))
    found = overall(*records)
    taus = [kendalltau(range(len(order)), order).statistic if len(order) > 1 else 1.0 for order in orders]
    assert found["kendall_tau"] == pytest.approx(np.mean(taus))
    assert found["copy_rate"] == pytest.approx(np.mean([list(order) == sorted(order) for order in orders]))
    for rank in range(1, max(map(len, orders)) + 1):
        assert found[f"first_from/{rank}"] == pytest.approx(np.mean([order[0] + 1 == rank for order in orders]))


def test_failures_truncation_and_length_are_shares_of_all_rollouts():
    found = overall(
        unranked("no_trace_end", truncated=True, completion_ids=[1] * 9), unranked(), ranked([1, 0, 2], 1), unranked()
    )
    assert (found["no_ranking"], found["failure/no_trace_end"], found["failure/junk"]) == (0.75, 0.25, 0.5)
    assert found["failure/duplicate"] == 0 and found["truncated"] == 0.25
    assert found["length_tokens"] == (9 + 2 + 2 + 2) / 4


def test_gain_counts_rankings_and_recall_counts_all():
    found = overall(ranked([1, 0, 2], 1), ranked([0, 2, 1], 3), unranked())
    assert found["rank_gain"] == 0.0  # (2 - 1) and (2 - 3)
    assert (found["R@1/before"], found["R@3/before"]) == (0.0, 1.0)
    assert found["R@1/after"] == pytest.approx(1 / 3) and found["R@3/after"] == pytest.approx(2 / 3)


def test_each_reward_and_its_share_of_the_total():
    found = overall(
        ranked([1, 0, 2], 1, reward_components={"rank_promotion": 0.5, "well_formed": 1.0}, reward=0.7),
        ranked([0, 2, 1], 3, reward_components={"rank_promotion": -0.3, "well_formed": 1.0}, reward=-0.1),
        unranked(reward_components={"well_formed": 0.0}, reward=0.0),
        weights=WEIGHTS,
    )
    assert found["reward"] == pytest.approx(0.2)
    assert found["reward/rank_promotion"] == pytest.approx(0.1) and found["reward/well_formed"] == pytest.approx(2 / 3)
    # over all three, rank pays 1.0 * 0.2/3 and format 0.2 * 2/3: one third and two thirds of the whole
    assert found["reward_share/rank_promotion"] == pytest.approx(1 / 3)
    assert found["reward_share/well_formed"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("weights", [None, {"rank_promotion": 1.0}])
def test_without_the_weight_of_every_reward_there_is_no_share(weights):
    found = overall(rollout(reward_components={"rank_promotion": 0.5, "well_formed": 1.0}), weights=weights)
    assert found["reward/well_formed"] == 1 and not [name for name in found if name.startswith("reward_share")]


@pytest.mark.parametrize(
    ("trace", "is_cited"),
    [
        ("best 2", True),
        ("1 fair, 2. 3", True),
        ("(2)", True),
        ("12 and 2.5 and like:2 and 22", False),
        ("the item <s_a_1><s_b_1>!", True),
        ("the item <s_a_1><s_b_2>", False),
        ("Brazil (1985) it is", True),
        ("Brazil", False),
        ("", False),
    ],
)
def test_a_trace_cites_the_target_by_label_id_or_title(trace, is_cited):
    catalogue = Catalogue([*"abc"], [f"<s_a_1><s_b_{code}>" for code in range(3)], ["", "Brazil (1985)", ""], [""] * 3)
    found = overall(rollout(completion=f"<think>{trace}</think> 2 1 3"), catalogue=catalogue)
    assert found["target_cited"] == is_cited


def test_the_gain_of_traces_that_cite_the_target_and_of_those_that_do_not():
    found = overall(
        ranked([1, 0, 2], 1, completion="<think>2</think>"),
        ranked([0, 2, 1], 3, completion="<think>1</think>"),
        ranked([0, 1, 2], 2, completion="<think>2</think>"),
        unranked("no_trace_end", completion="<think>2"),
    )
    assert found["target_cited"] == pytest.approx(2 / 3)  # what has no trace is not asked
    assert (found["rank_gain/cited"], found["rank_gain/not_cited"]) == (0.5, -1.0)


def test_groups_are_told_apart_by_step_round_and_number():
    records = [
        *(ranked([1, 0, 2], 1, group=0, reward=reward) for reward in (0.5, 0.7)),  # all best
        *(ranked([0, 2, 1], 3, group=0, round=1, reward=0.1) for _ in range(2)),  # all worse, same reward
        *(ranked([0, 1, 2], 2, group=1, reward=0.1) for _ in range(2)),  # all equal, same reward
        ranked([1, 0, 2], 1, group=2, reward=0.5, kept=False, discard_reason="surplus"),  # mixed
        unranked(group=2, reward=-1.0, kept=False, discard_reason="surplus"),
    ]
    found = overall(*records)
    kinds = [found[f"groups/{kind}"] for kind in ("all_best", "all_worse", "all_equal", "same_reward")]
    assert kinds == [0.25, 0.25, 0.25, 0.5] and found["kept"] == 0.75


def test_every_step_has_its_own_numbers_and_all_together_are_their_mean_over_rollouts():
    records = [
        ranked([0, 1, 2], 2, step=3),
        ranked([1, 0, 2], 1, step=5, reward=1.0),
        ranked([0, 1, 2], 2, step=5, reward=0.0),
        unranked(step=7),
    ]
    steps = metrics.by_step(to_table(records), WEIGHTS)
    assert steps.index.tolist() == [3, 5, 7] and steps.index.name == "step"
    assert steps["copy_rate"].tolist()[:2] == [1.0, 0.5] and math.isnan(steps["copy_rate"][7])
    assert steps["groups/same_reward"].tolist() == [1.0, 0.0, 1.0]
    assert overall(*records)["copy_rate"] == pytest.approx(2 / 3)


def test_what_no_rollout_has_is_left_out():
    found = overall(unranked(), unranked(), weights=WEIGHTS)
    assert found["no_ranking"] == 1.0 and found["groups/all_worse"] == 1.0
    assert "copy_rate" not in found and all(type(value) is float for value in found.values())


def test_agreement_of_rankings_made_from_two_orders_of_the_candidates():
    first = [[10, 11, 12], [10, 11, 12], [10, 11, 12], None, None]
    second = [[10, 11, 12], [12, 11, 10], [10, 12, 11], [10, 11, 12], None]
    found = metrics.agreement(first, second)
    assert found == pytest.approx({"kendall_tau": (1 - 1 + 1 / 3) / 3, "same_first": 2 / 3, "both_ranked": 0.6})
    nothing = metrics.agreement([None], [[1, 2]])
    assert math.isnan(nothing["kendall_tau"]) and math.isnan(nothing["same_first"]) and nothing["both_ranked"] == 0


@pytest.mark.parametrize("is_finished", [True, False])
def test_weights_come_from_the_recipe_of_the_run(tmp_path, is_finished):
    assert metrics.reward_weights(tmp_path) is None
    keys = {"rewards": [{"name": "ndcg"}, {"name": "my/rewards.py:novelty", "weight": 0.5}], "max_steps": 3}
    path = tmp_path / ("dapo/recipe.yaml" if is_finished else "dapo.partial/begun.json")
    path.parent.mkdir()
    path.write_text(json.dumps(keys if is_finished else {"given": keys, "inputs": {}}))  # JSON is YAML
    assert metrics.reward_weights(tmp_path) == {"ndcg": 1.0, "novelty": 0.5}
