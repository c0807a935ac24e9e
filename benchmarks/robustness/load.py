# SPDX-License-Identifier: Apache-2.0
"""What happens when hundreds of clients come at once?

    python benchmarks/robustness/load.py                              256 clients, one minute
    python benchmarks/robustness/load.py --clients 512 --seconds 300 --max-recordings 64

Clients of six kinds ask again and again: short recordings, long ones, an hour, streams, streams
whose reader leaves, and realtime sessions, which send their clip in pieces of a second. A client
that gets a 503 retries after ``Retry-After``.
Read it so: ``lost``, ``twice`` and ``wrong`` must be 0 in every row. ``lost`` are answers that
never came or were no answer; ``twice`` are streams that went on after their end, and sessions that
said two texts of one commit; ``wrong`` are answers unlike the first to the same recording.
A session's text hangs on how often the engine was asked, which is less often where it is behind; it
is wrong where less than ``ALIKE`` of it is the same.
``refused`` is back-pressure. Latency is of the answered, without the refusals before. What was lost
is listed below the table, and makes the exit code 1. The memory is that of the HTTP process, whose
growth is what back-pressure bounds, and that of the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

from common import percentile, print_result, print_table, server
from support.audio import SAMPLE_RATE, speech_clip
from support.checkpoints import CHECKPOINT


class Kind(NamedTuple):
    """The actions of one client."""

    seconds: float  # of audio
    share: float  # of the clients
    streams: bool = False
    leaves: bool = False  # before the end
    is_realtime: bool = False


KINDS = {
    "short": Kind(6.0, 0.4),
    "stream": Kind(12.0, 0.2, streams=True),
    "leaves": Kind(12.0, 0.1, streams=True, leaves=True),
    "realtime": Kind(12.0, 0.2, is_realtime=True),
    "long": Kind(300.0, 0.09),
    "hour": Kind(3600.0, 0.01),
}
VARIANTS = 4  # recordings of each kind
PIECE_BYTES = 2 * SAMPLE_RATE  # of a session: a second
WAV_HEADER_BYTES = 44
ALIKE = 0.8


def kind_of(number: int, num_clients: int) -> str:
    """Of a client: each kind has its share, and one client at least of eight or more."""
    ends = list(accumulate(kind.share for kind in KINDS.values()))
    return list(KINDS)[bisect(ends, (number + 0.5) / num_clients)]


@dataclass
class Tally:
    """The outcomes of all clients of one kind."""

    answered: list[tuple[float, float]] = field(default_factory=list)  # when, and its latency
    refused: int = 0
    left: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # of what was lost


class AnsweredTwice(Exception):
    """One question, two answers."""


class Crowd:
    """Clients of all kinds, until they are stopped."""

    def __init__(self, address: str, num_clients: int) -> None:
        self.address, self.num_clients = address, num_clients
        self.files = {
            name: [speech_clip(kind.seconds, 100 * index + i) for i in range(VARIANTS)]
            for index, (name, kind) in enumerate(KINDS.items())
        }
        self.tallies = {kind: Tally() for kind in KINDS}
        self.texts: dict[tuple[str, int], str] = {}
        self.is_over = False

    async def run(self, seconds: float) -> None:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=1800)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = [
                asyncio.create_task(
                    self._client(session, kind_of(number, self.num_clients), number)
                )
                for number in range(self.num_clients)
            ]
            await asyncio.sleep(seconds)
            self.is_over = True  # pending requests are still answered
            await asyncio.gather(*tasks)

    async def _client(self, session: Any, kind: str, number: int) -> None:
        rng = random.Random(number)
        while not self.is_over:
            variant = rng.randrange(VARIANTS)
            start = time.perf_counter()
            try:
                status, text = await self._ask(session, kind, variant)
            except AnsweredTwice:
                self.tallies[kind].twice += 1
                continue
            except Exception as error:  # any error means that there was no response
                self.tallies[kind].lost += 1
                self.tallies[kind].notes[repr(error)[:80]] += 1
                await asyncio.sleep(1)
                continue
            if status == 503:
                self.tallies[kind].refused += 1
                await asyncio.sleep(float(text))
            else:
                self._note(kind, variant, status, text, start)

    def _note(self, kind: str, variant: int, status: int, text: str, start: float) -> None:
        tally = self.tallies[kind]
        if status == 0:
            tally.left += 1
        elif status != 200:
            tally.lost += 1
            tally.notes[f"{status}: {text[:80]}"] += 1
        else:
            now = time.perf_counter()
            tally.answered.append((now, now - start))
            first = self.texts.setdefault((kind, variant), text)
            alike = (
                SequenceMatcher(None, first, text, autojunk=False).ratio() if text else not first
            )
            tally.wrong += alike < (ALIKE if KINDS[kind].is_realtime else 1)

    async def _ask(self, session: Any, kind: str, variant: int) -> tuple[int, str]:
        """The status and the text; 503 and the seconds to wait; 0 for one that left."""
        import aiohttp

        does = KINDS[kind]
        if does.is_realtime:
            return await self._speak(session, self.files[kind][variant])
        form = aiohttp.FormData()
        form.add_field("file", self.files[kind][variant], filename="clip.wav")
        form.add_field("stream", str(does.streams).lower())
        url = f"{self.address}/v1/audio/transcriptions"
        async with session.post(url, data=form) as response:
            if response.status == 503:
                return 503, response.headers["Retry-After"]
            if response.status != 200:
                return response.status, await response.text()
            if not does.streams:
                return 200, (await response.json())["text"]
            return await self._read(response, does.leaves)

    async def _read(self, response: Any, leaves: bool) -> tuple[int, str]:
        text, is_done, num_texts = "", False, 0
        async for line in response.content:
            if leaves and text:
                return 0, ""
            if is_done and line.strip():
                raise AnsweredTwice
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                text += event.get("delta", "")
                num_texts += event.get("type") == "transcript.text.done"
            is_done |= line.startswith(b"data: [DONE]")
        if not is_done:
            raise RuntimeError("the stream ended in the middle")
        if num_texts > 1:
            raise AnsweredTwice
        return 200, text

    async def _speak(self, session: Any, file: bytes) -> tuple[int, str]:
        import aiohttp

        url = f"ws{self.address.removeprefix('http')}/v1/realtime?intent=transcription"
        try:
            async with session.ws_connect(url) as socket:
                return 200, await self._say(socket, file[WAV_HEADER_BYTES:])
        except aiohttp.WSServerHandshakeError as error:
            if error.status != 503 or error.headers is None:
                raise
            return 503, error.headers["Retry-After"]

    async def _say(self, socket: Any, pcm: bytes) -> str:
        wanted = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}, "turn_detection": None}
        audio = {"type": "transcription", "audio": {"input": wanted}}
        await socket.send_json({"type": "session.update", "session": audio})
        for start in range(0, len(pcm), PIECE_BYTES):
            piece = base64.b64encode(pcm[start : start + PIECE_BYTES]).decode()
            await socket.send_json({"type": "input_audio_buffer.append", "audio": piece})
        await socket.send_json({"type": "input_audio_buffer.commit"})
        texts = [event["transcript"] async for event in _until(socket, "completed")]
        await socket.send_json({"type": "input_audio_buffer.clear"})  # the last that it answers
        texts += [event["transcript"] async for event in _until(socket, "cleared")]
        if len(texts) > 1:
            raise AnsweredTwice
        return str(texts[0])

    def rows(self) -> list[dict[str, Any]]:
        return [_row(kind, tally) for kind, tally in self.tallies.items()]


async def _until(socket: Any, end: str) -> AsyncIterator[dict[str, Any]]:
    """The texts that a session says until an event whose name ends so."""
    while True:
        event = await socket.receive_json()
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        if event["type"].endswith("transcription.completed"):
            yield event
        if event["type"].endswith(end):
            return


def _row(kind: str, tally: Tally) -> dict[str, Any]:
    seconds = [seconds for _, seconds in tally.answered]
    return {
        "kind": kind,
        "answered": len(seconds),
        "refused": tally.refused,
        "left": tally.left,
        "lost": tally.lost,
        "twice": tally.twice,
        "wrong": tally.wrong,
        "p50 s": percentile(seconds, 0.5),
        "p95 s": percentile(seconds, 0.95),
        "notes": dict(tally.notes),
    }


def print_tallies(rows: list[dict[str, Any]]) -> bool:
    """A table, and what was lost; returns whether all was well."""
    print_table([{name: row[name] for name in row if name != "notes"} for row in rows])
    for row in rows:
        for note, number in row["notes"].items():
            print(f"{row['kind']}: {number} x {note}")
    return not any(row["lost"] or row["twice"] or row["wrong"] for row in rows)


def memory(pid: int) -> dict[str, float]:
    """MiB and descriptors of the HTTP process, and MiB of all its children together.

    What processes share counts once: the engine and its worker talk through memory of both.
    """
    import psutil

    api = psutil.Process(pid)
    children = [child.memory_full_info().pss for child in api.children(recursive=True)]
    return {
        "api MiB": api.memory_full_info().pss / 2**20,
        "engine MiB": sum(children) / 2**20,
        "descriptors": float(api.num_fds()),
    }


async def drive(
    crowd: Crowd, pid: int, seconds: float, *, every_s: float
) -> list[tuple[float, dict[str, float]]]:
    """Runs the crowd; returns when the memory was what."""
    samples: list[tuple[float, dict[str, float]]] = []

    async def watch() -> None:
        while True:
            samples.append((time.perf_counter(), memory(pid)))
            await asyncio.sleep(every_s)

    watcher = asyncio.create_task(watch())
    try:
        await crowd.run(seconds)
    finally:
        watcher.cancel()
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-recordings", type=int, default=64, help="that the server takes")
    parser.add_argument("--max-audio-s", type=float, default=16_000.0, help="that it holds")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    os.environ["QWEN3_ASR_MAX_RECORDINGS"] = str(args.max_recordings)
    os.environ["QWEN3_ASR_MAX_AUDIO_S"] = str(args.max_audio_s)
    with server("ours", CHECKPOINT, ["--enforce-eager", "--dtype", args.dtype]) as (address, pid):
        crowd = Crowd(address, args.clients)
        before = memory(pid)
        samples = asyncio.run(drive(crowd, pid, args.seconds, every_s=1))
    rows = crowd.rows()
    is_well = print_tallies(rows)
    peak = {name: max(sample[name] for _, sample in samples) for name in before}
    print_table([{"when": "before"} | before, {"when": "most"} | peak])
    print_result("load", rows, clients=args.clients, before=before, most=peak, options=vars(args))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
