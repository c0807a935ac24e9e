# SPDX-License-Identifier: Apache-2.0
"""Configuration of a realtime session, in OpenAI's two shapes.

    {"type": "transcription", "audio": {"input": {"format": ..., "transcription": ...}}}    today
    {"input_audio_format": "pcm16", "input_audio_transcription": ..., ...}                  beta

An update holds the changed fields. ``Config.updated`` merges it, or raises ``EventError``, which
names the wrong field. Fields that are accepted without effect are reported as null.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ..audio import PcmStream
from ..languages import LANGUAGES, Languages
from ..prompt import MAX_CONTEXT, join_context
from ..voice_activity import VoiceActivity, voice_activity

LOGPROBS = "item.input_audio_transcription.logprobs"
WORDS = "item.input_audio_transcription.words"  # this server's own
STEP_BY_DELAY = {"minimal": 0.5, "low": 1.0, "medium": 2.0, "high": 3.0, "xhigh": 4.0}  # seconds
PAUSE_MS = 160  # of a pause after which a semantic_vad judges the text
PATIENCE_BY_EAGERNESS = {"low": 8_000, "medium": 4_000, "auto": 4_000, "high": 2_000}  # ms
MAX_NAME = 512  # characters of a model's name
_HALF_PAIR = re.compile("[\ud800-\udfff]")
MAX_MESSAGE = 1_000  # characters of an error: it may quote what the client sent


class EventError(Exception):
    """An invalid event, with the message, code and field for the client."""

    def __init__(
        self, message: str, *, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(message[:MAX_MESSAGE])
        self.code, self.param = code, param and param[:MAX_MESSAGE]


class _Strict(BaseModel):
    """Base of models that reject unknown fields."""

    model_config = ConfigDict(extra="forbid")


def _as_none(_: Any) -> None:
    return None


# The type is validated, then the value becomes null: the field has no effect.
_Flag = Annotated[bool | None, AfterValidator(_as_none)]


def _check_context(what: str, context: str) -> None:
    """Raise ValueError for a context that is too long or no valid Unicode."""
    if len(context) > MAX_CONTEXT:
        raise ValueError(f"{what} {len(context)} characters; the limit is {MAX_CONTEXT}.")
    if _HALF_PAIR.search(context):
        raise ValueError(f"{what} half of a surrogate pair; send valid Unicode.")


def _known(info: ValidationInfo) -> Languages:
    """Return the languages of the checkpoint, which ``Config.updated`` passes on."""
    return info.context or LANGUAGES


class Format(_Strict):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[8_000, 16_000, 24_000] | None = None

    @model_validator(mode="after")
    def _set_rate(self) -> Format:
        own: Literal[8_000, 24_000] = 24_000 if self.type == "audio/pcm" else 8_000
        if self.type != "audio/pcm" and self.rate not in (None, own):
            raise ValueError(f"{self.type} has a rate of {own} Hz; leave it out.")
        self.rate = self.rate or own
        return self

    @property
    def pcm(self) -> PcmStream:
        assert self.rate is not None
        return PcmStream(self.type.removeprefix("audio/"), self.rate)


class Transcription(_Strict):
    model: str | None = Field(default=None, max_length=MAX_NAME)
    language: str | None = Field(default=None, max_length=64)
    languages: list[Annotated[str, Field(max_length=64)]] | None = Field(
        default=None, max_length=128
    )
    prompt: str | None = None
    keywords: list[str] | None = None
    skip_special_tokens: bool | None = None
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str | None, info: ValidationInfo) -> str | None:
        _known(info).resolve(language)
        return language

    @field_validator("languages")
    @classmethod
    def _check_languages(
        cls, languages: list[str] | None, info: ValidationInfo
    ) -> list[str] | None:
        for language in languages or ():
            _known(info).resolve(language)
        return languages

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        _check_context("it has", prompt or "")
        return prompt

    @field_validator("keywords")
    @classmethod
    def _check_keywords(cls, keywords: list[str] | None) -> list[str] | None:
        _check_context("they have", join_context("", keywords or []))
        return keywords

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> Transcription:
        _check_context("prompt and keywords have", self.context)
        given = (self.language, *(self.languages or ()))
        language, *candidates = map(_known(info).resolve, given)
        if language and set(filter(None, candidates)) - {language}:
            raise ValueError("languages are candidates for detection; send null for language.")
        return self

    @property
    def context(self) -> str:
        return join_context(self.prompt or "", self.keywords or [])

    def stream_options(self, *, wants_logprobs: bool) -> dict[str, Any]:
        """Return the options of an item's stream."""
        return {
            "language": self.language,
            "languages": self.languages or [],
            "wants_logprobs": wants_logprobs,
            "context": self.context,
            "skip_special_tokens": self.skip_special_tokens is not False,
            "step_s": STEP_BY_DELAY[self.delay or "medium"],
        }


