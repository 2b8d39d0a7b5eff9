"""Intervals over users and seeds: their coverage in a simulation, and limits in which a textbook gives them."""

import numpy as np
import pytest
from scipy import stats

from rerank.results.intervals import Sampling

USERS = 100


def rows_of_users(rng):
    """(R,) users with one to several rows each."""
    return np.repeat(np.arange(USERS), rng.geometric(0.3, size=USERS))


def spread(rng, users, num_seeds, scales):
    """(S, R) values of mean 0 with parts of seeds, of users, of users with a seed, and of single values.

    Scales are standard deviations: of a seed, of a user, of a user with a seed, of a value.
    """
    seeds, of_user, of_both, of_value = scales
    return (
        seeds * rng.standard_normal((num_seeds, 1))
        + of_user * rng.standard_normal((1, USERS))[:, users]
        + of_both * rng.standard_normal((num_seeds, USERS))[:, users]
        + of_value * rng.standard_normal((num_seeds, len(users)))
    )


def model_and_baseline(rng, users, num_seeds, scales):
    """A model of several seeds, and a ranker without a seed."""
    return spread(rng, users, num_seeds, scales), spread(rng, users, 1, (0, 0.1, 0, 0.1))


def two_variants(rng, users, num_seeds, scales):
    """Two variants whose seeds have nothing in common."""
    return spread(rng, users, num_seeds, scales), spread(rng, users, num_seeds, scales)


def two_of_one_start(rng, users, num_seeds, scales):
    """Two variants that start, seed by seed, from one model, and vary far less than it."""
    start = spread(rng, users, num_seeds, (0.1, 0.3, 0.2, 0.2))
    return [start + spread(rng, users, num_seeds, scales) for _ in range(2)]


def two_on_lists_of_their_seed(rng, users, num_seeds, scales):
    """As before; each seed has lists of its own, so that one row in five is evaluated with some seeds only."""
    first, second = two_of_one_start(rng, users, num_seeds, scales)
    lost = rng.random(first.shape) < 0.2
    lost[0, lost.all(axis=0)] = False
    return np.where(lost, np.nan, first), np.where(lost, np.nan, second)


SCALES = {  # of a seed, a user, a user with a seed, a value
    "seeds as wide as users": (0.02, 0.1, 0.05, 0.2),
    "seeds wider than users": (0.05, 0.05, 0.02, 0.1),
    "each seed ranks other users well": (0.0, 0.03, 0.2, 0.2),
}
OF_ONE_MODEL = {"seeds vary little": (0.003, 0.1, 0.05, 0.2), "users alone": (0.0, 0.2, 0.0, 0.02)}
CASES = [
    pytest.param(simulate, scales, id=f"{simulate.__name__}, {name}")
    for simulate in (model_and_baseline, two_variants, two_of_one_start, two_on_lists_of_their_seed)
    for name, scales in {**SCALES, **(OF_ONE_MODEL if simulate is model_and_baseline else {})}.items()
]


