# SPDX-License-Identifier: Apache-2.0
"""Realtime sessions whose engine is a function: the whole server but vLLM."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import FastAPI

from qwen3_asr_vllm.alignment import AlignmentOutput, AlignmentRequest
from qwen3_asr_vllm.geometry import Geometry
from qwen3_asr_vllm.prompt import PUBLISHED
from qwen3_asr_vllm.server import connection, page
from qwen3_asr_vllm.server.admission import Admission

PATH = "/v1/realtime"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def words(request: Any, spoken: str = "English") -> str:
    """Answer a clip with a word for each second, in the language of the prompt."""
    _, _, prefix = request.prompt.rpartition("<|im_start|>assistant\n")
    header, tag, text = prefix.rpartition("<asr_text>")
    header = header + tag or f"language {spoken}<asr_text>"
    said, language = text.split(), header.split()[1][:2]
    seconds = sum(window.num_frames for window in request.windows) // 100
    if said and (whole := f"{language}{len(said) - 1}").startswith(said[-1]):
        said[-1] = whole  # the prefix may end inside of a word
    said += [f"{language}{number}" for number in range(len(said), seconds)]
    return (header + " ".join(said))[len(prefix) :]


def scored(text: str) -> list[Any]:
    """vLLM's log-probabilities of an output, in tokens of two characters."""
    pieces = re.findall("<asr_text>|..?", text)
    pieces += ["<|im_end|>"]
    return [{10: SimpleNamespace(decoded_token=piece, logprob=-0.25, rank=1)} for piece in pieces]


class Aligner:
    """Spreads the units of a request evenly over its audio, once ``gate`` is open."""

    def __init__(self, error: str = "") -> None:
        self.error, self.gate = error, threading.Event()
        self.gate.set()

    async def answer(self, request: AlignmentRequest, headers: Any) -> AlignmentOutput:
        await asyncio.to_thread(self.gate.wait)
        edges = np.linspace(0, len(request.waveform) / 16, len(request.units) + 1).tolist()
        times = [time for pair in pairwise(edges) for time in pair]
        return AlignmentOutput(() if self.error else times, error=self.error)


def made(answer: Callable[[Any], str] = words, **options: Any) -> Any:
    """The state of sessions whose engine is ``answer``."""
    from qwen3_asr_vllm.server.realtime_serving import Realtime

    class Fake(Realtime):
        def __init__(self) -> None:
            self.admission = Admission(max_recordings=1)
            self.allowed_origins = ["*"]
            self.aligner = None
            self.max_clip_s, self.max_utterance_s, self.idle_s = 12.0, 20.0, 60.0
            self.models = SimpleNamespace(model_name=lambda: "asr", lora_requests={})
            self.model_config = SimpleNamespace(max_model_len=4_096)
            self._tokenizer = Bytes()
            self._language_token_ids = {"None": 0, "English": 1, "German": 2, "French": 3}
            self._protocol, self._template_tokens = PUBLISHED, 16
            self._parts = {
                "tokenizer": self._tokenizer,
                "geometry": Geometry(),
                "loudest": lambda window: 0.0,
            }
            self.requests: list[Any] = []
            vars(self).update(options)

        def serves(self, model: str | None) -> bool:
            return model in (None, "asr", "other")

        async def decode(self, request: Any, model: str | None, headers: Any) -> Any:
            self.requests.append((request, model))
            text = answer(request)
            scores = scored(text) if request.decoding.wants_logprobs else None
            completion = SimpleNamespace(
                text=text, finish_reason="stop", token_ids=[1, 2], logprobs=scores
            )
            return SimpleNamespace(outputs=[completion], prompt_token_ids=[1, 2, 3])

    return Fake()


def app_of(shared: Any, **state: Any) -> FastAPI:
    from qwen3_asr_vllm.server.realtime import realtime
    from qwen3_asr_vllm.server.state import ServerState

    app = FastAPI()
    page.attach(app)
    app.add_api_websocket_route(PATH, realtime)
    connection.refuse_compression(app)
    app.state.qwen3_asr = ServerState(realtime=shared, **state)
    return app
