# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve ASR [--aligner ALIGNER]``: servers as child processes that always end.

    supervisor -- starts, watches --> aligner, if any, on a port of 127.0.0.1
               -- starts, waits for --> transcriber, which gets the aligner's address

Each server is ``vllm serve`` in a process group of its own. vLLM ignores SIGTERM while its engine
starts, and SIGHUP or SIGKILL leaves its engine behind. So the supervisor takes the signals, asks
the servers to end, and kills what is left of their groups in time. A server whose supervisor is
killed kills its own group.

The aligner starts first: both servers size their memory at the start. An aligner that dies is
restarted; until then, requests for words get a 503.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..processes import SUPERVISOR

logger = logging.getLogger(__name__)

POLL_S = 0.5  # seconds between two checks of the servers
GRACE_S = 8.0  # seconds beyond vLLM's --shutdown-timeout until servers are killed
GROUP_S = 2.0  # seconds for engines to end and the resource tracker to free memory
MAX_PAUSE_S = 30.0  # upper bound of seconds before an aligner is restarted
STEADY_S = 60.0  # seconds of uptime that reset this pause
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a terminal closes


@dataclass(frozen=True)
class Plan:
    """Servers to start: the arguments of ``vllm serve`` for each, and the aligner's URL."""

    transcriber: list[str]
    aligner: list[str] | None = None
    url: str = ""


def serve(argv: Sequence[str]) -> int:
    """Run the servers of one command line; returns the exit code.

    That is 0 after a signal, else the transcriber's; 128 + n if signal n ended the transcriber.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    if all(arg.partition("=")[0] != "--aligner" for arg in argv):
        return Supervisor(Plan(list(argv))).run()
    from ..engine import gpu_bytes

    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":  # only Linux lets the aligner bind a port that is held
            holder.close()
        return Supervisor(plan(argv, gpu_bytes=gpu_bytes(), port=port)).run()


def plan(argv: Sequence[str], *, gpu_bytes: int | None, port: int) -> Plan:
    """Split one command line in two. ``gpu_bytes``: memory of one GPU; None without one.

    ``--aligner-options`` is for the aligner; all else but ``--aligner`` is for the transcriber.
    Both share the memory that ``--gpu-memory-utilization`` grants. Exits 2 for wrong options.
    """
    from ..engine import ALIGNER_KV_CACHE_BYTES, UTILIZATION, split_memory

    parser = argparse.ArgumentParser(prog="qwen3-asr serve", allow_abbrev=False)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--aligner-options", "--aligner_options", type=shlex.split, default=[])
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", type=float)
    args, rest = parser.parse_known_args(list(argv))
    aligner = [args.aligner, "--host", "127.0.0.1", "--port", str(port)]
    aligner += ["--mm-processor-cache-gb", "0"]  # no clip is sent twice
    if gpu_bytes is None:
        aligner += ["--kv-cache-memory-bytes", str(ALIGNER_KV_CACHE_BYTES)]
        if args.gpu_memory_utilization is not None:
            rest += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    else:
        shares = split_memory(gpu_bytes, args.gpu_memory_utilization or UTILIZATION)
        for command, share in zip((aligner, rest), shares, strict=True):
            command += ["--gpu-memory-utilization", f"{share:.3f}"]
    return Plan(rest, aligner + args.aligner_options, f"http://127.0.0.1:{port}")


def shutdown_timeout_s(argv: Sequence[str]) -> float:
    """Return ``--shutdown-timeout`` of vLLM's command line, or of its ``--config`` file."""
    parser = argparse.ArgumentParser(prog="qwen3-asr serve", add_help=False)
    parser.add_argument("--shutdown-timeout", "--shutdown_timeout", type=float)
    parser.add_argument("--config", type=Path)
    args, _ = parser.parse_known_args(list(argv))
    if args.shutdown_timeout is not None or args.config is None:
        return float(args.shutdown_timeout or 0)
    try:
        options = args.config.read_text()
    except (OSError, ValueError):
        return 0.0  # vLLM reports the error
    found = re.search(r"^['\"]?shutdown[-_]timeout['\"]?\s*:\s*(\d+)", options, re.M)
    return float(found[1]) if found else 0.0


class Supervisor:
    """Starts the servers of a plan and watches them until they end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._aligner: subprocess.Popen[bytes] | None = None
        self._transcriber: subprocess.Popen[bytes] | None = None
        self._is_stopping = False
        self._pause_s = 1.0
        self._started_at = 0.0

    def run(self) -> int:
        patience_s = shutdown_timeout_s(self._plan.transcriber) + GRACE_S
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._stop)
        try:
            code = self._run()
        finally:
            until = time.monotonic() + patience_s
            for server in (self._transcriber, self._aligner):
                _end(server, until)
        return 128 - code if code < 0 else code

    def _run(self) -> int:
        environment = dict(os.environ)
        if self._plan.aligner is not None:
            self._start_aligner()
            if (code := self._wait_for_aligner()) is not None:
                return code
            logger.info("The aligner is ready at %s; starting the transcriber.", self._plan.url)
            environment["QWEN3_ASR_ALIGNER_URL"] = self._plan.url
        self._transcriber = _start(self._plan.transcriber, environment)
        while not self._is_stopping:
            if (code := _exit_code(self._transcriber)) is not None:
                logger.info("The server ended (exit code %d).", code)
                return code
            if (code := _exit_code(self._aligner)) is not None:
                self._start_aligner_again(code)
            time.sleep(POLL_S)
        return 0

    def _wait_for_aligner(self) -> int | None:
        """Return None once it is ready, else the exit code of this process."""
        while not self._is_stopping:
            if _is_healthy(self._plan.url):
                return None
            if (code := _exit_code(self._aligner)) is not None:
                logger.error("The aligner ended before it was ready (exit code %d).", code)
                return code or 1
            time.sleep(POLL_S)
        return 0

    def _start_aligner(self) -> None:
        # The aligner listens on 127.0.0.1 only, and the transcriber sends it no key.
        environment = {name: v for name, v in os.environ.items() if name != "VLLM_API_KEY"}
        self._aligner = _start(self._plan.aligner or [], environment)
        self._started_at = time.monotonic()

    def _start_aligner_again(self, code: int) -> None:
        _end(self._aligner, until=0)  # ends the rest of its process group
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
    # Like this process, the server must not import from the working directory.
    is_safe = sys.version_info >= (3, 11) and not {"", os.getcwd()} & set(sys.path)
    flags = ["-P"] if is_safe else []
    return subprocess.Popen(
        [sys.executable, *flags, "-m", "qwen3_asr_vllm.cli.vllm_serve", *argv],
        env=environment | {SUPERVISOR: str(os.getpid())},
        start_new_session=True,
    )


def _exit_code(server: subprocess.Popen[bytes] | None) -> int | None:
    return None if server is None else server.poll()


def _end(server: subprocess.Popen[bytes] | None, until: float) -> None:
    """Ask a server to end, and kill what is left of its process group at ``until``."""
    if server is None:
        return
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("A server did not end in time and is killed.")
            server.kill()
            server.wait()
    until = time.monotonic() + GROUP_S
    while _signal_group(server.pid, signal.SIGTERM) and time.monotonic() < until:
        time.sleep(0.1)
    _signal_group(server.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; returns whether anything is left of it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
