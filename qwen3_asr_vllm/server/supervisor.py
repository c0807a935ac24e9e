# SPDX-License-Identifier: Apache-2.0
"""A transcription server and its aligner on one machine: ``qwen3-asr serve ASR --aligner ALIGNER``.

    supervisor -- starts, watches --> aligner, on a port of 127.0.0.1
               -- starts, waits for --> transcriber, told where the aligner is

Two ordinary servers, each in a process group of its own. The aligner starts first, for both size
their memory at the start. One that dies is started again, and requests for words get a 503 until
it is back. When the transcriber ends, a signal comes or the supervisor is killed, both end.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from ..aligner import CPU_KV_CACHE_BYTES, UTILIZATION, split_memory
from ..engine import gpu_bytes
from ..processes import end_with_supervisor

logger = logging.getLogger(__name__)

POLL_S = 0.5
STOP_S = 30.0  # that a server has to finish what it does, when it is asked to end
MAX_PAUSE_S = 30.0  # before an aligner that dies again and again is started once more
STEADY_S = 60.0  # after which it counts as well again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a terminal closes


@dataclass(frozen=True)
class Plan:
    """What to start: the arguments of ``qwen3-asr serve`` for both, and where the aligner is."""

    transcriber: list[str]
    aligner: list[str]
    url: str


def plan(argv: Sequence[str], *, gpu_bytes: int | None, port: int) -> Plan:
    """The two command lines that one means. ``gpu_bytes``: of one GPU; None without one.

    ``--aligner-options`` is for the aligner; all else but ``--aligner`` is for the transcriber.
    Both share the memory that ``--gpu-memory-utilization`` grants. Exits 2 where wrong.
    """
    parser = argparse.ArgumentParser(prog="qwen3-asr serve", allow_abbrev=False)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--aligner-options", "--aligner_options", type=shlex.split, default=[])
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", type=float)
    args, rest = parser.parse_known_args(list(argv))
    aligner = [args.aligner, "--host", "127.0.0.1", "--port", str(port)]
    aligner += ["--mm-processor-cache-gb", "0"]  # no clip comes twice
    if gpu_bytes is None:
        aligner += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
        if args.gpu_memory_utilization is not None:
            rest += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    else:
        shares = split_memory(gpu_bytes, args.gpu_memory_utilization or UTILIZATION)
        for command, share in zip((aligner, rest), shares, strict=True):
            command += ["--gpu-memory-utilization", f"{share:.3f}"]
    return Plan(rest, aligner + args.aligner_options, f"http://127.0.0.1:{port}")


def serve_both(argv: Sequence[str]) -> int:
    """Run both until the transcriber ends, whose exit code this is, or a signal comes: 0."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":  # which alone lets the aligner share a port that is held
            holder.close()
        return Supervisor(plan(argv, gpu_bytes=gpu_bytes(), port=port)).run()


class Supervisor:
    """Starts what a plan says, and sees to it until the end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._aligner: subprocess.Popen[bytes] | None = None
        self._transcriber: subprocess.Popen[bytes] | None = None
        self._is_stopping = False
        self._pause_s = 1.0
        self._started_at = 0.0

    def run(self) -> int:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._stop)
        try:
            return self._run()
        finally:
            for server in (self._transcriber, self._aligner):
                _end(server)

    def _run(self) -> int:
        self._start_aligner()
        while not self._is_stopping and not _is_healthy(self._plan.url):
            if (code := _exit_code(self._aligner)) is not None:
                logger.error("The aligner ended before it was ready (exit code %d).", code)
                return code or 1
            time.sleep(POLL_S)
        if self._is_stopping:
            return 0
        logger.info("The aligner is ready at %s; starting the transcriber.", self._plan.url)
        self._transcriber = _start(
            self._plan.transcriber, os.environ | {"QWEN3_ASR_ALIGNER_URL": self._plan.url}
        )
        while not self._is_stopping:
            if (code := _exit_code(self._transcriber)) is not None:
                logger.info("The transcriber ended (exit code %d).", code)
                return code
            if (code := _exit_code(self._aligner)) is not None:
                self._start_aligner_again(code)
            time.sleep(POLL_S)
        return 0

    def _start_aligner(self) -> None:
        # It listens on this machine only, and those who ask it have no key.
        environment = {name: v for name, v in os.environ.items() if name != "VLLM_API_KEY"}
        self._aligner = _start(self._plan.aligner, environment)
        self._started_at = time.monotonic()

    def _start_aligner_again(self, code: int) -> None:
        _end(self._aligner)  # what is left of its group
        if time.monotonic() - self._started_at > STEADY_S:
            self._pause_s = 1.0
        logger.error("The aligner ended (%d); starting it again in %g s.", code, self._pause_s)
        until = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        while not self._is_stopping and time.monotonic() < until:
            if _exit_code(self._transcriber) is not None:
                return
            time.sleep(POLL_S)
        if not self._is_stopping:
            self._start_aligner()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True


def _start(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "serve", *argv]
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_supervisor if sys.platform == "linux" else None,
    )


def _exit_code(server: subprocess.Popen[bytes] | None) -> int | None:
    return None if server is None else server.poll()


def _end(server: subprocess.Popen[bytes] | None) -> None:
    """Ask a server to end, and make sure that it and all of its group have."""
    if server is None:
        return
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("A server did not end within %g s, and is killed.", STOP_S)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left
    server.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
