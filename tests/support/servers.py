# SPDX-License-Identifier: Apache-2.0
"""Servers: free ports, ``qwen3-asr serve`` and vLLM's own, ASGI apps on a port.

vLLM's in-tree Qwen3-ASR is the baseline: ``VLLM_PLUGINS=""`` switches our plugin off. In-tree
imports torchvision, through which no audio goes; where it is missing, ``stubs/torchvision`` stands
in for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .checkpoints import CHECKPOINT
from .checks import eventually

START_TIMEOUT_S = 900
STUBS = Path(__file__).resolve().parent / "stubs"
IN_TREE: dict[str, str] = {}  # ``pytest --in-tree`` fills it: servers have vLLM's own model


def in_tree_environment() -> dict[str, str]:
    """Variables that make vLLM serve its own model."""
    stubs = {} if find_spec("torchvision") else {"PYTHONPATH": with_paths(STUBS)}
    return {"VLLM_PLUGINS": ""} | stubs


def with_paths(*folders: Path | str) -> str:
    """This process's ``PYTHONPATH`` behind more folders."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port of 127.0.0.1: only a process that asks for its number gets it.

    On Linux, a socket that does not listen leaves room for one that does, if both allow it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def running(
    command: list[str], *, port: int, env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is healthy, and end it and its children with the block.

    Raises RuntimeError with the end of its log if it does not start.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # vLLM's own program, while it starts
            process.wait(60)
        with suppress(ProcessLookupError):  # also where the first of the group has died
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-20_000:]}")


# Every process of the server notes the addresses that it looks up or connects to.
NOTE_ADDRESSES = """
import os, sys

def note(event, args):
    if event == "socket.getaddrinfo" or event == "socket.connect":
        address = args[0] if event == "socket.getaddrinfo" else args[1]
        if isinstance(address, tuple):
            address = address[0]
        if isinstance(address, str) and not address.startswith("/"):
            with open(os.environ["ADDRESSES"], "a") as file:
                file.write(f"{address}\\n")

sys.addaudithook(note)
import socket
socket.getaddrinfo("localhost", None)  # shows that notes are taken
"""


@dataclass(frozen=True)
class Server:
    """A running server, its log and the addresses that its processes looked up."""

    url: str
    log: Path
    addresses: Path
    process: subprocess.Popen[bytes]


@contextmanager
def serving(
    folder: Path,
    *options: str,
    model: Path = CHECKPOINT,
    program: str = "qwen3_asr_vllm.cli serve",
    **env: str,
) -> Iterator[Server]:
    """Run ``qwen3-asr serve`` on a tiny checkpoint, as a user starts it; end it with the block.

    ``program`` may be vLLM's own.
    """
    (folder / "sitecustomize.py").write_text(NOTE_ADDRESSES)
    command = [sys.executable, "-m", *program.split(), str(model)]
    command += "--host 127.0.0.1 --dtype float32 --enforce-eager".split()
    drop = ("HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS")
    inherited = {name: value for name, value in os.environ.items() if name not in drop}
    env |= IN_TREE
    paths = filter(None, [str(folder), env.pop("PYTHONPATH", None)])
    env |= {"ADDRESSES": str(folder / "addresses"), "PYTHONPATH": with_paths(*paths)}
    env |= {"QWEN3_ASR_MAX_CLIP_S": "12"}  # the checkpoint learned on clips of a few sentences
    env |= {"QWEN3_ASR_MAX_UTTERANCE_S": "20", "QWEN3_ASR_REALTIME_IDLE_S": "10"}
    env |= {"VLLM_HOST_IP": "127.0.0.1"}  # else vLLM asks the kernel for its route to 8.8.8.8
    log = folder / "log"
    with reserved_port() as port:
        command += ["--port", str(port), *options]
        with running(command, port=port, env=inherited | env, log=log) as process:
            yield Server(f"http://127.0.0.1:{port}", log, folder / "addresses", process)


@contextmanager
def on_a_port(app: Any) -> Iterator[str]:
    """Serve an ASGI app from a thread; yields its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    if hasattr(app, "state"):
        app.state.server = server  # as vLLM does
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
