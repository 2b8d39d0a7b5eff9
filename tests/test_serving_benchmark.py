"""`tests.benchmarks.serving` and `tests.soak` in small: the search for a rate, arrivals, and the growth of memory."""

import numpy as np
import pytest
import soak
from benchmarks import serving, serving_load, serving_shares
from served import make_folder

from rerank.models.ranker import RankingModel
from rerank.rows import RankingRow


@pytest.mark.parametrize("most", [3.0, 40.0, 171.0])
def test_the_highest_rate_is_found_to_five_percent(most):
    probed = []

    def probe(rate):
        probed.append(rate)
        return serving_load.Load(np.full(100, 0.1 if rate <= most else 0.5), [], 0.0)

    best, load = serving.highest_rate(probe, idle=0.09)
    assert most / serving.PRECISION <= best <= most and load.p(95) == 0.1 and len(probed) < 20
    with pytest.raises(SystemExit, match="is the machine quiet?"):
        serving.highest_rate(lambda rate: serving_load.Load(np.ones(9), [], 0.0), idle=0.09)


def test_requests_arrive_at_the_rate_whenever_they_are_answered():
    times = serving_load.poisson(20, 4000, seed=1)
    assert times[-1] == pytest.approx(200, rel=0.05) and np.std(np.diff(times)) == pytest.approx(1 / 20, rel=0.1)
    assert np.array_equal(times, serving_load.poisson(20, 4000, seed=1))


def test_growth_is_that_of_each_process_from_some_minute_on():
    memory = [(minute, {"1 a": 50 + 2.5 * minute, "2 b": 80.0 + (minute < 2) * 99}) for minute in range(11)]
    memory.append((11, {"2 b": 80.0, "1 a": 77.5, "3 c": 1000.0}))
    assert soak.growth(memory, 2) == {"1 a": 2.5, "2 b": pytest.approx(0, abs=1e-3)}
    assert soak.growth(memory, 11) == {}


def test_a_row_is_asked_by_original_ids(tmp_path):
    row = RankingRow(
        1, (0, 1), (2, 3), ranks=(2, 1), fields={"age": 3, "query": "tv"}, time=5.0, history_times=(1, None)
    )
    assert serving_load.body_of(row, RankingModel.load(make_folder(tmp_path / "model"))) == {
        "query": "tv",
        "history": ["m0", "m1"],
        "documents": ["m2", "m3"],
        "scores": [0.5, 1.0],
        "context": {"age": 3, "time": 5.0, "history_times": [1, None]},
    }


def test_a_share_is_of_the_tokens_that_are_computed():
    prompts = [[1, 2, 3, 4, 9], [1, 2, 3, 4, 8], [1, 2, 3, 4, 7, 7]]
    assert serving_shares.prefix_limit(prompts) == 16 / 8
    assert serving_shares.prefix_limit([[1, 2], [2, 2]]) == 1.0
    slow, fast = iter([(9.0, 100), (4.0, 100), (6.0, 100)]), iter([(9.0, 50), (2.5, 50), (2.5, 50)])
    assert serving_shares.share(lambda: next(slow), lambda: next(fast), repeats=2) == 1.0  # (0.8 + 1.2) / 2
