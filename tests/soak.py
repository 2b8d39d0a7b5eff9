"""A server under load for some minutes, with what production brings: broken bodies, clients that leave, two reloads.

Well-formed requests arrive at --rate (by default 80 % of what the server does in a first half minute), 1,000 malformed
ones and 100 whose clients leave among them. `failed` counts well-formed requests without a ranking, malformed ones
without a 4xx, and reloads that are refused; `mb_per_min` is the largest growth of a process from minute 2 on, by a
line through its memory. The exit code is 1 where a request failed or memory grows by more than 1 MB a minute.

    python -m tests.soak --model runs/ml100k/dapo/model --minutes 10
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import numpy as np

from rerank.models.ranker import RankingModel
from tests.benchmarks import serving_load

MALFORMED, LEAVING, NUM_ROWS, WARM_UP_MINUTES = 1000, 100, 500, 2.0
BROKEN = (
    b"{",
    b"[" * 50_000,
    b'{"documents": []}',
    b'{"documents": ["a", "a"]}',
    b'{"scores": [NaN], "documents": []}',
    b'{"documents": 7, "query": "\\ud800"}',
    json.dumps({"documents": ["x"] * 10_000}).encode(),
    json.dumps({"query": "\x00<think>", "documents": ["<s_a_0>"]}).encode(),
)


class Soak:
    """Requests of all kinds to one server, and their failures."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[bytes]) -> None:
        self.client, self.bodies, self.failed, self.answered, self.refused = client, bodies, 0, 0, 0

    async def ask(self, number: int) -> None:
        """A well-formed request."""
        body = self.bodies[number % len(self.bodies)]
        answer = await self.client.post("/v1/rerank", content=body)
        is_right = answer.status_code == 200 and len(answer.json()["results"]) == len(json.loads(body)["documents"])
        self.answered, self.failed = self.answered + is_right, self.failed + (not is_right)

    async def break_one(self, number: int) -> None:
        """A malformed one."""
        answer = await self.client.post("/v1/rerank", content=BROKEN[number % len(BROKEN)])
        is_right = 400 <= answer.status_code < 500 and "\n" not in answer.json()["message"]
        self.refused, self.failed = self.refused + is_right, self.failed + (not is_right)

    async def leave(self, number: int) -> None:
        """One whose client does not wait."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                self.client.post("/v1/rerank", content=self.bodies[number % len(self.bodies)]), 0.02
            )

    async def reload(self, number: int) -> None:
        """Take up the folder anew."""
        self.failed += (await self.client.post("/v1/reload")).status_code != 200


async def closed_loop(soak: Soak, seconds: float, clients: int = 8) -> float:
    """Requests a second that a few clients get answered."""
    until, before = time.monotonic() + seconds, soak.answered

    async def one(number: int) -> None:
        while time.monotonic() < until:
            await soak.ask(number)

    await asyncio.gather(*map(one, range(clients)))
    return (soak.answered - before) / seconds


async def run(soak: Soak, rate: float, seconds: float, process: Popen) -> list[tuple[float, dict[str, float]]]:
    """Everything at its time; returns memory by minutes."""
    plan = [(then, soak.ask) for then in serving_load.poisson(rate, int(rate * seconds), 0)]
    plan += [(then, soak.break_one) for then in np.linspace(0, seconds, MALFORMED)]
    plan += [(then, soak.leave) for then in np.linspace(1, seconds, LEAVING)]
    plan += [(then, soak.reload) for then in (seconds / 3, seconds * 2 / 3)]
    plan.sort(key=lambda one: one[0])
    memory: list[tuple[float, dict[str, float]]] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number, (then, work) in enumerate(plan):
            await asyncio.sleep(max(0.0, began + then - time.monotonic()))
            tasks.create_task(work(number))
            minutes = (time.monotonic() - began) / 60
            if not memory or minutes - memory[-1][0] > 1 / 12:
                memory.append((minutes, serving_load.memory(process)))
    return memory


def growth(memory: list[tuple[float, dict[str, float]]], since: float) -> dict[str, float]:
    """The slope of each process's memory, megabytes a minute."""
    late = [one for one in memory if one[0] >= since]
    if len(late) < 3:
        return {}
    minutes, lasting = [then for then, _ in late], set.intersection(*(set(found) for _, found in late))
    slopes = {name: np.polyfit(minutes, [found[name] for _, found in late], 1)[0] for name in sorted(lasting)}
    return {name: round(float(slope), 3) for name, slope in slopes.items()}


async def measure(args: argparse.Namespace, url: str, process: Popen) -> dict[str, Any]:
    """The figures of a soak."""
    model = RankingModel.load(args.model)
    bodies = [
        json.dumps(serving_load.body_of(row, model)).encode() for row in serving_load.read_rows(args.model, NUM_ROWS)
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        soak = Soak(client, bodies)
        rate = args.rate or 0.8 * await closed_loop(soak, 30)
        memory = await run(soak, rate, args.minutes * 60, process)
    by_process = growth(memory, min(WARM_UP_MINUTES, args.minutes / 2))
    found = {"failed": soak.failed, "mb_per_min": max(by_process.values(), default=float("nan"))}
    rest = {"answered": soak.answered, "refused": soak.refused, "rate": round(rate, 2)}
    return {**found, **rest, "by_process": by_process}


def main() -> int:
    """Soak a server, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/ml100k/dapo/model"), help="of a run with test rows")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, help="requests a second")
    args = parser.parse_args()
    with serving_load.serving(args.model) as (url, process):
        found = asyncio.run(measure(args, url, process))
    sys.stdout.write(json.dumps(found) + "\n")
    return int(found["failed"] > 0 or not found["mb_per_min"] <= 1)


if __name__ == "__main__":
    sys.exit(main())
