# SPDX-License-Identifier: Apache-2.0
"""Reads audio, video and damaged files with FFmpeg through PyAV, packet by packet.

    container -> packets of one track -> frames -> silence for gaps -> blocks

A packet that cannot be decoded is counted and skipped. The format of the frames may change. Gaps in
their timestamps become silence.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .blocks import SAMPLING_RATES, Block, Unreadable, require
from .containers import RAW_ADVICE
from .timeline import JITTER_S, Losses, Timeline, clock
from .views import read_at, size_of

_MATROSKA = "matroska,webm"
_TS = "mpegts"
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_OGG = "ogg"
MAX_READ_ERRORS = 100  # per file, after which its demuxer continues
_MOST_CHUNKS = 64  # of a wav file that are looked at
_CUT_S = 0.25  # seconds missing at the end that cause a warning
_JITTER_S = {"ogg": 0.015, "flac": 0.015}  # containers with exact timestamps
_GAPLESS = {"ogg", "flac", "asf"}  # containers in which a gap means lost audio
_OF_ALL_TRACKS = {_MATROSKA, "flac", "flv"}  # containers that state the longest duration
# Containers without timestamps, whose frames FFmpeg counts, or with timestamps that are guesses.
_UNTIMED = {"aac", "mp3", "ac3", "eac3", "amr", "wav", "avi", "rm"}
_OVERHEAD = 4_096  # bytes between two packets of a Matroska file; where there are more, some failed
_TAGS = (b"ID3", b"TAG", b"APETAGEX")


@cache
def audio_decoders() -> str:
    """Return the names of FFmpeg's audio decoders, separated by commas."""
    av = require("av", "decode what libsndfile cannot read")
    names = []
    for name in sorted(av.codecs_available):
        with suppress(av.codec.codec.UnknownCodecError):  # one that only encodes
            if av.Codec(name, "r").type == "audio":
                names.append(name)
    return ",".join(names)


