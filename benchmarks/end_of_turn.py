# SPDX-License-Identifier: Apache-2.0
"""Is a turn ended by what was said: how long does a session wait, and whom does it cut off?

    python benchmarks/end_of_turn.py            # needs espeak-ng

Half of the utterances are whole sentences, half are sentences cut between two words, in voices of
espeak-ng, half of them unknown to the tiny checkpoint. Each is sent to a realtime session of its
own with five seconds of silence after it, faster than it is spoken: turns depend on audio, not on
the clock.

F1 counts an utterance as judged complete where its pause is nearer to the shortest than to the
longest, by their ratio. ``whole but cut`` are whole sentences whose turn ended before them, at a
pause inside; F1 has them as errors. ``wait`` is the silence after the other whole sentences that
ended the turn, as the server reports it. ``false cuts`` are the cut sentences whose turn would end
if their speaker paused there. Pauses inside of sentences are taken as log-normal around 0.5 s, one
of six longer than 1 s. ``fixed`` is the fixed silence that makes as many. ``final`` are the seconds
from the end of speech to the transcript, decoding included, of some whole sentences at the speed of
speech, one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from common import exit_on_sigterm, percentile, print_result, print_table, server
from sessions import opened
from support.audio import SAMPLE_RATE
from support.checkpoints import CHECKPOINT

PIECE_S = 0.1  # seconds of audio in an event
LEAD_S, TRAIL_S = 0.3, 5.0  # seconds of silence before and after speech
HISS = 2e-4  # standard deviation of what is not quite silence
MEDIAN_PAUSE_S, PAUSE_FACTOR = 0.5, 2.0  # of pauses inside of sentences, and one deviation
PAUSES = NormalDist(np.log(MEDIAN_PAUSE_S), np.log(PAUSE_FACTOR))
EARLY_S = -0.1  # a turn that ends earlier, in the last words or before them, cuts them off
SHORTEST_S, LONGEST_S = 0.16, 4.0  # pauses that end a turn, at the default eagerness
TIMEOUT_S = 120
AT_ONCE = 2  # sessions
TURNS = {
    "semantic_vad": {"type": "semantic_vad"},
    "server_vad": {"type": "server_vad", "silence_duration_ms": 500},
}


@dataclass(frozen=True)
class Utterance:
    """Speech that ends with its last sample."""

    waveform: np.ndarray
    is_complete: bool


@dataclass(frozen=True)
class Outcome:
    """Seconds from the end of speech to the end of the turn and to the transcript, and its text."""

    is_complete: bool
    wait_s: float  # of audio
    final_s: float  # of the clock
    text: str


def utterances(count: int) -> list[Utterance]:
    """Speak held-out sentences of the three languages, every second one cut between two words."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "checkpoints"))
    import grammar
    import samples
    import speech

    spoken: list[Utterance] = []
    rng = random.Random(0)
    while len(spoken) < count:
        number = len(spoken)
        language = list(grammar.LANGUAGES)[number // 2 % 3]
        variants = speech.HELD_OUT_VARIANTS if number // 6 % 2 else speech.TRAIN_VARIANTS
        voice = f"espeak:{rng.choice(speech.ACCENTS[language])}+{rng.choice(variants)}"
        (text,) = grammar.sentences(language, count=1, held_out=True, rng=rng)
        words = samples.word_times(said := speech.say(text, language, voice, rng))
        if len(words) < 4:
            continue
        last = words[rng.randrange(1, len(words) - 1)] if number % 2 else words[-1]
        waveform = said.waveform[: int(last.end * SAMPLE_RATE)].astype(np.float32)
        spoken.append(Utterance(waveform * (0.5 / np.abs(waveform).max()), number % 2 == 0))
    return spoken


# sessions ----


async def outcome(
    client: Any, address: str, utterance: Utterance, turns: Any, *, is_live: bool
) -> Outcome:
    """Send an utterance and silence to a session, until its transcript comes."""
    async with opened(client, address, turns=turns, timeout_s=TIMEOUT_S) as socket:
        reading = asyncio.create_task(read(socket))
        end_s = LEAD_S + len(utterance.waveform) / SAMPLE_RATE
        began = time.monotonic()
        for number in range(1, round((end_s + TRAIL_S) / PIECE_S)):
            start = int((number - 1) * PIECE_S * SAMPLE_RATE)
            audio = base64.b64encode(piece(utterance.waveform, start)).decode()
            await socket.send_json({"type": "input_audio_buffer.append", "audio": audio})
            if is_live:
                await asyncio.sleep(began + number * PIECE_S - time.monotonic())
            if reading.done():
                break
        stopped_s, completed, text = await reading
        return Outcome(utterance.is_complete, stopped_s - end_s, completed - began - end_s, text)


def piece(waveform: np.ndarray, start: int) -> bytes:
    """Return what a client sends next: silence with a hiss, and the utterance in it."""
    size, lead = round(PIECE_S * SAMPLE_RATE), round(LEAD_S * SAMPLE_RATE)
    samples = np.random.default_rng(start).normal(0, HISS, size).astype(np.float32)
    spoken = waveform[max(0, start - lead) : max(0, start - lead + size)]
    samples[max(0, lead - start) :][: len(spoken)] += spoken
    return (32_767 * samples).clip(-32_768, 32_767).astype("<i2").tobytes()


async def read(socket: Any) -> tuple[float, float, str]:
    """Return where the last turn stopped, in seconds of audio, when its text came, and the text."""
    stopped_s = 0.0
    async for message in socket:
        event = json.loads(message.data)
        if event["type"] == "input_audio_buffer.speech_stopped":
            stopped_s = event["audio_end_ms"] / 1000
        if event["type"].endswith("input_audio_transcription.completed"):
            return stopped_s, time.monotonic(), event["transcript"]
        if event["type"] == "error":
            raise RuntimeError(event["error"]["message"])
    raise RuntimeError("a session ended without a transcript.")


async def outcomes(
    address: str, spoken: list[Utterance], turns: Any, *, is_live: bool
) -> list[Outcome]:
    import aiohttp

    free = asyncio.Semaphore(1 if is_live else AT_ONCE)

    async def one(client: Any, utterance: Utterance) -> Outcome:
        async with free:
            return await outcome(client, address, utterance, turns, is_live=is_live)

    async with aiohttp.ClientSession() as client:
        return await asyncio.gather(*(one(client, utterance) for utterance in spoken))


# results ----


def f1(found: list[Outcome]) -> float:
    """Return how well waits tell complete utterances from others."""
    middle_s = (SHORTEST_S * LONGEST_S) ** 0.5
    judged = [(each.is_complete, EARLY_S < each.wait_s < middle_s) for each in found]
    hits, errors = judged.count((True, True)), sum(is_so != said for is_so, said in judged)
    return 2 * hits / max(1, 2 * hits + errors)


def false_cuts(waits_s: list[float]) -> float:
    """Return the share of pauses inside of sentences that are longer than these waits."""
    return fmean(1 - PAUSES.cdf(np.log(max(wait_s, 1e-3))) for wait_s in waits_s)


def row(name: str, found: list[Outcome], live: list[Outcome]) -> dict[str, Any]:
    cuts = false_cuts([each.wait_s for each in found if not each.is_complete])
    all_waits = [each.wait_s for each in found if each.is_complete]
    waits = [wait_s for wait_s in all_waits if wait_s > EARLY_S]
    finals = [each.final_s for each in live]
    return {
        "turns end by": name,
        "utterances": len(found),
        "F1": f1(found) if name == "semantic_vad" else None,
        "whole but cut": len(all_waits) - len(waits),
        "wait p50 s": percentile(waits, 0.5),
        "mean s": fmean(waits),
        "p95 s": percentile(waits, 0.95),
        "final p50 s": percentile(finals, 0.5),
        "final p95 s": percentile(finals, 0.95),
        "false cuts %": 100 * cuts,
        "fixed s": float(np.exp(PAUSES.inv_cdf(1 - cuts))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=200)
    parser.add_argument("--fixed", type=int, default=40, help="of them also for server_vad")
    parser.add_argument("--live", type=int, default=10, help="sentences at the speed of speech")
    args = parser.parse_args()
    exit_on_sigterm()
    spoken = utterances(args.utterances)
    with server("ours", CHECKPOINT, ["--dtype", "float32", "--enforce-eager"]) as (address, _):
        asyncio.run(outcomes(address, spoken[:2], TURNS["server_vad"], is_live=False))  # warms up
        whole = [each for each in spoken if each.is_complete]
        rows = []
        for name, turns in TURNS.items():
            sent = spoken if name == "semantic_vad" else spoken[: args.fixed]
            found = asyncio.run(outcomes(address, sent, turns, is_live=False))
            print(json.dumps({"turns": name, "found": list(map(asdict, found))}), flush=True)
            live = asyncio.run(outcomes(address, whole[: args.live], turns, is_live=True))
            rows.append(row(name, found, live))
            print_table(rows)
    print_result("end_of_turn", rows)


if __name__ == "__main__":
    main()
