"""`tests.benchmarks.serving` and `tests.soak` in small: the search for a rate, arrivals, and the growth of memory."""

import asyncio
import contextlib
import json
import threading
from dataclasses import replace
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_server import JsonHandler
from served import Server, make_folder

from rerank.launch.files import write_json
from rerank.models.ranker import RankingModel
from rerank.rows import FEATURES_FILE, RankingRow
from tests import soak
from tests.benchmarks import busy, serving, serving_load, serving_parts, serving_shares, serving_sides


@pytest.mark.parametrize("most", [3.0, 40.0, 171.0])
def test_the_highest_rate_is_found_to_five_percent(most):
    probed = []

    def probe(rate):
        probed.append(rate)
        return serving_load.Load(np.full(100, 0.1 if rate <= most else 0.5), [], 0.0)

    best, load = serving_sides.highest_rate(probe, idle=0.09)
    assert probed[0] == 2 / 0.09
    assert most / serving_sides.PRECISION <= best <= most and load.p(95) == 0.1 and len(probed) < 20
    for near, most_probes in ((0.98 * most, 2), (1.02 * most, 3), (most / 3, 12), (3 * most, 12)):
        probed.clear()
        best, _ = serving_sides.highest_rate(probe, 0.09, near)
        assert most / serving_sides.PRECISION <= best <= most and len(probed) <= most_probes, (near, probed)
    with pytest.raises(serving_load.NotMeasured, match="is the machine quiet?"):
        serving_sides.highest_rate(lambda rate: serving_load.Load(np.ones(9), [], 0.0), idle=0.09)


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


def test_a_row_is_asked_with_the_numbers_of_its_candidates_that_are_shown(tmp_path):
    shown = {"evidence": "words", "evidence_names": ["first_stage_score", "candidate_price"]}
    names = ["first_stage_score", "candidate_unshown", "candidate_price"]
    features = np.array([[1, 5, 2.5], [0, 6, np.nan], [0, 7, 3], [0, 8, 4]], dtype=np.float32)
    facts = {"names": names, "edges": {name: [0.0] for name in names}}
    requests = make_requests(tmp_path / "run/dapo/model", features=features.tolist(), facts=facts, **shown)
    assert requests.bodies[0]["context"] == {"price": [2.5, None, 3.0, 4.0]}
    assert "candidate_price 2.50" in requests.ready[0].asked.prompt
    with pytest.raises(SystemExit, match="no test row of .* can be asked: column 'price' is missing"):
        make_requests(tmp_path / "without/dapo/model", facts=facts, **shown)


def test_a_share_is_of_the_tokens_that_are_computed():
    prompts = [[1, 2, 3, 9], [1, 5, 6], [1, 2, 3, 8], [1, 2, 3, 7, 7], [2]]
    assert serving_shares.computed_once(prompts) == 3 + 1 + 1 + 2 + 2 + 1
    slow, fast = iter([(9.0, 100), (4.0, 100), (6.0, 100)]), iter([(9.0, 50), (2.5, 50), (2.5, 50)])
    assert serving_shares.share(lambda: next(slow), lambda: next(fast), repeats=2) == 1.0  # (0.8 + 1.2) / 2


# --- the servers


def make_requests(folder, generation=None, number=8, features=None, facts=None, **settings):
    """Requests of a run with these settings of prompts and of generation."""
    one_token = bool(generation and generation.get("one_token"))
    make_folder(folder, one_token=one_token, **settings)
    write_json(folder / "generation.json", {"max_completion_tokens": 64, "trace": True, **(generation or {})})
    if facts:
        write_json(folder / FEATURES_FILE, facts)
    table = folder.parents[1] / "candidates/test.parquet"
    table.parent.mkdir(parents=True)
    lists = {"candidates": [2, 3, 4, 5], "relevance": [0.0, 0.0, 1.0, 0.0], "features": features}
    rows = [{"row_id": row, "user": row, "history": [0, row], **lists} for row in range(number)]
    pq.write_table(pa.Table.from_pylist(rows), table)
    return serving_sides.Requests.of_model(folder, 100)


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


@pytest.mark.parametrize("layout", ["history_first", "candidates_first"])
def test_scores_are_asked_of_each_document_behind_the_rest_of_the_prompt(tmp_path, layout):
    requests, seen = make_requests(tmp_path / "run/dapo/model", layout=layout), []
    reply = {"data": [{"score": score} for score in (0.1, 0.4, 0.4, 0.2)]}
    assert answer_of(requests, "scoring", reply, seen) == [1, 2, 3, 0]  # of equals the one shown first
    ((path, body),) = seen
    assert path == "/generative_scoring" and [item.split("<")[0] for item in body["items"]] == [
        " 1. Title 2", " 2. Title 3", " 3. Title 4", " 4. Title 5",
    ]  # fmt: skip
    assert "History:" in body["query"] and "Title 2" not in body["query"]


