# SPDX-License-Identifier: Apache-2.0
"""Joins decoded blocks to a waveform: downmix, resample, and the limits of both.

    blocks (samples, channels) at any rate -> mono -> 16 kHz -> (samples,)

The rate and the channels may change from block to block. Each second is handled alone, so memory
does not grow with the rate or the channels of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..geometry import SAMPLE_RATE
from ..peaks import MAX_INTEGER_PEAK, check_samples

SAMPLING_RATES = range(1_000, 768_001)  # Hz; anything else is a broken header
# On average over the longest recording; more would keep a CPU busy for longer than an engine.
MAX_VALUES_PER_S = 8 * 48_000  # samples x channels
# Channels cancel where the power of their mean is less than this share of that of unrelated
# channels: 10 dB.
_CANCELLED = 0.1


class Block(NamedTuple):
    """Decoded audio of one format."""

    sampling_rate: int
    samples: np.ndarray  # (samples, channels), float32


class Unreadable(ValueError):
    """No part of a recording can be decoded."""


class ChannelError(ValueError):
    """A recording has another number of channels than requested."""


def to_waveform(
    blocks: Iterable[Block],
    *,
    max_duration_s: float,
    on_progress: Callable[[float], object],
    channel: tuple[int, int] | None = None,
    start_s: float = 0.0,
) -> np.ndarray:
    """Join all blocks, mono at 16 kHz, shape (samples,).

    ``channel`` takes one channel, by its index, of files that have so many. ``on_progress`` takes
    the seconds so far, from ``start_s``. Raises ValueError as soon as they are too long or too
    many, and ChannelError for another number of channels.
    """
    checked = _checked(blocks, max_duration_s, on_progress, start_s)
    mono = (Block(block.sampling_rate, _mono(block.samples, channel)) for block in checked)
    parts = [
        part
        for rate, group in groupby(mono, key=lambda block: block.sampling_rate)
        for part in resample((block.samples for block in group), rate)
    ]
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def check_duration(seconds: float, max_duration_s: float) -> None:
    """Raise ValueError for audio that is too long."""
    if seconds > max_duration_s:
        raise ValueError(
            f"audio is {seconds:.1f} s or longer; the limit is {max_duration_s:g} s. "
            "Cut the recording or raise max_duration_s."
        )


def check_rate(sampling_rate: int) -> None:
    """Raise ValueError for an implausible sampling rate."""
    if sampling_rate not in SAMPLING_RATES:
        raise ValueError(
            f"audio states a sampling rate of {sampling_rate} Hz; "
            f"allowed are {SAMPLING_RATES.start} to {SAMPLING_RATES.stop - 1} Hz."
        )


def resample(blocks: Iterable[np.ndarray], sampling_rate: int) -> Iterator[np.ndarray]:
    """Resample to 16 kHz; block by block gives the same bits as all at once."""
    if sampling_rate == SAMPLE_RATE:
        yield from blocks
        return
    resampler = resampler_from(sampling_rate)
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def resampler_from(sampling_rate: int) -> Any:
    soxr = require("soxr", f"resample {sampling_rate} Hz audio to {SAMPLE_RATE} Hz")
    return soxr.ResampleStream(sampling_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def installed(package: str) -> Any | None:
    """Import a package; None where it, or a library of it, is missing."""
    try:
        return import_module(package)
    except (ImportError, OSError):
        return None


def require(package: str, purpose: str) -> Any:
    """Import a package; raises ImportError that says what it is needed for."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed to {purpose}: pip install {package}") from error


def _checked(
    blocks: Iterable[Block],
    max_duration_s: float,
    on_progress: Callable[[float], object],
    start_s: float,
) -> Iterator[Block]:
    """Split blocks at whole seconds; raises ValueError at a limit."""
    seconds, num_values = start_s, start_s * MAX_VALUES_PER_S
    for rate, samples in _by_second(blocks):
        check_samples(samples, max_peak=MAX_INTEGER_PEAK, sampling_rate=rate, start_s=seconds)
        seconds += len(samples) / rate
        num_values += samples.size
        check_duration(seconds, max_duration_s)
        if num_values > max_duration_s * MAX_VALUES_PER_S:
            raise ValueError(
                f"audio has {samples.shape[1]} channels of {rate} Hz: more than "
                f"{MAX_VALUES_PER_S * max_duration_s:.3g} samples. Convert it to mono, 16 kHz."
            )
        on_progress(seconds)
        yield Block(rate, samples)


def _by_second(blocks: Iterable[Block]) -> Iterator[Block]:
    """Pass blocks of one channel on, and split others into pieces of a second.

    So what is decided for a second does not depend on how a decoder cuts its blocks.
    """
    for (rate, num_channels), group in groupby(blocks, key=_format):
        check_rate(rate)
        if num_channels == 1:
            yield from group
        else:
            pieces = _cut((block.samples for block in group), rate)
            yield from (Block(rate, piece) for piece in pieces)


def _format(block: Block) -> tuple[int, int]:
    return block.sampling_rate, block.samples.shape[1]


def _cut(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    rest: np.ndarray | None = None  # of the arrays before, shorter than ``length``
    for array in arrays:
        if rest is not None:
            num_missing = length - len(rest)
            rest, array = np.concatenate([rest, array[:num_missing]]), array[num_missing:]
            if len(rest) < length:
                continue
            yield rest
        for start in range(0, len(array) - length + 1, length):
            yield array[start : start + length]
        rest = array[len(array) // length * length :]
    if rest is not None and len(rest):
        yield rest


def _mono(samples: np.ndarray, channel: tuple[int, int] | None) -> np.ndarray:
    """Return the mean of the channels, or the loudest where they cancel, shape (samples,)."""
    num_channels = samples.shape[1]
    if channel is not None:
        index, expected = channel
        if num_channels != expected:
            raise ChannelError(f"audio has {num_channels} channel(s), not {expected}.")
        return samples[:, index]
    if num_channels == 1:
        return samples[:, 0]
    mean = _mean(samples)
    power = float(np.vdot(samples, samples))  # of all channels
    if float(mean @ mean) * num_channels**2 < _CANCELLED * power:
        return samples[:, np.square(samples).sum(axis=0).argmax()]
    return mean


def _mean(samples: np.ndarray) -> np.ndarray:
    if samples.shape[1] == 2:  # the same bits as the mean, twenty times faster
        return np.asarray((samples[:, 0] + samples[:, 1]) * np.float32(0.5))
    return np.asarray(samples.mean(axis=1))
