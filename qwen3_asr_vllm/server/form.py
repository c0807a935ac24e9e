# SPDX-License-Identifier: Apache-2.0
"""The form of a transcription request: its fields, their spellings, and rejected fields.

An unsupported field that would change the response is rejected, and so is a field that is sent
twice with different values. Other unsupported fields are named in the header X-Ignored-Params.
This module runs no engine and decodes no audio.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_origin

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from starlette.datastructures import FormData, UploadFile
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ..formats import RESPONSE_FORMATS, TIMED_TEXTS
from ..generation import UNSEARCHED, sampling_defaults
from ..languages import LANGUAGES, Languages
from ..options import (
    MAX_BEAMS,
    MAX_LENGTH_PENALTY,
    MAX_SPEAKERS,
    SPEAKER_COUNTS,
    TranscribeOptions,
)
from ..pauses import Pauses
from ..prompt import NO_TRANSLATION
from ..speakers import MAX_SPEAKER_NAME
from .errors import IS_ALIGNER, ApiError, resolver, shown, validate
from .fields import VOICES
from .state import server_state
from .uploads import RecordingForm, posted

UNTIMED_FORMATS = tuple(name for name, row in RESPONSE_FORMATS.items() if not row.is_timed)
STREAMED_FORMATS = tuple(name for name, row in RESPONSE_FORMATS.items() if row.is_streamed)
VERBOSE_FORMATS = tuple(name for name, row in RESPONSE_FORMATS.items() if row.is_verbose)
JSON_FORMATS = ("json", *VERBOSE_FORMATS)
INCLUDES = ("logprobs", *TIMED_TEXTS)

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "watermarking"),
)
# Unsupported fields that change the response: name, value (None: any but HARMLESS), advice.
REFUSED = (
    ("to_language", None, f"{NO_TRANSLATION} Leave it out."),
    ("task", None, f"{NO_TRANSLATION} Send transcribe, or leave it out."),
    ("max_tokens", None, "use max_completion_tokens."),
    ("initial_prompt", None, "use prompt."),
    ("word_timestamps", None, "use timestamp_granularities[]=word with verbose_json."),
    ("stop", None, "stop sequences are not supported; leave it out."),
    ("logit_bias", None, "it is not supported; use keywords[], or leave it out."),
)
HARMLESS = {"word_timestamps": "false", "task": "transcribe"}
SPEAKERS = ("A", "B")  # default names of the left and the right channel, as in OpenAI's API

_LIST_NAME = re.compile(r"([^\[]*)\[\d*\]")  # x[] or x[0]
_VAD_FIELD = re.compile(r"chunking_strategy\[(\w+)\]")
_Form = TypeVar("_Form", bound=BaseModel)


class ServerVad(BaseModel):
    """Split clips at pauses rather than near the maximum clip length."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    silence_duration_ms: int = Field(200, ge=10, le=60_000)
    prefix_padding_ms: int = Field(300, ge=0, le=60_000)

    @property
    def pauses(self) -> Pauses:
        return Pauses(
            threshold=self.threshold,
            silence_s=self.silence_duration_ms / 1000,
            padding_s=self.prefix_padding_ms / 1000,
        )


