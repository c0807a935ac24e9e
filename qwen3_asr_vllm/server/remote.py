# SPDX-License-Identifier: Apache-2.0
"""Clients of the servers beside this one: those of an aligner and of a diarizer."""

from __future__ import annotations

import asyncio

import aiohttp

RESPONSE_S = 600.0  # seconds for a response, queueing included
CONNECT_S = 2.0  # seconds to connect, however busy the server is
HEALTH_S = 20.0  # seconds for the response of /health


class RemoteServer:
    """Client of a server, whose address is the value of ``variable``."""

    def __init__(self, url: str, api_key: str | None = None, *, variable: str, name: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"{variable} is {url!r}; set it to the address of {name}'s server, such as "
                "http://127.0.0.1:8001."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def is_up(self) -> bool:
        """Return whether the server is healthy."""
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=CONNECT_S)
            async with self._open().get(f"{self.url}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return False

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """Return the HTTP session, which must be created inside the event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, timeout=aiohttp.ClientTimeout(total=RESPONSE_S)
            )
        return self._session
