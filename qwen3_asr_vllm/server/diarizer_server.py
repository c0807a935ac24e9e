# SPDX-License-Identifier: Apache-2.0
"""The process of a diarizer, which ``qwen3-asr serve ASR --diarizer SPEC`` starts.

    POST /v1/audio/speakers   samples of a recording and of known voices -> turns

It loads no engine, and diarizes one recording at a time: the samples of the next one are read only
then, so waiting recordings take no memory here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..diarizers import Diarizer, DiarizerError, diarize, load_diarizer
from ..speakers import DiarizationRequest
from .diarizer_client import ROUTE

CLIENT_CLOSED = 499


class DiarizerServer:
    """The routes of a diarizer."""

    def __init__(self, diarizer: Diarizer) -> None:
        self._diarizer = diarizer
        self._turn = asyncio.Lock()

    @property
    def app(self) -> Starlette:
        find = Route(ROUTE, self.find_speakers, methods=["POST"])
        return Starlette(routes=[Route("/health", show_health), find])

    async def find_speakers(self, http: Request) -> Response:
        """Return the turns of a recording; 400 for a request that cannot be honoured."""
        async with self._turn:
            try:
                request = await _read(http)
                output = await asyncio.to_thread(diarize, self._diarizer, request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED)
            except (DiarizerError, KeyError, TypeError, ValueError) as error:
                return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(asdict(output))


async def show_health(_: Request) -> Response:
    return Response()


async def _read(http: Request) -> DiarizationRequest:
    """Read the samples that ``_described`` of the client describes. Raises ValueError."""
    described: dict[str, Any] = json.loads(http.query_params["request"])
    voices: dict[str, int] = described.pop("known_speakers")
    lengths = [described.pop("num_samples"), *voices.values()]
    samples = np.empty(sum(lengths), "<f4")
    content, at = samples.data.cast("B"), 0
    async for piece in http.stream():
        if at + len(piece) > len(content):
            raise ValueError(f"the body is longer than its {len(samples)} samples.")
        content[at : at + len(piece)] = piece
        at += len(piece)
    if at < len(content):
        raise ValueError(f"the body has {at // 4} of its {len(samples)} samples.")
    recording, *known = np.split(samples, np.cumsum(lengths)[:-1])
    known_speakers = dict(zip(voices, known, strict=True))
    return DiarizationRequest(recording, known_speakers=known_speakers, **described)


def main(argv: list[str]) -> int:
    """Serve a diarizer until a signal; returns 1, with a message, if it cannot be loaded."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="qwen3_asr_vllm.server.diarizer_server")
    parser.add_argument("diarizer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8002)
    args = parser.parse_args(argv)
    try:
        diarizer = load_diarizer(args.diarizer)
    except (ImportError, OSError, ValueError) as error:
        print(f"qwen3-asr: {error}", file=sys.stderr)
        return 1
    app = DiarizerServer(diarizer).app
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
