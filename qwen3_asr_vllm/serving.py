# SPDX-License-Identifier: Apache-2.0
"""What the routes share: places for recordings, threads beside the event loop, vLLM's engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.renderers.inputs.preprocess import parse_model_prompt

from .admission import MAX_AUDIO_S, MAX_RECORDINGS, Admission
from .form import ApiError, limit

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

MEDIA_TYPES = {
    "json": "application/json",
    "text": "text/plain",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "lrc": "text/plain",
    "verbose_json": "application/json",
    "diarized_json": "application/json",
}

_Number = TypeVar("_Number", int, float)


class EngineServing(GenerateBaseServing):
    """A way to the engine, and the names of its models."""

    def __init__(self, engine_client: Any, models: OpenAIServingModels) -> None:
        super().__init__(engine_client, models, request_logger=None)

    async def render(self, prompt: dict[str, Any]) -> Any:
        """A prompt as the engine takes it."""
        parsed = parse_model_prompt(self.model_config, prompt)
        return (await self.renderer.render_cmpl_async([parsed]))[0]


class AudioServing(EngineServing):
    """The state of routes to which recordings are posted."""

    def __init__(self, engine_client: Any, models: OpenAIServingModels) -> None:
        super().__init__(engine_client, models)
        self.admission = Admission(
            max_recordings=setting("QWEN3_ASR_MAX_RECORDINGS", MAX_RECORDINGS),
            max_audio_s=setting("QWEN3_ASR_MAX_AUDIO_S", MAX_AUDIO_S),
        )
        self.pool = ThreadPoolExecutor(
            limit("VLLM_MAX_AUDIO_PREPROCESS_WORKERS", None), thread_name_prefix="decode-audio"
        )

    @property
    def in_pool(self) -> Callable[..., Awaitable[Any]]:
        """Runs a function beside the event loop."""
        return partial(asyncio.get_running_loop().run_in_executor, self.pool)

    async def check(self, form: Any) -> None:
        """Raises ApiError where the form names a model that is not served."""
        if refusal := await self._check_model(form):
            error = refusal.error
            raise ApiError(error.code, error.message, param=error.param, code="model_not_found")
        self._preflight()


def setting(variable: str, default: _Number) -> _Number:
    """A number above 0 of the default's type, from the environment if it is set there.

    Raises ValueError, which names the variable, for anything else.
    """
    given = os.environ.get(variable)
    if given is None:
        return default
    try:
        if (number := type(default)(given)) > 0:
            return number
    except ValueError:
        pass
    kind = "whole number" if isinstance(default, int) else "number"
    raise ValueError(f"{variable} is {given!r}; give a {kind} above 0.")
