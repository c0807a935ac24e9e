# SPDX-License-Identifier: Apache-2.0
"""How a transcription server asks the aligner that QWEN3_ASR_ALIGNER_URL names."""

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
ANSWER_S = 600.0  # in which an aligner must have answered, its queue included
RETRY_DELAYS_S = (0.5, 1, 2, 4)  # before each further attempt, where it is full
PASSING = (408, 425, 429)  # the refusals, from 400 to 499, that are not for good
CONNECT_S = 2.0  # in which its machine must take a connection, however busy the server is
HEALTH_S = 20.0  # in which it must say that it is there


class RemoteAligner:
    """An aligner's server, as a transcription server asks it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"QWEN3_ASR_ALIGNER_URL is {url!r}; give the address of a server of a forced "
                "aligner, such as http://127.0.0.1:8001."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def is_up(self) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=CONNECT_S)
            async with self._open().get(f"{self.url}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return False

    async def answer(
        self, request: AlignmentRequest, headers: Mapping[str, str] | None = None
    ) -> AlignmentOutput:
        """The aligner's answer; if it gives none, its ``error`` says why. One that is full is asked
        again."""
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
            await asyncio.sleep(delay)  # it is full
        if 400 <= status < 500 and status not in PASSING:
            return self._no_answer(f"{status}, and would be again: {error}", is_permanent=True)
        return self._no_answer(f"{status}: {error}")

    def _no_answer(self, reason: str, *, is_permanent: bool = False) -> AlignmentOutput:
        does = "refuses" if is_permanent else "gives no answer"
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
        """The session, which must be made inside the event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, timeout=aiohttp.ClientTimeout(total=ANSWER_S)
            )
        return self._session


def remote_aligner() -> RemoteAligner | None:
    """The aligner that QWEN3_ASR_ALIGNER_URL names, if it names one."""
    url = setting("QWEN3_ASR_ALIGNER_URL")
    return RemoteAligner(url, setting("QWEN3_ASR_ALIGNER_API_KEY")) if url else None
