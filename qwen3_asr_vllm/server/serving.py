# SPDX-License-Identifier: Apache-2.0
"""What the routes share: places for recordings, threads beside the event loop, vLLM's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.exceptions import EngineDeadError

from .admission import Admission
from .decoders import Decoders
from .errors import ApiError
from .settings import setting

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

POLL_S = 0.5  # seconds between two looks at whether the engine is there
CLOSE_S = 5  # for clients to close their connections, and uploads to end, once the server stops


async def fail_pending_requests(engine_client: Any, state: State) -> None:
    """Bound how long the server stops, and fail requests that wait for an engine that is dead.

    vLLM stops its engine first and then waits for its clients without limit. Those whose requests
    were in the engine would never get a response; others need never end their uploads.
    """
    while True:
        await asyncio.sleep(POLL_S)
        if (server := getattr(state, "server", None)) is not None:  # uvicorn's, once it runs
            server.config.timeout_graceful_shutdown = CLOSE_S
        if engine_client.errored:
            engine_client.output_processor.propagate_error(EngineDeadError(suppress_context=True))


class EngineServing(GenerateBaseServing):
    """A way to the engine, and the names of its models."""

    def __init__(self, engine_client: Any, models: OpenAIServingModels) -> None:
        super().__init__(engine_client, models, request_logger=None)

    async def render(self, prompt: dict[str, Any]) -> Any:
        """A prompt as the engine takes it. Raises EngineDeadError where the server is stopping."""
        parsed = parse_model_prompt(self.model_config, prompt)
        try:
            return (await self.renderer.render_cmpl_async([parsed]))[0]
        except RuntimeError as error:
            if "after shutdown" not in str(error):  # what its threads say that have ended
                raise
            raise EngineDeadError(suppress_context=True) from error


class AudioServing(EngineServing):
    """The state of routes to which recordings are posted."""

    def __init__(self, engine_client: Any, models: OpenAIServingModels) -> None:
        super().__init__(engine_client, models)
        self.admission = Admission(
            max_recordings=setting("QWEN3_ASR_MAX_RECORDINGS"),
            max_audio_s=setting("QWEN3_ASR_MAX_AUDIO_S"),
            max_bytes=setting("QWEN3_ASR_MAX_UPLOADS_MB") << 20,
        )
        self.pool = ThreadPoolExecutor(
            setting("VLLM_MAX_AUDIO_PREPROCESS_WORKERS"), thread_name_prefix="decode-audio"
        )
        self.decoders = Decoders()
        self.decoders.warm()

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
