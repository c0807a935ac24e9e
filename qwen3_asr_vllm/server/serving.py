# SPDX-License-Identifier: Apache-2.0
"""Common parts of the routes: admission, decoding threads, access to vLLM's engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
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

POLL_S = 0.5  # seconds between two checks of the engine
CLOSE_S = 5  # seconds for uploads and connections to end once the server stops


async def fail_pending_requests(engine_client: Any, state: State) -> None:
    """Fail pending requests once the engine is dead, and bound the time that stopping takes.

    vLLM stops its engine first and then waits for its clients without limit. Clients with requests
    in the engine would never get a response, and uploads might never end.
    """
    while True:
        await asyncio.sleep(POLL_S)
        if (server := getattr(state, "server", None)) is not None:  # uvicorn's, once it runs
            server.config.timeout_graceful_shutdown = CLOSE_S
        if engine_client.errored:
            engine_client.output_processor.propagate_error(EngineDeadError(suppress_context=True))


def shared_admission(num_servers: int) -> Admission:
    """Return the share of one of several API servers in what the settings let a server hold.

    It is at least the largest recording that they allow.
    """
    upload_mb = setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB")
    recording_s = setting("VLLM_MAX_AUDIO_DECODE_DURATION_S")

    def share(total: float, *, least: float) -> float:
        return min(total, max(total / num_servers, least))

    return Admission(
        max_recordings=ceil(share(setting("QWEN3_ASR_MAX_RECORDINGS"), least=1)),
        max_audio_s=share(setting("QWEN3_ASR_MAX_AUDIO_S"), least=recording_s),
        max_bytes=int(share(setting("QWEN3_ASR_MAX_UPLOADS_MB"), least=upload_mb)) << 20,
    )


def set_stream_interval(engine_client: Any, request_id: str, num_tokens: int) -> None:
    """Set the tokens per output of a running request; vLLM's API sets them only at its start."""
    processor = engine_client.output_processor
    for internal_id in processor.external_req_ids.get(request_id, ()):
        if state := processor.request_states.get(internal_id):
            state.stream_interval = num_tokens


class EngineServing(GenerateBaseServing):
    """Access to the engine and to the names of its models."""

    def __init__(self, engine_client: Any, models: OpenAIServingModels) -> None:
        super().__init__(engine_client, models, request_logger=None)

    async def render(self, prompt: dict[str, Any]) -> Any:
        """Render a prompt for the engine. Raises EngineDeadError if the server is stopping."""
        parsed = parse_model_prompt(self.model_config, prompt)
        try:
            return (await self.renderer.render_cmpl_async([parsed]))[0]
        except RuntimeError as error:
            if "after shutdown" not in str(error):  # the error of its ended threads
                raise
            raise EngineDeadError(suppress_context=True) from error


class AudioServing(EngineServing):
    """State of the routes that take uploads, in one of ``num_servers`` API servers."""

    def __init__(
        self, engine_client: Any, models: OpenAIServingModels, *, num_servers: int = 1
    ) -> None:
        super().__init__(engine_client, models)
        self.admission = shared_admission(num_servers)
        # by default as many as Python starts
        num_threads = setting("VLLM_MAX_AUDIO_PREPROCESS_WORKERS") or min(
            32, (os.cpu_count() or 1) + 4
        )
        self.pool = ThreadPoolExecutor(
            max(1, num_threads // num_servers), thread_name_prefix="decode-audio"
        )
        self.decoders = Decoders()
        self.decoders.warm()

    @property
    def in_pool(self) -> Callable[..., Awaitable[Any]]:
        """Return a function that runs another one in the decoding threads."""
        return partial(asyncio.get_running_loop().run_in_executor, self.pool)

    async def check(self, form: Any) -> None:
        """Raise ApiError if the form names a model that is not served."""
        if refusal := await self._check_model(form):
            error = refusal.error
            raise ApiError(error.code, error.message, param=error.param, code="model_not_found")
        self._preflight()