class Form(RecordingForm):
    """Supported fields. Lists are sent as x, x[], repeated, comma-separated, or as JSON."""

    model_config = ConfigDict(allow_inf_nan=False)

    languages: list[str] = []
    prompt: str = ""
    keywords: list[str] = []
    hotwords: list[str] = []
    response_format: Literal[tuple(RESPONSE_FORMATS)] = "json"  # type: ignore[valid-type]
    timestamp_granularities: list[Literal["segment", "word"]] = []
    include: list[Literal[INCLUDES]] = []  # type: ignore[valid-type]  # added to a JSON response
    chunking_strategy: ServerVad | None = None  # None: near the maximum clip length
    diarize: bool = False
    num_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)
    min_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)
    max_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)
    known_speaker_names: list[str] = []
    known_speaker_references: list[str] = []  # a voice for each name, as base64 or a data URL
    stream: bool = False
    stream_include_usage: bool | None = None  # None: in the last event, as in OpenAI's API
    stream_continuous_usage_stats: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    watermarking: bool | None = None  # whether the engine's watermark, if it has one, applies
    max_completion_tokens: int | None = Field(None, ge=1)
    use_beam_search: bool | None = None  # None: whether the checkpoint has beams by default
    n: int | None = Field(None, ge=1, le=MAX_BEAMS)  # beams
    length_penalty: float | None = Field(None, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    skip_special_tokens: bool = True
    vllm_xargs: Json[dict[str, Any]] | None = None
    priority: int = Field(0, ge=-(2**63), lt=2**63)  # an int64 in messages to the engine

    _temperature: float = 0.0  # of the form, else of the checkpoint

    @field_validator("languages")
    @classmethod
    def _resolve_all(cls, languages: list[str], info: ValidationInfo) -> list[str]:
        return [name for name in map(resolver(info), languages) if name]

    @field_validator("response_format", "timestamp_granularities", "include", mode="before")
    @classmethod
    def _ignore_case(cls, names: Any) -> Any:
        if isinstance(names, list):
            return [cls._ignore_case(name) for name in names]
        return names.lower() if isinstance(names, str) else names

    @field_validator("chunking_strategy", mode="before")
    @classmethod
    def _read_object(cls, strategy: Any) -> Any:
        """Parse a name, or an object sent as JSON."""
        if not isinstance(strategy, str):
            return strategy
        if strategy.lstrip().startswith("{"):
            try:
                return json.loads(strategy)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from error
        if strategy.lower() not in ("auto", "none", "server_vad"):
            raise ValueError(f"{shown(strategy)} is none of auto, none, server_vad.")
        return {} if strategy.lower() == "server_vad" else None

    @property
    def wants_speakers(self) -> bool:
        return self.diarize or self.response_format == "diarized_json"

    @property
    def speaker_counts(self) -> dict[str, int]:
        """Return the numbers of speakers that were sent."""
        sent = {name: getattr(self, name) for name in SPEAKER_COUNTS}
        return {name: number for name, number in sent.items() if number is not None}

    @property
    def is_mixed(self) -> bool:
        """Return whether speakers are to be found in the mix of all channels."""
        return bool(self.speaker_counts or self.known_speaker_references)

    @property
    def needs_words(self) -> bool:
        return "word" in self.timestamp_granularities

    @property
    def has_times(self) -> bool:
        """Return whether the response has timestamps."""
        return self.response_format not in UNTIMED_FORMATS or bool(set(self.include) - {"logprobs"})

    @property
    def wants_logprobs(self) -> bool:
        return "logprobs" in self.include

    @property
    def options(self) -> TranscribeOptions:
        """Return the options of the transcription that the form sets."""
        return TranscribeOptions(
            language=self.language,
            languages=self.languages,
            context=self.prompt,
            keywords=self.keywords + self.hotwords,
            pauses=self.chunking_strategy.pauses if self.chunking_strategy else None,
            confidences=self.wants_logprobs or self.response_format in VERBOSE_FORMATS,
            # A request that samples is no search, whatever the checkpoint's default.
            use_beam_search=False if self.unsearched else self.use_beam_search,
            n=self.n,
            length_penalty=self.length_penalty,
            skip_special_tokens=self.skip_special_tokens,
        )

    @property
    def unsearched(self) -> list[str]:
        """Return the given parameters that a beam search does not honour."""
        given = {name: getattr(self, name) for name in UNSEARCHED if name in self.model_fields_set}
        return [name for name, value in given.items() if value not in (None, UNSEARCHED[name])]

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """Return vLLM's parameters: those of the form, else the checkpoint's ``defaults``."""
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        if self.max_completion_tokens:
            given["max_tokens"] = self.max_completion_tokens
        given["output_kind"] = (
            RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        )
        try:
            return SamplingParams(**sampling_defaults(defaults) | given, extra_args=self.vllm_xargs)
        except VLLMValidationError as error:
            message = str(error.args[0]).replace("extra_args", "vllm_xargs")
            param = error.parameter and error.parameter.replace("extra_args", "vllm_xargs")
            raise ApiError(400, message, param=param) from error


def gather(fields: FormData) -> dict[str, list[Any]]:
    """Collect values by field: ``x``, ``x[]`` and ``x[0]`` are one; empty values are dropped."""
    values: dict[str, list[Any]] = {}
    for key, value in fields.multi_items():
        if value != "":
            name = _LIST_NAME.fullmatch(key)
            values.setdefault(name[1] if name else key, []).append(value)
    return values


def read(
    cls: type[_Form], values: Mapping[str, list[Any]], known: Languages | None = None
) -> _Form:
    """Create a form from its fields. Raises ApiError that names a wrong field."""
    fields = cls.model_fields
    given = {x: _value(fields[x], x, values[x]) for x in fields if x in values}
    return validate(cls, given, known)


def parse_form(fields: FormData, known: Languages = LANGUAGES) -> Form:
    """Create a transcription form; ``known`` are the languages of the checkpoint.

    Raises ApiError that names a wrong or rejected field.
    """
    values = gather(fields)
    _merge_strategy(values)
    _refuse(values)
    form = read(Form, values, known)
    form._ignored = [
        name
        for name, sent in values.items()
        if name not in Form.model_fields and not _is_harmless(name, sent[-1])
    ]
    _check(form)
    if form.response_format in UNTIMED_FORMATS and form.timestamp_granularities:
        form._ignored.append("timestamp_granularities")
    return form


def _merge_strategy(values: dict[str, list[Any]]) -> None:
    """Merge the fields ``chunking_strategy[...]`` into one object."""
    parts = {name: part[1] for name in values if (part := _VAD_FIELD.fullmatch(name))}
    if parts:
        strategy = {part: _one(name, values.pop(name)) for name, part in parts.items()}
        named = [x for x in values.get("chunking_strategy", ()) if x != "server_vad"]
        values["chunking_strategy"] = [*named, strategy]


def _value(field: FieldInfo, name: str, values: list[Any]) -> Any:
    if get_origin(field.annotation) is not list or field.metadata:  # Json: a list as one text
        return _one(name, values)
    return [item for value in values for item in _items(name, value)]


def _one(name: str, values: list[Any]) -> Any:
    """Return the value of a field. Raises ApiError if it was sent with different values."""
    first, *others = values
    for other in others:
        if isinstance(other, UploadFile):
            raise ApiError(400, f"{name}: several were sent; send one per request.", param=name)
        if other != first:
            both = f"{shown(first)} and {shown(other)}"
            raise ApiError(400, f"{name} was sent as {both}; send it once.", param=name)
    return first


def _items(name: str, value: Any) -> list[Any]:
    """Split one field of a list: a JSON array, or comma-separated items.

    A voice is never split: a data URL has a comma.
    """
    if not isinstance(value, str):
        return [value]
    items = [value] if name == VOICES else value.split(",")
    if value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # RecursionError: nested ten thousand deep
            items = list(map(str, json.loads(value)))
    try:
        "".join(items).encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ApiError(400, f"{name} holds half of a surrogate pair.", param=name) from error
    return [item.strip() for item in items if item.strip()]


def _refuse(values: dict[str, list[Any]]) -> None:
    """Raise ApiError for a known field that is not supported."""
    for name, refused, advice in REFUSED:
        for sent in (item for value in values.get(name, ()) for item in _items(name, value)):
            if sent == refused or (refused is None and not _is_harmless(name, sent)):
                given = f"{name}={refused}" if refused else name
                raise ApiError(400, f"{given}: {advice}", param=name)


def _is_harmless(name: str, sent: Any) -> bool:
    return str(sent).lower() == HARMLESS.get(name)


def _check(form: Form) -> None:
    """Raise ApiError for fields that contradict each other."""

    def check(ok: bool, param: str, advice: str) -> None:
        if not ok:
            raise ApiError(400, f"{param}: {advice}", param=param)

    name = form.response_format
    streamed = name in STREAMED_FORMATS
    check(streamed or not form.stream, "response_format", f"{name} cannot be streamed; use json.")
    times = form.timestamp_granularities
    timed = not times or name not in UNTIMED_FORMATS or (name == "json" and not form.needs_words)
    check(timed, "timestamp_granularities", f"{name} has no times; use verbose_json.")
    inclusive = name in JSON_FORMATS or not form.include
    check(inclusive, "include", f"{name} cannot contain it; use json or verbose_json.")
    for param in form.unsearched if form.use_beam_search else ():
        advice = "beam search does not sample; leave it out, or leave out use_beam_search."
        check(False, param, advice)
    one_or_other = not form.language or not set(form.languages) - {form.language}
    check(
        one_or_other,
        "languages",
        "they are the candidates of detection; send languages or language.",
    )
    _check_speakers(form, check)


def _check_speakers(form: Form, check: Callable[[bool, str, str], None]) -> None:
    name, names = form.response_format, form.known_speaker_names
    for param in (*form.speaker_counts, VOICES) if form.is_mixed else ():
        sent = param in form.speaker_counts or bool(form.known_speaker_references)
        advice = "speakers and their voices are found with diarize=true, or in diarized_json."
        check(form.wants_speakers or not sent, param, advice)
    shown = name not in UNTIMED_FORMATS or bool(set(form.include) - {"logprobs"})
    advice = f"{name} has no speakers; use diarized_json, verbose_json, srt or vtt."
    check(shown or not form.diarize, "diarize", advice)
    try:
        replace(TranscribeOptions(diarize=True), **form.speaker_counts)  # type: ignore[arg-type]
    except ValueError as error:
        param, _, _ = str(error).partition(" ")
        raise ApiError(400, str(error), param=param) from error
    if form.known_speaker_references:
        paired = len(names) == len(form.known_speaker_references) == len(set(names))
        check(
            paired, VOICES, "known_speaker_names must have a different name for each of the voices."
        )
    else:
        named = not names or (form.wants_speakers and len(names) == len(SPEAKERS))
        advice = (
            "they name the two channels, left and right; give two or none, or "
            f"{VOICES}, one for each name."
        )
        check(named, "known_speaker_names", advice)
    is_short = all(len(name) <= MAX_SPEAKER_NAME for name in names)
    check(is_short, "known_speaker_names", f"a name has at most {MAX_SPEAKER_NAME} characters.")


async def read_form(raw_request: Request) -> AsyncIterator[Form]:
    """Yield the form of a request; its file is closed after the response."""
    if (transcriber := server_state(raw_request.app).transcriber) is None:
        raise ApiError(404, IS_ALIGNER)
    async with posted(raw_request, transcriber.admission) as (fields, reservation):
        form = parse_form(fields, transcriber.protocol.languages)
        form._reservation = reservation
        yield form
