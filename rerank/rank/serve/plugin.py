"""vLLM's endpoint plugin: the routes of `rerank serve` inside vLLM's API server, over its own engine client.

vLLM loads it where VLLM_PLUGINS names it, in the process of the API server alone. Engines that train never do.
"""

import asyncio
import logging
import os
import signal
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State

from rerank.models.engine import sampling_params
from rerank.models.ranking_grammar import RankingGrammar
from rerank.rank.serve.protocol import Refusal
from rerank.rank.serve.routes import attach
from rerank.rank.serve.service import Service, Written
from rerank.rank.serve.settings import KEY, ServeSettings
from rerank.rank.serve.snapshot import Snapshot

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)


class OneLine(logging.Formatter):
    """Lines whose messages hold no control character, whatever a client or the model wrote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without its traceback."""
        record.message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


def log_to_stderr() -> None:
    """Write the log of the server to stderr, from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("rerank")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.getLogger("rerank.rank.items").setLevel(logging.ERROR)  # of the new items of every request


class VllmEngine:
    """The engine of vLLM's API server (`rerank.rank.serve.service.Engine`)."""

    def __init__(self, client: "EngineClient") -> None:
        self.client = client

    async def write(self, tokens: list[int], grammar: RankingGrammar, max_tokens: int, request_id: str) -> Written:
        """A greedy completion of a prompt by the rules of a grammar."""
        output = (await self._last(tokens, sampling_params(max_tokens, grammar), request_id)).outputs[0]
        return Written(output.text, len(output.token_ids), output.finish_reason == "length")

    async def compare(self, tokens: list[int], labels: list[int], request_id: str) -> Written:
        """The log-probabilities of labels as the next token."""
        output = (await self._last(tokens, sampling_params(1, logprob_token_ids=labels), request_id)).outputs[0]
        assert output.logprobs is not None
        return Written("", 1, logps=[output.logprobs[0][label].logprob for label in labels])

    async def _last(self, tokens: list[int], params: "SamplingParams", request_id: str) -> "RequestOutput":
        """The whole answer; vLLM frees the place of a request that is cancelled."""
        from vllm import TokensPrompt
        from vllm.exceptions import GracefulHTTPError
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        last = None
        try:
            async for output in self.client.generate(TokensPrompt(prompt_token_ids=tokens), params, request_id):
                last = output
        except GracefulHTTPError as error:  # a limit of vLLM's own options
            raise Refusal(429, str(error), 1) from None
        if last is None or not last.finished or last.outputs[0].finish_reason == "abort":
            raise Refusal(503, "the server shuts down; ask again later, or another one", 1)
        return last

    async def is_well(self) -> bool:
        """Whether it can answer."""
        return not self.client.errored


class RerankPlugin:
    """The plugin, as vLLM's entry point group `vllm.endpoint_plugins` wants it."""

    name = "rerank"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.settings = ServeSettings.of_environment(os.environ)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; those of vLLM with the same path give way."""
        log_to_stderr()
        attach(app, self.settings)

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Read the model folder, and let SIGHUP read it again and SIGTERM wait for the requests in flight.

        Raises:
            ValueError: For a folder that cannot be served, and a key that would leave routes open.
        """
        assert engine_client is not None, "required_tasks asks for an engine"
        if args.api_key and self.settings.api_key is None:
            raise ValueError(f"--api-key of vLLM leaves /rerank open; give the key by the variable {KEY}")
        context = engine_client.model_config.max_model_len
        snapshot = Snapshot.load(args.model, self.settings.unknown, self.settings.one_token, context)
        names = args.served_model_name or [args.model]
        state.rerank = service = Service(names, snapshot, VllmEngine(engine_client), self.settings)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, start_reload, service)
        drain_before_shutdown(engine_client, service)
        logger.info(
            "serving %s as %s: labels %s, %d items, at most %d documents", snapshot.folder, names[0],
            snapshot.summary["labels"], snapshot.summary["items"], snapshot.most_documents,
        )  # fmt: skip


_tasks: set[asyncio.Task[None]] = set()  # or a task could be collected before it ends


def start_reload(service: Service) -> None:
    """Take up the folder anew, and say in the log where that fails."""
    task = asyncio.ensure_future(_reload(service))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _reload(service: Service) -> None:
    try:
        await service.reload()
    except Refusal as refusal:
        logger.error("reload: %s", refusal.message)
    except Exception:
        logger.exception("reload: unexpected error")


def drain_before_shutdown(client: "EngineClient", service: Service) -> None:
    """Let vLLM's engine be shut down only when all accepted requests are answered, also those whose prompts are not
    written yet; vLLM itself waits for those in the engine alone."""
    shutdown = client.shutdown

    def drained(timeout: float | None = None) -> None:
        if not service.is_draining:  # vLLM calls it again, from the event loop, when all is over
            service.drain(client.vllm_config.shutdown_timeout if timeout is None else timeout)
        shutdown(timeout=timeout)

    vars(client)["shutdown"] = drained
