"""Servers under load, for `tests.benchmarks.serving` and `tests.soak`: started, asked at Poisson times, measured."""

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from transformers import AutoConfig

from rerank.models.engine import engine_dtype
from rerank.models.ranker import RankingModel
from rerank.rank import serve
from rerank.rank.rows import shown_columns
from rerank.rows import RankingRow, read_records
from rerank.rows.histories import COLUMN

SECONDS_TO_START, SECONDS_TO_STOP = 600, 120
KEYS = ("RERANK_API_KEY", "VLLM_API_KEY")  # which no request here sends
CACHE, BLOCK, MOST_OF_MEMORY = "VLLM_CPU_KVCACHE_SPACE", 32, 0.7  # its variable in GiB, tokens of a block, share
WITH_RESET = {"VLLM_SERVER_DEV_MODE": "1"}  # variables of a server whose prefix cache can be emptied
FAILED = 1e9  # seconds of a request that has no answer, in a percentile

Ask = Callable[[httpx.AsyncClient, int], Awaitable[list[int] | None]]  # the ranking of a row; None for no answer


class NotMeasured(Exception):
    """A figure that there is none of, and why."""


@dataclass(frozen=True)
class Load:
    """Requests that were sent.

    Attributes:
        seconds: Of each answer, infinite where there was none.
        orders: Rankings, None where there was none.
        client_share: Of its core that the client was busy.
        failed: Requests without an answer.
    """

    seconds: np.ndarray
    orders: list[list[int] | None]
    client_share: float
    failed: int = 0

    def p(self, percent: float) -> float:
        """A percentile of the seconds."""
        return float(np.percentile(np.minimum(self.seconds, FAILED), percent))


def read_rows(model_dir: Path, most: int) -> list[RankingRow]:
    """The first test rows of a model's run."""
    records = read_records(model_dir.resolve().parents[1] / "candidates/test.parquet")
    return [RankingRow.of(record) for record in records[:most]]


def set_cache(model_dir: Path, num_prompts: int, tokens: int) -> None:
    """Let engines on a CPU hold the keys and values of some prompts at once; of a GPU they take what there is.

    Args:
        model_dir: Of the model.
        num_prompts: At once.
        tokens: Of the longest of them and its answer.
    """
    needed = cache_bytes(model_dir, tokens) * num_prompts
    if torch.cuda.is_available() or CACHE in os.environ:
        return
    size, room = math.ceil(needed / 2**30), psutil.virtual_memory().available / 2**30
    if size > MOST_OF_MEMORY * room:
        raise SystemExit(
            f"{num_prompts} prompts of {tokens} tokens take {size} GiB of keys and values of {model_dir}, but "
            f"{room:.1f} GiB of memory are free; measure it on a larger machine, or set {CACHE} to fewer"
        )
    os.environ[CACHE] = str(size)


