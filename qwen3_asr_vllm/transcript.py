# SPDX-License-Identifier: Apache-2.0
"""The transcript of a recording: words, tokens and segments. Data only.

Times are seconds from the start of the recording. A field that is None was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """An aligned unit: a word, or one character of Chinese or Japanese."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Token:
    """A token that the model wrote. The texts of all tokens of an answer make its text.

    Of a character that takes several tokens, the last has it and the others are empty.
    """

    id: int
    text: str
    logprob: float  # nats


@dataclass(frozen=True)
class Segment:
    """A timed stretch of transcript, a sentence or a clause; ``language`` is a name.

    ``text`` begins with the white space before it, so that the texts of all segments, put
    together, are the text of the transcript. Confidences are the model's own, where asked for.
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


@dataclass(frozen=True)
class Transcript:
    """One recording, transcribed. ``warnings`` say where ``text`` may be incomplete.

    ``loops`` counts answers that went round in circles and were asked for again.
    """

    text: str
    duration: float
    segments: tuple[Segment, ...] = ()
    warnings: tuple[str, ...] = ()
    loops: int = 0

    @property
    def words(self) -> tuple[Word, ...]:
        """Those of all segments that have any."""
        return tuple(word for segment in self.segments for word in segment.words or ())

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages spoken, in order of first use."""
        return tuple(dict.fromkeys(s.language for s in self.segments if s.language))

    @property
    def language(self) -> str | None:
        """The language spoken first; None if nobody speaks."""
        return next(iter(self.languages), None)


# text ---------------------------------------------------------------------------------------


# subtitles ----------------------------------------------------------------------------------


# formats ------------------------------------------------------------------------------------
#
# A ``layout`` is what ``cues`` takes: max_line_width, max_line_count, highlight_words.