@contextmanager
def open_track(
    file: BinaryIO, *, number: int | None = None, container: str | None = None
) -> Iterator[Track]:
    """Open an audio track of a file by its number, from 1; None takes the default track.

    Raises Unreadable where FFmpeg finds no audio, and ValueError for a track that is not there.
    """
    av = require("av", "decode what libsndfile cannot read (m4a, aac, webm, video)")
    _check_riff(file)
    file.seek(0)
    try:
        # The whitelist: a playlist (ffconcat, SDP) that someone uploads must not make FFmpeg open
        # files of this machine or sockets. The tags of old files are often not UTF-8.
        # Only audio is decoded: FFmpeg would decode covers to find their size, 128 MB for each PNG.
        # The mode: without one, PyAV takes that of the file, and would write to a temporary one.
        opened = av.open(
            file,
            "r",
            container,
            options={"protocol_whitelist": "none", "codec_whitelist": audio_decoders()},
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        is_text = not read_at(file, 0, 16).translate(None, string.printable.encode())
        advice = "" if is_text else f" {RAW_ADVICE}"
        raise Unreadable(
            f"not audio, or cut off: neither libsndfile nor FFmpeg can read it.{advice}"
        ) from error
    with opened:
        yield Track(opened, _chosen(opened, number), av)


def _chosen(opened: Any, number: int | None) -> int:
    """Return the number of the track to read, from 1: the given one, or the first default."""
    tracks = opened.streams.audio
    if not tracks:
        raise Unreadable("not audio: the file has no audio track.")
    if number is None:
        usable = [n for n, track in enumerate(tracks, 1) if track.codec_context is not None]
        return next((n for n in usable if _is_default(tracks[n - 1])), usable[0] if usable else 1)
    if not 1 <= number <= len(tracks):
        raise ValueError(f"audio_track is {number}; the file has {len(tracks)}, counted from 1.")
    return number


def _is_default(track: Any) -> bool:
    return bool(track.disposition & type(track.disposition).default)


class _Frame(NamedTuple):
    rate: int
    samples: np.ndarray  # (samples, channels), float32
    time_s: float | None  # its timestamp from the container's start, where that can be trusted
    follows_skip: bool  # whether a gap before it is a loss that is not yet counted


class Track:
    """One audio track of an open container. ``losses`` are complete after the last block."""

    def __init__(self, opened: Any, number: int, av: Any) -> None:
        self.number, self.num_tracks = number, len(opened.streams.audio)
        self.losses = Losses()
        self._opened, self._av = opened, av
        self._stream = opened.streams.audio[number - 1]
        self._container = opened.format.name
        self.size = opened.size  # bytes of the file
        for other in opened.streams:
            if other is not self._stream and self._container != _MATROSKA:
                other.discard = type(other.discard).all
        decoder = self._stream.codec_context
        if decoder is not None and decoder.name == "flac":  # else damaged frames become noise
            decoder.options = {"err_detect": "crccheck+explode"}
        self._start_s = (opened.start_time or 0) / av.time_base
        self.end_s = self._stated_end_s()
        jitter_s = _JITTER_S.get(self._container, JITTER_S)
        self._timeline = Timeline(jitter_s=jitter_s, end_s=self._longest_s())
        self._packets_end_s = 0.0  # the end of the latest packet; Ogg states it for each page
        self._first_rate = 0  # of a frame
        self._has_lost = False  # a packet since the last frame, as was noted
        self._has_skipped = False  # bytes since the last frame
        self._packers: dict[tuple[str, str, int], Any] = {}

    def blocks(self) -> Iterator[Block]:
        """Yield blocks of about a second. Raises Unreadable where no packet can be decoded."""
        if self._stream.codec_context is None:
            raise Unreadable("not audio that FFmpeg has a decoder for.")
        yield from _batched(self._placed())
        missing_s = (self.end_s or 0.0) - self._timeline.time_s
        lost_s = self._last_page_s() - self._timeline.time_s
        if lost_s > JITTER_S:
            self.losses.others.append(
                f"about {lost_s:.1f} s before {clock(self._timeline.position_s)} could not be "
                "read: pages of the file are damaged or missing. Later times are early by as much."
            )
        elif missing_s > _CUT_S:
            self.losses.others.append(
                f"the sound ends at {clock(self._timeline.position_s)}, {missing_s:.1f} s before "
                "the end that the file states: it may be cut off."
            )

    def _last_page_s(self) -> float:
        """Return the end of the last page of an Ogg file in seconds; 0 for other files."""
        if self._container != _OGG or len(self._opened.streams) > 1:
            return 0.0
        stated_s = float((self._opened.duration or 0) / self._av.time_base)
        return max(self._packets_end_s, stated_s)

    def _longest_s(self) -> float | None:
        """Return the end of the longest track in seconds, if the container states it."""
        if not self._opened.duration or self._container not in {*_OF_ALL_TRACKS, _MP4}:
            return None
        duration_s = float(self._opened.duration / self._av.time_base)
        return duration_s if self._container == _MP4 else duration_s - self._start_s

    def _stated_end_s(self) -> float | None:
        """Return the end of this track in seconds, if the container states it."""
        if self._container == _MP4 and self._stream.duration:
            end = (self._stream.start_time or 0) + self._stream.duration
            return float(end * self._stream.time_base) - self._start_s
        is_alone = len(self._opened.streams) == 1
        return self._longest_s() if is_alone and self._container != _MP4 else None

    def _placed(self) -> Iterator[Block]:
        """Yield each frame as a block, after the silence of the gap before it."""
        for frame, following in pairwise(chain(self._frames(), (None,))):
            assert frame is not None  # only the last has none after it
            start_s = self._timeline.position_s
            duration_s = len(frame.samples) / frame.rate
            next_s = following.time_s if following else None
            silence_s, is_wrong = self._timeline.place(frame.time_s, duration_s, next_s=next_s)
            if is_wrong:
                self.losses.others.append(
                    f"a timestamp at {clock(start_s)} is too far ahead; its gap was left out."
                )
            if silence_s and start_s and frame.follows_skip:
                self.losses.add(start_s, silence_s)
            yield from _silence(silence_s, frame.rate, frame.samples.shape[1])
            yield Block(frame.rate, frame.samples)

    def _frames(self) -> Iterator[_Frame]:
        """Yield all frames that can be decoded; raises Unreadable where none can."""
        error: Exception | None = None
        num_frames = 0
        for packet in self._packets():
            if packet.pts is not None:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self._packets_end_s = max(self._packets_end_s, end_s - self._start_s)
            try:
                decoded = packet.decode()
            except self._av.FFmpegError as failure:
                error = failure
                self._lose(packet)
                continue
            if packet.is_corrupt and self._container == _TS:  # as its continuity counters say
                self._lose(packet)
            for frame in decoded:
                if frame.sample_rate in SAMPLING_RATES:
                    num_frames += 1
                    yield self._read(frame)
        if error and not num_frames:
            raise Unreadable(f"audio is broken: {getattr(error, 'strerror', error)}.")

    def _read(self, frame: Any) -> _Frame:
        rate = frame.sample_rate
        self._first_rate = self._first_rate or rate
        # FFmpeg counts the frames of a transport stream at the rate of the first.
        is_other = self._container == _TS and rate != self._first_rate
        is_timed = frame.time is not None and self._container not in _UNTIMED and not is_other
        time_s = float(frame.time) - self._start_s if is_timed else None
        follows_skip = (self._has_skipped or self._container in _GAPLESS) and not self._has_lost
        self._has_lost = self._has_skipped = False
        return _Frame(rate, self._samples(frame), time_s, follows_skip)

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the track; those of other tracks show skipped bytes."""
        end = 0  # of the packet before, in bytes
        for _ in range(MAX_READ_ERRORS):
            try:
                for packet in self._opened.demux():
                    if self._container == _MATROSKA and packet.pos is not None:
                        self._has_skipped |= 0 < end < packet.pos - _OVERHEAD
                        end = packet.pos + packet.size
                    if packet.stream_index == self._stream.index:
                        self._has_skipped |= packet.is_corrupt
                        yield packet
                return
            except self._av.FFmpegError:
                self.losses.add(self._timeline.position_s, 0.0)

    def _lose(self, packet: Any) -> None:
        if packet.size and not bytes(packet)[:8].startswith(_TAGS):
            seconds = float((packet.duration or 0) * (packet.time_base or 0))
            self.losses.add(self._timeline.position_s, seconds, num_packets=1)
            self._has_lost = True

    def _samples(self, frame: Any) -> np.ndarray:
        """Convert a frame to shape (samples, channels), float32."""
        num_channels = frame.layout.nb_channels
        if frame.format.name == "fltp" and num_channels <= 2:
            return np.asarray(frame.to_ndarray().T)
        # Packed: PyAV reads past the end of planar frames of eight channels and more, and crashes.
        key = frame.format.name, frame.layout.name, frame.sample_rate
        if key not in self._packers:
            self._packers = {key: self._av.AudioResampler(format="flt")}
        packed = self._packers[key].resample(frame)
        arrays = [part.to_ndarray().reshape(-1, num_channels) for part in packed]
        return np.concatenate(arrays) if arrays else np.empty((0, num_channels), np.float32)


def _batched(blocks: Iterator[Block]) -> Iterator[Block]:
    """Join blocks of one format to about a second: later steps cost the same for each block."""
    batch: list[np.ndarray] = []
    kind, length = (0, 0), 0
    for rate, samples in blocks:
        if batch and (kind != (rate, samples.shape[1]) or length >= rate):
            yield Block(kind[0], np.concatenate(batch))
            batch, length = [], 0
        kind = rate, samples.shape[1]
        batch.append(samples)
        length += len(samples)
    if batch:
        yield Block(kind[0], np.concatenate(batch))


def _silence(seconds: float, rate: int, num_channels: int) -> Iterator[Block]:
    left = round(seconds * rate)
    while left > 0:
        yield Block(rate, np.zeros((min(left, rate), num_channels), np.float32))
        left -= rate


def _check_riff(file: BinaryIO) -> None:
    """Raise Unreadable where a wav file states more tags than it has bytes.

    FFmpeg would reserve the memory for them: a gigabyte, for a header of 40 bytes.
    """
    end, place = size_of(file), 12
    if read_at(file, 0, 4) not in (b"RIFF", b"RIFX", b"RF64"):
        return
    for _ in range(_MOST_CHUNKS):
        name, size = read_at(file, place, 4), int.from_bytes(file.read(4), "little")
        is_sound = read_at(file, place + 8, 4) == b"movi"  # of an avi file, which may be cut off
        if name == b"LIST" and place + size > end and not is_sound:
            raise Unreadable(f"audio is broken: its header states {size} bytes of tags.")
        place += 8 + size + size % 2