def cache_bytes(model_dir: Path, tokens: int) -> int:
    """Bytes of the keys and values of a prompt of that length, in whole blocks."""
    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    number = 4 if engine_dtype() == "float32" else 2
    blocks = -(-tokens // BLOCK) + 1
    return 2 * number * config.num_hidden_layers * heads * width * blocks * BLOCK


def body_of(row: RankingRow, model: RankingModel) -> dict[str, Any]:
    """The request that asks for a row."""
    ids = model.prompter.catalogue.item_ids
    context: dict[str, Any] = {**row.fields, "time": row.time}
    context |= {"history_times": list(row.history_times), "history_events": list(row.history_events)}
    context |= candidate_columns(row, model)
    query = context.pop("query", "")
    return {
        "query": query,
        "history": [ids[item] for item in row.history],
        "documents": [ids[item] for item in row.candidates],
        "scores": [1 / rank for rank in row.ranks],
        "context": {name: value for name, value in context.items() if value not in (None, [])},
    }


def candidate_columns(row: RankingRow, model: RankingModel) -> dict[str, list[float | None]]:
    """Numbers of each candidate that prompts show, by the column that rows bring them in; None where unknown."""
    found, names = dict[str, list[float | None]](), list(model.prompter.names)
    for name, option in shown_columns(model).items():
        if option == f"evidence_names: {COLUMN}{name}" and row.features is not None:
            values = row.features[:, names.index(f"{COLUMN}{name}")].tolist()
            found[name] = [None if math.isnan(value) else value for value in values]
    return found


def server_words(model_dir: Path, plain: bool, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables and the words behind `vllm` of our server, or of a plain one with the same engine."""
    port = free_port()
    added, words = serve.launch_line(model_dir, "127.0.0.1", port, ["--served-model-name", "model"], environment)
    if plain:
        place = words.index("--logits-processors")
        del words[place : place + 2], added["VLLM_PLUGINS"]
    return added, words


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(
    model_dir: Path, plain: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server, and its process.

    Args:
        model_dir: That is served.
        plain: Whether by vLLM alone.
        variables: Of its environment, beside those that there are.
    """
    added, words = server_words(model_dir, plain, os.environ)
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    with tempfile.TemporaryFile() as log:
        line = [sys.executable, "-m", serve.MODULE, *words]
        environment = {**os.environ, **added, "RERANK_SERVE": json.dumps({"max_queue": 4096}), **(variables or {})}
        for name in KEYS:
            environment.pop(name, None)
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
        try:
            began = time.monotonic()
            while not is_up(url):
                if process.poll() is not None or time.monotonic() - began > SECONDS_TO_START:
                    log.seek(0)
                    raise NotMeasured(f"the server did not start: {log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.5)
            yield url, process
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a server."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def reset_prefix_cache(url: str) -> None:
    """Empty a server's prefix cache, which it does once all requests that were given up have left the engine."""
    until = time.monotonic() + SECONDS_TO_STOP
    try:
        while not httpx.post(f"{url}/reset_prefix_cache", timeout=60).raise_for_status().json()["success"]:
            if time.monotonic() > until:
                raise NotMeasured("the prefix cache cannot be emptied")
            time.sleep(0.1)
    except httpx.HTTPError as error:
        raise NotMeasured(f"the prefix cache cannot be emptied ({error})") from None


class Overloaded(Exception):
    """More requests are slow than may be."""


async def send(
    ask: Ask, url: str, rows: Sequence[int], times: np.ndarray, warm_up: int = 0, most: float = math.inf
) -> Load:
    """Send a request for each row at its time, whatever has been answered; the first ones do not count.

    Args:
        times: (R,) seconds from the start.
        most: Seconds that 95 % of the answers may take; where it is certain that more take longer, the others are not
            waited for, and all count as endless.
    """
    seconds, orders = np.zeros(len(rows)), list[list[int] | None]([None] * len(rows))
    limits, too_slow = httpx.Limits(max_connections=None, max_keepalive_connections=None), 0
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        began, busy = time.perf_counter(), time.process_time()

        async def one(place: int) -> None:
            nonlocal too_slow
            orders[place], seconds[place] = await timed(ask, client, rows[place])
            too_slow += place >= warm_up and seconds[place] > most
            if too_slow > 0.05 * (len(rows) - warm_up) + 1:  # a percentile lies between two of them
                raise Overloaded

        try:
            async with asyncio.TaskGroup() as tasks:
                for place, then in enumerate(times):
                    await asyncio.sleep(max(0.0, began + then - time.perf_counter()))
                    tasks.create_task(one(place))
        except* Overloaded:
            seconds[:] = math.inf
        share = (time.process_time() - busy) / (time.perf_counter() - began)
    failed = int(np.isinf(seconds[warm_up:]).sum())
    return Load(seconds[warm_up:], orders[warm_up:], share, failed)


async def timed(ask: Ask, client: httpx.AsyncClient, row: int) -> tuple[list[int] | None, float]:
    """A ranking and its seconds; none, and infinite ones, for a request that has no answer."""
    sent = time.perf_counter()
    try:
        return await ask(client, row), time.perf_counter() - sent
    except httpx.HTTPError:
        return None, math.inf


def poisson(rate: float, number: int, seed: int) -> np.ndarray:
    """(number,) times of arrival at a rate per second."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, number))


def memory(process: subprocess.Popen) -> dict[str, float]:
    """Megabytes that each process of a server has for itself alone, by its id and name."""
    found = {}
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = one.cmdline()[:1] or [one.name()]
            found[f"{one.pid} {Path(name[0]).name}"] = one.memory_full_info().uss / 1e6
    return found
