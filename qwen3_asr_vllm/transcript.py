# SPDX-License-Identifier: Apache-2.0
"""The transcript of a recording: words, tokens and segments.

Times are seconds from the start of the recording. A field that is None was not measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from .languages import LANGUAGES, Languages


@dataclass(frozen=True)
class Word:
    """An aligned unit: a word, or one character of Chinese or Japanese.

    ``probability`` is the geometric mean of those of its tokens, where confidences are requested.
    ``other_speakers`` speak at the same time as ``speaker``.
    """

    word: str
    start: float
    end: float
    probability: float | None = None
    speaker: str | None = None
    other_speakers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Token:
    """A token of the output. The texts of all tokens joined are the text of the output.

    Where a character takes several tokens, the last token has it and the others are empty.
    """

    id: int
    text: str
    logprob: float  # nats


@dataclass(frozen=True)
class Segment:
    """A timed stretch of transcript, a sentence or a clause; ``language`` is a name.

    ``text`` starts with the white space before it, so the texts of all segments joined are the
    text of the transcript. Confidences are the model's own, where requested. ``lines`` are those
    that a subtitle shows, where the user's text has them; None lays them out to fit.
    """

    start: float
    end: float
    text: str
    language: str | None = None
    language_probability: float | None = None
    no_speech_prob: float | None = None
    avg_logprob: float | None = None  # nats per token
    words: tuple[Word, ...] | None = None
    tokens: tuple[Token, ...] | None = None
    speaker: str | None = None
    other_languages: tuple[str, ...] | None = None  # that the model named for the same clip
    other_speakers: tuple[str, ...] | None = None  # who speak at the same time, for a word or more
    lines: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Transcript:
    """The transcript of one recording. ``warnings`` say where ``text`` may be incomplete.

    ``loops`` counts outputs that ended in a repetition loop. ``known`` are the languages
    of the checkpoint, with their codes.
    """

    text: str
    duration: float
    segments: tuple[Segment, ...] = ()
    warnings: tuple[str, ...] = ()
    loops: int = 0
    known: Languages = field(default=LANGUAGES, repr=False, compare=False)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments."""
        return tuple(word for segment in self.segments for word in segment.words or ())

    @property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers, in order of their first segments."""
        return tuple(dict.fromkeys(s.speaker for s in self.segments if s.speaker is not None))

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages spoken, in order of first use."""
        names = ((s.language, *(s.other_languages or ())) for s in self.segments)
        return tuple(dict.fromkeys(filter(None, chain.from_iterable(names))))

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of the languages spoken; a name where there is none."""
        return tuple(map(self.known.code, self.languages))

    @property
    def language(self) -> str | None:
        """The language spoken first; None without speech."""
        return next(iter(self.languages), None)

    def to(self, format: str, **layout: Any) -> str:
        """Return the transcript in a format of ``FORMATS``, such as "srt".

        ``layout`` are options of subtitles: ``max_line_width``, ``max_line_count``,
        ``highlight_words``. Raises ValueError for an unknown format.
        """
        from .formats import format_named  # which imports this module

        return format_named(format)(self, **layout)

    def write(self, path: str | os.PathLike[str], **layout: Any) -> None:
        """Write the transcript to a file, in the format of its suffix: ``write("a.srt")``.

        Raises ValueError for a suffix of no format, OSError where it cannot be written.
        """
        text = self.to(Path(path).suffix, **layout)
        Path(path).write_text(text, encoding="utf-8", newline="")
