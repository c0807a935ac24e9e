# SPDX-License-Identifier: Apache-2.0
"""Reads wav, flac, ogg, mp3 and others with libsndfile: the fastest way for undamaged files.

libsndfile takes the first thing that it does not understand for the end of the file. So what it
reads is counted, and a file of which something is missing is left to FFmpeg.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from .blocks import Block, Unreadable, check_duration, installed, require
from .containers import RawAudio

BLOCK_VALUES = 1 << 19  # values (samples x channels) decoded at a time: 2 MiB
_UNKNOWN_FRAMES = 2**63 - 1  # a piped flac states no length; libsndfile opens but cannot read it
_PADDING = 4 * 1152  # samples at most that mp3 encoders put around the sound
_RAW_SUBTYPES = {
    "pcm_s16le": "PCM_16",
    "pcm_s16be": "PCM_16",
    "pcm_mulaw": "ULAW",
    "pcm_alaw": "ALAW",
}


def read_soundfile(
    file: BinaryIO, *, num_samples: int = 0, max_duration_s: float, start_s: float = 0.0
) -> Iterator[Block]:
    """Yield the blocks of a whole file. ``num_samples``: the number that its frames hold, if known.

    Raises Unreadable where the file is not libsndfile's, or has less than that, or less than its
    header states; ValueError where that is too long for a file in which it begins at ``start_s``.
    """
    if (soundfile := installed("soundfile")) is None:
        raise Unreadable("soundfile is not installed.")
    file.seek(0, os.SEEK_END)  # discards the buffer: the descriptor may have moved
    file.seek(0)
    on_disk = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    try:  # a descriptor is read without Python, whose lock an engine in this process holds
        recording = soundfile.SoundFile(file.fileno() if on_disk else file, closefd=False)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise Unreadable(str(error)) from error
    if recording.frames == _UNKNOWN_FRAMES or (recording.format == "MP3" and not num_samples):
        raise Unreadable("the file states no length.")
    expected = max(num_samples - _PADDING, 0) or recording.frames
    check_duration(start_s + expected / recording.samplerate, max_duration_s)
    yield from _blocks(recording, soundfile, expected)


def read_raw(file: BinaryIO, raw: RawAudio) -> Iterator[Block]:
    """Yield blocks of audio without a header, except g729."""
    soundfile = require("soundfile", "read audio without a header")
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
    yield from _blocks(recording, soundfile, 0)


def _blocks(recording: Any, soundfile: Any, expected: int) -> Iterator[Block]:
    size = max(1, BLOCK_VALUES // recording.channels)
    # libsndfile takes several times as long to scale 16-bit samples, to the same bits.
    scale = np.float32(2**-15) if recording.subtype == "PCM_16" else None
    dtype = "float32" if scale is None else "int16"
    num_read = 0
    with recording:
        try:
            while len(block := recording.read(size, dtype=dtype, always_2d=True)):
                num_read += len(block)
                yield Block(recording.samplerate, block if scale is None else block * scale)
        except soundfile.LibsndfileError as error:
            raise Unreadable(str(error)) from error
        if num_read < expected:
            raise Unreadable(f"{num_read} of {expected} samples could be read.")
