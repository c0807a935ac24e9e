# SPDX-License-Identifier: Apache-2.0
"""Noises of daily life, synthesized: each a waveform (samples,) float32 of power 1 at 16 kHz."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import soundfile

from .audio import HELDOUT, SAMPLE_RATE, heldout


def at_snr(speech: np.ndarray, noise: np.ndarray, decibels: float) -> np.ndarray:
    """Add noise of power 1 to speech so that speech, where it is, is louder by ``decibels``."""
    spoken = speech[np.abs(speech) > 1e-3]
    level = np.sqrt(np.mean(np.square(spoken))) * 10 ** (-decibels / 20)
    return (speech + level * noise).astype(np.float32)


def white(num_samples: int) -> np.ndarray:
    return _of_power_1(np.random.default_rng(1).standard_normal(num_samples))


def fan(num_samples: int) -> np.ndarray:
    """Air below 400 Hz, and the hum of a motor."""
    air = _filtered(num_samples, lambda hertz: 1 / (1 + (hertz / 400) ** 2))
    seconds = np.arange(num_samples) / SAMPLE_RATE
    hum = 0.7 * np.sin(2 * np.pi * 120 * seconds) + 0.4 * np.sin(2 * np.pi * 240 * seconds)
    return _of_power_1(_of_power_1(air) + hum)


def street(num_samples: int) -> np.ndarray:
    """Low noise that swells every few seconds, as of cars that pass."""
    rumble = _filtered(num_samples, lambda hertz: np.maximum(hertz, 20) ** -0.8)
    seconds = np.arange(num_samples) / SAMPLE_RATE
    times = np.arange(0, seconds[-1] + 5, 2.5)
    swell = np.interp(seconds, times, np.random.default_rng(2).uniform(0, 1, len(times)))
    return _of_power_1(rumble * (1 + 2 * swell**2))


def music(num_samples: int) -> np.ndarray:
    """A major chord every half second, each note with three harmonics that decay."""
    rng, note = np.random.default_rng(3), SAMPLE_RATE // 2
    seconds = np.arange(note) / SAMPLE_RATE
    chords = []
    for _ in range(-(-num_samples // note)):
        root = 220 * 2 ** (rng.integers(0, 12) / 12)
        tones = [root * interval * n for interval in (1, 1.26, 1.5, 2) for n in (1, 2, 3)]
        sines = [np.sin(2 * np.pi * hertz * seconds) / (i % 3 + 1) for i, hertz in enumerate(tones)]
        chords.append(np.exp(-3 * seconds) * sum(sines))
    return _of_power_1(np.concatenate(chords)[:num_samples])


def babble(num_samples: int) -> np.ndarray:
    """Six voices at once."""
    rng = np.random.default_rng(4)
    paths = [HELDOUT / row["audio_filepath"] for row in heldout() if row["text"]]
    voices = [_of_power_1(soundfile.read(path, dtype="float32")[0]) for path in paths]
    crowd = np.zeros(num_samples)
    for _ in range(6):
        voice = np.concatenate([voices[i] for i in rng.permutation(len(voices))[:12]])
        crowd += np.resize(np.roll(voice, rng.integers(len(voice))), num_samples)
    return _of_power_1(crowd)


def _filtered(num_samples: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    spectrum = np.fft.rfft(np.random.default_rng(5).standard_normal(num_samples))
    hertz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * gain(hertz), num_samples)


def _of_power_1(samples: np.ndarray) -> np.ndarray:
    return (samples / np.sqrt(np.mean(np.square(samples)))).astype(np.float32)


NOISES = {
    "white": white,
    "fan": fan,
    "street": street,
    "music": music,
    "babble": babble,
}
