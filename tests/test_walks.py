"""Walks follow the scores of `transitions`, computed anew after each step."""

import numpy as np
import pytest

from rerank.baselines import Counts
from rerank.baselines.walks import walks

SEQUENCES = {0: np.array([0, 1, 2, 3]), 1: np.array([1, 3, 0]), 2: np.array([2, 0, 1])}


def test_each_step_is_drawn_in_proportion_to_the_scores_after_the_walk_so_far():
    counts = Counts.fit(SEQUENCES, 5)
    found = walks(SEQUENCES, 5, num_walks=60_000, length=3, rng=np.random.default_rng(0))
    for walked in ([0], [1], [0, 1], [3, 0]):
        follow = found[(found[:, : len(walked)] == walked).all(axis=1), len(walked)]
        assert len(follow) > 1000
        scores = np.maximum(counts.transition_scores(walked), 0)
        frequencies = np.bincount(follow, minlength=5) / len(follow)
        assert frequencies == pytest.approx(scores / scores.sum(), abs=0.03), walked


def test_no_item_comes_twice_and_a_walk_ends_where_nothing_new_follows():
    found = walks(SEQUENCES, 5, num_walks=200, length=6, rng=np.random.default_rng(0))
    assert (found[:, 4:] == -1).all()  # four items can be reached
    for walk in found:
        items = walk[walk >= 0]
        assert len(set(items.tolist())) == len(items) == 4


def test_walks_start_where_someone_went_on_and_repeat_with_their_seed():
    ends = {0: np.array([0, 1]), 1: np.array([2, 1])}  # nobody went on from 1
    first, second = (walks(ends, 3, 50, 2, np.random.default_rng(4)) for _ in range(2))
    assert set(first[:, 0].tolist()) == {0, 2}
    assert (first == second).all()


def test_nowhere_to_walk_is_refused():
    with pytest.raises(ValueError, match="leave walks out"):
        walks({0: np.array([1])}, 3, 5, 4, np.random.default_rng(0))