def test_ndcg_is_of_graded_rows_that_have_a_ranking(tmp_path):
    requests = make_requests(tmp_path / "run/dapo/model", number=4)
    requests.rows[3] = replace(requests.rows[3], relevance=())
    # the relevant candidate is the third: first 1, third (1 / log2(4)) / (1 / log2(2)) = 0.5
    assert requests.ndcg([0, 1, 2, 3], [[2, 0, 1, 3], [0, 1, 2, 3], None, [0, 1, 2, 3]]) == 0.75
    assert requests.ndcg([3], [[0, 1, 2, 3]]) is None


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


class Handler(JsonHandler):
    """A fake of both servers: rankings in the order shown; every `fails`-th request of a kind has none."""

    seen, fails = [], 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        before = [path for path, _ in self.seen]
        self.seen.append((self.path, body))
        if self.path == "/reset_prefix_cache":
            self.answer(200, {"success": self.path in before})
        elif self.fails and len(self.seen) % self.fails == 0:
            self.answer(500, {})
        else:
            self.answer(200, {"results": [{"index": place} for place in range(4)]})


@pytest.fixture
def started(monkeypatch):
    """Servers that would be started: a fake in their place, for few requests at one rate; gives their options."""
    options = []
    Handler.seen, Handler.fails = [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def serving(*given):
        options.append(given)
        yield f"http://127.0.0.1:{server.server_address[1]}", None

    process = SimpleNamespace(cpu_affinity=lambda cores: None)
    monkeypatch.setattr(serving_sides, "psutil", SimpleNamespace(cpu_count=lambda: 2, Process=lambda: process))
    monkeypatch.setattr(serving_load, "serving", serving)
    monkeypatch.setattr(serving_sides, "WARM_UP", 2)
    monkeypatch.setattr(serving_sides, "IDLE", 3)
    monkeypatch.setattr(serving_sides, "SLOWER", 1e6)
    monkeypatch.setattr(serving_sides, "highest_rate", lambda probe, idle, near: (near or 7.0, probe(1000.0)))
    yield options
    server.shutdown()
    server.server_close()


def test_a_side_counts_requests_without_an_answer(tmp_path, started):
    requests = make_requests(tmp_path / "run/dapo/model")
    side = serving_sides.Side("ours", requests.ours)
    found = side.measure(tmp_path, requests, 6, 0)
    # the relevant candidate is the third: 1 / log2(4) over 1 / log2(2)
    assert found["rate"] == 7 and found["ndcg@5"] == 0.5 and found["changed_share"] == found["failed"] == 0
    assert started[0] == (tmp_path, False, {"VLLM_SERVER_DEV_MODE": "1"})
    paths = [path for path, _ in Handler.seen]  # 2 * IDLE one by one; the cache is emptied, at the second call
    assert paths == ["/v1/rerank"] * 6 + ["/reset_prefix_cache"] * 2 + ["/v1/rerank"] * 8
    Handler.fails = 3
    found = side.measure(tmp_path, requests, 6, 1, near=9.0)
    assert found["rate"] == 9 and found["failed"] >= 2 and found["ndcg@5"] == 0.5
    Handler.fails = 1
    with pytest.raises(serving_load.NotMeasured, match="3 of 3 requests one by one have no answer"):
        side.measure(tmp_path, requests, 6, 0)


def test_a_request_that_fails_is_slower_than_any():
    async def ask(client, row):
        if row % 20 == 0:
            raise httpx.ReadError("gone")
        return [0]

    load = asyncio.run(serving_load.send(ask, "http://127.0.0.1", range(220), np.zeros(220), 20))
    assert load.failed == 10 and load.orders.count(None) == 10 and load.p(50) < 1 and load.p(97) == serving_load.FAILED


def test_a_machine_that_gets_quiet_is_waited_for(monkeypatch):
    shares, slept = iter([0.9, 0.5, 0.05]), []
    monkeypatch.setattr(busy, "busy_share", lambda: next(shares))
    monkeypatch.setattr(busy.time, "sleep", slept.append)
    busy.wait_until_quiet()
    assert len(slept) == 2
    monkeypatch.setattr(busy, "busy_share", lambda: 0.9)
    monkeypatch.setattr(busy, "WAITING_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="the machine is busy"):
        busy.wait_until_quiet()


def run_benchmark(monkeypatch, capsys, folder, out, *words):
    """The exit code of the command and its figures."""
    line = ["serving", "--model", str(folder), "--requests", "6", "--rounds", "2", "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", line)
    code = serving.main()
    return code, json.loads(capsys.readouterr().out)


def test_a_run_that_was_cut_off_is_continued_by_the_same_line(tmp_path, started, monkeypatch, capsys):
    folder, out = tmp_path / "run/dapo/model", tmp_path / "serving.jsonl"
    make_requests(folder)
    monkeypatch.setattr(serving_parts, "wait_until_quiet", lambda: None)
    monkeypatch.setattr(serving, "constraint_overhead", lambda *given: {"1": 1.01})
    monkeypatch.setattr(serving, "shares", lambda *given: {"no_think_share": 0.8, "one_token_share": None})

    def measure(self, model_dir, requests, number, seed, near=None):
        measured.append((self.name, seed, near))
        if len(measured) == cut_at:
            raise KeyboardInterrupt
        if self.name == "scoring":
            raise serving_load.NotMeasured("the server did not start")
        rate = {"ours": 10.0, "plain": 8.0}[self.name] + seed
        return {"rate": rate, "ndcg@5": 0.5, "changed_share": 0.0, "client_share": 0.1, "failed": 1}

    monkeypatch.setattr(serving_sides.Side, "measure", measure)
    measured, cut_at = [], 4
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(monkeypatch, capsys, folder, out)
    assert [json.loads(line)["part"] for line in out.read_text().splitlines()] == [
        "overhead", "shares", "round 0 ours", "round 0 plain",
    ]  # fmt: skip
    out.write_text(out.read_text() + '{"part": "round 1 ou')
    monkeypatch.setattr(serving, "constraint_overhead", None)
    measured, cut_at = [], 0
    code, found = run_benchmark(monkeypatch, capsys, folder, out)
    assert measured == [("scoring", 0, None), ("ours", 1, 10.0), ("plain", 1, 8.0), ("scoring", 1, None)]
    assert code == 1 and set(found["missing"]) == {"round 0 scoring", "round 1 scoring"}
    assert found["throughput_vs_plain"] == round((10 / 8 + 11 / 9) / 2, 4) and found["failed"]["ours"] == 2
    assert found["rates"] == {"ours": [10, 11], "plain": [8, 9], "scoring": []} and found["no_think_share"] == 0.8
    measured = []
    run_benchmark(monkeypatch, capsys, folder, out)
    assert measured == [("scoring", 0, None), ("scoring", 1, None)]
    (folder / "generation.json").write_text((folder / "generation.json").read_text() + " ")  # another model
    monkeypatch.setattr(serving, "constraint_overhead", lambda *given: None)
    measured = []
    run_benchmark(monkeypatch, capsys, folder, out)
    assert len(measured) == 6


def test_the_cache_holds_all_prompts_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_load, "engine_dtype", lambda: "auto")
    monkeypatch.setattr(serving_load.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(serving_load.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(serving_load.os, "environ", dict(serving_load.os.environ))
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    write_json(tmp_path / "config.json", {"model_type": "llama", **shape})  # SmolLM2-135M
    # keys and values of 2 bytes, 30 layers, 3 heads of 64: 23,040 bytes a token; 700 are 22 blocks, and one more
    assert serving_load.cache_bytes(tmp_path, 700) == 23_040 * 23 * 32
    serving_load.set_cache(tmp_path, 256, 700)
    assert serving_load.os.environ["VLLM_CPU_KVCACHE_SPACE"] == "5"  # 4.04 GiB
    serving_load.set_cache(tmp_path, 256, 7000)
    assert serving_load.os.environ["VLLM_CPU_KVCACHE_SPACE"] == "5"
    del serving_load.os.environ["VLLM_CPU_KVCACHE_SPACE"]
    with pytest.raises(SystemExit, match="take 39 GiB of keys and values of .* but 8.0 GiB of memory are free"):
        serving_load.set_cache(tmp_path, 256, 7000)


class ShareEngine:
    """A fake of the engine of the shares: a second for each token that it computes, and none for what it has."""

    def __init__(self, monkeypatch):
        self.now, self.resets, self.stopped = 0.0, 0, []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.stopped.append(1)))
        monkeypatch.setattr("rerank.models.engine.open_engine", lambda *args, **options: self)
        monkeypatch.setattr(serving_shares, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, words, params, use_tqdm):
        salted = [(word.get("cache_salt"), word["prompt_token_ids"]) for word in words]
        by_salt = {salt: [ids for one, ids in salted if one == salt] for salt, _ in salted}
        written = [3 if one.max_tokens > 1 else 1 for one in params]
        self.now += sum(map(serving_shares.computed_once, by_salt.values())) + sum(written)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * number)]) for number in written]


