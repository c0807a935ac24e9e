# SPDX-License-Identifier: Apache-2.0
"""HTTP routes that vLLM's API server takes from this plugin, in the place of its own."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class EndpointPlugin:
    """What vLLM loads when ``VLLM_PLUGINS`` names ``qwen3_asr``."""

    name = "qwen3_asr"
    required_tasks = ("transcription",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/audio/translations", refuse_translation, methods=["POST"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to keep: no route reaches the engine."""


async def refuse_translation() -> JSONResponse:
    """OpenAI's error object: the model transcribes only."""
    error = {
        "message": "Qwen3-ASR transcribes and does not translate; use /v1/audio/transcriptions.",
        "type": "invalid_request_error",
        "param": None,
        "code": "unsupported_task",
    }
    return JSONResponse({"error": error}, status_code=400)
