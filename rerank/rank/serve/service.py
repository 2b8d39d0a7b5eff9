"""A served model: requests to rankings, and its catalogue and counts taken up anew.

N documents of a request.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from rerank.models.ranker import last_tag_alone, read_answer
from rerank.models.ranking_grammar import RankingGrammar
from rerank.rank.encoder import Prepared, ReadyRow
from rerank.rank.rows import SettledRow
from rerank.rank.serve.batches import Batches
from rerank.rank.serve.documents import RequestRow, read_new_items, read_row
from rerank.rank.serve.protocol import Ranking, Refusal, RerankRequest, read_request, response
from rerank.rank.serve.settings import ServeSettings
from rerank.rank.serve.snapshot import Snapshot

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

RECENT = 0.1  # weight of the last request in the mean of their seconds
UNEXPECTED = "the server could not rank this; its log has the reason under the request id"


@dataclass(frozen=True)
class Written:
    """An engine's answer to one request.

    Attributes:
        text: Without its end token; empty where one token ranks.
        num_tokens: Written.
        truncated: Whether the token limit cut it off.
        logps: (N,) log-probabilities of the labels, where one token ranks.
    """

    text: str
    num_tokens: int
    truncated: bool = False
    logps: Sequence[float] = ()


class Engine(Protocol):
    """An engine that answers single requests; a cancelled call gives their place free."""

    async def write(self, tokens: list[int], grammar: RankingGrammar, max_tokens: int, request_id: str) -> Written:
        """A greedy completion of a prompt by the rules of a grammar."""

    async def compare(self, tokens: list[int], labels: list[int], request_id: str) -> Written:
        """The log-probabilities of labels as the next token."""

    async def is_well(self) -> bool:
        """Whether it can answer."""


@dataclass(frozen=True)
class Job:
    """A request that is ready for the engine."""

    request: RerankRequest
    row: RequestRow
    prepared: ReadyRow | SettledRow


class Service:
    """Ranks requests by a model folder and an engine that serves it.

    Attributes:
        names: Under which the model is served.
        snapshot: Catalogue, counts and what else is read of the folder.
        in_flight: Requests that are accepted and not answered.
        is_draining: Whether no more are accepted.
    """

    def __init__(self, names: Sequence[str], snapshot: Snapshot, engine: Engine, settings: ServeSettings) -> None:
        self.names, self.snapshot, self.engine, self.settings = list(names), snapshot, engine, settings
        self.in_flight, self.is_draining, self._seconds = 0, False, 1.0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="rerank")
        self._prepare: Batches[bytes, Job] = Batches(self._prepared, self._pool)
        self._finish: Batches[tuple[Job, Written | None], Ranking] = Batches(_rankings, self._pool)
        self._reloading = asyncio.Lock()

    async def rerank(self, body: bytes, request_id: str) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Refusal: For one that is not ranked.
        """
        wait = max(1, math.ceil(self._seconds))
        if self.is_draining:
            raise Refusal(503, "the server shuts down; ask again later, or another one", wait)
        if self.in_flight >= self.settings.max_queue:
            raise Refusal(429, f"{self.in_flight} requests are being ranked already; ask again later", wait)
        self.in_flight, began = self.in_flight + 1, time.perf_counter()
        try:
            job = await self._prepare(body)
            ranking = await self._finish((job, await self._ask(job, request_id)))
            self._seconds += RECENT * (time.perf_counter() - began - self._seconds)
            return response(request_id, job.request.model or self.names[0], job.request, ranking, job.row.warnings)
        finally:
            self.in_flight -= 1

    async def _ask(self, job: Job, request_id: str) -> Written | None:
        """The engine's answer; None where there is nothing to ask."""
        ready = job.prepared
        if isinstance(ready, SettledRow):
            return None
        if isinstance(ready.rules, RankingGrammar):
            return await self.engine.write(ready.tokens, ready.rules, ready.asked.max_completion_tokens, request_id)
        return await self.engine.compare(ready.tokens, ready.rules, request_id)

    def _prepared(self, bodies: Sequence[bytes]) -> list[Job | Exception]:
        """Jobs, or why there is none; requests without new items share a batch."""
        snapshot, found = self.snapshot, list[Job | Exception]()
        read = [_attempt(self._read, body, snapshot) for body in bodies]
        rows = [one[1] for one in read if not isinstance(one, Exception) and not one[1].new]
        batch = iter(_prepare_all(rows, snapshot))
        for one in read:
            if isinstance(one, Exception):
                found.append(one)
            else:
                request, row = one
                prepared = _attempt(_with_new, row, snapshot) if row.new else next(batch)
                found.append(_attempt(_job, request, row, prepared, snapshot))
        return found

    def _read(self, body: bytes, snapshot: Snapshot) -> tuple[RerankRequest, RequestRow]:
        request = read_request(body)
        if request.model is not None and request.model not in self.names:
            raise Refusal(404, f"model {request.model[:200]!r} is not served here; ask for {self.names[0]!r}")
        return request, read_row(request, snapshot.encoder, snapshot.sources, snapshot.most_documents)

    async def reload(self) -> dict[str, Any]:
        """Take up the catalogue and the counts that the folder has now; requests in flight keep those of before.

        Raises:
            Refusal: For a folder that cannot be read, or has other weights.
        """
        async with self._reloading:
            loop, before = asyncio.get_running_loop(), self.snapshot
            try:
                self.snapshot = await loop.run_in_executor(None, before.renewed)
            except (ValueError, OSError) as error:
                raise Refusal(409, f"nothing is changed: {error}") from None
            found = self.snapshot.summary
            folder = self.snapshot.folder
            logger.info("reloaded %s: %d items, counts until %s", folder, found["items"], found["counts_until"])
            return {**found, "items_before": before.summary["items"]}

    def drain(self, seconds: float) -> None:
        """Accept no more requests and wait, in a thread beside the event loop, until the others are answered."""
        self.is_draining, began = True, time.monotonic()
        while self.in_flight and time.monotonic() - began < seconds:
            time.sleep(0.02)
        if self.in_flight:
            logger.warning("%d requests are not answered after %.0f seconds, and are dropped", self.in_flight, seconds)

    def describe(self) -> dict[str, Any]:
        """The model, as `/v1/models` lists it."""
        root, summary = str(self.snapshot.folder), self.snapshot.summary
        shared = {"object": "model", "created": self.snapshot.loaded_at, "owned_by": "rerank", "root": root, **summary}
        return {"object": "list", "data": [{"id": name, **shared} for name in self.names]}


