# SPDX-License-Identifier: Apache-2.0
"""What ``qwen3-asr doctor --server URL`` asks of a server that runs.

Each check says what it found, or raises what is wrong and what to do.
"""

from __future__ import annotations

import io
import json
import time
import wave
from collections.abc import Callable

import numpy as np

from .. import SUPPORTED_VLLM, __version__
from ..corpus.client import Server, StatusError
from ..geometry import SAMPLE_RATE

TIMEOUT_S = 60  # without a byte; the tone takes a CPU a second or two
_OURS = "Do: start it with `qwen3-asr serve`, or with VLLM_PLUGINS=qwen3_asr"
_LOAD = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def server_checks(url: str, *, api_key: str | None = None) -> dict[str, Callable[[], str]]:
    """Checks by name, in order. The first raises ConnectionError where nothing answers.

    Raises ValueError for what is no address.
    """
    server = Server(url, model="any", api_key=api_key, timeout_s=TIMEOUT_S)

    def transcribes() -> str:
        asked = Server(url, api_key=api_key, timeout_s=TIMEOUT_S)
        started = time.perf_counter()
        (result,) = asked.transcribe([_tone()], most_busy_s=TIMEOUT_S)
        if result.error:
            raise result.error
        return f"a second of a tone in {time.perf_counter() - started:.2f} s"

    return {
        "ready": lambda: _ready(server),
        "vllm": lambda: _if_exposed(_vllm, server),
        "models": lambda: _models(server),
        "routes": lambda: f"of qwen3_asr_vllm {_about(server)['version']}{_other(server)}",
        "limits": lambda: _limits(server),
        "page": lambda: _page(server),
        "metrics": lambda: _if_exposed(_metrics, server),
        "transcribes": transcribes,
    }


def _if_exposed(check: Callable[[Server], str], server: Server) -> str:
    """A check of what a proxy before a server of ours need not let through."""
    try:
        return check(server)
    except StatusError as error:
        if error.status != 404:
            raise
    _about(server)
    return "not exposed"


def _ready(server: Server) -> str:
    try:
        server.get("/health")
    except ValueError as error:
        raise ValueError(f"{error} Do: wait if it starts; else read its log") from error
    return server.url


def _vllm(server: Server) -> str:
    version = str(json.loads(server.get("/version"))["version"])
    if not version.startswith(tuple(f"{tested}." for tested in SUPPORTED_VLLM)):
        raise ValueError(f"{version} is untested. Do: install {' or '.join(SUPPORTED_VLLM)}")
    return version


def _models(server: Server) -> str:
    try:
        models = json.loads(server.get("/v1/models"))["data"]
    except ValueError as error:
        raise ValueError(f"{error} Do: pass --api-key, if it wants one") from error
    return ", ".join(model["id"] for model in models)


def _about(server: Server) -> dict[str, object]:
    try:
        about: dict[str, object] = json.loads(server.get("/about"))
    except ValueError as error:
        raise ValueError(f"vLLM's own answer ({error}) {_OURS}") from error
    return about


def _other(server: Server) -> str:
    theirs = _about(server)["version"]
    return "" if theirs == __version__ else f" (here it is {__version__})"


def _limits(server: Server) -> str:
    about = _about(server)
    words = "words from an aligner" if about["words"] else "no aligner, so no words"
    return (
        f"{about['max_upload_mb']} MiB, {about['max_duration_s']:g} s, "
        f"{about['max_clip_s']:g} s in a clip; {words}"
    )


def _page(server: Server) -> str:
    if not server.get("/").startswith(b"<!doctype html>"):
        raise ValueError(f"something else answers there. {_OURS}")
    return f"{server.url}/"


def _metrics(server: Server) -> str:
    lines = server.get("/metrics").decode().splitlines()
    loads = (sum(float(x.split()[-1]) for x in lines if x.startswith(name)) for name in _LOAD)
    return "{:.0f} requests running, {:.0f} waiting".format(*loads)


def _tone() -> bytes:
    """A second of 440 Hz, as a wav file."""
    angles = 2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        output.writeframes((8000 * np.sin(angles)).astype("<i2").tobytes())
    return file.getvalue()
