# SPDX-License-Identifier: Apache-2.0
"""Reads a file of audio or video to a waveform, with warnings for what could not be read.

    file -> its recordings -> libsndfile, or FFmpeg where that misses anything -> one waveform

libsndfile is fast and reads what is whole. What it does not read to the end, FFmpeg reads again,
packet by packet. A file is refused only where neither can read any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from ..geometry import SAMPLE_RATE
from ..pauses import is_silent
from .blocks import Block, Unreadable, check_duration, to_waveform
from .containers import SIGNATURES, RawAudio
from .ffmpeg import Track, open_track
from .parts import Part, find_parts
from .sndfile import read_raw, read_soundfile
from .timeline import clock
from .views import View, read_at, size_of

MAX_TRACKS = 8  # tracks that are read in search of one that is not silent
MIN_BYTES_PER_S = 20  # of any audio; a file with fewer states a wrong duration


class _Attempt(NamedTuple):
    """A track that was read: its waveform, or why it has none."""

    track: Track
    waveform: np.ndarray
    failure: Unreadable | None = None

    def has_sound(self) -> bool:
        return len(self.waveform) > 0 and not is_silent(self.waveform)


@dataclass(frozen=True)
class Reader:
    """Reads files with the same limits and options.

    ``track`` is the audio track, from 1; ``raw`` describes files without a header; ``channel`` is
    the index of one channel and the number of all. ``start_s`` is where in its file a recording
    starts: the limit is of the whole file.
    """

    max_duration_s: float
    on_progress: Callable[[float], object]
    on_warning: Callable[[str], object]
    track: int | None = None
    raw: RawAudio | None = None
    channel: tuple[int, int] | None = None
    start_s: float = 0.0

    def read(self, file: BinaryIO) -> np.ndarray:
        """Return the waveform of a seekable file. Raises ValueError if no part can be read."""
        if not read_at(file, 0, 1):
            raise ValueError("audio is empty: the file has 0 bytes.")
        if self.raw and not _has_header(file):
            return self._read_raw(file, self.raw)
        waveforms: list[np.ndarray] = []
        failures: list[tuple[float, Part, Unreadable]] = []
        seconds = 0.0
        for part in find_parts(file):
            try:
                waveforms.append(replace(self, start_s=seconds)._read_part(file, part))
            except Unreadable as error:
                failures.append((seconds, part, error))
            seconds = sum(map(len, waveforms)) / SAMPLE_RATE
        if failures and not seconds:
            raise failures[0][-1]
        for start_s, part, _ in failures:
            self.on_warning(
                f"{part.end - part.start:,} bytes at {clock(start_s)} could not be read: they are "
                "no audio, or damaged."
            )
        return waveforms[0] if len(waveforms) == 1 else np.concatenate(waveforms)

    def sounding_track(self, file: BinaryIO) -> int | None:
        """Return the number of the track that ``read`` takes; None where there is no choice.

        Warns if it is not the default track.
        """
        if self.track or (self.raw and not _has_header(file)):
            return self.track
        try:
            with open_track(file) as track:
                if track.num_tracks == 1:
                    return None
        except Unreadable:
            return None
        chosen, warnings = self._choose(file)
        for warning in warnings:
            self.on_warning(warning)
        return chosen.track.number

    def _read_part(self, file: BinaryIO, part: Part) -> np.ndarray:
        is_file = not part.patches and part.start == 0 and part.end == size_of(file)
        view = file if is_file else cast(BinaryIO, View(file, part.start, part.end, part.patches))
        waveform = self._by_soundfile(view, part.num_samples) if part.is_whole else None
        warnings = [part.warning] if part.warning else []
        if waveform is None:
            waveform, by_ffmpeg = self._by_ffmpeg(view)
            warnings += by_ffmpeg
        if part.is_cut and not any("cut off" in warning for warning in warnings):
            end = clock(self.start_s + len(waveform) / SAMPLE_RATE)
            warnings.append(f"the file is cut off at {end}, or bytes of it are missing.")
        for warning in warnings:
            self.on_warning(warning)
        return waveform

    def _by_soundfile(self, file: BinaryIO, num_samples: int) -> np.ndarray | None:
        """Read with libsndfile; None where it cannot read everything."""
        if self.track not in (None, 1):
            return None
        blocks = read_soundfile(
            file, num_samples=num_samples, max_duration_s=self.max_duration_s, start_s=self.start_s
        )
        try:
            return self._waveform(blocks)
        except Unreadable:
            return None

    def _by_ffmpeg(self, file: BinaryIO) -> tuple[np.ndarray, list[str]]:
        """Read the waveform of the chosen track, and warnings."""
        chosen, warnings = self._choose(file)
        if chosen.failure:
            raise chosen.failure
        return chosen.waveform, warnings + chosen.track.losses.warnings(self.start_s)

    def _choose(self, file: BinaryIO) -> tuple[_Attempt, list[str]]:
        """Read the track of the options, else the default one or the first with sound."""
        first = self._attempt(file, self.track)
        if self.track is not None or self.channel is not None or first.has_sound():
            return first, []
        number, num_tracks = first.track.number, first.track.num_tracks
        others = {*range(1, min(num_tracks, MAX_TRACKS) + 1)} - {number}
        attempts = (self._attempt(file, other) for other in sorted(others))
        sounding = next((attempt for attempt in attempts if attempt.has_sound()), None)
        if sounding is None:
            return first, []
        state = "cannot be read" if first.failure else "is silent"
        return sounding, [
            f"audio track {number} of {num_tracks} {state}, so track {sounding.track.number} was "
            "read; choose one with audio_track."
        ]

    def _attempt(self, file: BinaryIO, number: int | None) -> _Attempt:
        with open_track(file, number=number) as track:
            try:
                return _Attempt(track, self._read_track(track))
            except Unreadable as error:
                return _Attempt(track, np.empty(0, np.float32), error)

    def _read_track(self, track: Track) -> np.ndarray:
        if track.end_s and track.size / track.end_s > MIN_BYTES_PER_S:  # else a wrong timestamp
            check_duration(self.start_s + track.end_s, self.max_duration_s)
        return self._waveform(track.blocks())

    def _read_raw(self, file: BinaryIO, raw: RawAudio) -> np.ndarray:
        if raw.encoding != "g729":
            return self._waveform(read_raw(file, raw))
        with open_track(file, container="g729") as track:
            return self._read_track(track)

    def _waveform(self, blocks: Iterator[Block]) -> np.ndarray:
        return to_waveform(
            blocks,
            max_duration_s=self.max_duration_s,
            start_s=self.start_s,
            on_progress=self.on_progress,
            channel=self.channel,
        )


def _has_header(file: BinaryIO) -> bool:
    head = read_at(file, 0, 16)
    return head.startswith(SIGNATURES) or head[4:8] == b"ftyp"
