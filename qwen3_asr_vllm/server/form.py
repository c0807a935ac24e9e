# SPDX-License-Identifier: Apache-2.0
"""The form that a client posts: its fields, how they are spelled, and what is refused.

A field that would change the answer and is not supported is refused; any other that is not
supported is named in the header X-Ignored-Params. Nothing here knows of engines or recordings.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar, get_origin

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from vllm import envs
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ..audio import MAX_DURATION_S, load_audio
from ..languages import resolve_language
from ..pauses import Pauses
from ..prompt import NO_TRANSLATION, join_context
from .admission import RETRY_AFTER_S, Admission, Busy, Place

MAX_UPLOAD_MB = 1024  # MiB, unless VLLM_MAX_AUDIO_CLIP_FILESIZE_MB says otherwise

UNTIMED_FORMATS = ("json", "text")
STREAMED_FORMATS = (*UNTIMED_FORMATS, "verbose_json")  # its last event has the segments
JSON_FORMATS = ("json", "verbose_json")

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
# What would change the answer: a field, its value (None: any that is not harmless), and advice.
REFUSED = (
    ("to_language", None, f"{NO_TRANSLATION} Leave it out."),
    ("known_speaker_references", None, "Qwen3-ASR does not know voices; leave it out."),
    ("use_beam_search", None, "there is no beam search; leave it out."),
    ("n", None, "there is one answer; leave it out."),
    ("max_tokens", None, "its name is max_completion_tokens."),
    ("initial_prompt", None, "its name is prompt."),
    ("word_timestamps", None, "ask for timestamp_granularities[]=word, in verbose_json."),
    ("stop", None, "an answer ends where the model ends it; leave it out."),
    ("logit_bias", None, "tokens are not weighted; give keywords[], or leave it out."),
)
HARMLESS = {"use_beam_search": "false", "word_timestamps": "false", "n": "1"}
SPEAKERS = ("A", "B")  # of the left and the right channel, as OpenAI calls who has no name
_VAD_FIELD = re.compile(r"chunking_strategy\[(\w+)\]")
_NOT_IN_HEADERS = re.compile(r"[^\w.\[\]-]", re.ASCII)
_Fields = TypeVar("_Fields", bound=BaseModel)


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
        is_final: bool = False,
    ) -> None:
        """``is_final``: OpenAI's clients ask again whatever has a status of 500 or more, unless
        they are told that it is of no use."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else {}
        if is_final:
            self.headers["x-should-retry"] = "false"

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def busy(error: Busy) -> ApiError:
    """What who comes to a full server is told."""
    return ApiError(503, str(error), code="busy", retry_after_s=RETRY_AFTER_S)


class ServerVad(BaseModel):
    """Where clips end: at pauses, rather than near the longest that a clip may be."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    silence_duration_ms: int = Field(200, ge=10)
    prefix_padding_ms: int = Field(300, ge=0)

    @property
    def pauses(self) -> Pauses:
        return Pauses(
            threshold=self.threshold,
            silence_s=self.silence_duration_ms / 1000,
            padding_s=self.prefix_padding_ms / 1000,
        )


class RecordingForm(BaseModel):
    """What every form has in which a recording is posted."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile = Field(exclude=True)
    model: str | None = None
    language: str | None = None  # the model's name for it; None where nobody says

    _ignored: list[str] = []  # the names of fields that change nothing
    _place: Place

    @field_validator("language")
    @classmethod
    def _resolve(cls, language: str | None) -> str | None:
        return resolve_language(language)

    @property
    def headers(self) -> dict[str, str]:
        """Of its answer."""
        names = (_NOT_IN_HEADERS.sub("?", name) for name in self._ignored)
        return {"X-Ignored-Params": ", ".join(names)} if self._ignored else {}


class Form(RecordingForm):
    """The fields that are honoured. A list comes as x, x[], repeated, by commas, or as JSON."""

    languages: list[str] = []
    prompt: str = ""
    keywords: list[str] = []
    hotwords: list[str] = []
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt", "diarized_json"] = "json"
    timestamp_granularities: list[Literal["segment", "word"]] = []
    include: list[Literal["logprobs", "srt", "vtt", "tsv", "lrc"]] = []  # beside the text
    chunking_strategy: ServerVad | None = None  # None: as long as clips may be
    known_speaker_names: list[str] = []
    stream: bool = False
    stream_include_usage: bool = True  # the last event always has it
    stream_continuous_usage_stats: bool = False
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    vllm_xargs: Json[dict[str, Any]] | None = None
    priority: int = Field(0, ge=-(2**63), lt=2**63)  # what the engine's messages hold

    @field_validator("languages")
    @classmethod
    def _resolve_all(cls, languages: list[str]) -> list[str]:
        return [name for name in map(resolve_language, languages) if name]

    @field_validator("chunking_strategy", mode="before")
    @classmethod
    def _read_object(cls, strategy: Any) -> Any:
        """A name, or an object, which comes as JSON."""
        if not isinstance(strategy, str):
            return strategy
        if strategy.lstrip().startswith("{"):
            try:
                return json.loads(strategy)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from error
        if strategy not in ("auto", "none", "server_vad"):
            raise ValueError(f"{strategy!r} is none of auto, none, server_vad.")
        return {} if strategy == "server_vad" else None

    @property
    def speakers(self) -> list[str]:
        """Of the channels, in their order; none where all are one recording."""
        if self.response_format != "diarized_json":
            return []
        return self.known_speaker_names or list(SPEAKERS)

    @property
    def needs_words(self) -> bool:
        return "word" in self.timestamp_granularities

    @property
    def has_times(self) -> bool:
        """Whether its answer says when something is said."""
        return self.response_format not in UNTIMED_FORMATS or bool(set(self.include) - {"logprobs"})

    @property
    def wants_logprobs(self) -> bool:
        return "logprobs" in self.include

    @property
    def wishes(self) -> dict[str, Any]:
        """What ``transcribe`` is to do."""
        return {
            "language": self.language,
            "languages": self.languages,
            "context": join_context(self.prompt, self.keywords + self.hotwords),
            "pauses": self.chunking_strategy and self.chunking_strategy.pauses,
            "confidences": self.wants_logprobs or self.response_format == "verbose_json",
        }

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
    vad: dict[str, Any] = {}
    for key, value in fields.multi_items():
        if value == "":  # an empty field is one that was left out
            continue
        if part := _VAD_FIELD.fullmatch(key):
            vad[part[1]] = value
        else:
            values.setdefault(key.removesuffix("[]"), []).append(value)
    if vad:
        values["chunking_strategy"] = [vad]
    _refuse(values)
    form = validate(
        Form, {name: _value(name, values[name]) for name in Form.model_fields if name in values}
    )
    form._ignored = [
        name
        for name, sent in values.items()
        if name not in Form.model_fields and not _is_harmless(name, sent[-1])
    ]
    _check(form)
    return form


