# SPDX-License-Identifier: Apache-2.0
"""Times the words of one utterance while its text becomes final; nothing here runs an aligner.

    audio, final text, tentative text -> requests of alignment.py -> words of the final text

Text that has no times yet is aligned with the audio since the last timed word. The tentative text
is aligned with it, because it is spoken in the same audio; its own words wait until it is final.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, takewhile

import numpy as np

from .alignment import align_words, shifted
from .geometry import MIN_SAMPLES, SAMPLE_RATE
from .rounds import Rounds
from .transcript import Word
from .units import check_language

LEAST_S = 0.002  # seconds of a word; stays above 0 when rounded to milliseconds


class LiveWords:
    """The words of an utterance that starts at a sample of its session."""

    def __init__(self, start: int) -> None:
        self.is_behind = False  # whether final text waits for ``align``
        self._start = start  # of the samples that are held
        self._samples: list[np.ndarray] = []
        self._num_timed = 0  # samples held that lie before the end of the last timed word
        self._num_decoded = 0  # samples held that the text covers
        self._final = self._tentative = ""  # text without times
        self._language: str | None = None

    def push(self, samples: np.ndarray) -> None:
        """Append the samples that follow, float32 at 16 kHz."""
        self._samples.append(samples)

    def extend(self, delta: str, tentative: str, *, end: int, language: str | None) -> None:
        """Append final text; with the tentative text it covers the samples before ``end``.

        ``end`` counts from the start of the session.
        """
        self._final += delta
        self._tentative, self._language = tentative, language
        self._num_decoded = end - self._start
        self.is_behind = True

    def align(self) -> Rounds[list[Word]]:
        """Time the final text so far; returns its words in seconds of the session.

        They include the spaces and punctuation around them. Raises ValueError for a language that
        the aligner does not know, and what ``align_words`` raises.
        """
        self.is_behind = False
        samples = np.concatenate([*self._samples, np.empty(0, np.float32)])
        final = self._final
        # words may outlast the audio that is new
        skipped = max(0, min(self._num_timed, self._num_decoded - MIN_SAMPLES))
        waveform = samples[skipped : self._num_decoded]
        if not final.strip() or not len(waveform):
            return []
        if self._language:
            check_language(self._language)
        words = yield from align_words(waveform, [final + self._tentative], self._language)
        words = _inside(shifted(words, (self._start + skipped) / SAMPLE_RATE), len(final))
        words = list(_after(words, (self._start + self._num_timed) / SAMPLE_RATE))
        if words:
            self._final = self._final[sum(len(word.word) for word in words) :]
            self._num_timed = round(words[-1].end * SAMPLE_RATE) - self._start
            self._drop(max(0, self._num_timed - MIN_SAMPLES))
        return words

    def _drop(self, num_samples: int) -> None:
        """Drop the first samples; more may have come while the aligner worked."""
        self._samples = [np.concatenate(self._samples)[num_samples:]]
        self._start += num_samples
        self._num_timed -= num_samples
        self._num_decoded -= num_samples


def _after(words: Iterable[Word], time: float) -> Iterator[Word]:
    """Yield the words, none of which starts before a time, or ends when it starts."""
    for word in words:
        start = max(word.start, time)
        yield replace(word, start=start, end=max(word.end, start + LEAST_S))


def _inside(words: Iterable[Word], num_characters: int) -> list[Word]:
    """Return the words that lie in the first characters of the text."""
    words = list(words)
    ends = accumulate(len(word.word) for word in words)
    pairs = zip(words, ends, strict=True)
    return [word for word, _ in takewhile(lambda pair: pair[1] <= num_characters, pairs)]
