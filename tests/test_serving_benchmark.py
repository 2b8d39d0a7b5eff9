"""`tests.benchmarks.serving` and `tests.soak` in small: the search for a rate, arrivals, and the growth of memory."""

import asyncio

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
    for near, most_probes in ((0.98 * most, 2), (1.02 * most, 3), (most / 3, 12), (3 * most, 12)):
        probed.clear()
        best, _ = serving.highest_rate(probe, 0.09, near)
        assert most / serving.PRECISION <= best <= most and len(probed) <= most_probes, (near, probed)
    with pytest.raises(SystemExit, match="is the machine quiet?"):
        serving.highest_rate(lambda rate: serving_load.Load(np.ones(9), [], 0.0), idle=0.09)


@pytest.mark.parametrize("slow", [1, 5])
def test_a_rate_at_which_too_many_are_slow_is_given_up(slow):
    asked = []

    async def ask(client, row):
        asked.append(row)
        await asyncio.sleep(0.05 if row % 20 < slow else 0)
        return [0]

    load = asyncio.run(serving_load.send(ask, "http://127.0.0.1", range(220), np.arange(220) / 2000, 20, most=0.02))
    assert np.isinf(load.seconds).all() == (slow > 1) and len(load.orders) == 200
    assert len(asked) == 220 or slow > 1 and len(asked) < 200


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
    prompts = [[1, 2, 3, 9], [1, 5, 6], [1, 2, 3, 8], [1, 2, 3, 7, 7], [2]]
    assert serving_shares.computed_once(prompts) == 3 + 1 + 1 + 2 + 2 + 1
    slow, fast = iter([(9.0, 100), (4.0, 100), (6.0, 100)]), iter([(9.0, 50), (2.5, 50), (2.5, 50)])
    assert serving_shares.share(lambda: next(slow), lambda: next(fast), repeats=2) == 1.0  # (0.8 + 1.2) / 2
