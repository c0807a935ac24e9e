# SPDX-License-Identifier: Apache-2.0
"""The range of samples: full scale is 1, and no waveform leaves [-8, 8].

    recording   up to 8   kept: lossy decoders overshoot full scale, to 2.7 at most
                to 2**31  few samples: broken, and clipped to full scale, with a warning
                          many: integers stored as float, divided by their peak, with a warning
                beyond    refused, like NaN and infinity
    waveform    beyond 8  refused, wherever one enters without a recording

The limits protect the model: huge samples overflow its spectrogram.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .geometry import SAMPLE_RATE

MAX_PEAK = 8.0
MAX_INTEGER_PEAK = 2.0**31
MAX_BROKEN, MAX_BROKEN_SHARE = 200, 0.001  # samples; a resampler spreads one over its filter


def check_waveform(waveform: np.ndarray) -> None:
    """Raise ValueError for a waveform that is empty or leaves the range."""
    if waveform.size == 0:
        raise ValueError("audio is empty: it holds no samples.")
    check_samples(waveform)


def check_samples(
    samples: np.ndarray,
    *,
    max_peak: float = MAX_PEAK,
    sampling_rate: int = SAMPLE_RATE,
    start_s: float = 0.0,
) -> None:
    """Raise ValueError for samples beyond ``max_peak``, with the first NaN or else the largest.

    ``samples``: (samples,) or (samples, channels), of which the first comes at ``start_s``.
    """
    if not samples.size or (samples.min() >= -max_peak and samples.max() <= max_peak):
        return
    value, index = _peak(samples)
    second = start_s + index / sampling_rate
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
    """Return the waveform of a recording in range; ``on_warning`` gets a sentence if it was not.

    A few samples out of range are clipped, so that the rest keeps its level. Raises ValueError for
    an empty waveform.
    """
    if waveform.size == 0:
        raise ValueError("audio is empty: it holds no samples.")
    value, index = _peak(waveform)
    if abs(value) <= MAX_PEAK:
        return waveform
    num_broken = int(np.count_nonzero(np.abs(waveform) > MAX_PEAK))
    where = f"{value:g} at {index / SAMPLE_RATE:.3f} s, where full scale is 1"
    if num_broken <= max(MAX_BROKEN, MAX_BROKEN_SHARE * waveform.size):
        on_warning(f"audio holds {num_broken} broken samples, such as {where}: they were clipped.")
        return waveform.clip(-1, 1)
    on_warning(
        f"audio peaks at {where}: all samples were divided by {abs(value):g}. If only a few are "
        "broken, repair them, and send the audio again."
    )
    return waveform / np.float32(abs(value))


def _peak(samples: np.ndarray) -> tuple[float, int]:
    """Return the first NaN, or else the largest sample, and its index in time."""
    flat = samples.reshape(-1)
    place = max(int(flat.argmax()), int(flat.argmin()), key=lambda i: abs(flat[i]))
    return float(flat[place]), place // (samples.size // len(samples))
