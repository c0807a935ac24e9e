# SPDX-License-Identifier: Apache-2.0
"""The configuration of a realtime session, as OpenAI writes it.

An update holds what changes; ``Config.updated`` merges it and raises ``EventError``, which names
the field, for what cannot be done.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..audio import PcmStream
from ..languages import resolve_language
from ..pauses import VoiceActivity
from ..prompt import join_context

STEP_BY_DELAY = {"minimal": 0.5, "low": 1.0, "medium": 2.0, "high": 3.0, "xhigh": 4.0}


class _Strict(BaseModel):
    """What is not listed is refused by name, not ignored."""

    model_config = ConfigDict(extra="forbid")


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
    model: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    prompt: str | None = None
    keywords: list[str] | None = None
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None

    @field_validator("language")
    @classmethod
    def _resolve(cls, language: str | None) -> str | None:
        resolve_language(language)
        return language

    @field_validator("languages")
    @classmethod
    def _resolve_one(cls, languages: list[str] | None) -> list[str] | None:
        if len({resolve_language(language) for language in languages or []}) > 1:
            raise ValueError("pass one to force it, or none to detect the language.")
        return languages

    @property
    def stream_options(self) -> dict[str, Any]:
        """What a stream of an item is made with."""
        return {
            "language": self.language or next(iter(self.languages or []), None),
            "context": join_context(self.prompt or "", self.keywords or []),
            "step_s": STEP_BY_DELAY[self.delay or "medium"],
        }


class TurnDetection(_Strict):
    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5_000)
    silence_duration_ms: int = Field(default=500, ge=50, le=10_000)
    create_response: Literal[False] | None = None
    interrupt_response: Literal[False] | None = None
    idle_timeout_ms: None = None

    @property
    def activity(self) -> VoiceActivity:
        return VoiceActivity(threshold=self.threshold, silence_ms=self.silence_duration_ms)


class Input(_Strict):
    format: Format = Format()
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()
    noise_reduction: None = None


class Audio(_Strict):
    input: Input = Input()


class Config(_Strict):
    """A transcription session, as OpenAI writes it."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: list[str] | None = Field(default=None, max_length=0)

    def updated(self, changes: Any) -> Config:
        """With what the client changes; raises ``EventError`` that names what cannot be."""
        if not isinstance(changes, dict):
            raise EventError("session must be an object.", param="session")
        try:
            return Config.model_validate(_merged(self.model_dump(exclude_unset=True), changes))
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(["session", *map(str, first["loc"])])
            message = ADVICE.get(param, first["msg"].removeprefix("Value error, "))
            raise EventError(f"{param}: {message}", param=param) from error


# What clients may ask for that cannot be had, and what to do instead.
_INPUT = "session.audio.input"


ADVICE = {
    "session.type": 'only "transcription" sessions can be had.',
    "session.include": "log-probabilities are not given; leave it out.",
    f"{_INPUT}.noise_reduction": "noise is not reduced; send null.",
    f"{_INPUT}.transcription": "a transcription session transcribes; leave null out.",
    f"{_INPUT}.turn_detection.type": "use server_vad, or null to commit by hand.",
    f"{_INPUT}.turn_detection.create_response": "there are no responses; leave it out.",
    f"{_INPUT}.turn_detection.interrupt_response": "there are no responses; leave it out.",
    f"{_INPUT}.turn_detection.idle_timeout_ms": "there are no responses; leave it out.",
}


_WHOLE = ("format", "turn_detection")  # another type has other fields, so these are not merged


def _merged(old: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(old.get(name), dict)
        merged[name] = _merged(old[name], value) if both and name not in _WHOLE else value
    return merged


class EventError(Exception):
    """What a client is told of an event that cannot be done."""

    def __init__(
        self, message: str, *, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param = code, param
