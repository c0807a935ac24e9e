# SPDX-License-Identifier: Apache-2.0
"""Signals at twenty moments of a server's life and of a batch's: how long until all have ended?

``faults.py`` runs them. A server gets the signal in the process that a user started. Processes
are found by a variable in their environment, so none is missed whose parent has ended.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from clients import CLIP_S, ask, running, upload
from common import QUIET
from support.audio import HELDOUT, speech_clip
from support.checkpoints import ALIGNER, CHECKPOINT
from websockets.sync.client import connect

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
MARK = "QWEN3_ASR_BENCHMARK_LIFE"  # variable: which life a process belongs to
PATIENCE_S = 60.0  # beyond --shutdown-timeout, after which what is still there is left
SHUTDOWN_TIMEOUT_S = 5
COMMAND = [sys.executable, "-m", "qwen3_asr_vllm.cli"]
START_TIMEOUT_S = 900.0
FLOOD_S = 10.0  # that a client sends and does not read


@dataclass
class Life:
    """A command and all the processes that it has started."""

    command: list[str]
    address: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    open: ExitStack = field(default_factory=ExitStack)  # closed once all has ended

    def start(self) -> None:
        log = self.open.enter_context(tempfile.NamedTemporaryFile())
        self.log = Path(log.name).read_bytes
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | QUIET | ENVIRONMENT | {MARK: self.name},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def members(self) -> list[psutil.Process]:
        """Its processes that are more than a name in the table of processes."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if each.environ().get(MARK) == self.name and each.status() != "zombie":
                    found.append(each)
        return found

    def wait(self, is_reached: Callable[[], Any]) -> None:
        """Wait for a moment. Raises RuntimeError where the command ends before."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command} ended, or took over {START_TIMEOUT_S:g} s")
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200)
        except OSError:
            return False

    def end(self, number: signal.Signals) -> tuple[float, int]:
        """Send the signal; returns the seconds until all has ended, and how many are left."""
        begin = time.monotonic()
        self.process.send_signal(number)
        patience_s = PATIENCE_S + SHUTDOWN_TIMEOUT_S
        while (left := self.members()) and time.monotonic() - begin < patience_s:
            self.process.poll()
            time.sleep(0.2)
        seconds = time.monotonic() - begin
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()
        self.open.close()
        return seconds, len(left)


# moments ----

Moment = Callable[[Life], None]  # waits for it


def after(seconds: float) -> Moment:
    return lambda life: time.sleep(seconds)


def logged(words: str) -> Moment:
    return lambda life: life.wait(lambda: words.encode() in life.log())


def idle(life: Life) -> None:
    life.wait(life.is_ready)


def half_upload(life: Life) -> None:
    idle(life)
    life.open.enter_context(upload(life.address, speech_clip(CLIP_S, 0), share=0.5))


def unread_session(life: Life) -> None:
    """A client that sends audio without an end, and reads no event."""
    idle(life)
    url = f"ws{life.address[4:]}/v1/realtime?intent=transcription"
    session = life.open.enter_context(connect(url, max_queue=1, close_timeout=1))
    pcm = base64.b64encode(speech_clip(5, 1)[44:]).decode()
    audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}}
    config = {"type": "session.update", "session": {"type": "transcription", "audio": audio}}

    def flood() -> None:
        with suppress(Exception):  # the end of the server
            session.send(json.dumps(config))
            while True:
                session.send(json.dumps({"type": "input_audio_buffer.append", "audio": pcm}))
                session.send(json.dumps({"type": "input_audio_buffer.commit"}))

    threading.Thread(target=flood, daemon=True).start()
    time.sleep(FLOOD_S)


def unread_stream(life: Life) -> None:
    idle(life)
    life.open.enter_context(upload(life.address, speech_clip(CLIP_S, 2), share=1, stream=True))
    life.wait(lambda: running(life.address))


def decoding(life: Life) -> None:
    idle(life)
    pool = life.open.enter_context(ThreadPoolExecutor(8))
    for seed in range(8):
        pool.submit(ask, life.address, speech_clip(CLIP_S, seed), stream=seed % 2 == 1)
    life.wait(lambda: running(life.address))


def stopping(life: Life) -> None:
    """A second signal, a second after SIGTERM."""
    decoding(life)
    life.process.terminate()
    time.sleep(1)


def batch_writes(folder: str) -> Moment:
    return lambda life: life.wait(lambda: any(Path(folder).glob("[!.]*")))


def serve(*options: str) -> Life:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(CHECKPOINT), "--port", str(port), "--served-model-name", "model"]
    arguments += ["--enforce-eager", "--max-model-len", "2048", *options]
    return Life([*COMMAND, *arguments], f"http://127.0.0.1:{port}")


# Of a start: what the server, its engine and its worker log. Between two of them lie seconds of
# imports, loading or profiling.
STARTS = {
    "at once": after(0),
    "imports": after(3),
    "model is known": logged("Resolved architecture"),
    "engine is started": logged("warmup completed"),
    "engine is built": logged("Initializing a V1 LLM engine"),
    "weights are read": logged("Starting to load model"),
    "weights are loaded": logged("Loading weights took"),
    "KV cache is sized": logged("KV cache size"),
}


def moments(folder: str) -> dict[str, tuple[Life, Moment]]:
    """The twenty, by their names."""
    timeout = ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    aligner = ["--aligner", str(ALIGNER), "--aligner-options=--enforce-eager"]

    def batch(name: str) -> Life:
        arguments = ["transcribe", str(HELDOUT), "--model", str(CHECKPOINT), "-f", "json"]
        return Life([*COMMAND, *arguments, "-o", f"{folder}/{name}"])

    return {
        **{name: (serve(), moment) for name, moment in STARTS.items()},
        "idle": (serve(), idle),
        "half an upload": (serve(), half_upload),
        "unread session": (serve(), unread_session),
        "unread stream": (serve(), unread_stream),
        "decoding": (serve(), decoding),
        "decoding, with a time-out": (serve(*timeout), decoding),
        "stopping": (serve(*timeout), stopping),
        "two API servers": (serve("--api-server-count", "2"), decoding),
        "aligner starts": (serve(*aligner), STARTS["weights are read"]),
        "with an aligner": (serve(*aligner), idle),
        "batch starts": (batch("started"), STARTS["engine is built"]),
        "batch writes": (batch("written"), batch_writes(f"{folder}/written")),
    }


def ended(number: signal.Signals, *, names: list[str] | None, at_once: int) -> dict[str, Any]:
    """One signal at each moment of ``names``, or at all: the row of a table."""

    def run(name: str) -> tuple[float, int]:
        life, reach = lives[name]
        life.start()
        try:
            reach(life)
        except RuntimeError:
            life.end(signal.SIGKILL)
            raise
        seconds, left = life.end(number)
        print(f"{number.name} {name}: {seconds:.1f} s, {left} left", flush=True)
        return seconds, left

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        lives = moments(folder)
        results = dict(zip(names or lives, pool.map(run, names or lives), strict=True))
    longest = max(results, key=results.__getitem__)
    return {
        "clients saw": f"{number.name} at {len(results)} moments",
        "known within s": None,
        "next client": None,
        "recovery": f"ended after {results[longest][0]:.1f} s at most ({longest})",
        "left": f"{sum(left for _, left in results.values())} processes",
    }
