"""The order of prompts, which groups are useful, and how the sampler finds them, with plain functions."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted_dapo import LIMIT, first_drawn, row_ids, rows, sampler, stream, useful_for

from rerank import scoring
from rerank.dapo import groups as grouping
from rerank.dapo.groups import Completion, Group, Rollout
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.sampler import SamplerState
from rerank.prompts import completion
from rerank.rollouts import store
from rerank.rows import reward_columns


def test_prompts_come_in_one_order_however_many_are_taken_at_once():
    whole, prompts = stream().take(0, 13), stream()
    assert row_ids(whole) == row_ids([*prompts.take(0, 4), *prompts.take(4, 1), *prompts.take(5, 8)])
    for epoch in (0, 1):  # each epoch is a permutation of all rows
        assert sorted(row_ids(whole)[5 * epoch : 5 * epoch + 5]) == [10, 11, 12, 13, 14]
    assert [prompt.epoch for prompt in whole] == [0] * 5 + [1] * 5 + [2] * 3
    assert row_ids(stream(seed=1).take(0, 13)) != row_ids(whole)
    reversed_rows = PromptStream(rows()[::-1], prompts.prompter, 0, 16)
    assert row_ids(reversed_rows.take(0, 13)) == row_ids(whole)


FIRST, SAME, LAST = [2, 0, 1, 3], [0, 1, 2, 3], [0, 1, 3, 2]  # where four candidates are ranked, the target third


def test_the_gain_is_the_places_moved_up_and_no_ranking_is_below_all():
    assert [rows()[0].rank_gain(order) for order in (FIRST, SAME, LAST, None)] == [2.0, 0.0, -1.0, -math.inf]


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
    made = Completion([1], [2], "", None, False)
    rollouts = [Rollout(made, {}, {}, 0.0, SAME, None, outcome) for outcome in outcomes]
    assert Group(stream().take(0, 1)[0], rollouts, 0, 0, 0).is_useful() is useful


@pytest.mark.parametrize(
    ("missing", "share", "number"),
    [(32, 1.0, 32), (32, 0.975, 33), (4, 0.5, 8), (1, 0.97, 2), (32, 0.1, 64), (4, 0.0, 64)],
)
def test_enough_prompts_are_sampled_but_not_more_than_two_batches(missing, share, number):
    assert grouping.num_prompts(missing, share, 32) == number


def one_cut_off(prompt, member):
    """A script: completions of equal length but for the first, which the limit cuts off."""
    return LIMIT if member == 0 else 5


def test_a_completion_that_is_cut_off_neither_makes_its_group_useful_nor_is_scored():
    found, metrics = sampler(one_cut_off).collect(0, 2)
    assert found.kept == [] and metrics["groups/share_useful"] == 0
    first, *others = found.sampled[0].rollouts
    assert (first.outcome, first.rewards, first.total, first.masked) == (None, {}, None, True)
    assert {(rollout.outcome, rollout.masked) for rollout in others} == {(5.0, False)}
    record = grouping.record(found.sampled[0], first, "run")
    assert record["kept"] is False and record["discard_reason"] == "truncated" and record["outcome"] is None
    unmasked, _ = sampler(one_cut_off, masks_truncated=False).collect(0, 2)
    assert len(unmasked.kept) == 2 and unmasked.kept[0].rollouts[0].outcome == LIMIT


def test_a_step_lacks_few_groups_where_few_prompts_are_useful_from_the_first_step_on():
    is_useful = np.random.default_rng(0).random(5000) < 0.3
    made = sampler(lambda prompt, member: 3 + member if is_useful[prompt.asked.row.row_id] else 5, 40, rounds=3)
    made.prompts = Endless()
    missing = [made.collect(step, 32)[1]["groups/missing"] for step in range(10)]
    assert np.mean(missing) < 1


class Endless:
    """Prompts of rows without an end, none of which comes twice."""

    rows = stream(1).rows

    def take(self, first, count):
        (prompt,) = stream(1).take(0, 1)
        rows = [replace(prompt.asked.row, row_id=number) for number in range(first, first + count)]
        return [replace(prompt, asked=replace(prompt.asked, row=row)) for row in rows]


def test_a_reward_that_is_none_on_every_completion_stops_the_run_by_name():
    made = sampler(lambda prompt, member: 3 + member)
    score = made.score

    def with_silent(texts, columns):
        scores = score(texts, columns)
        values = np.concatenate([np.asarray(scores.values), np.full((len(texts), 1), np.nan)], axis=1)
        conditions = np.concatenate([np.asarray(scores.conditions), np.ones((len(texts), 1), dtype=bool)], axis=1)
        return replace(scores, names=[*scores.names, "silent"], values=values, conditions=conditions)

    made.score = with_silent
    made.collect(0, 2)
    made.collect(1, 2)
    with pytest.raises(ValueError, match="the reward silent was None on every completion of the first 3 steps"):
        made.collect(2, 2)


def test_every_completion_has_a_seed_of_its_own_that_repeats():
    places = [*itertools.product((0, 1), (10, 11), (0, 1), range(8))]  # seed, row, epoch, member
    seeds = [grouping.request_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0
    assert [grouping.request_seed(*place) for place in places] == seeds


def rows_of(groups):
    return row_ids(group.prompt for group in groups)


def test_a_step_that_is_short_of_useful_groups_is_filled_up_with_the_others():
    order = first_drawn(8, 4)
    found, metrics = sampler(useful_for(order[:1]), rounds=2).collect(0, 3)
    assert metrics["groups/missing"] == 2
    assert rows_of(found.kept) == order[:1] and rows_of(found.padding)[:3] == order[1:]
    assert rows_of(found.padding)[-1] == order[0]  # if the others are too few


def test_without_dynamic_sampling_every_group_is_kept():
    found, metrics = sampler(useful_for([]), rounds=0).collect(0, 3)
    assert rows_of(found.kept) == first_drawn(8, 3) and found.discarded == []
    assert metrics["groups/share_useful"] == 0 and metrics["groups/prompts"] == 3


def test_useful_groups_beyond_the_step_are_surplus():
    order = first_drawn(8, 4)
    made = sampler(useful_for(order[1:]))
    made.state.share_useful = 0.5  # so that four are sampled for two
    found, metrics = made.collect(0, 2)
    assert rows_of(found.kept) == order[1:3] and metrics["groups/discarded_surplus"] == 1
    discarded = [(*rows_of([group]), group.discard_reason) for group in found.discarded]
    assert discarded == [(order[3], "surplus"), (order[0], "all_equal")]


def test_surplus_is_used_while_the_weights_are_those_that_sampled_it_and_stale_then():
    order, made = first_drawn(20, 10), sampler(count=20, keeps_surplus=True)
    made.state.share_useful = 0.4  # 2 / 0.4 = 5, of which two batches are 4
    first, metrics = made.collect(0, 2)
    assert rows_of(first.kept) == order[:2] and first.discarded == [] and "groups/discarded_surplus" not in metrics
    second, metrics = made.collect(0, 2)
    assert rows_of(second.kept) == order[2:4] and second.sampled == []
    assert metrics == {"groups/discarded_all_equal": 0}
    made.state.share_useful = 0.6
    made.collect(1, 2)  # samples four again
    third, metrics = made.collect(2, 2)
    assert [(group.step, group.discard_reason) for group in third.discarded] == [(1, "stale")] * 2
    assert rows_of(third.discarded) == order[6:8] and metrics["groups/discarded_stale"] == 2
    assert {group.number for group in third.kept} == {0, 1}  # numbers are those of a step


def test_steps_without_a_useful_group_that_are_not_the_first_do_not_stop_the_run():
    lucky = sampler(useful_for(first_drawn(40, 2)), count=40)
    assert [lucky.collect(step, 2)[1]["groups/missing"] for step in range(5)] == [0, 2, 2, 2, 2]
    resumed = sampler(useful_for([]), count=40)
    resumed.state = SamplerState(**vars(lucky.state))
    assert [len(resumed.collect(step, 2)[0].kept) for step in range(5, 9)] == [0] * 4


def test_a_rollout_has_its_ranking_its_scores_and_its_outcome():
    row = stream(1).take(0, 1)[0].asked
    specs = [{"name": "well_formed", "weight": 0.2, "condition": "promoted_or_kept_first"}, {"name": "rank_promotion"}]
    absent = scoring.Reward("absent", lambda completions, **_: [None] * len(completions))
    rewards = [*scoring.load_rewards(specs), absent]
    for order, promoted, places in ((FIRST, True, 2), (LAST, False, -1)):
        text = completion("", order, row.labels)
        (group,) = sampler(count=1, rewards=rewards, text=text, outcome="rank_gain").collect(0, 1)[0].sampled
        rollout = group.rollouts[0]
        assert rollout.rewards == {"well_formed": float(promoted), "rank_promotion": places / 4}
        assert rollout.conditions == {"well_formed": promoted, "rank_promotion": True, "absent": True}
        assert rollout.total == pytest.approx(0.2 * promoted + places / 4)
        assert (rollout.order, rollout.failure, rollout.outcome) == (order, None, float(places))
    (group,) = sampler(count=1, rewards=[absent], outcome="absent").collect(0, 1)[0].sampled
    assert (group.rollouts[0].total, group.rollouts[0].outcome) == (None, None)  # nothing applies


def test_a_record_has_every_column_of_the_store():
    (group,) = sampler(count=1).collect(0, 1)[0].kept
    group.discard_reason = "stale"
    (stored,) = store.to_table([grouping.record(group, group.rollouts[1], "toy")]).to_pylist(maps_as_pydicts="strict")
    for name, (value,) in reward_columns([group.prompt.asked]).items():
        assert stored["prompt" if name == "prompts" else name] == value
    wanted = {"run": "toy", **dict.fromkeys(("step", "round", "group"), 0)}
    wanted |= {"target": 2, "target_rank": 3, "target_rank_after": None}
    wanted |= {"completion_ids": [7] * 4, "failure": "no_trace_end", "kept": False, "discard_reason": "stale"}
    wanted |= {"reward": 4.0, "reward_components": {"num_tokens": 4.0, "evenness": 0.0}, "max_completion_tokens": 16}
    assert {name: stored[name] for name in wanted} == wanted


NEW_COLUMN = """
import pyarrow as pa
from rerank import rows
from rerank.rows import prompter

column = rows.RewardColumn("num_candidates", pa.int64(), lambda asked: len(asked.row.candidates))
rows.REWARD_COLUMNS = prompter.REWARD_COLUMNS = (*prompter.REWARD_COLUMNS, column)

from rerank import scoring
from rerank.dapo.groups import record
from rerank.rollouts import store
from scripted_dapo import sampler

rewards = scoring.load_rewards([{"name": "PLUGIN:size"}])
(group,) = sampler(count=1, rewards=rewards, outcome="size").collect(0, 1)[0].sampled
(stored, *_) = store.to_table([record(group, rollout, "toy") for rollout in group.rollouts]).to_pylist()
print(stored["num_candidates"], dict(stored["reward_components"])["size"])
"""


def test_a_new_reward_column_is_one_line(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def size(completions, num_candidates, **_):\n    return [n / 2 for n in num_candidates]\n")
    words = [sys.executable, "-c", NEW_COLUMN.replace("PLUGIN", str(plugin))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split() == ["4", "2.0"], done.stderr
