# SPDX-License-Identifier: Apache-2.0
"""Recordings decoded in a process of their own, as a server decodes them."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import hostile
import numpy as np

from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.peaks import MAX_PEAK
from qwen3_asr_vllm.server.decode_worker import Limits

from .audio import audio_case, recording
from .outcomes import HANG_S, Outcome

MAX_DURATION_S = 60.0  # what a case may decode to: 4 MB
MAX_DECODER_GROWTH = (64 + 12) << 20  # bytes that a case may add to its decoder: see ``Limits``
MAX_CPU_S = Limits().cpu(MAX_DURATION_S) + 1
SCRIPT = Path(__file__).resolve().parents[1] / "fuzz.py"


def load(number: int) -> Outcome:
    """One recording, decoded as a server does it, with what it costs."""
    name, data = audio_case(number)
    start = time.perf_counter()
    cost = hostile.decode(data, max_duration_s=MAX_DURATION_S)
    growth = cost.peak_bytes - _idle_bytes()
    answer, broken = _judged(cost, is_full=growth > 0.9 * Limits().memory_bytes)
    if growth > MAX_DECODER_GROWTH:
        broken = broken or f"{growth >> 20} MiB of memory"
    if cost.cpu_s > MAX_CPU_S:
        broken = broken or f"{cost.cpu_s:.1f} s of CPU time"
    return Outcome(number, name, answer, broken, time.perf_counter() - start, growth)


@cache
def _idle_bytes() -> int:
    """The peak of a decoder's memory for a good recording."""
    return hostile.decode(recording("m4a")).peak_bytes


def _judged(cost: hostile.Cost, *, is_full: bool) -> tuple[str, str]:
    """The answer, and what is wrong with it. ``is_full``: its memory was at the limit."""
    if cost.exit_code == -signal.SIGPROF or cost.error.startswith("MemoryError"):
        return "limited: by CPU time or memory", ""
    if cost.exit_code in (-signal.SIGSEGV, -signal.SIGABRT) and is_full:
        return "limited: a library crashed when it got no memory", ""
    if cost.exit_code:
        return "none", f"crash: the decoder ended with {cost.exit_code}"
    if cost.error:
        kind, _, text = cost.error.partition(": ")
        if kind != "ValueError":
            return cost.error, "another exception than ValueError"
        return f"refused: {text}", "" if re.search(r"[a-z]{2,} [a-z]", text) else "no message"
    waveform = cost.waveform
    is_good = (
        0 < len(waveform) <= MAX_DURATION_S * 16_000 + 16_000
        and np.isfinite(waveform).all()
        and np.abs(waveform).max() <= MAX_PEAK
    )
    return f"decoded: {len(waveform)} samples", "" if is_good else "not a waveform"


class Worker:
    """A process that loads recordings, one after the other."""

    def __init__(self) -> None:
        command = [sys.executable, str(SCRIPT), "--worker"]
        # What decoders complain of on stderr is not of interest here.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def load(self, number: int) -> Outcome:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write(f"{number}\n".encode())
        stdin.flush()
        if not select.select([stdout], [], [], HANG_S)[0]:
            return self._lost(number, f"hangs for more than {HANG_S:g} s")
        if not (line := stdout.readline()):
            return self._lost(number, f"crash: the process ended with {self.process.wait()}")
        return Outcome(**json.loads(line))

    def _lost(self, number: int, broken: str) -> Outcome:
        self.close()
        self.__init__()
        return Outcome(number, audio_case(number)[0], "none", broken)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def load_all(numbers: Iterable[int]) -> Iterator[Outcome]:
    worker = Worker()
    try:
        yield from map(worker.load, numbers)
    finally:
        worker.close()


def work() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # a library that prints does not disturb
    audio_case(0)  # all imports and tables are there before the first is measured
    load_audio(recording("flac")), load_audio(recording("webm"))
    _idle_bytes()
    gc.freeze()  # each case is a fork of this process
    for line in sys.stdin:
        os.write(answers, json.dumps(asdict(load(int(line)))).encode() + b"\n")
