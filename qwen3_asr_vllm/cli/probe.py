# SPDX-License-Identifier: Apache-2.0
"""Checks of a running server: ``qwen3-asr doctor --server URL``.

Each check returns its finding, or raises an error with the problem and a remedy.
"""

from __future__ import annotations

import io
import json
import re
import time
import wave
from collections.abc import Callable

import numpy as np

from .. import SUPPORTED_VLLM, __version__
from ..corpus.client import Client, StatusError
from ..geometry import SAMPLE_RATE

TIMEOUT_S = 60  # seconds without a byte; a CPU transcribes the tone in a second or two
_OURS = "Do: start it with `qwen3-asr serve`, or with VLLM_PLUGINS=qwen3_asr"
_LOAD = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
_ENGINE = r'^vllm:num_requests_running\{.*\bengine="(\d+)"'


def server_checks(url: str, *, api_key: str | None = None) -> dict[str, Callable[[], str]]:
    """Return checks by name, in order. The first raises ConnectionError without a response.

    Raises ValueError for a URL that is not http(s).
    """
    client = Client(url, model="any", api_key=api_key, timeout_s=TIMEOUT_S)

    def transcribes() -> str:
        client = Client(url, api_key=api_key, timeout_s=TIMEOUT_S, most_busy_s=TIMEOUT_S)
        started = time.perf_counter()
        client.transcribe(_tone())
        return f"a second of a tone in {time.perf_counter() - started:.2f} s"

    return {
        "ready": lambda: _ready(client),
        "vllm": lambda: _if_exposed(_vllm, client),
        "models": lambda: _models(client),
        "routes": lambda: f"of qwen3_asr_vllm {_about(client)['version']}{_other(client)}",
        "limits": lambda: _limits(client),
        "page": lambda: _page(client),
        "metrics": lambda: _if_exposed(_metrics, client),
        "transcribes": transcribes,
    }


def _if_exposed(check: Callable[[Client], str], client: Client) -> str:
    """Run a check of a route that a proxy may hide."""
    try:
        return check(client)
    except StatusError as error:
        if error.status != 404:
            raise
    _about(client)
    return "not exposed"


def _ready(client: Client) -> str:
    try:
        client.get("/health")
    except ValueError as error:
        raise ValueError(f"{error} Do: wait if it starts; else read its log") from error
    return client.url


def _vllm(client: Client) -> str:
    version = str(json.loads(client.get("/version"))["version"])
    if not version.startswith(tuple(f"{tested}." for tested in SUPPORTED_VLLM)):
        raise ValueError(f"{version} is untested. Do: install {' or '.join(SUPPORTED_VLLM)}")
    return version


def _models(client: Client) -> str:
    try:
        models = json.loads(client.get("/v1/models"))["data"]
    except ValueError as error:
        raise ValueError(f"{error} Do: pass --api-key, if the server needs one") from error
    return ", ".join(model["id"] for model in models)


def _about(client: Client) -> dict[str, object]:
    try:
        about: dict[str, object] = json.loads(client.get("/about"))
    except ValueError as error:
        raise ValueError(f"the route is not of this package ({error}) {_OURS}") from error
    return about


def _other(client: Client) -> str:
    theirs = _about(client)["version"]
    return "" if theirs == __version__ else f" (here it is {__version__})"


def _limits(client: Client) -> str:
    about = _about(client)
    words = "words from an aligner" if about["words"] else "no aligner, so no words"
    return (
        f"{about['max_upload_mb']} MiB, {about['max_duration_s']:g} s, "
        f"{about['max_clip_s']:g} s in a clip; {words}"
    )


def _page(client: Client) -> str:
    if not client.get("/").startswith(b"<!doctype html>"):
        raise ValueError(f"/ is not the page of this package. {_OURS}")
    return f"{client.url}/"


def _metrics(client: Client) -> str:
    lines = client.get("/metrics").decode().splitlines()
    loads = (sum(float(x.split()[-1]) for x in lines if x.startswith(name)) for name in _LOAD)
    found = "{:.0f} requests running, {:.0f} waiting".format(*loads)
    engines = {x for line in lines for x in re.findall(_ENGINE, line)}
    return f"{found} on {len(engines)} engines" if len(engines) > 1 else found


def _tone() -> bytes:
    """Return a wav file with a second of 440 Hz."""
    angles = 2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        output.writeframes((8000 * np.sin(angles)).astype("<i2").tobytes())
    return file.getvalue()
