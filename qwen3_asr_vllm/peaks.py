# SPDX-License-Identifier: Apache-2.0
"""How large samples may be: full scale is 1, and no waveform leaves [-8, 8].

recording   up to 8   taken as it is: lossy decoders overshoot full scale, to 2.7 at most
            to 2**31  integers that were stored as float: divided by its peak, with a warning
            beyond    refused, as NaN and infinity are
waveform    beyond 8  refused, wherever one enters without a recording
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .geometry import SAMPLE_RATE

MAX_PEAK = 8.0
MAX_INTEGER_PEAK = 2.0**31


def check_waveform(waveform: np.ndarray) -> None:
    """Raises ValueError for a waveform that is empty or leaves the range."""
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
    """Raises ValueError for samples beyond ``max_peak``, with the first NaN or else the largest.

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
    """The waveform of a recording in range; ``on_warning`` takes a sentence where it was not.

    Raises ValueError for one that is empty.
    """
    if waveform.size == 0:
        raise ValueError("audio is empty: it holds no samples.")
    value, index = _peak(waveform)
    if abs(value) <= MAX_PEAK:
        return waveform
    on_warning(
        f"audio peaks at {value:g} at {index / SAMPLE_RATE:.3f} s, where full scale is 1: all "
        f"samples were divided by {abs(value):g}. If that one sample is broken, speech is too "
        "quiet now; repair the sample and send the audio again."
    )
    return waveform / np.float32(abs(value))


def _peak(samples: np.ndarray) -> tuple[float, int]:
    """The first NaN, or else the largest sample, and its index in time."""
    flat = samples.reshape(-1)
    place = max(int(flat.argmax()), int(flat.argmin()), key=lambda i: abs(flat[i]))
    return float(flat[place]), place // (samples.size // len(samples))
