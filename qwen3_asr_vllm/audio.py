# SPDX-License-Identifier: Apache-2.0
"""From a recording to a waveform, and from a waveform to clips.

    path, bytes, file, array -> decode -> downmix -> resample -> check -> waveform -> clips

A waveform is float32, mono, in [-1, 1] (lossy decoders overshoot a little), at 16 kHz.
libsndfile reads wav, flac, ogg, opus and mp3; FFmpeg, through PyAV, reads the rest. Audio is
decoded block by block, so a small file that expands into days of samples costs no more memory
than the limit allows. Nothing here knows of models or engines.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from .containers import SIGNATURES, RawAudio
from .geometry import SAMPLE_RATE

logger = logging.getLogger(__name__)

AudioSource: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | tuple[np.ndarray, int]
)

MAX_DURATION_S = 4 * 3600  # seconds of audio in one recording, unless the caller says otherwise
MAX_PIPE_BYTES = 1 << 30  # a file may be larger: it need not fit into memory
SAMPLING_RATES = range(1_000, 768_001)  # Hz; anything else is a broken header
# On average over the longest recording; more would keep a CPU busy for longer than an engine.
MAX_VALUES_PER_S = 8 * 48_000  # samples x channels
MAX_PEAK = 8.0  # full scale is 1; lossy decoders overshoot it to 2.7, float recordings exceed it
MAX_INTEGER_PEAK = 2.0**31  # integers that were stored as float are no larger
PCM_ENCODINGS = ("pcm", "pcmu", "pcma")  # of raw audio: 16-bit, and G.711's mu-law and A-law

# What users have: its name in libsndfile, if any; FFmpeg's container and codec.
_FORMATS = {
    "wav": ("WAV", "wav", "pcm_s16le"),
    "flac": ("FLAC", "flac", "flac"),
    "mp3": ("MP3", "mp3", "mp3float"),
    "ogg": ("OGG", "ogg", "vorbis"),
    "opus": ("OGG", "ogg", "opus"),
    "m4a": (None, "mov", "aac"),
    "mp4": (None, "mov", "aac"),
    "webm": (None, "webm", "opus"),
    "wma": (None, "asf", "wmav2"),
    "amr": (None, "amr", "amrnb"),
}

_RAW_SUBTYPES = {
    "pcm_s16le": "PCM_16",
    "pcm_s16be": "PCM_16",
    "pcm_mulaw": "ULAW",
    "pcm_alaw": "ALAW",
}
_BLOCK_VALUES = 1 << 19  # values (samples x channels) decoded at a time: 2 MiB
_MOST_CHUNKS = 64  # of a wav file that are looked at
_UNKNOWN_FRAMES = 2**63 - 1  # a piped flac states no length; libsndfile opens but cannot read it


class _Stream(NamedTuple):
    """Audio as a decoder delivers it."""

    sampling_rate: int
    duration: float | None  # seconds, where the header states them
    blocks: Iterable[np.ndarray]  # each (samples, channels), float32


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
    """The waveform of a recording, shape (samples,), float32, 16 kHz.

    ``source`` is a path, the bytes of an audio or video file, a binary file (read from its
    start), an array, or a pair of an array and its sampling rate. An array is float in [-1, 1],
    int16 or int32, of shape (samples,), (samples, channels) or (channels, samples): the longer
    axis is time. ``sampling_rate`` is the array's, 16 kHz by default; files state their own.
    An array that is a waveform already is returned without a copy. ``on_progress`` is told the
    seconds that are decoded, block by block; what it raises ends the decoding. ``on_warning``
    takes each sentence about what could not be read; without it they are logged. ``audio_track``,
    from 1, chooses one of several in a video. ``raw`` describes a file without a header, and is
    ignored where the file has one.

    Samples beyond ``MAX_PEAK`` are scaled (``scale_to_range``).

    Raises ValueError, with the file's name, for what is not audio, is empty, holds NaN, infinity or
    samples beyond 2**31, or is longer than ``max_duration_s``; OSError for a file that cannot be
    opened; ImportError naming the package that would decode it.
    """
    if isinstance(source, tuple):
        source, sampling_rate = source
    try:
        if isinstance(source, np.ndarray):
            stream = _array_stream(source, sampling_rate or SAMPLE_RATE)
            waveform = _waveform(stream, max_duration_s, on_progress)
        elif sampling_rate is not None:
            raise ValueError("sampling_rate is for arrays; a file states its own. Leave it out.")
        else:
            with _open(source) as file:
                stream = _decode(file, audio_track=audio_track, raw=raw)
                waveform = _waveform(stream, max_duration_s, on_progress)
        return scale_to_range(waveform, on_warning or partial(_log, _label(source)))
    except ValueError as error:
        raise ValueError(f"{_label(source)}{error}") from error


def decodable_formats() -> tuple[str, ...]:
    """Which of the usual formats can be read with what is installed."""
    soundfile, av = _installed("soundfile"), _installed("av")
    by_soundfile = soundfile.available_formats() if soundfile else ()
    by_av = av.formats_available | av.codecs_available if av else set()
    return tuple(
        name
        for name, (label, *container_and_codec) in _FORMATS.items()
        if label in by_soundfile or by_av.issuperset(container_and_codec)
    )


def decoders() -> tuple[str, ...]:
    """What is installed of the two that read audio, with their versions."""
    soundfile, av = _installed("soundfile"), _installed("av")
    found = []
    if soundfile:
        found.append(f"libsndfile {soundfile.__libsndfile_version__}")
    if av:
        found.append(f"FFmpeg through PyAV {av.__version__}")
    return tuple(found)


class PcmStream:
    """Raw audio in pieces of any number of bytes -> pieces of its waveform.

    ``encoding``: "pcm", signed 16-bit little-endian, or G.711's "pcmu" and "pcma"; mono. The
    resampler looks ahead, so its last samples come with ``finish``, which makes it ready for
    other audio. Raises ValueError for an unknown encoding or sampling rate.
    """

    def __init__(self, encoding: str, sampling_rate: int) -> None:
        if encoding not in PCM_ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}; use one of {', '.join(PCM_ENCODINGS)}.")
        if sampling_rate not in SAMPLING_RATES:
            raise ValueError(_unknown_rate(sampling_rate))
        self._table = None if encoding == "pcm" else _g711(encoding)
        self._sampling_rate = sampling_rate
        self._begin()

    def _begin(self) -> None:
        self._odd = b""
        self._resampler = None
        if self._sampling_rate != SAMPLE_RATE:
            soxr = _require("soxr", f"resample {self._sampling_rate} Hz audio to {SAMPLE_RATE} Hz")
            self._resampler = soxr.ResampleStream(
                self._sampling_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ"
            )

    def push(self, data: bytes) -> np.ndarray:
        """The samples, float32, that these bytes complete."""
        if self._table is not None:
            return self._resample(self._table[np.frombuffer(data, np.uint8)])
        data = self._odd + data
        even = len(data) // 2 * 2
        self._odd = data[even:]
        samples = np.frombuffer(data[:even], "<i2").astype(np.float32) / np.float32(32_768)
        return self._resample(samples)

    def finish(self) -> np.ndarray:
        """The last samples; half a sample is dropped."""
        rest = self._resample(np.empty(0, np.float32), last=True)
        self._begin()
        return rest

    def _resample(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        if self._resampler is None or not (len(samples) or last):
            return samples
        return np.asarray(self._resampler.resample_chunk(samples, last=last))


def _g711(encoding: str) -> np.ndarray:
    """What each byte stands for, (256,) float32. Source: ITU-T G.711, as 16-bit samples."""
    code = np.arange(256) ^ (0xFF if encoding == "pcmu" else 0x55)
    exponent, mantissa = code >> 4 & 7, code & 15
    if encoding == "pcmu":
        size = ((2 * mantissa + 33) << exponent + 2) - 132
        sign = np.where(code & 0x80, -1, 1)
    else:
        size = np.where(exponent, (2 * mantissa + 33) << exponent + 2, (2 * mantissa + 1) << 3)
        sign = np.where(code & 0x80, 1, -1)
    return (sign * size / 32_768).astype(np.float32)


class ChannelError(ValueError):
    """A recording has not as many channels as were asked for."""


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
    """The waveform of each channel of a file that has so many: a speaker each, in a call.

    Takes and raises what ``load_audio`` does, and ChannelError for another number of channels.
    ``on_progress`` is told of all channels together.
    """
    channels: list[np.ndarray] = []
    with _open(source) as file:
        for channel in range(num_channels):  # decodes as often, and holds no block of all
            file.seek(0)
            stream = _decode(file, audio_track=audio_track, raw=raw)
            only = stream._replace(blocks=_channel(stream.blocks, channel, num_channels))
            before_s = sum(map(len, channels)) / SAMPLE_RATE
            progress = partial(_progress_after, before_s, on_progress or _ignore)
            channels.append(_waveform(only, max_duration_s, progress))
    warn = on_warning or partial(_log, _label(source))
    return [scale_to_range(waveform, warn) for waveform in channels]


def _log(label: str, warning: str) -> None:
    logger.warning("%s%s", label, warning)


def _progress_after(before_s: float, on_progress: Callable[[float], object], s: float) -> None:
    on_progress(before_s + s)


def check_waveform(waveform: np.ndarray, *, max_peak: float = MAX_PEAK) -> None:
    """Raises ValueError for a waveform that is empty or has samples beyond ``max_peak``.

    NaN and infinity are beyond any. The message names the sample and its time.
    """
    if waveform.size == 0:
        raise ValueError("audio is empty: it holds no samples.")
    value, second = _peak(waveform)
    if abs(value) <= max_peak:
        return
    if not np.isfinite(value):
        raise ValueError(
            f"audio holds NaN or infinity ({value} at {second:.3f} s); export it again or clean "
            "the array."
        )
    raise ValueError(
        f"audio holds a sample of {value:g} at {second:.3f} s; samples lie in [-1, 1], and no "
        f"larger ones than {max_peak:g} are taken. Divide integers by their full scale, such as "
        "32768; else export it again or clean the array."
    )


def scale_to_range(waveform: np.ndarray, on_warning: Callable[[str], object]) -> np.ndarray:
    """The waveform, divided by its peak where that is beyond ``MAX_PEAK``, as of integers that were
    stored as float; ``on_warning`` takes a sentence about that.

    Raises ValueError for one that is empty or has samples that no integer gives: NaN, infinity, and
    what lies beyond 2**31.
    """
    check_waveform(waveform, max_peak=MAX_INTEGER_PEAK)
    value, second = _peak(waveform)
    if abs(value) <= MAX_PEAK:
        return waveform
    on_warning(
        f"audio peaks at {value:g} at {second:.3f} s, where full scale is 1: all samples were "
        f"divided by {abs(value):g}. If that one sample is broken, speech is too quiet now; repair "
        "the sample and send the audio again."
    )
    return waveform / np.float32(abs(value))


def _peak(waveform: np.ndarray) -> tuple[float, float]:
    """The largest sample, or the first NaN, and its time in seconds."""
    index = max(int(waveform.argmax()), int(waveform.argmin()), key=lambda i: abs(waveform[i]))
    return float(waveform[index]), index / SAMPLE_RATE


def _waveform(
    stream: _Stream, max_duration_s: float, on_progress: Callable[[float], object] | None
) -> np.ndarray:
    """All blocks of a stream, mono at 16 kHz, shape (samples,)."""
    if stream.sampling_rate not in SAMPLING_RATES:
        raise ValueError(_unknown_rate(stream.sampling_rate))
    if stream.duration is not None:
        _check_duration(stream.duration, max_duration_s)
    mono = _mono(stream, max_duration_s, on_progress or _ignore)
    parts = list(_resample(mono, stream.sampling_rate))
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _unknown_rate(sampling_rate: int) -> str:
    return (
        f"audio states a sampling rate of {sampling_rate} Hz; "
        f"allowed are {SAMPLING_RATES.start} to {SAMPLING_RATES.stop - 1} Hz."
    )


def _mono(
    stream: _Stream, max_duration_s: float, on_progress: Callable[[float], object]
) -> Iterator[np.ndarray]:
    """The blocks as (samples,); raises ValueError as soon as they are too long together."""
    num_samples = num_values = 0
    for block in stream.blocks:
        num_samples += len(block)
        num_values += block.size
        _check_duration(num_samples / stream.sampling_rate, max_duration_s)
        if num_values > max_duration_s * MAX_VALUES_PER_S:
            raise ValueError(
                f"audio has {block.shape[1]} channels of {stream.sampling_rate} Hz: more than "
                f"{MAX_VALUES_PER_S * max_duration_s:.3g} samples. Convert it to mono, 16 kHz."
            )
        on_progress(num_samples / stream.sampling_rate)
        yield _downmix(block)


def _ignore(_: float) -> None:
    pass


def _channel(blocks: Iterable[np.ndarray], channel: int, num_channels: int) -> Iterator[np.ndarray]:
    for block in blocks:
        if block.shape[1] != num_channels:
            raise ChannelError(f"audio has {block.shape[1]} channel(s), not {num_channels}.")
        yield block[:, channel : channel + 1]


@np.errstate(over="ignore", invalid="ignore")  # what becomes of it is refused by name
def _downmix(block: np.ndarray) -> np.ndarray:
    """The mean of the channels, (samples, channels) -> (samples,)."""
    if block.shape[1] == 1:
        return block[:, 0]
    if block.shape[1] == 2:  # the same bits as the mean, twenty times faster
        return np.asarray((block[:, 0] + block[:, 1]) * np.float32(0.5))
    return np.asarray(block.mean(axis=1))


def _resample(blocks: Iterable[np.ndarray], sampling_rate: int) -> Iterator[np.ndarray]:
    """To 16 kHz; block by block gives the same bits as all at once."""
    if sampling_rate == SAMPLE_RATE:
        yield from blocks
        return
    soxr = _require("soxr", f"resample {sampling_rate} Hz audio to {SAMPLE_RATE} Hz")
    resampler = soxr.ResampleStream(sampling_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _check_duration(seconds: float, max_duration_s: float) -> None:
    if seconds > max_duration_s:
        raise ValueError(
            f"audio is {seconds:.1f} s or longer; the limit is {max_duration_s:g} s. "
            "Cut the recording or raise max_duration_s."
        )


def _array_stream(array: np.ndarray, sampling_rate: int) -> _Stream:
    if array.ndim == 1:
        array = array[:, None]
    elif array.ndim != 2:
        raise ValueError(
            f"audio is an array of shape {array.shape}; pass (samples,), (samples, channels) "
            "or (channels, samples)."
        )
    elif array.shape[0] < array.shape[1]:
        array = array.T  # time is the longer axis
    return _Stream(sampling_rate, len(array) / max(sampling_rate, 1), [as_float(array)])


@np.errstate(over="ignore")  # infinity is refused by name
def as_float(array: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1]; the array itself where it is that already.

    Raises ValueError for integers other than int16 and int32.
    """
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype in (np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    raise ValueError(f"audio is an array of {array.dtype}; pass float in [-1, 1], int16 or int32.")


def _open(source: Any) -> AbstractContextManager[BinaryIO]:
    """A seekable binary file; only one that was opened here is closed."""
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
    """Raises ValueError for one that does not end in time."""
    read = io.BytesIO()
    while piece := pipe.read(1 << 20):
        read.write(piece)
        if read.tell() > MAX_PIPE_BYTES:
            raise ValueError(
                f"a pipe brings more than {MAX_PIPE_BYTES >> 20} MiB; write it to a file first."
            )
    read.seek(0)
    return read


def _decode(file: BinaryIO, *, audio_track: int | None, raw: RawAudio | None) -> _Stream:
    if not (head := file.read(16)):
        raise ValueError("audio is empty: the file has 0 bytes.")
    if raw and not head.startswith(SIGNATURES):
        return _open_raw(file, raw)
    return _open_soundfile(file) or _open_pyav(file, audio_track or 1)


def _open_raw(file: BinaryIO, raw: RawAudio) -> _Stream:
    if raw.encoding == "g729":
        return _open_pyav(file, 1, format="g729")
    soundfile = _require("soundfile", "read audio without a header")
    file.seek(0)
    recording = soundfile.SoundFile(
        file,
        samplerate=raw.sampling_rate,
        channels=raw.num_channels,
        format="RAW",
        subtype=_RAW_SUBTYPES[raw.encoding],
        endian="BIG" if raw.encoding == "pcm_s16be" else "LITTLE",
        closefd=False,
    )
    return _Stream(raw.sampling_rate, None, _soundfile_blocks(recording, soundfile))


def _open_soundfile(file: BinaryIO) -> _Stream | None:
    """None where soundfile is not installed or cannot read the file."""
    if (soundfile := _installed("soundfile")) is None:
        return None
    file.seek(0, os.SEEK_END)  # forgets what is buffered, for the descriptor may have moved
    file.seek(0)
    on_disk = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    try:  # a descriptor is read without Python, whose lock an engine in this process holds
        recording = soundfile.SoundFile(file.fileno() if on_disk else file, closefd=False)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a name that ends in .raw
        return None
    if recording.frames == _UNKNOWN_FRAMES:
        return None
    duration = recording.frames / recording.samplerate
    return _Stream(recording.samplerate, duration, _soundfile_blocks(recording, soundfile))


def _soundfile_blocks(recording: Any, soundfile: Any) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK_VALUES // recording.channels)
    # libsndfile takes several times as long to scale 16-bit samples, to the same bits.
    scale = np.float32(2**-15) if recording.subtype == "PCM_16" else None
    dtype = "float32" if scale is None else "int16"
    with recording, _as_broken_audio(soundfile.LibsndfileError):
        while len(block := recording.read(size, dtype=dtype, always_2d=True)):
            yield block if scale is None else block * scale


def _open_pyav(file: BinaryIO, track: int, *, format: str | None = None) -> _Stream:
    """Raises ValueError where FFmpeg finds no audio."""
    av = _require("av", "decode what libsndfile cannot read (m4a, aac, webm, video)")
    _check_riff(file)
    file.seek(0)
    try:
        # The whitelist: a playlist (ffconcat, SDP) that someone uploads must not make FFmpeg open
        # files of this machine or sockets. The tags of old files are often not UTF-8.
        # The mode: without one, PyAV takes that of the file, and would write to a temporary one.
        options = {"protocol_whitelist": "none"}
        container = av.open(file, "r", format, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(
            "not audio, or cut off: neither libsndfile nor FFmpeg can read it."
        ) from error
    frames = _pyav_frames(container, av, track)
    first = next(frames, None)
    if first is None:
        return _Stream(SAMPLE_RATE, None, [])
    duration = container.duration / av.time_base if container.duration else None
    # The rate of a decoded frame: the header of HE-AAC states half of it.
    return _Stream(first.sample_rate, duration, _pyav_blocks(chain([first], frames), av))


def _check_riff(file: BinaryIO) -> None:
    """Raises ValueError where a wav file states more tags than it has bytes.

    FFmpeg would reserve the memory for them: a gigabyte, for a header of 40 bytes.
    """
    end, place = file.seek(0, os.SEEK_END), 12
    file.seek(0)
    if file.read(4) not in (b"RIFF", b"RIFX", b"RF64"):
        return
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        if name == b"LIST" and place + size > end:
            raise ValueError(f"audio is broken: its header states {size} bytes of tags.")
        place += 8 + size + size % 2


def _pyav_frames(container: Any, av: Any, track: int) -> Iterator[Any]:
    """The decoded frames of an audio track, from 1; closes the container after the last."""
    with container:
        if not container.streams.audio:
            raise ValueError("not audio: the file has no audio track.")
        if not 1 <= track <= (num_tracks := len(container.streams.audio)):
            raise ValueError(f"audio_track is {track}; the file has {num_tracks}, from 1.")
        with _as_broken_audio(av.FFmpegError):
            yield from container.decode(container.streams.audio[track - 1])


def _pyav_blocks(frames: Iterable[Any], av: Any) -> Iterator[np.ndarray]:
    # Packed: PyAV reads past the end of planar frames of eight channels and more, and crashes.
    to_float = av.AudioResampler(format="flt")  # keeps the rate and the channels
    for frame in frames:
        with _as_broken_audio(av.FFmpegError):
            packed = to_float.resample(frame)
        for block in packed:
            yield block.to_ndarray().reshape(-1, block.layout.nb_channels)


@contextmanager
def _as_broken_audio(error_type: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error_type as error:
        raise ValueError(f"audio is broken: {getattr(error, 'strerror', error)}") from error


def _installed(package: str) -> Any | None:
    try:
        return import_module(package)
    except (ImportError, OSError):  # OSError: the package without its library
        return None


def _require(package: str, purpose: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed to {purpose}: pip install {package}") from error


def _label(source: Any) -> str:
    """How an error names the recording: "talk.mp3: ", or nothing where it has no name."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return f"{os.fspath(name)}: " if isinstance(name, str | os.PathLike) and name else ""
