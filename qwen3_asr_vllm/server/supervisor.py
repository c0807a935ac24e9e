# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve ASR [--aligner ALIGNER] [--diarizer DIARIZER]``: child processes that end.

    supervisor -- starts, watches --> aligner and diarizer, if any, on ports of 127.0.0.1
               -- starts, waits for --> transcriber, which gets their addresses

Each server is ``vllm serve``, or a diarizer without vLLM, in a process group of its own. vLLM
ignores SIGTERM while its engine starts, and SIGHUP or SIGKILL leaves its engine behind. So the
supervisor takes the signals, asks the servers to end, and kills what is left of their groups in
time. A server whose supervisor is killed kills its own group.

Aligner and diarizer start first: the transcriber sizes its memory at the start. One that dies is
restarted; until then, requests for words or speakers get a 503. A transcriber with several engines
(``--engines-per-gpu``) ends when one of them dies, and is restarted too, if it has been ready.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..processes import SUPERVISOR

logger = logging.getLogger(__name__)

POLL_S = 0.5  # seconds between two checks of the servers
GRACE_S = 8.0  # seconds beyond vLLM's --shutdown-timeout until servers are killed
GROUP_S = 2.0  # seconds for engines to end and the resource tracker to free memory
MAX_PAUSE_S = 30.0  # upper bound of seconds before a server is restarted
DEFAULT_PORT = 8000  # of vLLM
DIARIZER_BYTES = 4 << 30  # of a GPU that a diarizer may take
STEADY_S = 60.0  # seconds of uptime that reset this pause
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a terminal closes


@dataclass(frozen=True)
class Plan:
    """Servers to start: the arguments for each, and the URLs of aligner and diarizer."""

    transcriber: list[str]
    aligner: list[str] | None = None
    url: str = ""
    diarizer: list[str] | None = None
    diarizer_url: str = ""


def serve(argv: Sequence[str]) -> int:
    """Run the servers of one command line; returns the exit code.

    That is 0 after a signal, else the transcriber's; 128 + n if signal n ended the transcriber.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    if not {"--aligner", "--diarizer"} & {arg.partition("=")[0] for arg in argv}:
        return Supervisor(Plan(list(argv))).run()
    from ..engine import gpu_bytes

    with _held_port() as port, _held_port() as diarizer_port:
        made = plan(argv, gpu_bytes=gpu_bytes(), port=port, diarizer_port=diarizer_port)
        return Supervisor(made).run()


@contextmanager
def _held_port() -> Iterator[int]:
    """Hold a free port of 127.0.0.1, which only a process that is given its number binds."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":  # only Linux lets a server bind a port that is held
            holder.close()
        yield port


def plan(argv: Sequence[str], *, gpu_bytes: int | None, port: int, diarizer_port: int = 0) -> Plan:
    """Split one command line. ``gpu_bytes``: memory of one GPU; None without one.

    ``--aligner-options`` is for the aligner; all else but ``--aligner`` and ``--diarizer`` is for
    the transcriber. All share the memory that ``--gpu-memory-utilization`` grants. Exits 2 for
    wrong options.
    """
    from ..engine import UTILIZATION

    parser = argparse.ArgumentParser(prog="qwen3-asr serve", allow_abbrev=False)
    parser.add_argument("--aligner")
    parser.add_argument("--aligner-options", "--aligner_options", type=shlex.split, default=[])
    parser.add_argument("--diarizer")
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", type=float)
    args, rest = parser.parse_known_args(list(argv))
    share = args.gpu_memory_utilization
    if gpu_bytes is not None:
        diarizer_share = DIARIZER_BYTES / gpu_bytes if args.diarizer else 0.0
        share = (share or UTILIZATION) - diarizer_share
    diarizer = ["--diarizer", args.diarizer, "--port", str(diarizer_port)]
    aligner, share = _aligner(args, port, gpu_bytes, share)
    if share is not None:
        rest += ["--gpu-memory-utilization", f"{share:.3f}" if gpu_bytes else str(share)]
    return Plan(
        transcriber=rest,
        aligner=aligner,
        url=f"http://127.0.0.1:{port}",
        diarizer=diarizer if args.diarizer else None,
        diarizer_url=f"http://127.0.0.1:{diarizer_port}",
    )


def _aligner(
    args: argparse.Namespace, port: int, gpu_bytes: int | None, share: float | None
) -> tuple[list[str] | None, float | None]:
    """Return the arguments of the aligner, and the share of a GPU that the transcriber has."""
    from ..engine import ALIGNER_KV_CACHE_BYTES, split_memory

    if args.aligner is None:
        return None, share
    aligner = [args.aligner, "--host", "127.0.0.1", "--port", str(port)]
    aligner += ["--mm-processor-cache-gb", "0"]  # no clip is sent twice
    if gpu_bytes is None or share is None:
        aligner += ["--kv-cache-memory-bytes", str(ALIGNER_KV_CACHE_BYTES)]
    else:
        its_share, share = split_memory(gpu_bytes, share)
        aligner += ["--gpu-memory-utilization", f"{its_share:.3f}"]
    return aligner + args.aligner_options, share


