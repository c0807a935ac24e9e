# SPDX-License-Identifier: Apache-2.0
"""Client of the forced aligner that QWEN3_ASR_ALIGNER_URL names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import aiohttp
import numpy as np

from ..alignment import AlignmentOutput, AlignmentRequest
from .settings import setting

ALIGNMENTS = "/v1/audio/alignments"
TIMES = f"{ALIGNMENTS}/times"
RESPONSE_S = 600.0  # seconds for a response, queueing included
RETRY_DELAYS_S = (0.5, 1, 2, 4)  # seconds before each retry while the aligner is full
TRANSIENT = (408, 425, 429)  # statuses from 400 to 499 that may pass
CONNECT_S = 2.0  # seconds to connect, however busy the server is
HEALTH_S = 20.0  # seconds for the response of /health


class RemoteAligner:
    """Client of an aligner's server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"QWEN3_ASR_ALIGNER_URL is {url!r}; set it to the address of an aligner's "
                "server, such as http://127.0.0.1:8001."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def is_up(self) -> bool:
        """Return whether the aligner is healthy."""
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=CONNECT_S)
            async with self._open().get(f"{self.url}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return False

    async def answer(
        self, request: AlignmentRequest, headers: Mapping[str, str] | None = None
    ) -> AlignmentOutput:
        """Return the aligner's output; its ``error`` is the reason if there is none.

        Retries while the aligner is full.
        """
        status, error, url = 0, "", self.url + TIMES
        for delay in (*RETRY_DELAYS_S, None):
            try:
                data = self._form(request)
                async with self._open().post(url, data=data, headers=headers) as answer:
                    if answer.status == 200:
                        return AlignmentOutput((await answer.json())["times"])
                    status, error = answer.status, (await answer.text())[:300]
            except (aiohttp.ClientError, asyncio.TimeoutError) as failure:
                return self._no_answer(str(failure) or type(failure).__name__)
            if status != 503 or delay is None:
                break
            await asyncio.sleep(delay)
        if 400 <= status < 500 and status not in TRANSIENT:
            return self._no_answer(f"{status}, permanent: {error}", is_permanent=True)
        return self._no_answer(f"{status}: {error}")

    def _no_answer(self, reason: str, *, is_permanent: bool = False) -> AlignmentOutput:
        does = "rejects the request" if is_permanent else "does not answer"
        error = f"the aligner at {self.url} {does} ({reason})"
        return AlignmentOutput((), error=error, is_permanent=is_permanent)

    def _form(self, request: AlignmentRequest) -> aiohttp.FormData:
        form = aiohttp.FormData()
        samples = np.ascontiguousarray(request.waveform, "<f4").tobytes()
        form.add_field("samples", samples, filename="samples.f32")
        form.add_field("units", json.dumps(list(request.units), ensure_ascii=False))
        return form

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


def remote_aligner() -> RemoteAligner | None:
    """Return a client of QWEN3_ASR_ALIGNER_URL; None if it is not set."""
    url = setting("QWEN3_ASR_ALIGNER_URL")
    return RemoteAligner(url, setting("QWEN3_ASR_ALIGNER_API_KEY")) if url else None
