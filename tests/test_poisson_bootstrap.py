"""Intervals of more users than are drawn one by one: as wide as those of fewer, and their coverage in a simulation."""

import numpy as np
import pytest
from scipy import stats

from rerank.results import intervals
from rerank.results.intervals import Sampling

NORMAL = 1.959964


@pytest.fixture
def by_poisson(monkeypatch):
    monkeypatch.setattr(intervals, "MOST_DRAWN", 0)


def drawn_one_by_one(users, values, baseline):
    """The bounds as they are up to MOST_DRAWN users, written out."""
    sums = np.array([np.bincount(users, weights=values - baseline), np.bincount(users)])
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        events, cases = sums[:, rng.integers(sums.shape[1], size=sums.shape[1])].sum(axis=1)
        found.append(events / cases)
    return np.percentile(found, [2.5, 97.5]).tolist()


def test_weights_are_those_of_a_poisson_distribution():
    assert len(intervals.POISSON) == 65536
    assert intervals.POISSON.mean() == pytest.approx(1, abs=1e-4)
    assert intervals.POISSON.var() == pytest.approx(1, abs=1e-4)


def test_users_are_drawn_one_by_one_up_to_the_limit_and_weighted_beyond(monkeypatch):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), rng.integers(1, 4, 60))
    values, baseline = rng.random((2, len(users)))
    wanted = drawn_one_by_one(users, values, baseline)
    assert intervals.MOST_DRAWN == 100_000
    monkeypatch.setattr(intervals, "MOST_DRAWN", 60)
    assert Sampling(users).difference(values, baseline)[1] == wanted
    monkeypatch.setattr(intervals, "MOST_DRAWN", 59)
    assert Sampling(users).difference(values, baseline)[1] != wanted


def test_the_width_above_the_limit_is_that_of_the_standard_error_within_5_percent():
    rng = np.random.default_rng(1)
    num_users = intervals.MOST_DRAWN + 1
    values, baseline = rng.random((2, num_users))
    low, high = Sampling(np.arange(num_users)).difference(values, baseline)[1]
    assert high - low == pytest.approx(2 * NORMAL * (values - baseline).std() / num_users**0.5, rel=0.05)


def test_the_mean_width_is_that_of_drawn_users(monkeypatch):
    rng = np.random.default_rng(2)
    users = np.repeat(np.arange(300), rng.geometric(0.4, 300))  # users of many rows weigh more
    values, baseline = rng.random(300)[users] + rng.random(len(users)), rng.random(len(users))
    widths = []
    for most in (300, 0):
        monkeypatch.setattr(intervals, "MOST_DRAWN", most)
        bounds = [Sampling(users, seed=seed).difference(values, baseline)[1] for seed in range(10)]
        widths.append(np.mean([high - low for low, high in bounds]))
    assert widths[1] == pytest.approx(widths[0], rel=0.02)


def test_differences_of_every_two_columns_are_those_of_each_pair(by_poisson):
    rng = np.random.default_rng(4)
    users, columns = rng.integers(20, size=60), rng.random((3, 60))
    sampling = Sampling(users, 300, seed=7)
    for (later, earlier), (difference, bounds) in sampling.differences(list(columns)).items():
        one, ends = sampling.difference(columns[later], columns[earlier])
        assert difference == pytest.approx(one) and bounds == pytest.approx(ends)


def test_coverage_is_95_percent(by_poisson):
    """Of users with one normal value each: their mean is independent of both distances from it to a bound (Basu), so
    that each simulation gives the chance that a mean of this distribution is covered, in place of one yes or no."""
    rng, num_users, chances = np.random.default_rng(3), 1000, []
    for _ in range(50):
        gains = rng.standard_normal(num_users)
        found, (low, high) = Sampling(np.arange(num_users)).difference(gains, np.zeros(num_users))
        below, above = stats.norm.cdf(np.array([low - found, high - found]) * num_users**0.5)
        chances.append(above - below)
    assert np.mean(chances) == pytest.approx(0.95, abs=0.01)


@pytest.mark.matrix
def test_coverage_of_users_with_several_rows_and_skewed_values_is_95_percent(by_poisson):
    rng, num_users, repeats, covered = np.random.default_rng(3), 1000, 4000, 0
    for _ in range(repeats):
        users = np.repeat(np.arange(num_users), rng.geometric(0.5, num_users))
        gains = rng.exponential(size=num_users)[users] - 1 + rng.standard_normal(len(users))
        low, high = Sampling(users).difference(gains, np.zeros(len(users)))[1]
        covered += low <= 0 <= high
    assert covered / repeats == pytest.approx(0.95, abs=0.01)
