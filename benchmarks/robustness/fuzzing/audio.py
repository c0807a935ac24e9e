# SPDX-License-Identifier: Apache-2.0
"""Recordings: good ones in every format, and damage to them."""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any

import hostile
import numpy as np

# name: container and codec of FFmpeg, and its channels. Ogg Vorbis is written by libsndfile.
CODECS = {
    "flac": ("flac", "flac", "stereo"),
    "mp3": ("mp3", "libmp3lame", "stereo"),
    "m4a": ("ipod", "aac", "stereo"),
    "alac.m4a": ("ipod", "alac", "mono"),
    "aac": ("adts", "aac", "mono"),
    "opus": ("ogg", "libopus", "mono"),
    "webm": ("webm", "libopus", "stereo"),
    "mkv": ("matroska", "aac", "mono"),
    "mp4": ("mp4", "aac", "5.1"),
    "wav": ("wav", "pcm_s16le", "stereo"),
    "adpcm.wav": ("wav", "adpcm_ima_wav", "mono"),
    "64bit.wav": ("wav", "pcm_f64le", "mono"),
    "w64": ("w64", "pcm_s24le", "mono"),
    "aiff": ("aiff", "pcm_s16be", "stereo"),
    "au": ("au", "pcm_mulaw", "mono"),
    "caf": ("caf", "pcm_s16le", "mono"),
    "ac3": ("ac3", "ac3", "stereo"),
    "wma": ("asf", "wmav2", "stereo"),
}
FORMATS = (*CODECS, "ogg")


def tone(seconds: float, rate: int) -> np.ndarray:
    """A sine of 220 Hz, (samples,) float32."""
    return np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate), dtype=np.float32) / rate) / 4


@cache
def recording(name: str) -> bytes:
    """A good recording of 0.6 s, 48 kHz, in the format of that name."""
    if name == "ogg":
        return _written("OGG", "VORBIS", tone(0.6, 48_000), 48_000)
    import av

    container, codec, layout = CODECS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=48_000, layout=layout)
        stream.bit_rate = 128_000
        channels = stream.layout.nb_channels
        planes = np.tile(tone(0.6, 48_000), (channels, 1))
        frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _written(container: str, subtype: str, samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=container)
    return file.getvalue()


EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, -1)


def truncated(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """A few bytes or bits changed, anywhere."""
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 64))):
        damaged[place] = int(rng.integers(256))
    return bytes(damaged)


def header_flipped(rng: np.random.Generator, data: bytes) -> bytes:
    size = min(len(data), 256)
    return flipped(rng, data[:size]) + data[size:]


def lying(rng: np.random.Generator, data: bytes) -> bytes:
    """Numbers of the header, of two, four or eight bytes, become extreme ones."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.choice([2, 4, 8]))
        value = int(rng.choice(np.array(EXTREMES, object))) % (1 << 8 * width)
        place = int(rng.integers(0, max(1, min(len(data) - 8, 512))))
        damaged[place : place + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
    return bytes(damaged)


def shuffled(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut in pieces that are dropped, repeated, and put in another order."""
    cuts = sorted(int(cut) for cut in rng.integers(0, len(data), 4))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return b"".join(pieces[i] for i in rng.integers(0, len(pieces), int(rng.integers(1, 12))))


def spliced(rng: np.random.Generator, data: bytes) -> bytes:
    """The head of one format before the body of another."""
    other = recording(str(rng.choice(FORMATS)))
    return data[: int(rng.integers(4, 400))] + other[int(rng.integers(0, 400)) :]


