# SPDX-License-Identifier: Apache-2.0
"""Clients of a server that fails, and the outcome of each in a word or two."""

from __future__ import annotations

import re
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import openai
from support.audio import speech_clip

CLIENTS = 8
CLIP_S = 60.0  # of their recordings


def ask(address: str, file: bytes, *, stream: bool = False, words: bool = False) -> str:
    """Send a recording; return the outcome in a word or two."""
    form: dict[str, Any] = {"model": "model", "file": ("a.wav", file), "stream": stream}
    if words:
        form |= {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 600}
    with openai.OpenAI(base_url=f"{address}/v1", **options) as client:
        events = None
        try:
            answer = client.audio.transcriptions.create(**form)
            if not stream:
                return "text"
            events = []
            events.extend(answer)
            is_whole = events and events[-1].type == "transcript.text.done"
            return "text" if is_whole else "a cut stream"
        except openai.APIStatusError as error:
            return f"{error.status_code} {error.code or ''}".strip()
        except openai.APIConnectionError:
            return "connection closed" if events is None else "a cut stream"
        except openai.APIError as error:
            return f"error event: {error.message[:60]}"


def short_request(address: str) -> str:
    return ask(address, speech_clip(2, 99))


def running(address: str) -> float:
    """Requests in the engine, when it last said."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.M)))


def mid_request(pool: ThreadPoolExecutor, address: str) -> list[Future[str]]:
    """Clients, half of them streaming, whose recordings the engine is decoding."""
    asked = [
        pool.submit(ask, address, speech_clip(CLIP_S, seed), stream=seed % 2 == 1)
        for seed in range(CLIENTS)
    ]
    while not running(address) and not all(future.done() for future in asked):
        time.sleep(0.05)
    return asked


def upload(
    address: str, file: bytes, *, share: float, stream: bool = False
) -> closing[HTTPConnection]:
    """A client that has sent so much of its form, and waits."""
    field = b"--b\r\nContent-Disposition: form-data; name="
    body = field + b"stream\r\n\r\n%s\r\n" % str(stream).lower().encode()
    body += field + b"file; filename=a.wav\r\n\r\n" + file + b"\r\n--b--\r\n"
    connection = HTTPConnection(address.removeprefix("http://"), timeout=600)
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: int(len(body) * share)])
    return closing(connection)
