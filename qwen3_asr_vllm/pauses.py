# SPDX-License-Identifier: Apache-2.0
"""Pauses in speech: silence, and the cutting of recordings into clips.

waveform -> loudness of each 10 ms frame -> quiet or speech -> cuts
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .geometry import HOP_LENGTH, MAX_CLIP_S, SAMPLE_RATE
from .voice_activity import speech_frames

SILENT_PEAK = 0.0005  # -66 dBFS: 16 steps of 16-bit audio


@dataclass(frozen=True)
class Pauses:
    """The pauses that end a clip, as OpenAI's ``server_vad`` defines them.

    A frame is quiet where the probability of speech is below ``threshold``; where Silero VAD is
    not installed, below ``threshold`` of the way, in dB, from the quietest to the loud ones. A
    pause lasts ``silence_s`` or longer; the last ``padding_s`` of it open the next clip.
    """

    threshold: float = 0.5
    silence_s: float = 0.2
    padding_s: float = 0.3


def is_silent(waveform: np.ndarray) -> bool:
    """Return whether no sample is louder than -66 dBFS: digital silence or dither."""
    return bool(max(waveform.max(), -waveform.min()) < SILENT_PEAK)


def split_at_silence(
    waveform: np.ndarray, *, max_clip_s: float, search_s: float | None = None
) -> list[tuple[int, int]]:
    """Split a waveform into clips, (start, end) in samples, which concatenate to it exactly.

    Each clip but the last is cut in the middle of the widest quiet stretch of the last
    ``search_s`` seconds (default: half of ``max_clip_s``) before ``max_clip_s`` is reached, so
    no clip is longer than ``max_clip_s``.

    Raises ValueError where ``max_clip_s`` is not between 1 and 1200.
    """
    if not 1 <= max_clip_s <= MAX_CLIP_S:
        raise ValueError(f"max_clip_s is {max_clip_s:g}; the model takes 1 to {MAX_CLIP_S} s.")
    max_frames = _frames(max_clip_s)
    search = min(max(_frames(search_s or max_clip_s / 2), 1), max_frames - 1)
    if len(waveform) <= max_frames * HOP_LENGTH:
        return [(0, len(waveform))]
    levels = _levels(waveform)
    cuts = [0]  # in frames
    while len(waveform) - cuts[-1] * HOP_LENGTH > max_frames * HOP_LENGTH:
        limit = cuts[-1] + max_frames
        cuts.append(limit - search + _widest_quiet(levels[limit - search : limit]))
    return list(pairwise([*(cut * HOP_LENGTH for cut in cuts), len(waveform)]))


def split_at_pauses(
    waveform: np.ndarray, pauses: Pauses, *, max_clip_s: float
) -> list[tuple[int, int]]:
    """Split a waveform as ``split_at_silence`` does, and also at every pause."""
    speech = speech_frames(waveform, threshold=pauses.threshold)
    quiet = quiet_frames(waveform, threshold=pauses.threshold) if speech is None else ~speech
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    cuts = [
        int(max(start, end - _frames(pauses.padding_s))) * HOP_LENGTH
        for start, end in edges
        if start > 0 and end < len(quiet) and end - start >= _frames(pauses.silence_s)
    ]
    return [
        (start + begin, start + finish)
        for start, end in pairwise([0, *cuts, len(waveform)])
        for begin, finish in split_at_silence(waveform[start:end], max_clip_s=max_clip_s)
    ]


def halve_at_silence(waveform: np.ndarray) -> int:
    """Return the cut of a clip in two, in samples: the widest quiet stretch of its middle half."""
    levels = _levels(waveform)
    margin = len(levels) // 4
    return (margin + _widest_quiet(levels[margin : len(levels) - margin])) * HOP_LENGTH


def quiet_frames(waveform: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
    """Mark the whole frames that are pauses, shape (len(waveform) // 160,), bool."""
    if len(waveform) < HOP_LENGTH:
        return np.zeros(0, bool)
    return _is_quiet(_levels(waveform), threshold)


def _frames(seconds: float) -> int:
    return int(seconds * SAMPLE_RATE / HOP_LENGTH)


def _levels(waveform: np.ndarray) -> np.ndarray:
    """Return the loudness of each whole frame in dB, over 50 ms, shape (len(waveform) // 160,)."""
    frames = waveform[: len(waveform) // HOP_LENGTH * HOP_LENGTH].reshape(-1, HOP_LENGTH)
    power = np.einsum("ij,ij->i", frames, frames) / HOP_LENGTH
    if len(power) >= 5:
        power = np.convolve(power, np.full(5, 0.2), mode="same")
    return np.asarray(10 * np.log10(np.maximum(power, 1e-10)))


def _is_quiet(levels: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Mark the frames below ``threshold`` of the way, in dB, from the quietest to the loud ones.

    Loud is the 90th percentile. The quietest counts as at most 60 dB below it, so that a dropout
    does not make pauses look loud.
    """
    rank = len(levels) * 9 // 10
    loud = np.partition(levels, rank)[rank]  # np.percentile takes as long as all else here
    quietest = max(levels.min(), loud - 60)
    return np.asarray(levels <= quietest + threshold * (loud - quietest))


def _widest_quiet(levels: np.ndarray) -> int:
    """Return the middle of the longest run of quiet frames."""
    edges = np.flatnonzero(np.diff(_is_quiet(levels), prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    widest = np.argmax(ends - starts)
    return int(starts[widest] + ends[widest]) // 2