def option(argv: Sequence[str], name: str) -> str | None:
    """Return a value of vLLM's command line, or of its ``--config`` file; None if it has none."""
    parser = argparse.ArgumentParser(prog="qwen3-asr serve", add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest="value")
    parser.add_argument("--config", type=Path)
    args, _ = parser.parse_known_args(list(argv))
    if args.value is not None or args.config is None:
        return args.value
    try:
        options = args.config.read_text()
    except (OSError, ValueError):
        return None  # vLLM reports the error
    key = name.replace("-", "[-_]")
    found = re.search(rf"^(['\"]?){key}\1\s*:\s*(['\"]?)([^\s'\"#]+)\2", options, re.M)
    return found[3] if found else None


def shutdown_timeout_s(argv: Sequence[str]) -> float:
    return _number(option(argv, "shutdown-timeout"), default=0.0)


def has_several_engines(argv: Sequence[str]) -> bool:
    """Return whether engines share a GPU; a server of several is started again if one dies."""
    return _number(option(argv, "engines-per-gpu"), default=1.0) > 1


def _number(value: str | None, *, default: float) -> float:
    try:
        return float(default if value is None else value)
    except ValueError:
        return default  # vLLM reports the error


class Server:
    """A server in a process group of its own, which may be started again after it ended."""

    def __init__(self, argv: list[str], environment: Mapping[str, str], *, name: str) -> None:
        self.argv, self.name = argv, name
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = 1.0
        self._start_at = 0.0  # monotonic seconds of the last start, or of the next

    def start(self) -> None:
        self._process, self._start_at = _start(self.argv, self._environment), time.monotonic()

    def exit_code(self) -> int | None:
        """Return the exit code of the process; None while it runs, or waits to be started again."""
        return None if self._process is None else self._process.poll()

    def start_later(self, code: int) -> None:
        """Start it again after a pause, which doubles while it ends soon after each start."""
        self.end(until=0)  # ends the rest of its process group
        if time.monotonic() - self._start_at > STEADY_S:
            self._pause_s = 1.0
        logger.error("%s ended (%d); starting it again in %g s.", self.name, code, self._pause_s)
        self._start_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    def start_if_due(self) -> None:
        if self._process is None and time.monotonic() >= self._start_at:
            self.start()

    def end(self, until: float) -> None:
        """Ask it to end, and kill what is left of its process group at ``until``."""
        if self._process is not None:
            _end(self._process, until)
        self._process = None


class Supervisor:
    """Starts the servers of a plan and watches them until they end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        environment = dict(os.environ)
        # Those beside the transcriber listen on 127.0.0.1 only, and it sends them no key.
        keyless = {name: v for name, v in environment.items() if name != "VLLM_API_KEY"}
        self._beside: dict[Server, str] = {}  # URLs
        for name, argv, url in (
            ("aligner", plan.aligner, plan.url),
            ("diarizer", plan.diarizer, plan.diarizer_url),
        ):
            if argv is not None:
                self._beside[Server(argv, keyless, name=f"The {name}")] = url
                environment[f"QWEN3_ASR_{name.upper()}_URL"] = url
        self._transcriber = Server(plan.transcriber, environment, name="The server")
        self._has_several_engines = has_several_engines(plan.transcriber)
        self._is_kept = False  # whether the transcriber is started again when it ends
        self._is_stopping = False

    def run(self) -> int:
        patience_s = shutdown_timeout_s(self._plan.transcriber) + GRACE_S
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._stop)
        try:
            code = self._run()
        finally:
            until = time.monotonic() + patience_s
            for server in (self._transcriber, *self._beside):
                server.end(until)
        return 128 - code if code < 0 else code

    def _run(self) -> int:
        for server in self._beside:
            server.start()
        for server, url in self._beside.items():
            if (code := self._wait_for(server, url)) is not None:
                return code
            logger.info("%s is ready at %s; the transcriber waits for it.", server.name, url)
        self._transcriber.start()
        while not self._is_stopping:
            if (code := self._watch()) is not None:
                logger.info("The server ended (exit code %d).", code)
                return code
            time.sleep(POLL_S)
        return 0

    def _watch(self) -> int | None:
        """Start again what has ended; returns the exit code of a transcriber that is not."""
        if self._has_several_engines and not self._is_kept:
            self._is_kept = _accepts(self._plan.transcriber)
        for server in (self._transcriber, *self._beside):
            if (code := server.exit_code()) is not None:
                if server is self._transcriber and not self._is_kept:
                    return code
                server.start_later(code)
            server.start_if_due()
        return None

    def _wait_for(self, server: Server, url: str) -> int | None:
        """Return None once it is ready, else the exit code of this process."""
        while not self._is_stopping:
            if _is_healthy(url):
                return None
            if (code := server.exit_code()) is not None:
                logger.error("%s ended before it was ready (exit code %d).", server.name, code)
                return code or 1
            time.sleep(POLL_S)
        return 0

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


def _end(server: subprocess.Popen[bytes], until: float) -> None:
    """Ask a server to end, and kill what is left of its process group at ``until``."""
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


def _accepts(argv: Sequence[str]) -> bool:
    """Return whether a server accepts connections; vLLM's does once its engines are ready."""
    host, port = option(argv, "host") or "127.0.0.1", option(argv, "port")
    try:
        if path := option(argv, "uds"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
        else:
            socket.create_connection((host, int(_number(port, default=DEFAULT_PORT))), 2).close()
    except OSError:
        return False
    return True
