# SPDX-License-Identifier: Apache-2.0
"""HTTP routes that vLLM's API server takes from this plugin, in the place of its own.

    form -> waveform -> transcribe() asks, the engine answers, clip by clip -> json, srt, events

What to ask the engine and what to make of its answers is decided in ``transcription.py``; here are
only the form, the engine, and what is sent back. A field that would change the answer and is not
supported is refused; any other that is not supported is named in the header X-Ignored-Params.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from vllm import envs
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.logger import init_logger
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from . import page
from .admission import MAX_AUDIO_S, MAX_RECORDINGS, RETRY_AFTER_S, Admission, Busy, Place
from .audio import MAX_DURATION_S, decodable_formats, load_audio
from .engine import Answer, engine_prompt, sampling_params, slot_ids
from .languages import language_code, resolve_language, separator
from .transcript import FORMATS, Transcript
from .transcription import EngineOutput, EngineRequest, LiveText, Steps, transcribe

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import CompletionOutput, RequestOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MODEL_TYPE = "qwen3_asr"
MAX_UPLOAD_MB = 1024  # MiB, unless VLLM_MAX_AUDIO_CLIP_FILESIZE_MB says otherwise
CLIP_SHARE = 8  # one recording takes at most this part of the engine's seats: 1/8 of max_num_seqs

MEDIA_TYPES = {
    "json": "application/json",
    "text": "text/plain",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "verbose_json": "application/json",
}
UNTIMED_FORMATS = ("json", "text")
STREAMED_FORMATS = (*UNTIMED_FORMATS, "verbose_json")  # its last event has the segments

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
# What would change the answer: a field, its value (None: any that is not harmless), and advice.
REFUSED = (
    ("response_format", "diarized_json", "there are no speakers; verbose_json has timed segments."),
    ("timestamp_granularities", "word", "only a forced aligner times words; ask for segment."),
    ("include", "logprobs", "they are not given; leave it out."),
    ("to_language", None, "Qwen3-ASR transcribes and does not translate; leave it out."),
    ("known_speaker_names", None, "Qwen3-ASR does not tell speakers apart; leave it out."),
    ("known_speaker_references", None, "Qwen3-ASR does not tell speakers apart; leave it out."),
    ("use_beam_search", None, "there is no beam search; leave it out."),
    ("n", None, "there is one answer; leave it out."),
)
HARMLESS = {"use_beam_search": "false", "n": "1", "chunking_strategy": "auto"}
_NOT_IN_HEADERS = re.compile(r"[^\w.\[\]-]", re.ASCII)


class ApiError(Exception):
    """What a client is told, as OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else None

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


