# SPDX-License-Identifier: Apache-2.0
"""Realtime sessions, sent to a server."""

from __future__ import annotations

import base64
import json
import struct
import time
import zlib
from copy import deepcopy
from typing import Any

import numpy as np

from .outcomes import HANG_S, Outcome

EVENTS = ("session.update", "input_audio_buffer.append", "input_audio_buffer.commit")
EVENTS += ("input_audio_buffer.clear", "transcription_session.update", "response.create", "x", "")
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, 1e308, "", "a" * 10_000, "\0", "\ud800", "<|im_end|>", [], {}),
    *([[]], [None], {"": None}, {"a": {"b": []}}, "AAAA", "AAA", "====", "é", "file:///etc/passwd"),
)
PLACES = (
    *(("type",), ("event_id",), ("audio",), ("session",), ("model",), ("final",)),
    *(("session", "type"), ("session", "audio"), ("session", "audio", "input"), ("session", "x")),
    *(("session", "audio", "input", name) for name in ("format", "transcription", "x")),
    *(("session", "audio", "input", "turn_detection"), ("session", "include")),
    *(("session", "audio", "input", "format", name) for name in ("type", "rate")),
    *(("session", "audio", "input", "transcription", name) for name in ("model", "language")),
    *(("session", "audio", "input", "transcription", name) for name in ("prompt", "keywords")),
    *(("session", "audio", "input", "turn_detection", name) for name in ("type", "threshold")),
    *(("session", "audio", "input", "turn_detection", name) for name in ("eagerness", "x")),
    *(("session", "audio", "input", name) for name in ("noise_reduction", "turn_detection")),
    *(("session", "audio", "input", "transcription", name) for name in ("languages", "delay")),
    *(("session", name) for name in ("input_audio_format", "input_audio_transcription")),
    *(("session", name) for name in ("modalities", "turn_detection", "client_secret")),
)
FRAMES: tuple[str | bytes, ...] = (
    *("", "{", "null", "[]", "1", '"x"', "NaN", "[" * 50_000, '{"type": ' * 2_000, "\0", "{}"),
    *(
        b"",
        b"\xff\xfe",
        b'{"type": "session.update"}',
        b"\0" * 100_000,
        '{"type": "x"' + " " * 10**6,
        '{"type": "x", "session": [' + "[]," * 300_000 + "1]}",
        '{"type": "session.update", "session": {' + '"a":{},' * 200_000 + '"b":1}}',
    ),
)


def session_case(number: int) -> list[str | bytes]:
    """The frames of one session: events with wrong parts, and frames that are no events."""
    rng = np.random.default_rng([3, number])
    return [_frame(rng) for _ in range(int(rng.integers(1, 8)))]


def _frame(rng: np.random.Generator) -> str | bytes:
    if rng.random() < 0.2:
        return FRAMES[int(rng.integers(len(FRAMES)))]
    event: dict[str, Any] = {"type": EVENTS[int(rng.integers(len(EVENTS)))]}
    if event["type"] == "input_audio_buffer.append":
        size = int(rng.choice([0, 1, 3, 4_800, 96_001]))
        event["audio"] = base64.b64encode(rng.bytes(size)).decode()
    for _ in range(int(rng.integers(0, 3))):
        *path, last = PLACES[int(rng.integers(len(PLACES)))]
        place = event
        for name in path:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = deepcopy(JUNK[int(rng.integers(len(JUNK)))])
    return json.dumps(event)


def deflated_frame(rng: np.random.Generator) -> bytes:
    """A compressed frame of 16 KiB, which are 16 MiB, though no compression was agreed on."""
    text = (b'{"type": "x"' + b" " * (1 << 24), b"[" * (1 << 24), b'{"audio": "' + b"A" * (1 << 24))
    packer = zlib.compressobj(9, wbits=-15)
    data = packer.compress(text[int(rng.integers(len(text)))]) + packer.flush(zlib.Z_SYNC_FLUSH)
    data = data.removesuffix(b"\0\0\xff\xff")
    final, compressed, is_text, masked = 0x80, 0x40, 0x01, 0x80
    head = bytes([final | compressed | is_text, masked | 126]) + struct.pack(">H", len(data))
    return head + bytes(4) + data


def deflate(url: str, number: int) -> Outcome:
    """A session that sends such frames: it must be ended at once, as RFC 6455 says."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    start, code = time.perf_counter(), 0
    frame = deflated_frame(np.random.default_rng([8, number]))
    try:
        with connect(f"ws{url.removeprefix('http')}/v1/realtime") as socket:
            socket.socket.sendall(frame * 16)
            while True:
                socket.recv(timeout=HANG_S)
    except ConnectionClosed as error:
        code = error.rcvd.code if error.rcvd else 1006
    except (OSError, TimeoutError) as error:
        return Outcome(number, "deflated", "none", f"lost: {error!r}")
    broken = "" if code in (1002, 1007, 1009) else "closed with another code"
    return Outcome(number, "deflated", f"{code}: closed", broken, time.perf_counter() - start)


def converse(url: str, number: int) -> Outcome:
    """One session; after all that it must still answer."""
    if np.random.default_rng([9, number]).random() < 0.05:
        return deflate(url, number)
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    start, answers = time.perf_counter(), []
    last = {"type": "no such type"}
    try:
        with connect(f"ws{url.removeprefix('http')}/v1/realtime", max_size=None) as socket:
            for frame in session_case(number):
                socket.send(frame)
            socket.send(json.dumps(last))
            while not answers or last["type"] not in str(answers[-1].get("error")):
                answers.append(json.loads(socket.recv(timeout=HANG_S * 5)))
    except (OSError, WebSocketException, TimeoutError) as error:
        return Outcome(number, "session", str(answers[-1:])[:300], f"lost: {error!r}")
    errors = [answer["error"] for answer in answers if answer["type"] == "error"]
    unsaid = [error for error in errors if not _has_words(error)]
    broken = f"an error without words: {unsaid[0]}" if unsaid else ""
    answer = f"{len(errors)}: errors of {len(answers)} events"
    return Outcome(number, "session", answer, broken, time.perf_counter() - start)


def _has_words(error: Any) -> bool:
    """Whether an error has words: as a string, in vLLM's dialect, or in OpenAI's object."""
    return bool(error if isinstance(error, str) else error.get("message") and error.get("type"))