class TurnDetection(_Strict):
    """OpenAI's turn detection: a turn ends after a silence.

    That of a server_vad has a fixed length. A semantic_vad waits the longer, the less complete
    the text is.
    """

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5_000)
    silence_duration_ms: int | None = Field(default=None, ge=50, le=10_000)
    eagerness: Literal["low", "medium", "high", "auto"] | None = None
    create_response: _Flag = None
    interrupt_response: _Flag = None
    idle_timeout_ms: Annotated[int | None, AfterValidator(_as_none)] = None

    @model_validator(mode="after")
    def _check_type(self) -> TurnDetection:
        if self.is_semantic:
            if self.silence_duration_ms is not None:
                raise ValueError("silence_duration_ms belongs to server_vad; send eagerness.")
            self.eagerness = self.eagerness or "auto"
        else:
            if self.eagerness is not None:
                raise ValueError("eagerness belongs to semantic_vad; send silence_duration_ms.")
            if self.silence_duration_ms is None:
                self.silence_duration_ms = 500
        return self

    @model_serializer(mode="wrap")
    def _without_fields_of_the_other(self, serialize: SerializerFunctionWrapHandler) -> Any:
        other = "silence_duration_ms" if self.is_semantic else "eagerness"
        return {name: value for name, value in serialize(self).items() if name != other}

    @property
    def is_semantic(self) -> bool:
        return self.type == "semantic_vad"

    def silence_ms(self, completeness: float) -> int:
        """Return how long a pause ends a turn whose text is complete with this probability.

        It is ``PAUSE_MS`` for a complete text, the patience of its eagerness for one that is not,
        and between them by equal factors for equal differences of the probability.
        """
        if self.silence_duration_ms is not None:
            return self.silence_duration_ms
        patience_ms = PATIENCE_BY_EAGERNESS[self.eagerness or "auto"]
        return round(patience_ms * (PAUSE_MS / patience_ms) ** completeness)

    @property
    def activity(self) -> VoiceActivity:
        return voice_activity(
            threshold=self.threshold,
            silence_ms=self.silence_ms(0.0),
            pause_ms=PAUSE_MS if self.is_semantic else None,
        )


class NoiseReduction(_Strict):
    type: Literal["near_field", "far_field"] | None = None
    strength: float | None = None


class Input(_Strict):
    format: Format = Format()
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()
    noise_reduction: Annotated[NoiseReduction | None, AfterValidator(_as_none)] = None


class Audio(_Strict):
    input: Input = Input()


Include: TypeAlias = Literal[
    "item.input_audio_transcription.logprobs", "item.input_audio_transcription.words"
]


class Config(_Strict):
    """A transcription session, as OpenAI writes it."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: list[Include] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def wants_words(self) -> bool:
        return WORDS in (self.include or ())

    @property
    def stream_options(self) -> dict[str, Any]:
        turns = self.audio.input.turn_detection
        options = self.audio.input.transcription.stream_options(wants_logprobs=self.wants_logprobs)
        return {**options, "wants_completeness": bool(turns and turns.is_semantic)}

    def updated(self, changes: Any, known: Languages = LANGUAGES) -> Config:
        """Return the changed config; ``known`` are the languages of the checkpoint.

        Raises EventError that names the first wrong field.
        """
        if not isinstance(changes, dict):
            raise EventError("session must be an object.", param="session")
        nested = _nested(changes)
        try:
            merged = _merged(self.model_dump(exclude_unset=True), nested)
            return Config.model_validate(merged, context=known)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            param = ".".join(["session", *map(str, first["loc"])])
            message = ADVICE.get(param, first["msg"].removeprefix("Value error, "))
            param = param if nested is changes else _flat_name(param)
            raise EventError(f"{param}: {message}", param=param) from error

    def flat(self) -> dict[str, Any]:
        """Return the session in the shape of OpenAI's beta."""
        audio = self.audio.input.model_dump()
        form = audio["format"]["type"]
        return {
            "modalities": ["text"],
            "input_audio_format": next(name for name, kind in _FORMATS.items() if kind == form),
            "input_audio_transcription": audio["transcription"],
            "input_audio_noise_reduction": audio["noise_reduction"],
            "turn_detection": audio["turn_detection"],
            "include": self.include,
        }


# Reasons for rejected values, and alternatives, by field.
_INPUT = "session.audio.input"
ADVICE = {
    "session.type": 'this server has "transcription" sessions only.',
    "session.include.0": f"the items are {LOGPROBS} and {WORDS}.",
    f"{_INPUT}.transcription": "transcription cannot be disabled; leave null out.",
    f"{_INPUT}.turn_detection.type": "use server_vad, semantic_vad, or null to commit by hand.",
}
_WHOLE = ("format", "turn_detection")  # replaced whole: another type has other fields


def _merged(old: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(old.get(name), dict)
        merged[name] = _merged(old[name], value) if both and name not in _WHOLE else value
    return merged


# Fields of the beta and their names today.
_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_NO_EFFECT = ("modalities", "client_secret")
_BETA = {
    "input_audio_format": "format",
    "input_audio_transcription": "transcription",
    "input_audio_noise_reduction": "noise_reduction",
    "turn_detection": "turn_detection",
}


def _nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes in today's shape: fields of the beta get their names of today."""
    if not changes.keys() & {*_BETA, *_NO_EFFECT}:
        return changes
    moved = {_BETA[name]: value for name, value in changes.items() if name in _BETA}
    if "format" in moved:
        moved["format"] = {"type": _beta_format(moved["format"])}
    rest = {n: value for n, value in changes.items() if n not in _BETA and n not in _NO_EFFECT}
    return _merged(rest, {"audio": {"input": moved}})


def _beta_format(name: Any) -> str:
    if not isinstance(name, str) or name not in _FORMATS:
        param = "session.input_audio_format"
        raise EventError(f"{param}: use one of {', '.join(_FORMATS)}.", param=param)
    return _FORMATS[name]


def _flat_name(param: str) -> str:
    """Return the name of a field in the shape of the beta."""
    for flat, name in _BETA.items():
        param = re.sub(rf"^{re.escape(_INPUT)}\.{name}\b", f"session.{flat}", param)
    return param
