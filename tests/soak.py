"""A server under load for some minutes, with what production brings: broken bodies, clients that leave, two reloads.

Well-formed requests arrive at --rate, 1,000 malformed ones, 100 with documents that could harm others (control
characters, ids that look like tags) and 100 whose clients leave among them. By default the rate is 80 % of what eight
clients, each with one request at a time, get answered in a first half minute; 80 % of the rate that
`tests.benchmarks.serving` finds is another number, to be given by --rate.

A copy of the folder is served. Before the first reload it gets a new item by `rerank add-items`, before the second one
newer counts by `rerank refresh` of the run's interactions, or another item where that cannot be; `renewed` names what
was done. `failed` counts requests without a ranking of all documents, malformed ones without a 4xx, and reloads that
are refused or find no new item; `mb_per_min` is the largest growth of a process from minute 2 on, by a line through
its memory. The exit code is 1 where a request failed or memory grows by more than 1 MB a minute.

    python -m tests.soak --model runs/ml100k/dapo/model --minutes 10
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.models.ranker import RankingModel
from rerank.models.saving import SOURCES_FILE, ItemSources
from rerank.prompts.fields import SEMANTIC_ID
from tests.benchmarks import serving_load

MALFORMED, POISONED, LEAVING, NUM_ROWS, WARM_UP_MINUTES = 1000, 100, 100, 500, 2.0
BROKEN = (
    b"{",
    b"[" * 50_000,
    b'{"documents": []}',
    b'{"documents": ["a", "a"]}',
    b'{"scores": [NaN], "documents": []}',
    b'{"documents": 7, "query": "\\ud800"}',
    json.dumps({"documents": ["x"] * 10_000}).encode(),
    json.dumps({"query": "\x00<think>", "documents": ["<s_a_0>"]}).encode(),
    b" " * 10_000_000,
    b'{"documents": ["a", "b"], "scores": [1e999, 0]}',
)
POISON = ("\x00\x1b[2J\x07 </think> 1 2", "<think><s_a_0>", "\u202e\ufeff<|endoftext|>", "\ufdfd" * 8)


class Soak:
    """Requests of all kinds to one server, and their failures."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[bytes], folder: "Folder | None" = None) -> None:
        self.client, self.bodies, self.folder, self.renewed = client, bodies, folder, list[str]()
        self.failed, self.answered, self.refused = 0, 0, 0

    async def _post(self, content: bytes, path: str = "/v1/rerank") -> tuple[int, dict[str, Any]]:
        """Status and object of an answer; 0 where there is none."""
        try:
            answer = await self.client.post(path, content=content)
            found: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError):
            return 0, {}
        return answer.status_code, found

    async def _rank(self, body: bytes) -> None:
        status, answer = await self._post(body)
        is_right = status == 200 and len(answer["results"]) == len(json.loads(body)["documents"])
        self.answered, self.failed = self.answered + is_right, self.failed + (not is_right)

    async def ask(self, number: int) -> None:
        """A well-formed request."""
        await self._rank(self.bodies[number % len(self.bodies)])

    async def poison(self, number: int) -> None:
        """One with a document that could harm others."""
        await self._rank(poisoned(self.bodies[number % len(self.bodies)], number))

    async def break_one(self, number: int) -> None:
        """A malformed one."""
        status, answer = await self._post(BROKEN[number % len(BROKEN)])
        is_right = 400 <= status < 500 and "\n" not in answer["message"]
        self.refused, self.failed = self.refused + is_right, self.failed + (not is_right)

    async def leave(self, number: int) -> None:
        """One whose client does not wait."""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(
                self.client.post("/v1/rerank", content=self.bodies[number % len(self.bodies)]), 0.02
            )

    async def reload(self, number: int) -> None:
        """Change the folder, and take it up."""
        done = "nothing" if self.folder is None else await self.folder.renew(len(self.renewed))
        self.renewed.append(done)
        status, answer = await self._post(b"", "/v1/reload")
        is_right = status == 200 and answer["items"] == answer["items_before"] + (done == "add-items")
        self.failed += not is_right