def covered(simulate, num_seeds, scales, interval, repeats=1500):
    """The share of simulations whose interval holds the true difference, 0."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        users = rows_of_users(rng)
        low, high = interval(users, *simulate(rng, users, num_seeds, scales))
        hits += low <= 0 <= high
    return hits / repeats


def ours(users, values, baseline):
    return Sampling(users).difference(values, baseline)[1]


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize(("simulate", "scales"), CASES)
def test_coverage_of_intervals_over_users_and_seeds_is_95_percent(simulate, num_seeds, scales):
    assert 93 <= round(100 * covered(simulate, num_seeds, scales, ours)) <= 97


def by_satterthwaite(users, values, baseline):
    """Student's t of Satterthwaite's degrees of freedom, the variances of seeds and users added."""
    gains = values - baseline
    by_user = np.array([np.bincount(users, weights=row) for row in gains - gains.mean()]) / gains.size
    (num_seeds, num_users), of_seed, of_user = by_user.shape, by_user.sum(axis=1), by_user.sum(axis=0)
    seeds = num_seeds / (num_seeds - 1) * (of_seed**2).sum()
    users_part = num_users / (num_users - 1) * (of_user**2).sum()
    freedom = (seeds + users_part) ** 2 / (seeds**2 / (num_seeds - 1) + users_part**2 / (num_users - 1))
    half = stats.t.ppf(0.975, freedom) * (seeds + users_part) ** 0.5
    return gains.mean() - half, gains.mean() + half


def test_coverage_by_satterthwaite_is_too_low_where_three_seeds_vary_more_than_users():
    assert covered(two_variants, 3, (0.05, 0.1, 0, 0.1), by_satterthwaite) < 0.93
    assert covered(two_variants, 3, (0.05, 0.1, 0, 0.1), ours) >= 0.93


def test_coverage_of_users_alone_is_far_less_where_seeds_vary():
    def of_mean(users, values, baseline):
        return Sampling(users, num_samples=200).difference(values.mean(axis=0), baseline.mean(axis=0))[1]

    assert covered(two_variants, 3, (0.05, 0.1, 0, 0.2), of_mean, repeats=200) < 0.7


def test_where_only_seeds_vary_the_interval_is_that_of_a_t_test_of_their_means():
    values = np.array([[0.1], [0.4], [0.2]]) * np.ones((3, 6))
    found, bounds = Sampling([0, 0, 1, 2, 3, 3]).difference(values, np.zeros(6))
    expected = stats.ttest_1samp([0.1, 0.4, 0.2], 0).confidence_interval(0.95)
    assert found == pytest.approx(0.7 / 3)
    assert bounds == pytest.approx([expected.low, expected.high])


def test_where_only_users_vary_the_interval_is_that_of_a_t_test_of_users():
    of_user = np.array([0.1, 0.5, -0.2, 0.3])
    found, bounds = Sampling([4, 5, 6, 7]).difference(np.tile(of_user, (5, 1)), np.zeros(4))
    expected = stats.ttest_1samp(of_user, 0).confidence_interval(0.95)
    assert found == pytest.approx(of_user.mean())
    assert bounds == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize("of_seeds", [0.0, 1.0], ids=["interaction alone", "seeds too"])
def test_the_half_width_is_that_of_a_two_way_analysis_written_out(of_seeds):
    rng, num_seeds, num_users = np.random.default_rng(1), 3, 8
    values = of_seeds * rng.normal(size=(num_seeds, 1)) + rng.normal(size=(num_seeds, num_users))
    mean, of_seed, of_user = values.mean(), values.mean(axis=1), values.mean(axis=0)
    seeds = sum((x - mean) ** 2 for x in of_seed) / (num_seeds - 1) / num_seeds
    users = sum((x - mean) ** 2 for x in of_user) / (num_users - 1) / num_users
    rest = [values[s, u] - of_seed[s] - of_user[u] + mean for s in range(num_seeds) for u in range(num_users)]
    both = sum(x**2 for x in rest) / (num_seeds - 1) / (num_users - 1) / (num_seeds * num_users)
    assert (seeds > both) == bool(of_seeds)
    if seeds > both:
        variance = users + seeds - both
        share = min(1, seeds / variance)
        t = share * stats.t.ppf(0.975, num_seeds - 1) + (1 - share) * stats.t.ppf(0.975, num_users - 1)
    else:
        variance, t = users, stats.t.ppf(0.975, num_users - 1)
    _, bounds = Sampling(range(num_users)).difference(values, np.zeros(num_users))
    assert bounds == pytest.approx([mean - t * variance**0.5, mean + t * variance**0.5])


def test_a_row_that_a_seed_lacks_has_no_part_in_the_mean_and_one_that_all_lack_is_refused():
    values = np.array([[0.5, np.nan, 0.1], [0.3, 0.9, 0.0]])
    found, _ = Sampling([0, 1, 2]).difference(values, np.zeros(3))
    assert found == pytest.approx((0.5 + 0.1 + 0.3 + 0.9 + 0.0) / 5)
    with pytest.raises(ValueError, match="row 1 of 3 has no value"):
        Sampling([0, 1, 2]).difference(values[0], np.zeros(3))


def test_a_rate_with_one_case_a_row_is_a_mean():
    rng = np.random.default_rng(2)
    first, second, ones = rng.integers(2, size=(3, 50)), rng.integers(2, size=(3, 50)), np.ones((3, 50))
    sampling = Sampling(rng.integers(12, size=50))
    found = sampling.rate_difference(first, ones, second, ones)
    expected = sampling.difference(first, second)
    assert found[0] == pytest.approx(expected[0]) and found[1] == pytest.approx(expected[1])


def test_coverage_of_a_difference_of_rates_over_seeds_is_95_percent():
    rng, covered, repeats = np.random.default_rng(3), 0, 1000
    for _ in range(repeats):
        users = rng.integers(80, size=200)
        cases, other_cases = rng.binomial(1, 0.5, (2, 3, 200))
        events, others = rng.binomial(cases, 0.3), rng.binomial(other_cases, 0.3)
        _, (low, high) = Sampling(users).rate_difference(events, cases, others, other_cases)
        covered += low <= 0 <= high
    assert 0.93 <= covered / repeats <= 0.985  # seeds and users have no part of their own here, so that it is wide


def test_one_user_has_no_interval():
    found, bounds = Sampling([3, 3]).difference([[1.0, 2.0], [0.0, 1.0]], [0.0, 0.0])
    assert found == 1.0 and np.isnan(bounds).all()


def test_differences_of_every_two_columns_are_those_of_each_pair():
    rng, users = np.random.default_rng(4), np.random.default_rng(5).integers(20, size=60)
    columns, sampling = rng.random((4, 60)), Sampling(users, 300, seed=7)
    lost = np.vstack([np.zeros((1, 60), dtype=bool), rng.random((2, 60)) < 0.2])
    seeds = [columns[0], rng.random((3, 60)), np.where(lost, np.nan, columns[1])]
    for of in (list(columns), seeds):
        found = sampling.differences(of)
        assert list(found) == [(later, earlier) for later in range(len(of)) for earlier in range(later)]
        for (later, earlier), (difference, bounds) in found.items():
            one, ends = sampling.difference(of[later], of[earlier])
            assert difference == pytest.approx(one) and bounds == pytest.approx(ends)
    assert Sampling(users).differences([]) == {}
