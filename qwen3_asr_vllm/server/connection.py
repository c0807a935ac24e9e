# SPDX-License-Identifier: Apache-2.0
"""The WebSocket of a session: its handshake and its limits in time.

uvicorn buffers what a client does not read and then lets the sender wait for ever; a session that
waited with it would keep its reservation. So every await here ends: the client takes an event
within ``SEND_S`` seconds, or its connection is dropped.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .errors import ApiError

SEND_S = 30.0  # seconds for a client to take an event
PROTOCOL = "realtime"  # the subprotocol that OpenAI's clients offer


class Connection:
    """One WebSocket. Its methods raise WebSocketDisconnect once the client is gone or stuck."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self._sending = asyncio.Lock()

    async def accept(self) -> None:
        offered = self.websocket.scope.get("subprotocols", [])
        await self._within(self.websocket.accept(PROTOCOL if PROTOCOL in offered else None))

    async def refuse(self, error: ApiError) -> None:
        """Answer the handshake with an HTTP error."""
        await self._within(self.websocket.send_denial_response(error.response()))

    async def send(self, event: dict[str, Any]) -> None:
        numbered = {"type": event["type"], "event_id": f"event_{uuid4().hex[:24]}"} | event
        # escaped: what a client sent and is told again may hold half a surrogate pair
        text = json.dumps(numbered)
        async with self._sending:
            await self._within(self.websocket.send_text(text))

    def receive(self) -> asyncio.Task[MutableMapping[str, Any]]:
        """The next message, to wait for as long as the caller wants, and then to cancel."""
        return asyncio.ensure_future(self.websocket.receive())

    async def close(self, code: int, reason: str = "") -> None:
        """Close what is open; a client that never answers is dropped."""
        if self.websocket.application_state is WebSocketState.DISCONNECTED:
            return
        with suppress(WebSocketDisconnect):
            await self._within(self.websocket.close(code, reason))
            asyncio.get_running_loop().call_later(SEND_S, self._drop)

    async def _within(self, sending: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(sending, SEND_S)
        except (RuntimeError, asyncio.TimeoutError) as error:  # closed; or never read
            self._drop()
            raise WebSocketDisconnect(1006) from error

    def _drop(self) -> None:
        """Drop the connection with what it has not sent: uvicorn would wait for ever to send it.

        ASGI has no word for that. Every connection of uvicorn's has a ``state`` of its own, in
        its scope, which tells it from all others.
        """
        server = getattr(self.websocket.app.state, "server", None)
        for protocol in list(server.server_state.connections) if server else ():
            scope = getattr(protocol, "scope", None) or {}
            if scope.get("state") is self.websocket.scope.get("state"):
                protocol.transport.abort()


# the server ---------------------------------------------------------------------------------


def refuse_compression(app: FastAPI) -> None:
    """Accept no compressed frames: 16 KB of them may be 16 MiB of JSON.

    vLLM has no option for it, but keeps its uvicorn server in the state of the app before that
    server starts, and every connection reads the server's config.
    """
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def configured(app: FastAPI) -> AsyncIterator[Any]:
        server = getattr(app.state, "server", None)
        if server is not None:
            server.config.ws_per_message_deflate = False
        async with lifespan(app) as state:
            yield state

    app.router.lifespan_context = configured
