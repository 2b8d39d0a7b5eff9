"""Metrics as written-out fractions."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, kendalltau

from rerank.metrics import (
    METRICS,
    auc,
    best_first,
    compared,
    has_pairs,
    kendall_tau,
    kendall_taus,
    mean_random_metrics,
    ndcg_at_k,
    parse_metric,
    ranking_metrics,
    recall_at_k,
    reciprocal_rank,
)
from rerank.results.intervals import Sampling

NAN = math.nan


def test_ndcg_divides_by_the_best_order():
    # hit at rank 3: (1/log2 4) / (1/log2 2) = 0.5
    assert ndcg_at_k([0, 0, 1, 0], 5) == pytest.approx(0.5)
    assert ndcg_at_k([0, 0, 1, 0], 2) == 0.0
    # gains 1, 0, 7, 3: DCG@3 = 1/log2 2 + 0 + 7/log2 4 = 4.5; ideal 7, 3, 1: 7 + 3/log2 3 + 1/2
    assert ndcg_at_k([1, 0, 3, 2], 3) == pytest.approx(4.5 / (7 + 3 / math.log2(3) + 0.5))


def test_recall_counts_the_share_of_relevant_items_in_the_first_k():
    assert [recall_at_k([0, 1, 0, 2], k) for k in (1, 2, 4)] == [0, 1 / 2, 1]


def test_reciprocal_rank_is_that_of_the_first_relevant_item():
    assert reciprocal_rank([0, 0, 1, 1]) == 1 / 3


def test_a_ranking_without_a_relevant_item_has_no_metric():
    gains = [0, 0, 0]
    assert (ndcg_at_k(gains, 5), recall_at_k(gains, 5)) == (None, None)
    assert all(metric(gains) is None for metric in (reciprocal_rank, ranking_metrics, mean_random_metrics, auc))


def test_ranking_metrics_of_a_hit_at_rank_seven():
    # log2(7 + 1) = 3, so N@10 = 1/3
    values = ranking_metrics([0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    assert values == pytest.approx({"R@1": 0, "R@5": 0, "N@5": 0, "N@10": 1 / 3, "MRR": 1 / 7})


@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0], [2, 1, 0, 0, 0, 1], [3, 0], [2, 0, 1], [1, 2, 3, 0, 0, 4]])
def test_random_metrics_equal_the_mean_over_all_orders(grades):
    names = (*METRICS, "AUC", "R@2", "N@1", "N@3", "N@100")
    orders = [ranking_metrics(order, names) for order in itertools.permutations(grades)]
    expected = {name: np.mean([values[name] for values in orders]) for name in names}
    assert mean_random_metrics(grades, names) == pytest.approx(expected)
    assert mean_random_metrics([NAN, *grades[:1], NAN, *grades[1:]], names) == mean_random_metrics(grades, names)


def test_random_metrics_of_three_items_by_hand():
    # gains 3, 1 and 0: mean 4/3; the first relevant item is first with chance 2/3, else second
    found = mean_random_metrics([0, 2, 1], ("R@1", "N@1", "N@3", "MRR", "AUC"))
    discounts = 1 + 1 / math.log2(3) + 1 / 2
    wanted = {"R@1": 1 / 3, "N@1": 4 / 3 / 3, "N@3": 4 / 3 * discounts / (3 + 1 / math.log2(3))}
    assert found == pytest.approx({**wanted, "MRR": 2 / 3 + 1 / 6, "AUC": 0.5})


def test_unjudged_items_are_left_out_before_anything_is_computed():
    shown, judged_alone = [NAN, 0, NAN, 1, NAN, 2, 0], [0, 1, 2, 0]
    for metric in (lambda g: ndcg_at_k(g, 2), lambda g: recall_at_k(g, 2), reciprocal_rank, auc, ranking_metrics):
        assert metric(shown) == metric(judged_alone)
    assert reciprocal_rank(shown) == 1 / 2 and recall_at_k(shown, 2) == 1 / 2 and auc(shown) == 1 / 2
    assert ndcg_at_k(shown, 2) == pytest.approx((1 / math.log2(3)) / (3 + 1 / math.log2(3)))  # gains 0, 1 of 3, 1
    for grades in ([NAN, NAN], [NAN, 0], []):
        assert all(metric(grades) is None for metric in (reciprocal_rank, ranking_metrics, mean_random_metrics, auc))
    assert auc([NAN, 1]) is None and ndcg_at_k([NAN, 1], 1) == 1.0
    assert best_first([NAN, 1, NAN, 2]) == [3, 1, 0, 2]


def test_a_list_has_pairs_where_one_judged_item_is_relevant_and_another_is_not():
    assert has_pairs([0, 2]) and has_pairs([NAN, 1, 0])
    assert not any(has_pairs(grades) for grades in ([1, 2], [1, NAN], [0, 0], [NAN], []))


def test_metrics_have_names():
    parsed = {"R@1": ("R", 1), "N@10": ("N", 10), "MRR": ("MRR", 0), "AUC": ("AUC", 0)}
    assert {name: parse_metric(name) for name in parsed} == parsed
    for name in ("N@0", "N@-1", "n@5", "N@05", "MRR@10", "NDCG", "R@", ""):
        with pytest.raises(ValueError, match="is no metric; write R@k"):
            parse_metric(name)
    assert compared(METRICS) == ("N@5", "R@1") and compared(("R@9", "MRR", "N@7", "N@1", "R@1")) == ("N@7", "R@9")
    grades = [0, 2, 0, 1]
    found = ranking_metrics(grades, ("AUC", "N@3", "R@2", "MRR"))
    assert found == {"AUC": 1 - 3 / 4, "N@3": ndcg_at_k(grades, 3), "R@2": 1 / 2, "MRR": 1 / 2}
    assert ranking_metrics([1, 1]) is not None and ranking_metrics([1, 1], ("AUC",)) is None


def test_interval_draws_whole_users_and_weighs_them_by_their_rows():
    # Three rows of user 7 with difference 1, one of user 9 with -1: the mean over rows is (3 - 1) / 4.
    # A draw of two users is -1, 0.5 or 1, the outer ones with chance 1/4 each; one of four single rows is rarely -1.
    assert Sampling([7, 7, 7, 9]).difference([1, 1, 1, -1], [0, 0, 0, 0]) == (0.5, [-1.0, 1.0])


def test_interval_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(0)
    values, users = rng.random(50), rng.integers(20, size=50)
    first, again, other = (Sampling(users, seed=seed).difference(values, np.zeros(50)) for seed in (3, 3, 4))
    assert first == again != other


def test_a_rate_interval_draws_users_whose_cases_differ():
    # User 0: 3 of 4 against 1 of 2; user 1: 0 of 1 against 1 of 1; user 2 has no case and changes nothing.
    events, cases = [1, 2, 0, 0], [2, 2, 1, 0]
    others, other_cases = [1, 0, 1, 0], [1, 1, 1, 0]
    found, bounds = Sampling([0, 0, 1, 2]).rate_difference(events, cases, others, other_cases)
    assert found == pytest.approx(3 / 5 - 2 / 3)
    assert bounds == pytest.approx([0 / 1 - 1 / 1, 3 / 4 - 1 / 2])  # each outer draw has chance 1/4


def test_a_rate_interval_is_that_of_scipy():
    rng = np.random.default_rng(1)
    cases, other_cases, users = rng.integers(1, 3, 80), rng.integers(1, 3, 80), rng.integers(25, size=80)
    events, others = rng.binomial(cases, 0.6), rng.binomial(other_cases, 0.3)
    sums = [np.bincount(users, weights=column) for column in (events, cases, others, other_cases)]

    def difference(a, of, b, of_b, axis):
        return a.sum(axis) / of.sum(axis) - b.sum(axis) / of_b.sum(axis)

    drawn = bootstrap(sums, difference, n_resamples=2000, batch=100, paired=True, method="percentile", rng=0)
    found = Sampling(users).rate_difference(events, cases, others, other_cases)
    assert found[0] == pytest.approx(difference(*sums, axis=0))
    assert found[1] == pytest.approx([*drawn.confidence_interval])


def test_a_rate_interval_of_too_few_cases_is_nan():
    sampling = Sampling([0, 1])
    found, bounds = sampling.rate_difference([0, 0], [0, 0], [1, 0], [1, 1])
    assert np.isnan([found, *bounds]).all()
    found, bounds = sampling.rate_difference([1, 0], [1, 0], [0, 0], [1, 0])
    assert found == 1 and np.isnan(bounds).all()


def test_intervals_refuse_columns_of_different_length():
    with pytest.raises(ValueError, match=r"\[2, 1\] values for 2 users; an interval needs one for each user"):
        Sampling([0, 1]).difference([1, 2], [1])
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 2\] values for 2 users"):
        Sampling([0, 1]).rate_difference([1], [1, 1], [0, 0], [1, 1])
    with pytest.raises(ValueError, match=r"\[0, 0\] values for 0 users"):
        Sampling([]).difference([], [])


def test_best_first_keeps_ties_in_their_order():
    assert best_first([0.5, 1.0, 0.5, 1.0]) == [1, 3, 0, 2]


def test_kendall_taus_are_scipys():
    rng = np.random.default_rng(0)
    assert kendall_taus(np.array([[0], [0]])).tolist() == [1.0, 1.0] and kendall_tau([0]) == 1.0
    # one neighbouring swap of four items: 5 pairs in order, 1 not, of 6
    assert kendall_tau([1, 0, 2, 3]) == pytest.approx(4 / 6)
    for size in (2, 3, 10, 25):
        orders = np.array([rng.permutation(size) for _ in range(5)])
        assert kendall_taus(orders) == pytest.approx([kendalltau(range(size), order).statistic for order in orders])


def test_auc_is_the_double_sum_of_its_equation():
    assert auc([1, 1]) is None and auc([]) is None
    rng = np.random.default_rng(0)
    for gains in rng.choice([0, 0, 1, 2], (50, 10)):
        positives, negatives = np.flatnonzero(gains > 0), np.flatnonzero(gains == 0)
        pairs = [i < j for i in positives for j in negatives]
        assert auc(gains) == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)
