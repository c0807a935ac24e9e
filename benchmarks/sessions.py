# SPDX-License-Identifier: Apache-2.0
"""How long after the end of speech does the final text of a realtime session come, beside others?

    python benchmarks/sessions.py                                  # the tiny checkpoint
    python benchmarks/sessions.py --model 0.6B --sessions 200

Starts ``qwen3-asr serve`` and opens so many sessions at ``/v1/realtime``. Each sends speech at the
speed at which it is spoken, all distinct, and commits it at its end. ``p50`` and ``p95`` are the
seconds from the commit to the transcript; ``first`` are those from the first audio to the first
text. ``late`` is how far the clients fell behind the clock, of which they are a part: one process
sends all. A session without a transcript fails the benchmark. Models that count end each step
after a hundred words (``counting.py``); real ones write less.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import exit_on_sigterm, percentile, print_result, print_table, server
from counting import chosen_checkpoint
from support.audio import SAMPLE_RATE, speech
from work import UnequalWork

PIECE_S = 0.5  # seconds of audio in an event
WORDS = 100  # of a model that counts
TIMEOUT_S = 300


@dataclass
class Session:
    """The latencies of one session, in seconds."""

    final_s: float
    first_s: float
    late_s: float
    text: str


@asynccontextmanager
async def opened(client: Any, address: str, *, turns: Any, timeout_s: float) -> AsyncIterator[Any]:
    """Open a session of 16 kHz with a turn detection; it is over after ``timeout_s`` seconds."""
    url = f"ws{address.removeprefix('http')}/v1/realtime?intent=transcription"
    async with client.ws_connect(url) as socket, asyncio.timeout(timeout_s):
        wanted = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}, "turn_detection": turns}
        session = {"type": "transcription", "audio": {"input": wanted}}
        await socket.send_json({"type": "session.update", "session": session})
        yield socket


async def speak(client: Any, address: str, pieces: list[str], start_s: float) -> Session:
    """Speak at the speed of speech, and wait for the transcript. ``start_s``: when to begin."""
    await asyncio.sleep(start_s)
    async with opened(client, address, turns=None, timeout_s=TIMEOUT_S) as socket:
        texts = asyncio.create_task(read(socket))
        began, late_s = time.monotonic(), 0.0
        for number, piece in enumerate(pieces, start=1):
            await socket.send_json({"type": "input_audio_buffer.append", "audio": piece})
            wait_s = began + number * PIECE_S - time.monotonic()
            late_s = max(late_s, -wait_s)
            await asyncio.sleep(wait_s)
        await socket.send_json({"type": "input_audio_buffer.commit"})
        ended = time.monotonic()
        first, final, text = await texts
        return Session(final - ended, first - began, late_s, text)


async def read(socket: Any) -> tuple[float, float, str]:
    """Return when the first text and the transcript came, and the transcript."""
    first = None
    async for message in socket:
        event = json.loads(message.data)
        if event["type"].endswith("input_audio_transcription.delta"):
            first = first or time.monotonic()
        if event["type"].endswith("input_audio_transcription.completed"):
            return first or time.monotonic(), time.monotonic(), event["transcript"]
        if event["type"] == "error":
            raise RuntimeError(event["error"]["message"])
    raise UnequalWork("a session ended without a transcript.")


async def speak_all(address: str, count: int, seconds: float, *, seed: int = 0) -> list[Session]:
    """Run so many sessions, which begin within one step of two seconds."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    spoken = [pieces_of(seconds, seed + number) for number in range(count)]
    async with aiohttp.ClientSession(connector=connector) as client:
        sessions = (
            speak(client, address, pieces, 2.0 * number / count)
            for number, pieces in enumerate(spoken)
        )
        return await asyncio.gather(*sessions)


def pieces_of(seconds: float, seed: int) -> list[str]:
    samples = (32_767 * speech(seconds, seed=seed)).clip(-32_768, 32_767).astype("<i2")
    size = round(PIECE_S * SAMPLE_RATE)
    parts = (samples[start : start + size] for start in range(0, len(samples), size))
    return [base64.b64encode(part.tobytes()).decode() for part in parts]


def session_row(address: str, count: int, seconds: float, *, seed: int = 0) -> dict[str, Any]:
    sessions = asyncio.run(speak_all(address, count, seconds, seed=seed))
    finals = [session.final_s for session in sessions]
    firsts = [session.first_s for session in sessions]
    return {
        "sessions": count,
        "speech s": seconds,
        "p50 s": percentile(finals, 0.5),
        "p95 s": percentile(finals, 0.95),
        "first p50 s": percentile(firsts, 0.5),
        "first p95 s": percentile(firsts, 0.95),
        "late s": max(session.late_s for session in sessions),
        "with text": sum(bool(session.text) for session in sessions),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="tiny, counting, 0.6B, 1.7B, or a checkpoint"
    )
    parser.add_argument("--sessions", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="of speech in a session")
    parser.add_argument("--server-args", default="", help="options of vllm serve, one string")
    args = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        model = chosen_checkpoint(args.model, Path(folder), ends_after=WORDS)
        with server("ours", model, shlex.split(args.server_args)) as (address, _):
            session_row(address, 1, 2.0, seed=10**6)  # warms up
            rows = [session_row(address, count, args.seconds) for count in args.sessions]
    print_table(rows)
    print_result("sessions", rows, model=args.model, server_args=args.server_args)


if __name__ == "__main__":
    main()
