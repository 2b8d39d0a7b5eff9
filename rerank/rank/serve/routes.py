"""The routes of a served model."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rerank.rank.serve.guard import Guard, refused
from rerank.rank.serve.protocol import Refusal
from rerank.rank.serve.service import UNEXPECTED, Service
from rerank.rank.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")
LEFT = 499  # of a client that has left, as nginx has it; nobody reads it


def attach(app: FastAPI, settings: ServeSettings) -> None:
    """Add the routes and the guard to an application, which keeps its Service as `state.rerank`."""
    for path in RERANK_PATHS:
        app.add_api_route(path, _rerank, methods=["POST"])
    app.add_api_route("/v1/reload", _reload, methods=["POST"])
    app.add_api_route("/v1/models", _models, methods=["GET"])
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_middleware(Guard, api_key=settings.api_key, max_body_mb=settings.max_body_mb)


def service_of(request: Request) -> Service:
    """The service of the application that a request is for."""
    service: Service = request.app.state.rerank
    return service


async def _rerank(request: Request) -> Response:
    service, request_id = service_of(request), request.state.request_id

    async def rank() -> dict[str, Any]:
        return await service.rerank(body, request_id)

    try:
        body = await request.body()
    except ClientDisconnect:
        return Response(status_code=LEFT)
    except Refusal as refusal:
        return refused(refusal)
    work, left = asyncio.ensure_future(_answered(rank, request_id)), asyncio.ensure_future(_until_left(request))
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=LEFT)
    finally:
        work.cancel()  # which frees its place in the engine
        left.cancel()


async def _until_left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answered(work: Callable[[], Awaitable[dict[str, Any]]], request_id: str) -> Response:
    """The answer of a route, or that to a refusal or an unexpected error."""
    try:
        return JSONResponse(await work())
    except Refusal as refusal:
        return refused(refusal)
    except Exception:
        logger.exception("%s: unexpected error", request_id)
        return refused(Refusal(500, UNEXPECTED))


async def _reload(request: Request) -> Response:
    return await _answered(service_of(request).reload, request.state.request_id)


async def _models(request: Request) -> Response:
    return JSONResponse(service_of(request).describe())


async def _health(request: Request) -> Response:
    service = service_of(request)
    is_well = not service.is_draining and await service.engine.is_well()
    return Response(status_code=200 if is_well else 503)
