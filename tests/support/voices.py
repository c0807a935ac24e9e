# SPDX-License-Identifier: Apache-2.0
"""A diarizer for tests: Resemblyzer, whose weights come in its package, and a clustering.

``support.voices:diarize`` is its spec. Silero VAD finds speech, windows of it are embedded, and the
windows of one voice are one cluster. Speech of two at once is given to one of them.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from qwen3_asr_vllm.geometry import HOP_LENGTH, SAMPLE_RATE
from qwen3_asr_vllm.pauses import quiet_frames
from qwen3_asr_vllm.voice_activity import speech_frames

WINDOW_S, STEP_S = 1.6, 0.4  # seconds of an embedding, and between two
MAX_DISTANCE = 0.3  # between the windows of one voice, as one minus the cosine
FRAMES_PER_S = SAMPLE_RATE // HOP_LENGTH
MIN_PAUSE = 15  # frames of 10 ms


class Voices:
    """Finds the voices of a recording; ``num_speakers`` of them, if that is known."""

    same_voice = 0.75

    @cached_property
    def encoder(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SciPy's and PyTorch's old names
            from resemblyzer import VoiceEncoder

            return VoiceEncoder("cpu", verbose=False)

    def __call__(
        self,
        waveform: np.ndarray,
        num_speakers: int | None = None,
        *,
        min_speakers: int | None = None,
        max_speakers: int | None = None,
    ) -> list[tuple[float, float, int]]:
        windows = [window for span in stretches(waveform) for window in split(span)]
        if not windows:
            return []
        voices = np.array([self.embed(waveform[slice(*samples(w))]) for w in windows])
        found = cluster(voices, num_speakers)
        count = found.max() + 1
        bounded = min(max(count, min_speakers or 1), max_speakers or count)
        if num_speakers is None and bounded != count:
            found = cluster(voices, bounded)
        return turns(windows, found.tolist())

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        level = np.sqrt(np.mean(np.square(waveform))) or 1.0
        padded = np.pad(waveform, (0, max(0, SAMPLE_RATE - len(waveform))), mode="wrap")
        return self.encoder.embed_utterance(0.03 * padded / level)


diarize = Voices()


def samples(window: tuple[int, int]) -> tuple[int, int]:
    """The samples of a window, made longer on both sides if it is short."""
    return window[0] * HOP_LENGTH, window[1] * HOP_LENGTH


def stretches(waveform: np.ndarray) -> list[tuple[int, int]]:
    """Frames of speech between pauses: (start, end) in frames of 10 ms."""
    is_speech = speech_frames(waveform)
    if is_speech is None:
        is_speech = ~quiet_frames(waveform)
    is_speech = is_speech.copy()
    start = 0
    for value, group in groupby(is_speech.tolist()):
        end = start + len(list(group))
        if not value and end - start < MIN_PAUSE:
            is_speech[start:end] = True
        start = end
    edges = np.flatnonzero(np.diff(is_speech, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= 20]


def split(span: tuple[int, int]) -> list[tuple[int, int]]:
    """Windows of one stretch, which overlap: (start, end) in frames."""
    start, end = span
    size, step = int(WINDOW_S * FRAMES_PER_S), int(STEP_S * FRAMES_PER_S)
    starts = range(start, max(end - size, start) + step, step)
    return [(max(start, min(s, end - size)), min(end, max(s, start) + size)) for s in starts]


def cluster(voices: np.ndarray, number: int | None) -> np.ndarray:
    """The voice of each window, as a number from 0."""
    from sklearn.cluster import AgglomerativeClustering

    if len(voices) < 2:
        return np.zeros(len(voices), int)
    how = {"n_clusters": min(number, len(voices))} if number else {"n_clusters": None}
    far = None if number else MAX_DISTANCE
    model = AgglomerativeClustering(
        metric="cosine", linkage="average", distance_threshold=far, **how
    )
    return model.fit_predict(voices)


def turns(windows: list[tuple[int, int]], voices: list[int]) -> list[tuple[float, float, int]]:
    """Turns in seconds: a frame belongs to the window whose middle is nearest."""
    found: list[tuple[float, float, int]] = []
    for (start, end), voice in zip(windows, voices, strict=True):
        if found and found[-1][1] * FRAMES_PER_S > start:  # both windows share speech
            cut = (start + found[-1][1] * FRAMES_PER_S) / 2 / FRAMES_PER_S
            before, _, other = found.pop()
            found += [(before, cut, other), (cut, end / FRAMES_PER_S, voice)]
        else:
            found.append((start / FRAMES_PER_S, end / FRAMES_PER_S, voice))
    return found