def validate(cls: type[_Fields], values: Mapping[str, Any]) -> _Fields:
    """Raises ApiError that names the field for a value that is wrong."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}", param=str(first["loc"][0])) from error


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
        except (ValueError, RecursionError):  # it may be nested ten thousand deep
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
    streamed = name in STREAMED_FORMATS
    check(streamed or not form.stream, "response_format", f"no stream has {name}; use json.")
    timed = name not in UNTIMED_FORMATS or not form.timestamp_granularities
    check(timed, "timestamp_granularities", f"{name} has no times; use verbose_json.")
    inclusive = name in JSON_FORMATS or not form.include
    check(inclusive, "include", f"{name} holds nothing beside itself; use json or verbose_json.")
    one_or_other = not form.language or not set(form.languages) - {form.language}
    check(one_or_other, "languages", "they are to choose from; leave them or language out.")
    names = form.known_speaker_names
    named = not names or (name == "diarized_json" and len(names) == len(SPEAKERS))
    advice = "they name the two channels of diarized_json, left and right; give two or none."
    check(named, "known_speaker_names", advice)


async def read_form(raw_request: Request) -> AsyncIterator[Form]:
    """The form of a request for a transcription. Its file is closed after."""
    transcriber = getattr(raw_request.app.state, "qwen3_asr", None)
    if transcriber is None:
        raise ApiError(404, "this server's model is a forced aligner; ask /v1/audio/alignments.")
    async with posted(raw_request, transcriber.admission) as (fields, place):
        form = parse_form(fields)
        form._place = place
        yield form


@asynccontextmanager
async def posted(
    raw_request: Request, admission: Admission
) -> AsyncIterator[tuple[FormData, Place]]:
    """The fields that were posted, which end as soon as they are too large.

    They have a place from before the first byte is read until the answer has been sent.
    """
    max_bytes = limit("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", MAX_UPLOAD_MB) << 20
    _check_size(int(raw_request.headers.get("content-length", 0)), max_bytes)
    request = Request(raw_request.scope, _counted(raw_request.receive, max_bytes))
    with admission.place() as place:
        async with _multipart(request) as fields:
            yield fields, place


def load_posted(
    file: UploadFile,
    place: Place,
    *,
    longest_s: float,
    load: Callable[..., Any] = load_audio,
    options: Sequence[Any] = (),
) -> Any:
    """What a loader makes of an uploaded file; raises ApiError for what it cannot.

    ``longest_s`` is the most that the server holds; vLLM's own limit may be less.
    """
    limits = {
        "QWEN3_ASR_MAX_AUDIO_S": longest_s,
        "VLLM_MAX_AUDIO_DECODE_DURATION_S": limit(
            "VLLM_MAX_AUDIO_DECODE_DURATION_S", MAX_DURATION_S
        ),
    }
    lower = min(limits, key=limits.__getitem__)
    try:
        return load(file.file, *options, max_duration_s=limits[lower], on_progress=place.hold)
    except ImportError as error:
        raise ApiError(501, f"the server cannot decode this audio: {error}") from error
    except ValueError as error:
        message = str(error).replace("max_duration_s", f"{lower} on the server")
        raise ApiError(400, message, param="file") from error


@asynccontextmanager
async def _multipart(request: Request) -> AsyncIterator[FormData]:
    try:
        fields = await request.form()
    except HTTPException as error:
        raise ApiError(error.status_code, f"the form cannot be read: {error.detail}") from error
    except OSError as error:
        message = f"the upload cannot be kept ({error.strerror}); try again in {RETRY_AFTER_S} s."
        raise ApiError(503, message, code="busy", retry_after_s=RETRY_AFTER_S) from error
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


def limit(variable: str, default: Any) -> Any:
    """vLLM's limit where it was set; its own defaults would refuse a lecture."""
    return getattr(envs, variable) if envs.is_set(variable) else default
