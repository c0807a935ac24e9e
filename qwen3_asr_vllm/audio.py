# SPDX-License-Identifier: Apache-2.0
"""Loads recordings as waveforms.

    path, bytes, file, array -> decode -> downmix -> resample -> check -> waveform

A waveform is float32, mono, in [-1, 1] (lossy decoders overshoot a little), at 16 kHz. Files are
read by ``media/``, block by block, so a small file that expands into days of samples stays within
the memory limit. Nothing here knows of models or engines.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from .geometry import SAMPLE_RATE
from .media.blocks import (
    Block,
    check_rate,
    installed,
    resampler_from,
    to_waveform,
)
from .media.containers import CONTAINERS, RawAudio, raw_audio_of_name
from .media.reading import Reader
from .peaks import scale_to_range

AudioSource: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | tuple[np.ndarray, int]
)

MAX_DURATION_S = 4 * 3600  # seconds of audio in one recording, unless the caller says otherwise
MAX_PIPE_BYTES = 1 << 30  # a file may be larger: it need not fit into memory
PCM_ENCODINGS = ("pcm", "pcmu", "pcma")  # of raw audio: 16-bit, and G.711's mu-law and A-law
logger = logging.getLogger(__name__)


def load_audio(
    source: AudioSource,
    *,
    sampling_rate: int | None = None,
    max_duration_s: float = MAX_DURATION_S,
    on_progress: Callable[[float], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
    audio_track: int | None = None,
    raw: RawAudio | None = None,
) -> np.ndarray:
    """Load a recording as a waveform, shape (samples,), float32, 16 kHz.

    ``source`` is a path, the bytes of an audio or video file, a binary file (read from its
    start), an array, or a pair of an array and its sampling rate. An array is float in [-1, 1],
    int16 or int32, of shape (samples,), (samples, channels) or (channels, samples): the longer
    axis is time. ``sampling_rate`` is the array's, 16 kHz by default; files state their own.
    An array that is a waveform already is returned without a copy. ``on_progress`` takes the
    seconds that are decoded, block by block; what it raises ends the decoding. ``on_warning``
    takes each sentence about what could not be read; without it they are logged. ``audio_track``,
    from 1, chooses one of several in a video. ``raw`` describes a file without a header, and is
    ignored where the file has one.

    Integers that were stored as float are scaled (``peaks.py``).

    Raises ValueError, with the file's name, for what is not audio, is empty, holds NaN, infinity or
    samples beyond 2**31, or is longer than ``max_duration_s``; OSError for a file that cannot be
    opened; ImportError naming the package that would decode it.
    """
    if isinstance(source, tuple):
        source, sampling_rate = source
    try:
        if isinstance(source, np.ndarray):
            if audio_track is not None or raw is not None:
                raise ValueError("audio_track and raw are for files; leave them out for arrays.")
            block = _array_block(source, sampling_rate or SAMPLE_RATE)
            waveform = to_waveform(
                [block], max_duration_s=max_duration_s, on_progress=on_progress or _ignore
            )
        elif sampling_rate is not None:
            raise ValueError("sampling_rate is for arrays; a file states its own. Leave it out.")
        else:
            with _open(source) as file:
                waveform = Reader(
                    max_duration_s=max_duration_s,
                    on_progress=on_progress or _ignore,
                    on_warning=on_warning or partial(_log, _label(source)),
                    track=audio_track,
                    raw=raw or raw_audio_of_name(_name(source)),
                ).read(file)
        return scale_to_range(waveform, on_warning or partial(_log, _label(source)))
    except ValueError as error:
        raise ValueError(f"{_label(source)}{error}") from error


def decodable_formats() -> tuple[str, ...]:
    """Return the usual formats that the installed decoders read."""
    soundfile, av = installed("soundfile"), installed("av")
    by_soundfile = soundfile.available_formats() if soundfile else ()
    by_av = av.formats_available | av.codecs_available if av else set()
    return tuple(
        container.name
        for container in CONTAINERS
        if container.libsndfile in by_soundfile or by_av >= {container.ffmpeg, container.codec}
    )


def decoders() -> tuple[str, ...]:
    """Return the installed decoders, libsndfile and FFmpeg, with their versions."""
    soundfile, av = installed("soundfile"), installed("av")
    found = []
    if soundfile:
        found.append(f"libsndfile {soundfile.__libsndfile_version__}")
    if av:
        found.append(f"FFmpeg through PyAV {av.__version__}")
    return tuple(found)


class PcmStream:
    """Decodes raw audio that comes in pieces of any number of bytes.

    ``encoding``: "pcm", signed 16-bit little-endian, or G.711's "pcmu" and "pcma"; mono. The
    resampler looks ahead, so its last samples come with ``finish``, which makes it ready for
    other audio. Raises ValueError for an unknown encoding or sampling rate.
    """

    def __init__(self, encoding: str, sampling_rate: int) -> None:
        if encoding not in PCM_ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}; use one of {', '.join(PCM_ENCODINGS)}.")
        check_rate(sampling_rate)
        self._table = None if encoding == "pcm" else _g711(encoding)
        self._sampling_rate = sampling_rate
        self._begin()

    def _begin(self) -> None:
        self._odd = b""
        self._resampler = None
        if self._sampling_rate != SAMPLE_RATE:
            self._resampler = resampler_from(self._sampling_rate)

    def push(self, data: bytes) -> np.ndarray:
        """Return the samples, float32, that these bytes complete."""
        if self._table is not None:
            return self._resample(self._table[np.frombuffer(data, np.uint8)])
        data = self._odd + data
        even = len(data) // 2 * 2
        self._odd = data[even:]
        samples = np.frombuffer(data[:even], "<i2").astype(np.float32) / np.float32(32_768)
        return self._resample(samples)

    def finish(self) -> np.ndarray:
        """Return the last samples; half a sample is dropped."""
        rest = self._resample(np.empty(0, np.float32), last=True)
        self._begin()
        return rest

    def _resample(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        if self._resampler is None or not (len(samples) or last):
            return samples
        return np.asarray(self._resampler.resample_chunk(samples, last=last))


def _g711(encoding: str) -> np.ndarray:
    """Return the sample of each byte, (256,) float32. Source: ITU-T G.711, as 16-bit samples."""
    code = np.arange(256) ^ (0xFF if encoding == "pcmu" else 0x55)
    exponent, mantissa = code >> 4 & 7, code & 15
    if encoding == "pcmu":
        size = ((2 * mantissa + 33) << exponent + 2) - 132
        sign = np.where(code & 0x80, -1, 1)
    else:
        size = np.where(exponent, (2 * mantissa + 33) << exponent + 2, (2 * mantissa + 1) << 3)
        sign = np.where(code & 0x80, 1, -1)
    return (sign * size / 32_768).astype(np.float32)


def load_channels(
    source: AudioSource,
    num_channels: int,
    *,
    max_duration_s: float = MAX_DURATION_S,
    on_progress: Callable[[float], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
    audio_track: int | None = None,
    raw: RawAudio | None = None,
) -> list[np.ndarray]:
    """Load the waveform of each channel of a file. In a call, each channel is one speaker.

    Takes and raises what ``load_audio`` does, and ChannelError for another number of channels.
    ``on_progress`` counts all channels together.
    """
    channels: list[np.ndarray] = []
    warn = on_warning or partial(_log, _label(source))
    raw = raw or raw_audio_of_name(_name(source))
    with _open(source) as file:
        reader = Reader(max_duration_s, _ignore, warn, audio_track, raw)
        track = reader.sounding_track(file)
        for channel in range(num_channels):  # decodes as often, and holds no block of all
            before_s = sum(map(len, channels)) / SAMPLE_RATE
            reader = Reader(
                max_duration_s=max_duration_s,
                on_progress=partial(_progress_after, before_s, on_progress or _ignore),
                on_warning=_ignore if channel else warn,
                track=track,
                raw=raw,
                channel=(channel, num_channels),
            )
            channels.append(reader.read(file))
    return [scale_to_range(waveform, warn) for waveform in channels]


def _progress_after(before_s: float, on_progress: Callable[[float], object], s: float) -> None:
    on_progress(before_s + s)


def _ignore(_: object) -> None:
    pass


def _log(label: str, warning: str) -> None:
    logger.warning("%s%s", label, warning)


def _array_block(array: np.ndarray, sampling_rate: int) -> Block:
    if array.ndim == 1:
        array = array[:, None]
    elif array.ndim != 2:
        raise ValueError(
            f"audio is an array of shape {array.shape}; pass (samples,), (samples, channels) "
            "or (channels, samples)."
        )
    elif array.shape[0] < array.shape[1]:
        array = array.T  # time is the longer axis
    return Block(sampling_rate, as_float(array))


@np.errstate(over="ignore")  # infinity is refused by name
def as_float(array: np.ndarray) -> np.ndarray:
    """Convert an array to float32 in [-1, 1]; without a copy if it is so already.

    Raises ValueError for integers other than int16 and int32.
    """
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype in (np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    raise ValueError(f"audio is an array of {array.dtype}; pass float in [-1, 1], int16 or int32.")


def _open(source: Any) -> AbstractContextManager[BinaryIO]:
    """Open a source as a seekable binary file; only files opened here are closed."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        file = open(source, "rb")
        if file.seekable():
            return file
        with file:
            return _read_pipe(file)
    if not hasattr(source, "read"):
        raise TypeError(
            f"cannot read audio from {type(source).__name__}; pass a path, bytes, a binary file, "
            "a numpy array, or a pair of an array and its sampling rate."
        )
    try:
        source.seek(0)
    except (AttributeError, OSError):
        return _read_pipe(source)
    return nullcontext(source)


def _read_pipe(pipe: BinaryIO) -> io.BytesIO:
    """Read a pipe to its end; raises ValueError for one that is too long."""
    read = io.BytesIO()
    while piece := pipe.read(1 << 20):
        read.write(piece)
        if read.tell() > MAX_PIPE_BYTES:
            raise ValueError(
                f"the pipe holds more than {MAX_PIPE_BYTES >> 20} MiB; write it to a file first."
            )
    read.seek(0)
    return read


def _label(source: Any) -> str:
    """Return the prefix of messages: "talk.mp3: ", or "" without a name."""
    return f"{name}: " if (name := _name(source)) else ""


def _name(source: Any) -> str:
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return os.fspath(name) if isinstance(name, str | os.PathLike) else ""
