# SPDX-License-Identifier: Apache-2.0
"""State of ``/v1/realtime``: the engine, the protocol of the checkpoint, the limits of a server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from vllm.exceptions import GenerationError
from vllm.sampling_params import RequestOutputKind

from ..engine import (
    OutputCollector,
    default_params,
    language_token_ids,
    sampling_params,
    stream_parts,
)
from ..languages import Languages
from ..prompt import NO_CONTEXT, TextProtocol, sanitize_context
from ..streaming import Stream, StreamRequest
from .admission import Admission
from .errors import engine_dead_as_503
from .serving import EngineServing
from .session_config import WORDS, Config, EventError, Transcription
from .settings import setting

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import RequestOutput

    from ..transcription import EngineOutput
    from .aligner_client import RemoteAligner

NO_WORDS = (
    f"{WORDS}: words are timed by a forced aligner, and this server has none. Start it with: "
    "qwen3-asr serve MODEL --aligner Qwen/Qwen3-ForcedAligner-0.6B; or set QWEN3_ASR_ALIGNER_URL "
    "to the address of one."
)
TOKENS_PER_S = 26  # tokens per second of a clip: 13 of audio, about as many of text


class Realtime(EngineServing):
    """State of the route, shared by its sessions."""

    def __init__(
        self,
        engine_client: Any,
        models: OpenAIServingModels,
        *,
        max_clip_s: float,
        protocol: TextProtocol,
        admission: Admission,
        aligner: RemoteAligner | None,
        allowed_origins: list[str],
    ) -> None:
        super().__init__(engine_client, models)
        self.aligner = aligner
        self.admission = admission  # a session counts as one recording
        self.allowed_origins = allowed_origins
        self.max_clip_s = max_clip_s
        self._params = default_params(self.model_config)
        self.max_utterance_s = setting("QWEN3_ASR_MAX_UTTERANCE_S")
        self.idle_s = setting("QWEN3_ASR_REALTIME_IDLE_S")
        thinker = self.model_config.hf_config.thinker_config
        self._tokenizer = self.renderer.get_tokenizer()
        self._parts = stream_parts(thinker, self._tokenizer, protocol)
        self._language_token_ids = language_token_ids(self._tokenizer, protocol.languages)
        self._protocol = protocol
        self._template_tokens = len(self._tokenizer.encode(protocol.bare))  # besides the context

    def allows(self, origin: str | None, host: str) -> bool:
        """Return whether a page of this origin may connect; only browsers send an origin."""
        allowed = {"*", origin} & set(self.allowed_origins)
        return origin is None or bool(allowed) or urlsplit(origin).netloc == host

    def serves(self, model: str | None) -> bool:
        return self._is_model_supported(model)

    @property
    def languages(self) -> Languages:
        """The languages of the checkpoint."""
        return self._protocol.languages

    def stream(self, options: Mapping[str, Any]) -> Stream:
        clip_s = max(options["step_s"], self.max_clip_s / 2)
        return Stream(
            **self._parts, **options, clip_s=clip_s, max_clip_s=max(clip_s, self.max_clip_s)
        )

    def stream_options(self, config: Config) -> dict[str, Any]:
        """Return the options of the config, without control tokens in the context."""
        options = config.stream_options
        context = sanitize_context(options["context"], self._protocol.control_tokens)
        return {**options, "context": context}

    def check(self, config: Config) -> None:
        """Raise EventError for words without an aligner, and for an unfit transcription."""
        if config.wants_words and self.aligner is None:
            raise EventError(NO_WORDS, param="session.include")
        self._check_transcription(config.audio.input.transcription)

    def _check_transcription(self, transcription: Transcription) -> None:
        """Raise EventError for a model that is not served, or a context that does not fit."""
        self.check_model(transcription.model)
        param = "session.audio.input.transcription.prompt"
        if transcription.context and not self._protocol.with_context:
            raise EventError(f"{param}: {NO_CONTEXT}", param=param)
        limit = self.model_config.max_model_len - self._template_tokens
        limit = max(0, limit - round(TOKENS_PER_S * self.max_clip_s))
        tokens = self._tokenizer.encode(transcription.context, add_special_tokens=False)
        if len(tokens) > limit:
            raise EventError(
                f"{param}: prompt and keywords have {len(tokens)} tokens; the limit of this "
                f"server's model is {limit}, beside {self.max_clip_s:g} s of audio.",
                param=param,
            )

    def check_model(self, model: str | None) -> None:
        if model is not None and not self.serves(model):
            raise EventError(
                f"The model `{model}` does not exist; this server has {self.models.model_name()}.",
                code="model_not_found",
                param="session.audio.input.transcription.model",
            )

    async def decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        """Return the engine's output for a request; cancelling the call aborts the request.

        ``headers`` are those of the session, for the engine's traces.
        """
        try:
            return await self._decode(request, model, headers)
        except GenerationError:  # the engine may have evicted audio that was sent once
            return await self._decode(request, model, headers)

    async def _decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        params = sampling_params(request.decoding, self._language_token_ids, self._params)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        request_id = f"realtime-{uuid4().hex}"
        options = {
            "lora_request": self.models.lora_requests.get(model or ""),
            "trace_headers": await self._get_trace_headers(headers),
        }
        with engine_dead_as_503():
            prompt = await self.render(request.engine_prompt)
            outputs = self.engine_client.generate(prompt, params, request_id, **options)
            async with aclosing(outputs):
                async for output in outputs:
                    self._raise_if_error(output.outputs[0].finish_reason, request_id)
        if output.outputs[0].finish_reason == "abort":  # the server stops
            raise RuntimeError("the server is stopping; retry, or use another server.")
        return output

    def read(self, request: StreamRequest, output: RequestOutput) -> EngineOutput:
        """Convert vLLM's output, with the log-probabilities that the request wants."""
        collector = OutputCollector(request.decoding, self._language_token_ids)
        collector.push(output.outputs[0])
        return collector.output()
