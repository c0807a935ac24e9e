# SPDX-License-Identifier: Apache-2.0
"""What was said, when, and in which language; and the formats that it is written in.

Times are seconds from the start of the recording. A field that is None was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .languages import separator


@dataclass(frozen=True)
class Word:
    """An aligned unit: a word, or one character of Chinese or Japanese."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """A timed stretch of transcript. ``language`` is a name, None where nobody speaks."""

    start: float
    end: float
    text: str
    language: str | None = None
    language_probability: float | None = None
    no_speech_prob: float | None = None
    avg_logprob: float | None = None  # nats per token
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Transcript:
    """One recording, transcribed. ``warnings`` say where ``text`` may be incomplete."""

    text: str
    duration: float
    segments: tuple[Segment, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages spoken, in order of first use."""
        return tuple(dict.fromkeys(s.language for s in self.segments if s.language))

    @property
    def language(self) -> str | None:
        """The language spoken first; None if nobody speaks."""
        return next(iter(self.languages), None)


def join_texts(texts: Iterable[str]) -> str:
    """One text from many, with a space between two where their scripts want one."""
    joined = ""
    for text in map(str.strip, texts):
        joined += separator(joined, text) + text
    return joined


def _txt(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _json(transcript: Transcript) -> str:
    """An object with these keys, always; a segment has the fields that were measured.

    text, language (null if nobody speaks), languages, duration, segments, warnings
    """
    document = {
        "text": transcript.text,
        "language": transcript.language,
        "languages": transcript.languages,
        "duration": transcript.duration,
        "segments": [asdict(s, dict_factory=_measured) for s in transcript.segments],
        "warnings": transcript.warnings,
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _measured(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": _txt, "json": _json}
