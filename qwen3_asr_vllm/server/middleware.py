# SPDX-License-Identifier: Apache-2.0
"""Middleware of all routes, ours and vLLM's: request ids, API keys, engine headers.

    RequestIds -> ApiKeys -> EngineHeaders -> vLLM's middleware -> routes

All three handle HTTP requests and WebSocket handshakes.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections.abc import Iterator, Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..printable import printable
from .errors import ApiError

MAX_REQUEST_ID = 128  # characters; longer ids are truncated
INSECURE_KEY = "openai-insecure-api-key."  # prefix of the subprotocol that carries a browser's key

# Paths that need no key: health checks, metrics, and the page, which asks for a key. All others
# need one: vLLM has routes outside /v1 that run the model or change the server.
OPEN_PATHS = frozenset({"/", "/about", "/health", "/ping", "/metrics"})

WRONG_KEY = (
    "this server requires an API key, and the request has no valid one. Send it as "
    "'Authorization: Bearer KEY'."
)

_NUMBER = re.compile(r" *-?[0-9]{1,19} *")
_NOT_IN_IDS = re.compile(r"[^!-~]")  # visible ASCII, as a header may hold


def wrap(app: FastAPI, *, keys: Sequence[str], num_ranks: int) -> None:
    """Wrap all middleware of the app, which vLLM has built before it serves."""
    inner: ASGIApp = EngineHeaders(
        app.middleware_stack or app.build_middleware_stack(), num_ranks=num_ranks
    )
    app.middleware_stack = RequestIds(ApiKeys(inner, keys=keys) if keys else inner)


class RequestIds:
    """Gives every request an ``X-Request-Id`` and returns it in the response.

    A client's own id is kept; characters that are not visible ASCII become "?".
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        request_id = _NOT_IN_IDS.sub("?", headers.get("x-request-id", ""))[:MAX_REQUEST_ID]
        headers["x-request-id"] = request_id = request_id or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class ApiKeys:
    """Responds with 401 to requests without a valid API key, except on open paths.

    A browser cannot set the headers of a WebSocket: its key arrives as OpenAI's subprotocol.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_open(scope):
            return await self.app(scope, receive, send)
        for key in _given_keys(scope):
            if self._is_known(key):
                # vLLM checks this header, too
                MutableHeaders(scope=scope)["authorization"] = f"Bearer {key}"
                return await self.app(scope, receive, send)
        error = ApiError(401, WRONG_KEY, code="invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        await error.response()(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        """Return whether a request needs no key. A browser's preflight request carries none."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["type"] == "http" and path in OPEN_PATHS

    def _is_known(self, key: str) -> bool:
        """Return whether a key is valid, in a time that does not depend on it."""
        given = _digest(key)
        return any([secrets.compare_digest(given, digest) for digest in self._digests])


def _given_keys(scope: Scope) -> Iterator[str]:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield key
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(INSECURE_KEY):
            yield protocol.removeprefix(INSECURE_KEY)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class EngineHeaders:
    """Responds with 400 to a header of vLLM's whose number the engine cannot take."""

    def __init__(self, app: ASGIApp, *, num_ranks: int) -> None:
        self.app = app
        self._ranges = {
            "X-Vllm-Priority": (-(2**63), 2**63 - 1),
            "X-data-parallel-rank": (0, num_ranks - 1),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else Headers()
        for name, (least, most) in self._ranges.items():
            given = headers.get(name)
            if given is not None and not _is_number(given, least, most):
                message = f"{name} is {printable(given)!r}; give a whole number, {least} to {most}."
                return await ApiError(400, message, param=name).response()(scope, receive, send)
        await self.app(scope, receive, send)


def _is_number(text: str, least: int, most: int) -> bool:
    return bool(_NUMBER.fullmatch(text)) and least <= int(text) <= most
