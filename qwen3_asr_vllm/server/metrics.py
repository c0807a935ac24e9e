# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of recordings, beside vLLM's metrics of engine requests, at ``/metrics``.

Import this module in API servers only: prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is
imported. Each API server writes to files in that folder, and ``/metrics`` shows their sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import Counter, Gauge, Histogram
from starlette.types import Message, Receive, Scope, Send
from vllm.logger import init_logger

from ..transcript import Transcript
from .errors import CLIENT_CLOSED
from .state import server_state

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

_MODEL = ("model_name",)  # the label of vLLM's metrics
REQUESTS = Counter(
    "qwen3_asr_requests",
    "Requests by status; 499: the client disconnected.",
    (*_MODEL, "route", "status"),
)
AUDIO = Counter("qwen3_asr_audio_seconds", "Seconds of audio transcribed.", _MODEL)
CLIPS = Counter("qwen3_asr_clips", "Clips decoded; each attempt counts.", _MODEL)
LOOPS = Counter("qwen3_asr_loops", "Outputs that ended in a repetition loop.", _MODEL)
DECODING = Histogram(
    "qwen3_asr_audio_decode_seconds",
    "Seconds from a complete upload to its clips, including the wait for a thread.",
    _MODEL,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
REAL_TIME_FACTOR = Histogram(
    "qwen3_asr_real_time_factor",
    "Seconds from a complete upload to its transcript, per second of audio.",
    _MODEL,
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
SESSIONS = Gauge(
    "qwen3_asr_realtime_sessions", "Open realtime sessions.", _MODEL, multiprocess_mode="livesum"
)
REALTIME_DELAY = Histogram(
    "qwen3_asr_realtime_delay_seconds",
    "Seconds from the end of an utterance to the end of its transcript.",
    _MODEL,
    buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30),
)


def observe_decoding(seconds: float, model: str) -> None:
    """Observe the time from a complete upload to its clips."""
    DECODING.labels(model).observe(seconds)


def count_transcript(
    transcript: Transcript, *, num_clips: int, model: str, started: float, request_id: str
) -> None:
    """Count and log a transcribed recording; the log line holds no text.

    ``started`` is the ``time.perf_counter()`` at which its upload was complete.
    """
    AUDIO.labels(model).inc(transcript.duration)
    CLIPS.labels(model).inc(num_clips)
    LOOPS.labels(model).inc(transcript.loops)
    seconds = time.perf_counter() - started
    REAL_TIME_FACTOR.labels(model).observe(seconds / transcript.duration)
    logger.info(
        "transcribed id=%s model=%s audio_s=%.1f clips=%d loops=%d seconds=%.2f",
        *(request_id, model, transcript.duration, num_clips, transcript.loops, seconds),
    )


def count_utterance(seconds: float, *, delay_s: float, model: str, item_id: str) -> None:
    """Count and log a transcribed utterance of a realtime session."""
    AUDIO.labels(model).inc(seconds)
    REALTIME_DELAY.labels(model).observe(delay_s)
    logger.info(
        "utterance id=%s model=%s audio_s=%.1f delay_s=%.2f", item_id, model, seconds, delay_s
    )


def add_counted_route(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    """Add a POST route whose requests are counted."""
    app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=CountedRoute)


class CountedRoute(APIRoute):
    """A route whose requests are counted when they end.

    ``request.state.failed_with`` overrides the status that was sent: a stream can fail later.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = status = CLIENT_CLOSED
        is_gone = False

        async def watched_receive() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone |= message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal sent, status
            if message["type"] == "http.response.start":
                sent = message["status"]
            elif not message.get("more_body") and not is_gone:
                status = sent
            await send(message)

        try:
            await super().handle(scope, watched_receive, watched_send)
        except Exception:  # vLLM's exception handlers, above the routes, send a 500
            status = 500
            raise
        finally:
            status = scope["state"].get("failed_with", status)
            model = server_state(scope["app"]).model_name
            REQUESTS.labels(model, self.path, str(status)).inc()
