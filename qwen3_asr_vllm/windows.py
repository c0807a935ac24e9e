# SPDX-License-Identifier: Apache-2.0
"""The attention windows of a clip that grows.

    samples so far -> Window, Window, ... -> one item each of vLLM's multimodal input

A finished window never changes, so vLLM's encoder cache and prefix cache know it by its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from .geometry import HALF_FFT, HOP_LENGTH, Geometry, num_frames

GUARD_SAMPLES = HALF_FFT - HOP_LENGTH  # samples past its end that the last frame of a window sees


class Tokenizer(Protocol):
    """The methods of a tokenizer that rolling back needs; those of transformers have them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class Window:
    """One attention window of a clip that grows, as an item of vLLM's multimodal input.

    ``samples``: float32 at 16 kHz. All but a clip's first open with the 200 samples before the
    window; a finished one ends 40 samples after it. ``peak``: the largest value of the clip's
    log-mel spectrogram so far, before its floor; -inf: use the window's own peak.
    """

    samples: np.ndarray
    has_context: bool
    peak: float

    @property
    def num_frames(self) -> int:
        if self.has_context:
            return (len(self.samples) - HALF_FFT) // HOP_LENGTH
        return num_frames(len(self.samples))

    @cached_property
    def uuid(self) -> str:
        """A hash of everything that its audio tokens depend on."""
        digest = hashlib.blake2b(self.samples.tobytes(), digest_size=16)
        digest.update(np.array([self.peak, self.has_context], dtype=np.float32).tobytes())
        return f"qwen3-asr-window-{digest.hexdigest()}"


class GrowingClip:
    """The samples of a clip, and its windows at any length so far."""

    def __init__(
        self, samples: np.ndarray, geometry: Geometry, loudest: Callable[[Window], float]
    ) -> None:
        self._buffer = samples
        self._size = geometry.window_samples
        self._loudest = loudest
        self._finished: list[Window] = []  # as they are now
        self._peaks: list[float] = []  # the largest value of each finished one
        self.num_samples = len(samples)

    @property
    def samples(self) -> np.ndarray:
        return self._buffer[: self.num_samples]

    def append(self, samples: np.ndarray) -> None:
        needed = self.num_samples + len(samples)
        if needed > len(self._buffer):
            grown = np.empty(max(needed, 2 * len(self._buffer)), np.float32)
            grown[: self.num_samples] = self.samples
            self._buffer = grown
        self._buffer[self.num_samples : needed] = samples
        self.num_samples = needed

    def windows(self, num_samples: int) -> list[Window]:
        """The windows of the first samples, each finished one the same object as long as it is
        the same; together they have the features of the whole."""
        num_finished = max(0, (num_samples - GUARD_SAMPLES) // self._size)
        for i in range(len(self._finished), num_finished):
            window = self._window(i, (i + 1) * self._size + GUARD_SAMPLES)
            self._finished.append(window)
            self._peaks.append(self._loudest(window))
        peaks = self._peaks[:num_finished]
        tail = self._window(num_finished, num_samples)
        if has_tail := tail.num_frames > 0:
            peaks.append(self._loudest(tail))
        finished = [_at(window, max(peaks)) for window in self._finished[:num_finished]]
        self._finished[:num_finished] = finished
        return finished + [_at(tail, max(peaks))] * has_tail

    def _window(self, index: int, end: int) -> Window:
        start = max(0, index * self._size - HALF_FFT)
        return Window(self._buffer[start:end], has_context=index > 0, peak=-np.inf)


def _at(window: Window, peak: float) -> Window:
    """Return the window of a clip with this peak."""
    return window if window.peak == peak else replace(window, peak=peak)