def with_junk(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes before or behind it; an ID3 tag that states a size it does not have."""
    junk = rng.bytes(int(rng.integers(1, 5000)))
    id3 = b"ID3\x04\x00\x00" + rng.bytes(4)
    return [junk + data, data + junk, id3 + data, id3 + junk][int(rng.integers(4))]


def repeated(rng: np.random.Generator, data: bytes) -> bytes:
    return data * int(rng.integers(2, 40))


DAMAGE = (truncated, flipped, header_flipped, lying, lying, shuffled, spliced, with_junk, repeated)


def lying_wav(rng: np.random.Generator) -> bytes:
    """A wav file whose header says anything: tag, channels, rate, bits, sizes, chunks."""

    def any_of(*values: int) -> int:
        return values[int(rng.integers(len(values)))]

    tag = any_of(1, 1, 1, 3, 3, 6, 7, 2, 0x11, 0x31, 0x50, 0x55, 0xFFFE, 0, 0xFFFF)
    channels = any_of(1, 2, 3, 6, 8, 32, int(rng.integers(1, 33)), 0, 255, 1024, 65535)
    rate = any_of(8000, 16000, 44100, 1000, 768_000, int(rng.integers(1000, 768_001)))
    rate = any_of(rate, rate, rate, 0, 1, 999, 768_001, 2**31, 2**32 - 1)
    bits = any_of(8, 16, 24, 32, 64, 0, 1, 4, 12, 20, 255, 65535)
    align = any_of(channels * bits // 8 % 65536, 0, 1, 65535)
    body = rng.bytes(int(rng.integers(0, 20_000)))
    format_size = any_of(16, 18, 40, 0, 14, 2**32 - 1, 2**31)
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits)
    header += rng.bytes(min(format_size, 40) - 16) if format_size > 16 else b""
    chunks = [b"fmt " + struct.pack("<I", format_size) + header]
    if rng.random() < 0.3:
        extra = rng.bytes(int(rng.integers(0, 64)))
        name = [b"LIST", b"fact", b"cue ", b"ds64", b"bext", b"data"][int(rng.integers(6))]
        chunks.append(name + struct.pack("<I", any_of(len(extra), 0, 2**32 - 1)) + extra)
    size = any_of(len(body), len(body), 0, 2**32 - 1, 2**31 - 1, len(body) * 1000, 1)
    chunks.append(b"data" + struct.pack("<I", size) + body)
    if rng.random() < 0.1:
        chunks.reverse()
    form = [b"RIFF", b"RIFF", b"RF64", b"RIFX"][int(rng.integers(4))]
    return (
        form + struct.pack("<I", any_of(36 + len(body), 0, 2**32 - 1)) + b"WAVE" + b"".join(chunks)
    )


def hostile_case(rng: np.random.Generator) -> tuple[str, bytes]:
    """A file whose tables, tags, covers or chunks expand; often of a size that still passes."""
    kind = str(rng.choice(list(hostile.KINDS)))
    data = hostile.hostile(kind, share=10 ** rng.uniform(-3, 0))
    if rng.random() < 0.3:
        return f"hostile, damaged {kind}", DAMAGE[int(rng.integers(len(DAMAGE)))](rng, data)
    return f"hostile {kind}", data


PEAKS = (1.0, 8.0, 9.0, 1e4, 1e10, 1e17, 1e30, 3e38, np.inf, np.nan, 1e-40)
FLOATS = ("WAV", "AIFF", "CAF", "W64", "AU", "RF64", "MAT5")


def loud_case(rng: np.random.Generator) -> tuple[str, bytes]:
    """A float recording some of whose samples are too loud, or no numbers."""
    samples = tone(0.6, 48_000)
    peak = PEAKS[int(rng.integers(len(PEAKS)))]
    count = int(rng.choice([1, 2, 100, len(samples)]))
    samples[rng.integers(0, len(samples), count)] = rng.choice([-1, 1], count) * np.float32(peak)
    container, subtype = str(rng.choice(FLOATS)), str(rng.choice(["FLOAT", "DOUBLE"]))
    return f"loud {peak:g} {container} {subtype}", _written(container, subtype, samples, 48_000)


def audio_case(number: int) -> tuple[str, bytes]:
    """The damage and its format, and the damaged bytes."""
    rng = np.random.default_rng([1, number])
    share = np.random.default_rng([6, number]).random()  # does not renumber the cases below
    if share < 0.01:
        return hostile_case(rng)
    if share < 0.03:
        return loud_case(rng)
    if rng.random() < 0.2:
        return "wav header", lying_wav(rng)
    name = str(rng.choice(FORMATS))
    damages = [DAMAGE[i] for i in rng.integers(0, len(DAMAGE), int(rng.integers(1, 3)))]
    data = recording(name)
    for damage in damages:
        data = damage(rng, data) or b"\0"
    return f"{name} {' '.join(damage.__name__ for damage in damages)}", data
