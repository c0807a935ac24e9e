# SPDX-License-Identifier: Apache-2.0
"""The endpoint plugin: attaches the routes and builds their state when vLLM's server starts."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import TYPE_CHECKING

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from vllm import envs
from vllm.logger import init_logger

from ..chat_template import load_protocol
from ..printable import printable
from ..prompt import NO_TRANSLATION
from . import alignments, middleware, page
from .admission import Busy
from .aligner_client import ALIGNMENTS
from .alignments import AlignerServing
from .connection import refuse_compression
from .errors import ApiError, busy
from .metrics import add_counted_route
from .protocol import bound_heads
from .realtime import realtime
from .realtime_serving import Realtime
from .serving import fail_pending_requests
from .settings import check_settings
from .state import ServerState
from .transcriptions import Transcriber, create_transcription

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MODEL_TYPE = "qwen3_asr"
NOT_NEEDED = "Qwen3ASRRealtimeGeneration"  # the architecture of vLLM's own realtime route
NEEDS_NO_OVERRIDE = (
    f"hf_overrides names {NOT_NEEDED}, which vLLM's own /v1/realtime needs. This server's needs no "
    "override; leave it out."
)


class EndpointPlugin:
    """The plugin that vLLM loads when ``VLLM_PLUGINS`` names ``qwen3_asr``."""

    name = "qwen3_asr"
    required_tasks = ("transcription", "token_classify")

    def attach_router(self, app: FastAPI) -> None:
        self._app = app
        app.router.redirect_slashes = False  # a redirect would go to any host that a request names
        app.add_exception_handler(ApiError, _answer_error)
        app.add_exception_handler(Busy, _answer_busy)
        app.add_exception_handler(HTTPException, _answer_http_error)
        app.add_exception_handler(aiohttp.ClientError, _answer_unread_media)
        app.add_exception_handler(RuntimeError, _answer_unread_media)
        bound_heads()
        page.attach(app)
        add_counted_route(app, "/v1/audio/transcriptions", create_transcription)
        add_counted_route(app, "/v1/audio/translations", refuse_translation)
        app.add_api_route("/v1/models/{model:path}", show_model, methods=["GET"])
        app.add_api_websocket_route("/v1/realtime", realtime)
        refuse_compression(app)
        alignments.attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Build the state of the routes, with the clip length and models of vLLM's handler."""
        assert engine_client is not None  # only a server without an engine has none
        check_settings()
        if (model_type := engine_client.model_config.hf_config.model_type) != MODEL_TYPE:
            raise ValueError(
                f"VLLM_PLUGINS names qwen3_asr, whose routes serve {MODEL_TYPE}; this model is "
                f"{model_type}. Leave it out of VLLM_PLUGINS."
            )
        middleware.wrap(
            self._app,
            keys=[key for key in args.api_key or [envs.VLLM_API_KEY] if key],
            num_ranks=engine_client.vllm_config.parallel_config.data_parallel_size,
        )
        watch = asyncio.create_task(fail_pending_requests(engine_client, state))
        models = state.openai_serving_models
        num_servers = args.api_server_count or 1
        if engine_client.model_config.hf_config.is_aligner:
            aligner = AlignerServing(engine_client, models, num_servers=num_servers)
            state.qwen3_asr = ServerState(aligner=aligner, watch=watch)
            logger.info("Aligning at %s.", ALIGNMENTS)
            return
        max_clip_s = state.openai_serving_transcription.asr_config.max_audio_clip_s
        protocol = load_protocol(
            engine_client.model_config, engine_client.renderer.get_tokenizer(), args.chat_template
        )
        transcriber = Transcriber(
            engine_client,
            models,
            max_clip_s=max_clip_s,
            num_servers=num_servers,
            protocol=protocol,
        )
        sessions = Realtime(
            engine_client,
            models,
            max_clip_s=max_clip_s,
            protocol=protocol,
            admission=transcriber.admission,
            aligner=transcriber.aligner,
            allowed_origins=args.allowed_origins,
        )
        about = transcriber.about(args)
        state.qwen3_asr = ServerState(transcriber, sessions, about, watch=watch)
        if NOT_NEEDED in engine_client.model_config.architectures:
            logger.warning(NEEDS_NO_OVERRIDE)
        logger.info("Transcribing at /v1/audio/transcriptions and on the page at /: %s.", about)


async def refuse_translation() -> JSONResponse:
    return ApiError(400, NO_TRANSLATION, code="unsupported_task").response()


async def show_model(raw_request: Request, model: str) -> JSONResponse:
    """Describe one served model as OpenAI does; its id may hold slashes."""
    served = await raw_request.app.state.openai_serving_models.show_available_models()
    for card in served.data:
        if card.id == model:
            return JSONResponse(card.model_dump())
    ids = ", ".join(card.id for card in served.data)
    message = f"The model '{printable(model)}' does not exist; this server has {ids}."
    raise ApiError(404, message, param="model", code="model_not_found")


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_busy(_: Request, error: Exception) -> Response:
    assert isinstance(error, Busy)
    return busy(error).response()


async def _answer_unread_media(_: Request, error: Exception) -> Response:
    """Return a 400 for a URL or a file of a chat that vLLM cannot read; raise other errors."""
    if isinstance(error, aiohttp.ClientError):
        message = f"a URL in the request cannot be fetched: {printable(error)}"
        return ApiError(400, message, code="unreachable_url").response()
    if "--allowed-local-media-path" in str(error):
        return ApiError(400, printable(error), code="local_file").response()
    raise error


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Return OpenAI's error object for a path or a method that no route has."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {printable(request.scope['path'])}"
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Unknown request URL: {asked}. Check it for typos.", "unknown_url"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        message, code = f"Not allowed: {asked}. Use {allowed}.", "method_not_supported"
    answer = ApiError(error.status_code, message, code=code)
    answer.headers |= error.headers or {}
    return answer.response()
