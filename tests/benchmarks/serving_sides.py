"""The two servers of `serving` and vLLM's scores beside them: what they are asked, and the rates that they bear."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from rerank.metrics import ndcg_at_k
from rerank.models.ranker import RankingModel, read_answer
from rerank.rank.encoder import ReadyRow, RowEncoder
from rerank.rows import RankingRow
from tests.benchmarks import serving_load
from tests.benchmarks.serving_load import Ask, Load, NotMeasured, poisson, send, timed

WARM_UP, IDLE, PRECISION, SLOWER = 50, 50, 1.05, 2.0


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
        if not found:
            raise SystemExit(f"no test row of {model_dir} can be asked: {ready[0] if ready else 'there is none'}")
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
        last = first + len(self.ready[number].asked.labels)
        items, query = lines[first:last], "\n".join([*lines[:first], *lines[last:]])
        body = {"model": "model", "query": query, "items": items, "label_token_ids": [0, 1]}
        answer = await client.post("/generative_scoring", json=body)
        answer.raise_for_status()
        scores = [one["score"] for one in answer.json()["data"]]
        return sorted(range(len(scores)), key=lambda place: -scores[place])

    def ndcg(self, numbers: Sequence[int], orders: Sequence[list[int] | None]) -> float | None:
        """Mean N@5 of rankings of these rows; None where none is graded."""
        graded = [
            ndcg_at_k([self.rows[number].relevance[place] for place in order], 5)
            for number, order in zip(numbers, orders, strict=True)
            if order is not None and self.rows[number].relevance
        ]
        return mean([value for value in graded if value is not None])


def parsed_order(ready: ReadyRow, text: str) -> list[int] | None:
    """The ranking that a free answer states; None where it states none."""
    return read_answer(ready.asked.begun + text, 0, False, ready.asked.labels, ready.asked.top_k).order


def mean(values: Sequence[float]) -> float | None:
    """Of some values; None of none."""
    return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Side:
    """One of the servers."""

    name: str
    ask: Ask

    def measure(
        self, model_dir: Path, requests: Requests, number: int, seed: int, near: float | None = None
    ) -> dict[str, Any]:
        """The figures of one round: a server is started, asked one by one, then under load.

        Args:
            model_dir: That is served.
            requests: That it is asked.
            number: Of those under load that count.
            seed: Of their times.
            near: The rate of the round before.

        Raises:
            NotMeasured: When the server does not start, or answers too slowly at every rate.
        """
        rows = [place % len(requests.rows) for place in range(WARM_UP + number)]
        *others, own = range(psutil.cpu_count() or 1)
        psutil.Process().cpu_affinity(others or [own])  # which the server inherits
        server = serving_load.serving(model_dir, self.name != "ours", serving_load.WITH_RESET)
        with server as (url, _):
            psutil.Process().cpu_affinity([own])
            alone = asyncio.run(self._one_by_one(url, rows))
            idle_seconds = alone.p(50)
            if idle_seconds >= serving_load.FAILED / 2:
                raise NotMeasured(f"{alone.failed} of {IDLE} requests one by one have no answer")

            def probe(rate: float) -> Load:
                serving_load.reset_prefix_cache(url)
                times = poisson(rate, len(rows), seed)
                return asyncio.run(send(self.ask, url, rows, times, WARM_UP, SLOWER * idle_seconds))

            best, load = highest_rate(probe, idle_seconds, near)
        counted, idle = rows[WARM_UP:], dict(zip(rows, alone.orders, strict=False))
        both = [(idle.get(row), order) for row, order in zip(counted, load.orders, strict=True)]
        return {
            "rate": best,
            "idle_p50": idle_seconds,
            "ndcg@5": requests.ndcg(counted, load.orders),
            "changed_share": mean([before != now for before, now in both if before is not None and now is not None]),
            "client_share": load.client_share,
            "failed": alone.failed + load.failed,
        }

    async def _one_by_one(self, url: str, rows: Sequence[int]) -> Load:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            found = [await timed(self.ask, client, row) for row in rows[: 2 * IDLE]]
        seconds = np.array([seconds for _, seconds in found[IDLE:]])
        return Load(seconds, [order for order, _ in found], 0.0, int(np.isinf(seconds).sum()))


def highest_rate(probe: Callable[[float], Load], idle: float, near: float | None = None) -> tuple[float, Load]:
    """The highest rate at which the 95th percentile stays below SLOWER times the idle median, and its requests.

    Args:
        probe: Sends requests at a rate.
        idle: Seconds, the median of an idle server.
        near: A rate that is about the one looked for, such as that of the round before.
    """
    low, high, rate, step = 0.0, math.inf, near or 2 / idle, PRECISION if near else 2.0
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
            raise NotMeasured("even one request now and then is slower than allowed; is the machine quiet?")
    assert best is not None
    return low, best