@pytest.mark.parametrize(
    ("generation", "settings", "known"),
    [
        ({}, {}, {"no_think_share"}),
        ({}, {"layout": "candidates_first"}, {"no_think_share", "prefix_share_of_limit", "prefix_limit"}),
        ({"bypass_reasoning": True}, {}, set()),
        ({"one_token": True}, {"ranking": "letter"}, set()),
        ({"trace": False}, {"ranking": "letter"}, set()),
    ],
)
def test_shares_are_of_models_that_can_have_them(tmp_path, monkeypatch, generation, settings, known):
    requests, engine = make_requests(tmp_path / "run/dapo/model", generation, **settings), ShareEngine(monkeypatch)
    found = serving_shares.shares(tmp_path / "run/dapo/model", requests.rows, requests.records, 1)
    assert set(found) == set(serving_shares.FIGURES) and engine.stopped and bool(engine.resets) == bool(known)
    assert {name for name, value in found.items() if value is not None} == known
    assert all(value == 1 for name, value in found.items() if name in known and name != "prefix_limit")
    assert "prefix_limit" not in known or 1 < found["prefix_limit"] < 32


# --- the soak


def soak_of(handle, folder=None):
    """A soak of one request, whose server is this function."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://server")
    return soak.Soak(client, [json.dumps({"query": "m0", "documents": ["m2", "m3"]}).encode()], folder)


def test_a_request_without_an_answer_is_counted(tmp_path):
    def gone(request):
        raise httpx.ReadError("gone", request=request)

    def broken(request):
        return httpx.Response(500, text="Internal Server Error")

    for handle in (gone, broken):
        of_one = soak_of(handle)
        plan = (of_one.ask, of_one.poison, of_one.break_one, of_one.leave, of_one.reload)
        for work in plan:
            asyncio.run(work(0))
        assert (of_one.failed, of_one.answered, of_one.refused) == (4, 0, 0)


def test_poison_is_ranked_and_broken_bodies_are_refused(tmp_path):
    server, seen = Server(make_folder(tmp_path / "model")), []

    async def handle(request):
        seen.append(request.content)
        headers = {"content-length": str(len(request.content))}
        async with server.client(headers=headers) as client:
            return await client.post(request.url.path, content=request.content)

    of_all = soak_of(handle)
    for number in range(len(soak.BROKEN)):
        asyncio.run(of_all.break_one(number))
    assert (of_all.failed, of_all.refused) == (0, len(soak.BROKEN)) and max(map(len, seen)) == 10_000_000
    for number in range(len(soak.POISON)):
        asyncio.run(of_all.poison(number))
    assert (of_all.failed, of_all.answered) == (0, len(soak.POISON))
    texts = [server.engine.tokenizer.decode(asked[0]) for asked in server.engine.asked]
    assert len(texts) == len(soak.POISON) and not [text for text in texts if "</think>" in text or "<s_a_0>" in text]


def test_the_folder_changes_before_each_reload(tmp_path):
    run, served = tmp_path / "run", tmp_path / "served/model"
    folder = make_folder(run / "dapo/model", evidence="words", evidence_names=["popularity"])
    make_folder(served, evidence="words", evidence_names=["popularity"])
    server = Server(served)
    (run / "data").mkdir()
    interactions = {"user": [0, 0, 1], "item": [2, 3, 3], "time": [1.7e9, 1.7e9 + 1, 1.7e9], "position": [0, 1, 0]}
    pq.write_table(pa.table(interactions), run / "data/interactions.parquet")

    async def handle(request):
        async with server.client() as client:
            return await client.post(request.url.path, content=request.content)

    reloaded = soak_of(handle, soak.Folder(folder, served, RankingModel.load(folder)))
    for _ in range(2):
        asyncio.run(reloaded.reload(0))
    assert reloaded.renewed == ["add-items", "refresh"] and reloaded.failed == 0
    summary = server.service.snapshot.summary
    assert summary["items"] == 13 and summary["counts_until"] == "2023-11-14"
    (run / "data/interactions.parquet").unlink()
    asyncio.run(reloaded.reload(0))
    assert reloaded.renewed[2] == "add-items" and reloaded.failed == 0
