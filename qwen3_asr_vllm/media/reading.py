# SPDX-License-Identifier: Apache-2.0
"""Reads a file of audio or video to a waveform, with warnings for what could not be read.

    file -> its recordings -> libsndfile, or FFmpeg where that misses anything -> one waveform

libsndfile is fast and reads what is whole. What it does not read to the end, FFmpeg reads again,
packet by packet. A file is refused only where neither can read any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, cast

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


@dataclass(frozen=True)
class Reader:
    """Reads files with the same limits and options.

    ``track`` is the audio track, from 1; ``raw`` describes files without a header; ``channel`` is
    the index of one channel and the number of all.
    """

    max_duration_s: float
    on_progress: Callable[[float], object]
    on_warning: Callable[[str], object]
    track: int | None = None
    raw: RawAudio | None = None
    channel: tuple[int, int] | None = None

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
                waveforms.append(self._from(seconds)._read_part(file, part, seconds))
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

    def _from(self, start_s: float) -> Reader:
        """Return a reader for the recording that starts at ``start_s`` of a file."""
        if not start_s:
            return self
        return replace(
            self,
            max_duration_s=self.max_duration_s - start_s,
            on_progress=partial(_progress_from, start_s, self.on_progress),
        )

    def _read_part(self, file: BinaryIO, part: Part, start_s: float) -> np.ndarray:
        is_file = not part.patches and part.start == 0 and part.end == size_of(file)
        view = file if is_file else cast(BinaryIO, View(file, part.start, part.end, part.patches))
        waveform = self._by_soundfile(view, part.num_samples) if part.is_whole else None
        warnings = [part.warning] if part.warning else []
        if waveform is None:
            waveform, by_ffmpeg = self._by_ffmpeg(view, start_s)
            warnings += by_ffmpeg
        if part.is_cut and not any("cut off" in warning for warning in warnings):
            end = clock(start_s + len(waveform) / SAMPLE_RATE)
            warnings.append(f"the file is cut off at {end}, or bytes of it are missing.")
        for warning in warnings:
            self.on_warning(warning)
        return waveform

    def _by_soundfile(self, file: BinaryIO, num_samples: int) -> np.ndarray | None:
        """Read with libsndfile; None where it cannot read everything."""
        if self.track not in (None, 1):
            return None
        blocks = read_soundfile(file, num_samples=num_samples, max_duration_s=self.max_duration_s)
        try:
            return self._waveform(blocks)
        except Unreadable:
            return None

    def _by_ffmpeg(self, file: BinaryIO, start_s: float) -> tuple[np.ndarray, list[str]]:
        """Read the waveform of a track, and warnings.

        The track is the one that was chosen; without a choice the default one or, where that is
        silent, the first that is not.
        """
        with open_track(file, number=self.track) as track:
            waveform = self._read_track(track)
        warnings = track.losses.warnings(start_s)
        is_chosen = self.track is not None or self.channel is not None
        if is_chosen or track.num_tracks == 1 or not len(waveform) or not is_silent(waveform):
            return waveform, warnings
        for number in range(1, min(track.num_tracks, MAX_TRACKS) + 1):
            with open_track(file, number=number) as other:
                candidate = self._read_track(other)
            if len(candidate) and not is_silent(candidate):
                choice = (
                    f"audio track {track.number} of {track.num_tracks} is silent, so track "
                    f"{number} was read; choose one with audio_track."
                )
                return candidate, [choice, *other.losses.warnings(start_s)]
        return waveform, warnings

    def _read_track(self, track: Track) -> np.ndarray:
        if track.end_s and track.size / track.end_s > MIN_BYTES_PER_S:  # else a wrong timestamp
            check_duration(track.end_s, self.max_duration_s)
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
            on_progress=self.on_progress,
            channel=self.channel,
        )


def _has_header(file: BinaryIO) -> bool:
    head = read_at(file, 0, 16)
    return head.startswith(SIGNATURES) or head[4:8] == b"ftyp"


def _progress_from(start_s: float, on_progress: Callable[[float], object], s: float) -> None:
    on_progress(start_s + s)
