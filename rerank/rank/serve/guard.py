"""A guard around all routes of the API server: key, size of bodies, request ids, a line of log for each request."""

import hashlib
import logging
import re
import secrets
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rerank.rank.serve.protocol import Refusal

logger = logging.getLogger(__name__)

OPEN = ("/health",)  # paths that need no key
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
MEGABYTE = 1 << 20


class Guard:
    """ASGI middleware; vLLM's own key leaves paths outside of `/v1` and `/v2` open, such as `/rerank`."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_mb: float) -> None:
        self.app, self.max_bytes = app, int(max_body_mb * MEGABYTE)
        self.max_body = f"{max_body_mb:g} MB"
        self.key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # of a client that left

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["X-Request-Id"] = request_id
            await send(message)

        refusal = self._refusal(scope, headers)
        try:
            if refusal is None and scope["type"] == "http":
                await self.app(scope, self._limited(receive), send_with_id)
            elif refusal is None:
                await self.app(scope, receive, send)
            elif scope["type"] == "http":
                await refused(refusal)(scope, receive, send_with_id)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        finally:
            method, seconds = scope.get("method", "WEBSOCKET"), time.perf_counter() - began
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO
            logger.log(level, "%s %s %s %d %.3f s", request_id, method, scope["path"], status, seconds)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        """Why a request is not passed on."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.key is not None and path not in OPEN and not self._has_key(headers):
            return Refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.max_bytes:
            return self._too_large()
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(key.strip().encode()).digest()
        return scheme.lower() == "bearer" and secrets.compare_digest(found, self.key or b"")

    def _too_large(self) -> Refusal:
        return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {self.max_body}; send less")

    def _limited(self, receive: Receive) -> Receive:
        """Messages of a body, which raise when it is longer than its header says and too long."""
        read = 0

        async def receive_some() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise self._too_large()
            return message

        return receive_some


def refused(refusal: Refusal) -> JSONResponse:
    """The answer to a request that is refused."""
    return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)
