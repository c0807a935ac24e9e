# SPDX-License-Identifier: Apache-2.0
"""Client of the forced aligner that QWEN3_ASR_ALIGNER_URL names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import aiohttp
import numpy as np

from ..alignment import AlignmentOutput, AlignmentRequest
from .remote import RemoteServer
from .settings import setting

ALIGNMENTS = "/v1/audio/alignments"
TIMES = f"{ALIGNMENTS}/times"
RETRY_DELAYS_S = (0.5, 1, 2, 4)  # seconds before each retry while the aligner is full
TRACE = ("traceparent", "tracestate")  # the headers that are forwarded
TRANSIENT = (408, 425, 429)  # statuses from 400 to 499 that may pass


class RemoteAligner(RemoteServer):
    """Client of an aligner's server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        super().__init__(url, api_key, variable="QWEN3_ASR_ALIGNER_URL", name="an aligner")

    async def answer(
        self, request: AlignmentRequest, headers: Mapping[str, str] | None = None
    ) -> AlignmentOutput:
        """Return the aligner's output; its ``error`` is the reason if there is none.

        Retries while the aligner is full. ``headers`` are those of the client: a request, or the
        handshake of a session.
        """
        status, error, url = 0, "", self.url + TIMES
        trace = {name: headers[name] for name in TRACE if name in headers} if headers else None
        for delay in (*RETRY_DELAYS_S, None):
            try:
                data = self._form(request)
                async with self._open().post(url, data=data, headers=trace) as answer:
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


def remote_aligner() -> RemoteAligner | None:
    """Return a client of QWEN3_ASR_ALIGNER_URL; None if it is not set."""
    url = setting("QWEN3_ASR_ALIGNER_URL")
    return RemoteAligner(url, setting("QWEN3_ASR_ALIGNER_API_KEY")) if url else None
