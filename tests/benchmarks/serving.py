"""Requests a second of `rerank serve` against plain `vllm serve`, and the cost of constrained decoding.

Requests of a model's test rows arrive at Poisson times of a fixed seed, at least 500 a rate after 50 of warm-up; the
figure of a server is the highest rate, found to 5 % by bisection, at which the 95th percentile of its seconds stays
below twice the median of an idle server. The plain server gets the same prompts as tokens, written before its time is
taken, by `/v1/completions`; its client parses the answers, and takes the input order where one is no ranking.

- `throughput_vs_plain`: the one rate over the other, the median of five rounds that alternate; `ndcg@5` stands beside.
- `changed_share`: rankings at temperature 0 that differ under load from those of the idle server.
- `constraint_overhead`: by batch size, seconds of decoding with the rules over those without, of requests whose free
  answer is a ranking; their prompts are in the engine's cache.
- `no_think_share`, `one_token_share`, `prefix_share_of_limit`: how many times faster answers without reasoning, those
  of one token, and prompts of lists that 32 users share are, over how many times fewer tokens they take
  (`serving_shares`).
- What a model cannot have is null: one that ranks by one token has no plain server beside it, and no overhead.
- `rates` has those of vLLM's `/generative_scoring` too: a score for each document, of a probability after it.
- `client_share`: of its core that the client was busy, at most; the server has the other cores.

On a quiet machine:

    python -m tests.benchmarks.serving --model runs/ml100k/dapo/model
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import psutil

from rerank.launch import recipe
from rerank.metrics import ndcg_at_k
from rerank.models.ranker import RankingModel, read_answer
from rerank.models.ranking_grammar import RankingGrammar
from rerank.rank.encoder import ReadyRow, RowEncoder
from rerank.rows import RankingRow
from tests.benchmarks import serving_load
from tests.benchmarks.busy import busy_share, refuse_busy
from tests.benchmarks.serving_load import Ask, Load, poisson, send
from tests.benchmarks.serving_shares import shares

WARM_UP, IDLE, PRECISION, SLOWER = 50, 50, 1.05, 2.0
BATCHES = (1, 16, 256)


@dataclass
class Requests:
    """Test rows as both servers are asked for them."""

    rows: list[RankingRow]
    bodies: list[dict[str, Any]]
    records: list[dict[str, Any]]
    ready: list[ReadyRow]
    one_token: bool = False  # whether the model ranks by one token, which a plain server cannot

    @classmethod
    def of_model(cls, model_dir: Path, most: int) -> "Requests":
        """Of the run of a model."""
        model = RankingModel.load(model_dir)
        encoder, rows = RowEncoder(model, model.load_counts()), serving_load.read_rows(model_dir, most)
        bodies = [serving_load.body_of(row, model) for row in rows]
        records = [{**body["context"], **body, "candidates": body["documents"]} for body in bodies]
        ready = encoder.prepare(records)
        kept = [place for place, one in enumerate(ready) if isinstance(one, ReadyRow)]
        found = [one for one in ready if isinstance(one, ReadyRow)]
        return cls(*([of[place] for place in kept] for of in (rows, bodies, records)), found, encoder.one_token)

    async def ours(self, client: httpx.AsyncClient, number: int) -> list[int] | None:
        """A ranking by `rerank serve`."""
        answer = await client.post("/v1/rerank", json=self.bodies[number])
        answer.raise_for_status()
        return [result["index"] for result in answer.json()["results"]]

    async def plain(self, client: httpx.AsyncClient, number: int) -> list[int] | None:
        """A ranking by a plain server, repaired by the input order."""
        ready = self.ready[number]
        limit = ready.asked.max_completion_tokens
        options = {"model": "model", "temperature": 0, "max_tokens": limit, "skip_special_tokens": False}
        answer = await client.post("/v1/completions", json={"prompt": ready.tokens, **options})
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        return parsed_order(ready, choice["text"]) or list(range(len(ready.asked.labels)))

    async def scoring(self, client: httpx.AsyncClient, number: int) -> list[int] | None:
        """An order by scores of the documents one by one, which no model here was trained for: a measure of time."""
        lines = self.ready[number].asked.prompt.split("\n")
        first = lines.index("Candidates:") + 1
        items = lines[first : first + len(self.ready[number].asked.labels)]
        query = "\n".join(lines[:first])
        body = {"model": "model", "query": query, "items": items, "label_token_ids": [0, 1]}
        answer = await client.post("/generative_scoring", json=body)
        answer.raise_for_status()
        scores = [one["score"] for one in answer.json()["data"]]
        return sorted(range(len(scores)), key=lambda place: -scores[place])

    def ndcg(self, numbers: Sequence[int], orders: Sequence[list[int] | None]) -> float:
        """Mean N@5 of rankings of these rows."""
        graded = [
            ndcg_at_k([self.rows[number].relevance[place] for place in order], 5)
            for number, order in zip(numbers, orders, strict=True)
            if order is not None and self.rows[number].relevance
        ]
        return float(np.mean([value for value in graded if value is not None]))


def parsed_order(ready: ReadyRow, text: str) -> list[int] | None:
    """The ranking that a free answer states; None where it states none."""
    return read_answer(ready.asked.begun + text, 0, False, ready.asked.labels, ready.asked.top_k).order


@dataclass
class Side:
    """One of the two servers, and its figures by round."""

    name: str
    ask: Ask
    rates: list[float] = field(default_factory=list)
    ndcg: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    client_share: float = 0.0

    def measure(self, model_dir: Path, requests: Requests, number: int, seed: int) -> None:
        """One round: a server is started, asked one by one, then under load."""
        rows = [place % len(requests.rows) for place in range(WARM_UP + number)]
        *others, own = range(psutil.cpu_count() or 1)
        psutil.Process().cpu_affinity(others or [own])  # which the server inherits
        with serving_load.serving(model_dir, plain=self.name != "ours") as (url, _):
            psutil.Process().cpu_affinity([own])
            alone = asyncio.run(self._one_by_one(url, rows))
            idle = dict(zip(rows, alone.orders, strict=False))
            idle_seconds, near = alone.p(50), self.rates[-1] if self.rates else None

            def probe(rate: float) -> Load:
                times = poisson(rate, len(rows), seed)
                return asyncio.run(send(self.ask, url, rows, times, WARM_UP, SLOWER * idle_seconds))

            best, load = highest_rate(probe, idle_seconds, near)
        counted = rows[WARM_UP:]
        self.rates.append(best)
        self.ndcg.append(requests.ndcg(counted, load.orders))
        known = [(idle[row], order) for row, order in zip(counted, load.orders, strict=True) if row in idle]
        self.changed.append(float(np.mean([before != now for before, now in known])))
        self.client_share = max(self.client_share, load.client_share)

    async def _one_by_one(self, url: str, rows: Sequence[int]) -> Load:
        seconds, orders = [], []
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for row in rows[: 2 * IDLE]:
                began = time.perf_counter()
                orders.append(await self.ask(client, row))
                seconds.append(time.perf_counter() - began)
        return Load(np.array(seconds[IDLE:]), orders, 0.0)


def highest_rate(probe: Callable[[float], Load], idle: float, near: float | None = None) -> tuple[float, Load]:
    """The highest rate at which the 95th percentile stays below SLOWER times the idle median, and its requests.

    Args:
        probe: Sends requests at a rate.
        idle: Seconds, the median of an idle server.
        near: A rate that is about the one looked for, such as that of the round before.
    """
    low, high, rate, step = 0.0, math.inf, near or 0.5 / idle, PRECISION if near else 2.0
    best = None
    while high > low * PRECISION:
        load = probe(rate)
        if load.p(95) < SLOWER * idle:
            low, best = rate, load
        else:
            high = rate
        is_between = 0 < low and high < math.inf
        rate = (low + high) / 2 if is_between else low * step if low else high / step
        step = step**2 if near and not is_between else step  # of a rate that is not near after all
        if best is None and high * idle < 0.01:
            raise SystemExit("even one request now and then is slower than allowed; is the machine quiet?")
    assert best is not None
    return low, best


def constraint_overhead(model_dir: Path, requests: Requests, repeats: int) -> dict[str, float] | None:
    """Seconds of decoding with the rules over those without, by batch size; None where no free answer is a ranking, or
    none is written."""
    if requests.one_token:
        return None
    from rerank.models import engine as vllm_engine

    limit = requests.ready[0].asked.max_completion_tokens
    longest = max(len(one.tokens) for one in requests.ready) + limit
    engine = vllm_engine.open_engine(model_dir, longest, constrained=True)

    def answers(ready: Sequence[ReadyRow], is_constrained: bool) -> tuple[float, list[str]]:
        rules = [one.rules if isinstance(one.rules, RankingGrammar) else None for one in ready]
        began = time.perf_counter()
        prompts = [one.asked.prompt for one in ready]
        found = vllm_engine.generate(engine, prompts, limit, grammars=rules if is_constrained else None)
        return time.perf_counter() - began, [completion.text for (completion,) in found]

    texts = answers(requests.ready, False)[1]
    valid = [one for one, text in zip(requests.ready, texts, strict=True) if parsed_order(one, text)]
    found = {}
    for size in BATCHES if valid else ():
        batch = [valid[place % len(valid)] for place in range(size)]
        ratios = []
        for _ in range(repeats + 1):
            free, constrained = answers(batch, False)[0], answers(batch, True)[0]
            ratios.append(constrained / free)
        found[str(size)] = round(statistics.median(ratios[1:]), 4)
    engine.llm_engine.engine_core.shutdown()
    return found or None


def main() -> None:
    """Measure both servers in turn, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/ml100k/dapo/model"), help="of a run with test rows")
    parser.add_argument("--requests", type=int, default=500, help="a rate (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    refuse_busy(busy_share())
    requests = Requests.of_model(args.model, 1000)
    with patch.dict(os.environ):  # of engines in this process; the servers have their own
        recipe.set_environment()
        overhead = constraint_overhead(args.model, requests, args.rounds)
        saved = shares(args.model, requests.rows[: BATCHES[-1]], requests.records, args.rounds)
    names = [name for name in ("ours", "plain", "scoring") if name != "plain" or not requests.one_token]
    sides = [Side(name, getattr(requests, name)) for name in names]
    for seed in range(args.rounds):
        for side in sides:
            refuse_busy(busy_share())
            side.measure(args.model, requests, args.requests, seed)
    rates = {side.name: side.rates for side in sides}
    ratios = [one / other for one, other in zip(rates["ours"], rates.get("plain", ()), strict=False)]
    found = {
        "throughput_vs_plain": round(statistics.median(ratios), 4) if ratios else None,
        "rates": {name: [round(rate, 2) for rate in of_side] for name, of_side in rates.items()},
        "ndcg@5": {side.name: round(statistics.mean(side.ndcg), 4) for side in sides if side.name != "scoring"},
        "changed_share": {side.name: max(side.changed) for side in sides},
        "client_share": round(max(side.client_share for side in sides), 2),
        "constraint_overhead": overhead,
        **saved,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
