# SPDX-License-Identifier: Apache-2.0
"""Does a realtime session that lasts a day stay as it was?

    python benchmarks/robustness/long_session.py               # 24 hours of audio
    python benchmarks/robustness/long_session.py --hours 0.1

One session gets the same sentence every four seconds, faster than it is spoken; the server is real
but for its engine, which is a function. ``lost`` counts utterances that did not come, or came
twice. ``drift`` is how far the start of any utterance is from where the second one and the clock
put it, in seconds (the first has no audio before it). A second session gets as much without turns,
in utterances of 20 s and clips of 12 s, and its words with times: ``lost`` are then seconds without
a transcript, ``drift`` is that of the last word. ``MiB`` is by how much the memory of this process
grew after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

import numpy as np
import psutil
import soundfile
import websockets
from common import print_result, print_table
from support.audio import HELDOUT, SAMPLE_RATE
from support.fake_sessions import PATH, Aligner, app_of, made
from support.servers import on_a_port

PERIOD_S = 4  # 125 frames of Silero VAD
AHEAD = 20  # periods without a transcript: pings wait behind them
WORDS = "item.input_audio_transcription.words"
MOST_DRIFT_S = 0.1
MOST_MIB = 50
PATIENCE: dict[str, Any] = {"open_timeout": 60, "ping_timeout": None, "max_size": None}


def period() -> str:
    """Return a sentence and silence, 4 s in all, as an event has it."""
    samples = soundfile.read(HELDOUT / "english_14.flac", dtype="int16")[0]
    samples = np.pad(samples, (0, PERIOD_S * SAMPLE_RATE - len(samples)))
    return base64.b64encode(samples.astype("<i2").tobytes()).decode()


async def events(url: str, count: int, session: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a session that gets so many periods, and is committed at its end."""
    append = json.dumps({"type": "input_audio_buffer.append", "audio": period()})
    async with websockets.connect(url.replace("http", "ws") + PATH, **PATIENCE) as socket:
        await socket.send(json.dumps({"type": "session.update", "session": session}))

        async def speak() -> None:
            for _ in range(count):
                await ahead.acquire()
                await socket.send(append)
            await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))

        ahead = asyncio.Semaphore(AHEAD)
        speaking = asyncio.create_task(speak())
        async for message in socket:
            event = json.loads(message)
            yield event
            if event["type"].endswith("completed"):
                for _ in range(round(event["usage"]["seconds"] / PERIOD_S)):
                    ahead.release()
        await speaking


async def by_turns(url: str, count: int) -> dict[str, Any]:
    """Count utterances, and compare their starts with the clock."""
    session = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}}}}
    memory, starts, ends = Memory(), [], []
    async for event in events(url, count, session):
        if event["type"].endswith("speech_started"):
            starts.append(event["audio_start_ms"] / 1000)
            memory.note(len(starts) / count)
        if event["type"].endswith("completed"):
            ends.append(event["item_id"])
            if len(ends) == count:
                break
    drift = max(abs(at - starts[1] - PERIOD_S * number) for number, at in enumerate(starts[1:]))
    lost = abs(count - len(starts)) + count - len(set(ends))
    return {"session": "by turns", "lost": lost, "drift s": drift, "MiB": memory.growth}


async def by_hand(url: str, count: int) -> dict[str, Any]:
    """Sum the seconds of transcripts, and compare the last word with the clock."""
    audio = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}, "turn_detection": None}
    session = {"include": [WORDS], "audio": {"input": audio}}
    memory, seconds, last_s, texts, timed = Memory(), 0.0, 0.0, "", ""
    async for event in events(url, count, session):
        if event["type"].endswith("completed"):
            seconds += event["usage"]["seconds"]
            texts += event["transcript"]
            memory.note(seconds / (count * PERIOD_S))
        if event["type"].endswith(".words"):
            timed += "".join(word["word"] for word in event["words"])
            last_s = event["words"][-1]["end"]
        if seconds >= count * PERIOD_S and len(timed) >= len(texts):
            break
    lost = abs(count * PERIOD_S - seconds) + (timed != texts)
    drift = abs(count * PERIOD_S - last_s)
    return {"session": "by hand", "lost": lost, "drift s": drift, "MiB": memory.growth}


class Memory:
    """The memory of this process, from the first tenth to the end."""

    def __init__(self) -> None:
        self._seen: list[float] = []

    def note(self, share: float) -> None:
        if share >= 0.1:
            self._seen.append(psutil.Process().memory_info().rss / (1 << 20))

    @property
    def growth(self) -> float:
        return self._seen[-1] - self._seen[0]


def rows(hours: float) -> list[dict[str, Any]]:
    count = round(hours * 3600 / PERIOD_S)
    found = []
    for measure in (by_turns, by_hand):
        shared = made(aligner=Aligner(), requests=deque(maxlen=1))  # which else keeps all audio
        with on_a_port(app_of(shared)) as url:
            found.append(asyncio.run(measure(url, count)) | {"hours": hours})
    return found


def is_well(row: dict[str, Any]) -> bool:
    return not row["lost"] and row["drift s"] <= MOST_DRIFT_S and row["MiB"] <= MOST_MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=24.0)
    args = parser.parse_args()
    found = rows(args.hours)
    print_table(found)
    print_result("long_session", found)
    return 0 if all(map(is_well, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