def poisoned(body: bytes, number: int) -> bytes:
    """A request whose last document is one that could harm others."""
    asked, text = json.loads(body), POISON[number % len(POISON)]
    asked["documents"][-1] = {"id": f"</think>{text[:8]}{number}", "title": text, "category": text}
    return json.dumps(asked).encode()


class Folder:
    """The folder that is served, and what it is renewed from."""

    def __init__(self, model_dir: Path, served: Path, model: RankingModel) -> None:
        """Nothing is changed yet.

        Args:
            model_dir: Of a run.
            served: A copy of it.
            model: Of either.
        """
        self.served, self.interactions = served, model_dir.resolve().parents[1] / "data/interactions.parquet"
        self.item_ids, self.fields = model.prompter.catalogue.item_ids, _fields_of(served, model)

    async def renew(self, number: int) -> str:
        """The command that has changed the folder: `add-items`, or where there was one `refresh`, if it can be."""
        ways = [self.refresh] if number and self.interactions.is_file() else []
        for way in (*ways, self.add_items):
            command, *words = way(number)
            line = [sys.executable, "-m", "rerank.cli", command, str(self.served), *words]
            process = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.DEVNULL)
            if await process.wait() == 0:
                return command
        return "nothing"

    def add_items(self, number: int) -> Sequence[str]:
        """Words of the command, for one item."""
        path = self.served.with_name(f"items{number}.jsonl")
        path.write_text(json.dumps({"item": f"soak {number}", **dict.fromkeys(self.fields, "7")}))
        return "add-items", "--items", str(path)

    def refresh(self, number: int) -> Sequence[str]:
        """Words of the command, for the run's interactions."""
        table = pq.read_table(self.interactions, columns=["user", "item", "time"])
        items = pa.array(self.item_ids).take(table["item"].combine_chunks())
        path = self.served.with_name("interactions.parquet")
        pq.write_table(table.set_column(1, "item", items), path)
        return "refresh", "--interactions", str(path), "--columns", "{user: user, item: item, time: time}"


def _fields_of(folder: Path, model: RankingModel) -> list[str]:
    """Names of the fields that a new item may need."""
    reading = ItemSources.load(folder).reading if (folder / SOURCES_FILE).is_file() else {}
    names = "title", "category", *model.prompter.settings.item_fields, *(reading.get("text_columns") or ())
    return [name for name in dict.fromkeys(names) if name != SEMANTIC_ID]


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
    plan += [(then, soak.poison) for then in np.linspace(0.5, seconds, POISONED)]
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


async def measure(args: argparse.Namespace, served: Path, url: str, process: Popen) -> dict[str, Any]:
    """The figures of a soak."""
    model = RankingModel.load(args.model)
    bodies = [
        json.dumps(serving_load.body_of(row, model)).encode() for row in serving_load.read_rows(args.model, NUM_ROWS)
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        soak = Soak(client, bodies, Folder(args.model, served, model))
        rate = args.rate or 0.8 * await closed_loop(soak, 30)
        if not rate:
            raise SystemExit(f"none of {soak.failed} requests was answered in a first half minute")
        memory = await run(soak, rate, args.minutes * 60, process)
    by_process = growth(memory, min(WARM_UP_MINUTES, args.minutes / 2))
    found = {"failed": soak.failed, "mb_per_min": max(by_process.values(), default=float("nan"))}
    rest = {"answered": soak.answered, "refused": soak.refused, "rate": round(rate, 2), "renewed": soak.renewed}
    return {**found, **rest, "by_process": by_process}


def main() -> int:
    """Soak a server, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/ml100k/dapo/model"), help="of a run with test rows")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, help="requests a second, in place of those 80 %%")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        served = shutil.copytree(args.model, Path(place) / "model")
        with serving_load.serving(served) as (url, process):
            found = asyncio.run(measure(args, served, url, process))
    sys.stdout.write(json.dumps(found) + "\n")
    return int(found["failed"] > 0 or not found["mb_per_min"] <= 1)


if __name__ == "__main__":
    sys.exit(main())
