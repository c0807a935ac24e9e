# SPDX-License-Identifier: Apache-2.0
"""Times the words of one utterance while its text becomes final; nothing here runs an aligner.

    audio, final text, tentative text -> requests of alignment.py -> words of the final text

Text that has no times yet is aligned with the audio since the last timed word. The tentative text
is aligned with it, because it is spoken in the same audio; its own words wait until it is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, takewhile

import numpy as np

from .alignment import align_words
from .geometry import SAMPLE_RATE
from .rounds import Rounds
from .transcript import Word
from .units import check_language


class LiveWords:
    """The words of an utterance that starts at a sample of its session."""

    def __init__(self, start: int) -> None:
        self.is_behind = False  # whether final text waits for ``align``
        self._start = start  # of the samples that are held
        self._samples: list[np.ndarray] = []
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
        start, final = self._start, self._final
        waveform = samples[: self._num_decoded]
        if not final.strip() or not len(waveform):
            return []
        if self._language:
            check_language(self._language)
        words = yield from align_words(waveform, [final + self._tentative], self._language)
        words = _inside(words, len(final))
        if words:
            self._drop(round(words[-1].end * SAMPLE_RATE), sum(len(word.word) for word in words))
        offset_s = start / SAMPLE_RATE
        return [replace(w, start=w.start + offset_s, end=w.end + offset_s) for w in words]

    def _drop(self, num_samples: int, num_characters: int) -> None:
        """Drop the audio and the text of timed words; more of both may have come meanwhile."""
        samples = np.concatenate(self._samples)
        self._samples = [samples[num_samples:]]
        self._start += num_samples
        self._num_decoded -= num_samples
        self._final = self._final[num_characters:]


def _inside(words: Sequence[Word], num_characters: int) -> list[Word]:
    """Return the words that lie in the first characters of the text."""
    ends = accumulate(len(word.word) for word in words)
    pairs = zip(words, ends, strict=True)
    return [word for word, _ in takewhile(lambda pair: pair[1] <= num_characters, pairs)]
