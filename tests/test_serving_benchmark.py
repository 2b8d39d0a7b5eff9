"""`tests.benchmarks.serving` and `tests.soak` in small: the search for a rate, arrivals, and the growth of memory."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soak
from benchmarks import serving, serving_load, serving_shares
from served import make_folder

from rerank.launch.files import write_json
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


# --- the servers


def make_requests(folder, generation=None, number=8, **settings):
    """Requests of a run with these settings of prompts and of generation."""
    one_token = bool(generation and generation.get("one_token"))
    make_folder(folder, one_token=one_token, **settings)
    write_json(folder / "generation.json", {"max_completion_tokens": 64, "trace": True, **(generation or {})})
    table = folder.parents[1] / "candidates/test.parquet"
    table.parent.mkdir(parents=True)
    rows = [
        {
            "row_id": row,
            "user": row,
            "history": [0, row],
            "candidates": [2, 3, 4, 5],
            "relevance": [0.0, 0.0, 1.0, 0.0],
        }
        for row in range(number)
    ]
    pq.write_table(pa.Table.from_pylist(rows), table)
    return serving.Requests.of_model(folder, 100)


def answer_of(requests, ask, reply, seen=None):
    """The ranking of the first row by a server that gives this reply."""

    def handle(request):
        if seen is not None:
            seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json=reply)

    async def call():
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://server") as client:
            return await getattr(requests, ask)(client, 0)

    return asyncio.run(call())


@pytest.mark.parametrize(("bypass", "before"), [(False, "<think>why</think>"), (True, "")])
def test_an_answer_of_a_plain_server_is_read_behind_what_the_prompt_begins(tmp_path, bypass, before):
    requests, seen = make_requests(tmp_path / "run/dapo/model", {"bypass_reasoning": bypass}), []

    def of(text):
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}

    assert answer_of(requests, "plain", of(f"{before} 2 1 4 3"), seen) == [1, 0, 3, 2]
    assert seen[0][0] == "/v1/completions" and seen[0][1]["prompt"] == requests.ready[0].tokens
    assert seen[0][1]["max_tokens"] == 64 and seen[0][1]["temperature"] == 0
    assert answer_of(requests, "plain", of("no ranking")) == [0, 1, 2, 3]


class Engine:
    """A fake of the engine in this process: free answers that are told, and seconds by a clock of its own."""

    def __init__(self, monkeypatch, text, ratio=1.5):
        self.text, self.ratio, self.now, self.sizes, self.stopped = text, ratio, 0.0, [], []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.stopped.append(1)))
        monkeypatch.setattr("rerank.models.engine.open_engine", lambda *args, **options: self)
        monkeypatch.setattr("rerank.models.engine.generate", self.generate)
        monkeypatch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def generate(self, engine, prompts, limit, grammars):
        self.now += len(prompts) * (self.ratio if grammars else 1.0)
        self.sizes.append(len(prompts))
        return [[SimpleNamespace(text=self.text)] for _ in prompts]


def test_the_overhead_of_rules_is_of_requests_whose_free_answer_is_a_ranking(tmp_path, monkeypatch):
    requests = make_requests(tmp_path / "run/dapo/model", {"bypass_reasoning": True})
    engine = Engine(monkeypatch, " 2 1 4 3")
    assert serving.constraint_overhead(tmp_path, requests, 2) == {"1": 1.5, "16": 1.5, "256": 1.5}
    assert engine.sizes == [8, *[1] * 6, *[16] * 6, *[256] * 6] and engine.stopped
    engine = Engine(monkeypatch, "no ranking")
    assert serving.constraint_overhead(tmp_path, requests, 2) is None and engine.sizes == [8] and engine.stopped


def test_a_model_of_one_token_has_no_overhead_of_rules(tmp_path):
    requests = make_requests(tmp_path / "run/sft/model", {"one_token": True}, ranking="letter")
    assert requests.one_token and serving.constraint_overhead(tmp_path, requests, 2) is None