def _attempt(work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R | Exception:
    """A result, or the exception in its place."""
    try:
        return work(*args, **options)
    except Refusal as refusal:
        refusal.__context__ = None  # its traceback and that of this one would hold the request
        return refusal.with_traceback(None)
    except Exception as error:
        return error


def _prepare_all(rows: Sequence[RequestRow], snapshot: Snapshot) -> list[Prepared | Exception]:
    """Rows without new items; an unexpected error is that of a single one."""
    prepare = snapshot.encoder.prepare
    try:
        return [*prepare([row.record for row in rows])]
    except Exception:
        alone = [_attempt(prepare, [row.record]) for row in rows]
        return [one if isinstance(one, Exception) else one[0] for one in alone]


def _with_new(row: RequestRow, snapshot: Snapshot) -> Prepared:
    """The row of a request with new items."""
    assert snapshot.sources is not None
    try:
        new = read_new_items(row.new, snapshot.encoder, snapshot.sources)
        encoder = snapshot.encoder.with_items(new, "documents")
    except (ValueError, FileNotFoundError) as error:
        raise Refusal(422, str(error)) from None
    return encoder.prepare([row.record])[0]


def _job(request: RerankRequest, row: RequestRow, prepared: Prepared | Exception, snapshot: Snapshot) -> Job:
    """A request that is ready, with what is to be said of unknown ids."""
    if isinstance(prepared, Exception):
        raise prepared
    if isinstance(prepared, str):
        raise Refusal(422, prepared)
    if isinstance(prepared, ReadyRow) and request.top_k is not None:
        prepared = snapshot.encoder.with_top_k(prepared, request.top_k)
    encoded = prepared.encoded if isinstance(prepared, ReadyRow) else prepared
    in_history, among_documents = encoded.unknown
    if in_history:
        row.warnings.append(f"{in_history} ids of the history are unknown to the model and left out")
    if among_documents:
        dealt = "placed last" if snapshot.encoder.unknown == "last" else "left out"
        row.warnings.append(f"{among_documents} documents are unknown to the model and {dealt}")
    return Job(request, row, prepared)


def _rankings(jobs: Sequence[tuple[Job, Written | None]]) -> list[Ranking | Exception]:
    """Rankings of the engine's answers."""
    return [_attempt(_ranking, job, written) for job, written in jobs]


def _ranking(job: Job, written: Written | None) -> Ranking:
    places = {item_id: place for place, item_id in enumerate(job.row.record["candidates"])}
    if written is None:
        assert isinstance(job.prepared, SettledRow)
        order = [places[item_id] for item_id in job.prepared.ranking]
        return Ranking(order, _reciprocals(len(order)), "1/rank", None)
    assert isinstance(job.prepared, ReadyRow)
    ready, encoded = job.prepared, job.prepared.encoded
    tokens = len(ready.tokens), written.num_tokens
    last = [places[item_id] for item_id in encoded.last]
    if written.logps:
        logps = np.asarray(written.logps)
        best = np.argsort(-logps, kind="stable")
        shares = np.exp(logps - np.logaddexp.reduce(logps))[best]
        order = [places[encoded.ids[place]] for place in best] + last
        return Ranking(order, [*shares.tolist(), *[0.0] * len(last)], "probability", "", *tokens)
    text = ready.asked.begun + last_tag_alone(written.text)
    answer = read_answer(text, written.num_tokens, written.truncated, ready.asked.labels, ready.asked.top_k)
    ranking = encoded.ranking(answer)
    if ranking is None:
        raise RuntimeError(f"the answer {written.text!r} is no ranking: {answer.failure}")
    return Ranking([places[one] for one in ranking], _reciprocals(len(ranking)), "1/rank", answer.trace, *tokens)


def _reciprocals(number: int) -> list[float]:
    return [1 / rank for rank in range(1, number + 1)]
