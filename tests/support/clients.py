# SPDX-License-Identifier: Apache-2.0
"""Clients: requests to a server, and its responses, events, errors and metrics."""

from __future__ import annotations

import base64
import json
import urllib.request
from typing import Any

import numpy as np

ROUTE = "/v1/audio/transcriptions"


def error(response: Any, status: int) -> dict[str, Any]:
    """OpenAI's error object of a response with that status."""
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a streamed response, which ends with ``[DONE]``."""
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def metric(server: Any, name: str, *labels: str) -> float:
    """The sum of a metric over all its label sets that contain ``labels``, as ``key="value"``.

    vLLM counts aborted requests as successes of their own kind; these are left out.
    """
    lines = urllib.request.urlopen(f"{server.url}/metrics").read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith((f"{name}{{", f"{name} "))
        and 'reason="abort"' not in line
        and all(label in line for label in labels)
    )


def counted(status: int, *, route: str = ROUTE, model: str = "asr") -> float:
    """Count the requests to an app in this process that ended with a status."""
    from prometheus_client import REGISTRY

    labels = {"model_name": model, "route": route, "status": str(status)}
    return REGISTRY.get_sample_value("qwen3_asr_requests_total", labels) or 0


def speak(client: Any, waveform: np.ndarray, **options: Any) -> str:
    """Open a realtime session, send one utterance, return its transcript."""
    wanted = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
    speech = (32_767 * waveform).astype("<i2").tobytes()
    query = {"intent": "transcription"}
    with client.realtime.connect(extra_query=query, **options) as connection:
        connection.session.update(session={"type": "transcription", "audio": {"input": wanted}})
        connection.input_audio_buffer.append(audio=base64.b64encode(speech).decode())
        connection.input_audio_buffer.commit()
        for event in connection:
            if event.type.endswith("transcription.completed"):
                return str(event.transcript)
    raise AssertionError("the session ended without a transcript")