class EndpointPlugin:
    """What vLLM loads when ``VLLM_PLUGINS`` names ``qwen3_asr``."""

    name = "qwen3_asr"
    required_tasks = ("transcription",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_exception_handler(ApiError, _answer_error)
        app.add_exception_handler(Busy, _answer_busy)
        page.attach(app)
        app.add_api_route("/v1/audio/transcriptions", create_transcription, methods=["POST"])
        app.add_api_route("/v1/audio/translations", refuse_translation, methods=["POST"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Take the place of vLLM's handler, whose clip length and models are ours too."""
        assert engine_client is not None  # only a server without an engine has none
        if (model_type := engine_client.model_config.hf_config.model_type) != MODEL_TYPE:
            raise ValueError(
                f"VLLM_PLUGINS names qwen3_asr, whose routes serve {MODEL_TYPE}; this model is "
                f"{model_type}. Leave it out of VLLM_PLUGINS."
            )
        core = state.openai_serving_transcription
        state.qwen3_asr = Transcriber(
            engine_client, state.openai_serving_models, max_clip_s=core.asr_config.max_audio_clip_s
        )
        state.qwen3_asr_about = about = state.qwen3_asr.about(args)
        logger.info("Transcribing at /v1/audio/transcriptions and on the page at /: %s.", about)


async def refuse_translation() -> JSONResponse:
    message = "Qwen3-ASR transcribes and does not translate; use /v1/audio/transcriptions."
    return ApiError(400, message, code="unsupported_task").response()


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_busy(_: Request, error: Exception) -> Response:
    return ApiError(503, str(error), code="busy", retry_after_s=RETRY_AFTER_S).response()


# the form -----------------------------------------------------------------------------------


class Form(BaseModel):
    """The fields that are honoured. A list comes as x, x[], repeated, by commas, or as JSON."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile = Field(exclude=True)
    model: str | None = None
    language: str | None = None  # the model's name for it; None to detect it
    languages: list[str] = []
    prompt: str = ""
    keywords: list[str] = []
    hotwords: list[str] = []
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    timestamp_granularities: list[Literal["segment"]] = []
    include: list[Literal["srt", "vtt", "tsv", "lrc"]] = []  # these formats, beside the text
    stream: bool = False
    stream_include_usage: bool = True  # the last event always has it
    stream_continuous_usage_stats: bool = False
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    vllm_xargs: Json[dict[str, Any]] | None = None
    priority: int = 0

    _ignored: list[str] = []
    _place: Place

    @field_validator("language")
    @classmethod
    def _resolve(cls, language: str | None) -> str | None:
        return resolve_language(language)

    @field_validator("languages")
    @classmethod
    def _resolve_all(cls, languages: list[str]) -> list[str]:
        return [name for name in map(resolve_language, languages) if name]

    @property
    def context(self) -> str:
        """What biases the model: the prompt, and a line of keywords."""
        return "\n".join(filter(None, (self.prompt, ", ".join(self.keywords + self.hotwords))))

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Ignored-Params": ", ".join(self._ignored)} if self._ignored else {}

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """Greedy where nothing else is asked for; ``defaults`` are the server's."""
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        # Where nobody limits it, the clip's duration does; vLLM's own default is 16 tokens.
        given["max_tokens"] = self.max_completion_tokens or defaults.get("max_tokens")
        given["output_kind"] = (
            RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        )
        return SamplingParams(**defaults | given, extra_args=self.vllm_xargs)


def parse_form(fields: FormData) -> Form:
    """Raises ApiError for a field that is wrong or refused, and names it."""
    values: dict[str, list[Any]] = {}
    for key, value in fields.multi_items():
        if value != "":  # an empty field is one that was left out
            values.setdefault(key.removesuffix("[]"), []).append(value)
    _refuse(values)
    try:
        form = Form.model_validate(
            {name: _value(name, values[name]) for name in Form.model_fields if name in values}
        )
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}", param=param) from error
    form._ignored = [
        _NOT_IN_HEADERS.sub("?", name)
        for name, sent in values.items()
        if name not in Form.model_fields and not _is_harmless(name, sent[-1])
    ]
    form.language = form.language or next(iter(form.languages), None)
    _check(form)
    return form


def _value(name: str, values: list[Any]) -> Any:
    if get_origin(Form.model_fields[name].annotation) is not list:
        return values[-1]
    return [item for value in values for item in _items(value)]


def _items(value: Any) -> list[Any]:
    """One field of a list: a JSON array, or items between commas."""
    if not isinstance(value, str):
        return [value]
    if value.lstrip().startswith("["):
        try:
            return [str(item) for item in json.loads(value)]
        except ValueError:
            pass
    return [item.strip() for item in value.split(",") if item.strip()]


def _refuse(values: dict[str, list[Any]]) -> None:
    """Raises ApiError for what is understood and cannot be done."""
    for name, refused, advice in REFUSED:
        for sent in (item for value in values.get(name, ()) for item in _items(value)):
            if sent == refused or (refused is None and not _is_harmless(name, sent)):
                given = f"{name}={refused}" if refused else name
                raise ApiError(400, f"{given}: {advice}", param=name)


def _is_harmless(name: str, sent: Any) -> bool:
    return str(sent).lower() == HARMLESS.get(name)


def _check(form: Form) -> None:
    """Raises ApiError for fields that do not go together."""

    def check(ok: bool, param: str, advice: str) -> None:
        if not ok:
            raise ApiError(400, f"{param}: {advice}", param=param)

    name = form.response_format
    one_language = not set(form.languages) - {form.language}
    check(one_language, "languages", "pass one to force it, or none to detect the language.")
    streamed = name in STREAMED_FORMATS
    check(streamed or not form.stream, "response_format", f"no stream has {name}; use json.")
    timed = name not in UNTIMED_FORMATS or not form.timestamp_granularities
    check(timed, "timestamp_granularities", f"{name} has no times; use verbose_json.")
    inclusive = MEDIA_TYPES[name] == "application/json" or not form.include
    check(inclusive, "include", f"{name} holds nothing beside itself; use json or verbose_json.")


async def read_form(raw_request: Request) -> AsyncIterator[Form]:
    """The form of a request, which ends as soon as it is too large. Its file is closed after.

    It has a place from before its first byte is read until its answer has been sent.
    """
    max_bytes = _limit("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", MAX_UPLOAD_MB) << 20
    _check_size(int(raw_request.headers.get("content-length", 0)), max_bytes)
    request = Request(raw_request.scope, _counted(raw_request.receive, max_bytes))
    transcriber: Transcriber = raw_request.app.state.qwen3_asr
    with transcriber.admission.place() as place:
        async with _multipart(request) as fields:
            form = parse_form(fields)
            form._place = place
            yield form


@asynccontextmanager
async def _multipart(request: Request) -> AsyncIterator[FormData]:
    try:
        fields = await request.form()
    except HTTPException as error:
        raise ApiError(error.status_code, f"the form cannot be read: {error.detail}") from error
    try:
        yield fields
    finally:
        await fields.close()


def _counted(receive: Callable[[], Awaitable[Any]], max_bytes: int) -> Callable[[], Awaitable[Any]]:
    num_bytes = 0

    async def counted() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        _check_size(num_bytes, max_bytes)
        return message

    return counted


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ApiError(
            413,
            f"the upload is {num_bytes / 2**20:.1f} MiB or larger; the limit is "
            f"{max_bytes >> 20} MiB. Send a compressed format, such as opus or mp3, or set "
            "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB on the server.",
            param="file",
        )


def _limit(variable: str, default: Any) -> Any:
    """vLLM's limit where it was set; its own defaults would refuse a lecture."""
    return getattr(envs, variable) if envs.is_set(variable) else default


# the engine ---------------------------------------------------------------------------------


class Transcriber(GenerateBaseServing):
    """The state of the route: what reaches the engine, and what decodes audio."""

    def __init__(
        self, engine_client: Any, models: OpenAIServingModels, *, max_clip_s: float
    ) -> None:
        super().__init__(engine_client, models, request_logger=None)
        self.max_clip_s = max_clip_s
        self.sampling_defaults = self.model_config.get_diff_sampling_param()
        max_num_seqs = engine_client.vllm_config.scheduler_config.max_num_seqs
        self.max_parallel_clips = max(1, max_num_seqs // CLIP_SHARE)
        self.slot_ids = slot_ids(self.renderer.get_tokenizer())
        self.admission = Admission(
            max_recordings=int(os.environ.get("QWEN3_ASR_MAX_RECORDINGS", MAX_RECORDINGS)),
            max_audio_s=float(os.environ.get("QWEN3_ASR_MAX_AUDIO_S", MAX_AUDIO_S)),
        )
        self.pool = ThreadPoolExecutor(
            _limit("VLLM_MAX_AUDIO_PREPROCESS_WORKERS", None), thread_name_prefix="decode-audio"
        )

    def about(self, args: Namespace) -> page.About:
        """What this server takes; ``args`` are vLLM's."""
        return page.About(
            models=tuple(model.name for model in self.models.base_model_paths),
            decodes=decodable_formats(),
            max_upload_mb=_limit("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", MAX_UPLOAD_MB),
            max_duration_s=_limit("VLLM_MAX_AUDIO_DECODE_DURATION_S", MAX_DURATION_S),
            max_clip_s=self.max_clip_s,
            needs_key=any(args.api_key or [envs.VLLM_API_KEY]),
            words=False,
        )

    async def start(self, form: Form, raw_request: Request) -> Recording:
        """Raises what there is to refuse (the model, a value, the audio) before the answer."""
        if refusal := await self._check_model(form):
            error = refusal.error
            raise ApiError(error.code, error.message, param=error.param, code="model_not_found")
        self._preflight()
        request_id = f"transcribe-{self._base_request_id(raw_request)}"
        raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
        generate = partial(
            self._generate,
            params=form.sampling_params(self.sampling_defaults),
            lora_request=self._maybe_get_adapters(form),
            trace_headers=await self._get_trace_headers(raw_request.headers),
            priority=self._get_priority(form, raw_request),
            data_parallel_rank=self._get_data_parallel_rank(raw_request),
        )
        in_pool = partial(asyncio.get_running_loop().run_in_executor, self.pool)
        return Recording(
            request_id=request_id,
            model=form.model or self.models.model_name(),
            steps=await in_pool(self._steps, form),
            generate=generate,
            slot_ids=self.slot_ids,
            in_pool=in_pool,
            seats=asyncio.Semaphore(self.max_parallel_clips),
        )

    async def _generate(
        self, request: EngineRequest, *, request_id: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        rendered = await self.renderer.render_cmpl_async(
            [parse_model_prompt(self.model_config, engine_prompt(request))]
        )
        params = sampling_params(request.decoding, self.slot_ids, params)
        async for output in self.engine_client.generate(rendered[0], params, request_id, **options):
            reason = output.outputs[0].finish_reason
            self._raise_if_error(reason, request_id)
            if reason == "abort":  # not by its client, who is gone then: the server stops
                message = "the server is stopping; ask again in a few seconds, or another one."
                raise ApiError(503, message, code="stopping", retry_after_s=RETRY_AFTER_S)
            yield output

    def _steps(self, form: Form) -> Steps[Transcript]:
        """Decode and cut the recording. Runs in the pool."""
        longest_s = _limit("VLLM_MAX_AUDIO_DECODE_DURATION_S", MAX_DURATION_S)
        max_duration_s = min(longest_s, self.admission.max_audio_s)
        try:
            waveform = load_audio(
                form.file.file, max_duration_s=max_duration_s, on_progress=form._place.hold
            )
        except ImportError as error:
            raise ApiError(501, f"the server cannot decode this audio: {error}") from error
        except ValueError as error:
            advice = "VLLM_MAX_AUDIO_DECODE_DURATION_S on the server"
            message = str(error).replace("max_duration_s", advice)
            raise ApiError(400, message, param="file") from error
        return Steps(
            transcribe(
                waveform,
                language=form.language,
                context=form.context,
                max_clip_s=self.max_clip_s,
            )
        )


class Clip:
    """The answer to one request, as the engine writes it."""

    def __init__(self, request: EngineRequest, ids: Mapping[str, int]) -> None:
        self.inbox: asyncio.Queue[RequestOutput | Exception | None] = asyncio.Queue()
        self._answer = Answer(request.decoding, ids)
        self._live = LiveText(request)

    async def deltas(self, left: str) -> AsyncIterator[str]:
        """Its text, as far as it stays, joined to what is on the left of it."""
        async for piece in self._pieces():
            yield separator(left, piece) + piece
            left = ""  # no seam inside the clip

    async def wait(self) -> None:
        """For the end of an answer of which nothing is shown."""
        async for _ in self._messages():
            pass

    @property
    def output(self) -> EngineOutput:
        return self._answer.output(shown=self._live.shown)

    @property
    def is_settled(self) -> bool:
        """Whether ``deltas`` were all of the text that will be."""
        return self._live.is_settled

    async def _pieces(self) -> AsyncIterator[str]:
        finish_reason = None
        async for completion in self._messages():
            finish_reason = completion.finish_reason
            if piece := self._live.push(completion.text):
                yield piece
        if piece := self._live.finish(finish_reason):
            yield piece

    async def _messages(self) -> AsyncIterator[CompletionOutput]:
        while (message := await self.inbox.get()) is not None:
            if isinstance(message, Exception):
                raise message
            self._answer.push(message.outputs[0])
            yield message.outputs[0]


@dataclass
class Recording:
    """One recording on its way through the engine, some clips at a time."""

    request_id: str
    model: str
    steps: Steps[Transcript]
    generate: Callable[..., AsyncIterator[RequestOutput]]
    slot_ids: Mapping[str, int]
    in_pool: Callable[..., Awaitable[Any]]  # runs a function beside the event loop
    seats: asyncio.Semaphore  # held by a clip while the engine decodes it
    numbers: Iterator[int] = field(default_factory=count)  # of the engine's requests
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_cut_off: bool = False  # a clip reached its token limit

    async def deltas(self) -> AsyncGenerator[str, None]:
        """The text, in the order of the clips; when it ends there is ``steps.result``.

        After a clip that must be asked for again, the rest comes at once when all is done.
        Closing this, or cancelling who waits for it, aborts what the engine still decodes.
        """
        text = ""
        is_live = True
        while requests := self.steps.requests:
            clips = [Clip(request, self.slot_ids) for request in requests]
            decode = map(self._decode, requests, clips)
            tasks = [asyncio.create_task(coroutine) for coroutine in decode]
            try:
                for clip in clips:
                    if not is_live:
                        await clip.wait()
                        continue
                    async for delta in clip.deltas(text):
                        text += delta
                        yield delta
                    is_live = clip.is_settled
            finally:
                for task in tasks:
                    task.cancel()
            outputs = [clip.output for clip in clips]
            self.is_cut_off |= any(output.finish_reason == "length" for output in outputs)
            await self.in_pool(self.steps.send, outputs)
            is_live = False
        if rest := self.steps.result.text[len(text) :]:
            yield rest

    async def _decode(self, request: EngineRequest, clip: Clip) -> None:
        end: Exception | None = None
        prompt_tokens = 0
        try:
            async with self.seats:
                request_id = f"{self.request_id}-{next(self.numbers)}"
                async for output in self.generate(request, request_id=request_id):
                    prompt_tokens = len(output.prompt_token_ids or ()) or prompt_tokens
                    self.output_tokens += len(output.outputs[0].token_ids)
                    clip.inbox.put_nowait(output)
        except Exception as error:  # whatever it is, the reader of the clip raises it
            end = error
        self.prompt_tokens += prompt_tokens
        clip.inbox.put_nowait(end)

    @property
    def usage(self) -> dict[str, int | str]:
        """Tokens so far, under the names that OpenAI and vLLM give them."""
        return {
            "type": "tokens",
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


# the answer ---------------------------------------------------------------------------------


@with_cancellation
@load_aware_call
async def create_transcription(
    raw_request: Request, form: Annotated[Form, Depends(read_form)]
) -> Response:
    """Transcribe a recording."""
    transcriber: Transcriber = raw_request.app.state.qwen3_asr
    try:
        recording = await transcriber.start(form, raw_request)
        if form.stream:
            return StreamingResponse(
                _events(recording, form),
                media_type="text/event-stream",
                headers=form.headers,
            )
        async for _ in recording.deltas():
            pass
    except EngineDeadError as error:  # 503, and not 500: a replica can take the recording over
        message = "the engine ended, and this server with it; another can be asked at once."
        raise ApiError(503, message, code="engine_dead", retry_after_s=RETRY_AFTER_S) from error
    return _response(recording.steps.result, form)


def _response(transcript: Transcript, form: Form) -> Response:
    media_type = MEDIA_TYPES[form.response_format]
    if media_type == "application/json":
        return JSONResponse(_document(transcript, form), headers=form.headers)
    name = "txt" if form.response_format == "text" else form.response_format
    return Response(FORMATS[name](transcript), media_type=media_type, headers=form.headers)


def _document(transcript: Transcript, form: Form) -> dict[str, Any]:
    """The text and its languages; warnings where there are any; what else was asked for."""
    document: dict[str, Any] = {
        "text": transcript.text,
        "language": transcript.language,
        "languages": [{"code": language_code(name) or name} for name in transcript.languages],
        "usage": {"type": "duration", "seconds": round(transcript.duration, 3)},
    }
    if transcript.warnings:
        document["warnings"] = transcript.warnings
    if form.response_format == "verbose_json":
        document |= json.loads(FORMATS["verbose_json"](transcript))
    return document | {name: FORMATS[name](transcript) for name in form.include}


async def _events(recording: Recording, form: Form) -> AsyncIterator[str]:
    """Server-sent events; each is OpenAI's transcript.text event and vLLM's chunk at once."""
    chunk = {
        "id": recording.request_id,
        "object": "transcription.chunk",
        "created": int(time.time()),
        "model": recording.model,
    }

    def delta_event(text: str, finish_reason: str | None = None) -> str:
        choice = {"delta": {"content": text}, "finish_reason": finish_reason}
        usage = {"usage": recording.usage} if form.stream_continuous_usage_stats else {}
        event = {"type": "transcript.text.delta", "delta": text, "choices": [choice]}
        return _event(event | chunk | usage)

    try:
        async with aclosing(recording.deltas()) as deltas:
            async for delta in deltas:
                yield delta_event(delta)
        yield delta_event("", "length" if recording.is_cut_off else "stop")
        done = {"type": "transcript.text.done", "choices": [], "usage": recording.usage}
        yield _event(_document(recording.steps.result, form) | done | chunk)
    except Exception as error:  # the status has been sent, so the client is told in the stream
        logger.exception("Transcription %s failed.", recording.request_id)
        if isinstance(error, ApiError):
            yield _event(error.body)
        else:
            yield _event(create_error_response(error).model_dump())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
