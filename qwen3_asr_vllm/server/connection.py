# SPDX-License-Identifier: Apache-2.0
"""WebSocket of a session: its handshake, its timeouts, and how the client is spoken to.

uvicorn buffers events that a client does not read, then blocks the sender without limit. A blocked
session would keep its reservation, so every await here is bounded: a client takes an event within
``SEND_S`` seconds, or its connection is dropped.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .dialects import Events, OpenAI
    from .errors import ApiError
    from .session_config import Config

SEND_S = 30.0  # seconds for a client to take an event
PROTOCOL = "realtime"  # the subprotocol that OpenAI's clients offer


class Connection:
    """One WebSocket. Methods raise WebSocketDisconnect if the client is gone or does not read."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self._sending = asyncio.Lock()

    async def accept(self) -> None:
        offered = self.websocket.scope.get("subprotocols", [])
        await self._within(self.websocket.accept(PROTOCOL if PROTOCOL in offered else None))

    async def refuse(self, error: ApiError) -> None:
        """Reject the handshake with an HTTP error."""
        await self._within(self.websocket.send_denial_response(error.response()))

    async def send(self, event: dict[str, Any]) -> None:
        numbered = {"type": event["type"], "event_id": f"event_{uuid4().hex[:24]}"} | event
        # ASCII only: values that echo the client may hold half a surrogate pair
        text = json.dumps(numbered)
        async with self._sending:
            await self._within(self.websocket.send_text(text))

    def receive(self) -> asyncio.Task[MutableMapping[str, Any]]:
        """Return a task for the next message; the caller waits for it and cancels it."""
        return asyncio.ensure_future(self.websocket.receive())

    async def close(self, code: int, reason: str = "") -> None:
        """Close the connection; drop a client that does not answer."""
        if self.websocket.application_state is WebSocketState.DISCONNECTED:
            return
        with suppress(WebSocketDisconnect):
            await self._within(self.websocket.close(code, reason))
            asyncio.get_running_loop().call_later(SEND_S, self._drop)

    async def _within(self, sending: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(sending, SEND_S)
        except (RuntimeError, asyncio.TimeoutError) as error:  # closed, or not read in time
            self._drop()
            raise WebSocketDisconnect(1006) from error

    def _drop(self) -> None:
        """Drop the connection and its unsent events, which uvicorn would hold without limit.

        ASGI has no message for that. Every uvicorn connection has a ``state`` object of its own
        in its scope, which identifies it.
        """
        server = getattr(self.websocket.app.state, "server", None)
        for protocol in list(server.server_state.connections) if server else ():
            scope = getattr(protocol, "scope", None) or {}
            if scope.get("state") is self.websocket.scope.get("state"):
                protocol.transport.abort()


@dataclass
class Client:
    """The client of a session: its connection, and its dialect and config as they are now."""

    connection: Connection
    dialect: OpenAI
    config: Config

    async def send(self, events: Events) -> None:
        for event in events:
            await self.connection.send(event)


# the server ---------------------------------------------------------------------------------


def refuse_compression(app: FastAPI) -> None:
    """Disable compressed frames: 16 KB of them may expand to 16 MiB of JSON.

    vLLM has no option for it. It stores its uvicorn server in the state of the app before that
    server starts, and every connection reads the config of the server.
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
