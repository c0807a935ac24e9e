# SPDX-License-Identifier: Apache-2.0
"""Client of the diarizer that QWEN3_ASR_DIARIZER_URL names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import numpy as np

from ..diarizers import DiarizerError
from ..geometry import SAMPLE_RATE
from ..speakers import DiarizationOutput, DiarizationRequest, SpeakerTurn
from .remote import CONNECT_S, RESPONSE_S, RemoteServer
from .settings import setting

ROUTE = "/v1/audio/speakers"
MAX_REAL_TIME_FACTOR = 4.0  # seconds that a second of audio may take, beyond RESPONSE_S
_PIECE = 1 << 20  # bytes that are sent at once


class RemoteDiarizer(RemoteServer):
    """Client of a diarizer's server."""

    def __init__(self, url: str) -> None:
        super().__init__(url, variable="QWEN3_ASR_DIARIZER_URL", name="a diarizer")

    async def answer(self, request: DiarizationRequest) -> DiarizationOutput:
        """Return the diarizer's output; its ``error`` is the reason if there is none.

        Raises DiarizerError for a request that the diarizer cannot honour.
        """
        most_s = RESPONSE_S + MAX_REAL_TIME_FACTOR * len(request.waveform) / SAMPLE_RATE
        timeout = aiohttp.ClientTimeout(total=most_s, sock_connect=CONNECT_S)
        params, url = {"request": _described(request)}, self.url + ROUTE
        try:
            posted = self._open().post(url, params=params, data=_samples(request), timeout=timeout)
            async with posted as answer:
                if answer.status not in (200, 400):
                    return self._no_answer(f"{answer.status}: {(await answer.text())[:300]}")
                document = await answer.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as failure:
            return self._no_answer(str(failure) or type(failure).__name__)
        if answer.status == 400:
            raise DiarizerError(document["error"])
        turns = tuple(SpeakerTurn(*turn) for turn in document["turns"])
        return DiarizationOutput(turns, document["error"])

    def _no_answer(self, reason: str) -> DiarizationOutput:
        return DiarizationOutput(error=f"the diarizer at {self.url} does not answer ({reason})")


def _described(request: DiarizationRequest) -> str:
    voices = {name: len(voice) for name, voice in request.known_speakers.items()}
    numbers = {"num_samples": len(request.waveform), "num_speakers": request.num_speakers}
    return json.dumps(numbers | request.bounds | {"known_speakers": voices})


async def _samples(request: DiarizationRequest) -> AsyncIterator[memoryview]:
    """Yield the samples of the recording and of the known voices, without a copy of all."""
    for waveform in (request.waveform, *request.known_speakers.values()):
        content = memoryview(np.ascontiguousarray(waveform, "<f4").data).cast("B")
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


def remote_diarizer() -> RemoteDiarizer | None:
    """Return a client of QWEN3_ASR_DIARIZER_URL; None if it is not set."""
    url = setting("QWEN3_ASR_DIARIZER_URL")
    return RemoteDiarizer(url) if url else None
