# SPDX-License-Identifier: Apache-2.0
"""Audio: the recordings of ``tests/data``, and waveforms made from them or from noise."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 16_000
DATA = Path(__file__).resolve().parents[1] / "data"
HELLO = DATA / "hello.flac"
RECORDING = DATA / "three_languages.flac"
HELDOUT = DATA / "heldout"  # recordings that training never used, and their manifest
HOSTILE = (1e4, 1e10, 1e17, 1e30, 3e38, np.nan, np.inf)  # samples that no speech has


def heldout() -> list[dict[str, Any]]:
    """Rows of the manifest of ``HELDOUT``: file, text, language."""
    return [json.loads(line) for line in (HELDOUT / "manifest.jsonl").read_text().splitlines()]


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    """Noise that swells like speech: a waveform, (samples,) float32. Distinct for each seed."""
    rng = np.random.default_rng(seed)
    num_samples = round(seconds * SAMPLE_RATE)
    swell = np.sin(np.linspace(0, 9 * seconds, num_samples)) ** 2 + 0.05
    return (0.1 * swell * rng.standard_normal(num_samples)).astype(np.float32)


def speech(seconds: float, *, seed: int) -> np.ndarray:
    """Speech from a random position of ``RECORDING``, with a little noise: a waveform."""
    rng = np.random.default_rng(seed)
    samples = np.roll(_recording(), -int(rng.integers(len(_recording()))))
    samples = np.resize(samples, round(seconds * SAMPLE_RATE))
    return samples + 1e-3 * rng.standard_normal(len(samples), dtype=np.float32)


@cache
def _recording() -> np.ndarray:
    import soundfile

    return soundfile.read(RECORDING, dtype="float32")[0]


def speech_clip(seconds: float, seed: int) -> bytes:
    """Speech as a 16 kHz wav file. Distinct for each seed."""
    return wav_bytes(speech(seconds, seed=seed), subtype="PCM_16")


def wav_bytes(
    samples: np.ndarray, sampling_rate: int = SAMPLE_RATE, *, subtype: str | None = None
) -> bytes:
    """A wav file of samples, shape (samples,) or (samples, channels)."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, format="WAV", subtype=subtype)
    return file.getvalue()


def wav(samples: np.ndarray, sampling_rate: int = SAMPLE_RATE) -> tuple[str, bytes, str]:
    """A wav file as a form has it: name, bytes, media type."""
    return ("audio.wav", wav_bytes(samples, sampling_rate), "audio/wav")


def poisoned(values: Any, value: float) -> Any:
    """A copy of an array or a tensor with ``value`` in its middle."""
    copy = values.copy() if isinstance(values, np.ndarray) else values.clone()
    flat = copy.reshape(-1)
    flat[len(flat) // 2] = value
    return copy


# Eight sentences of four voices that training never had: two each.
DIALOGUE = ("25", "10", "28", "19", "12", "29", "23", "22")


@cache
def dialogue() -> tuple[np.ndarray, tuple[tuple[float, float, str, str], ...]]:
    """A mono dialogue of four voices: a waveform, and (start, end, voice, text) of each turn."""
    import soundfile

    rows = {row["audio_filepath"]: row for row in heldout()}
    pause = np.zeros(round(0.3 * SAMPLE_RATE), np.float32)
    parts, turns, seconds = [], [], 0.0
    for number in DIALOGUE:
        row = rows[f"english_{number}.flac"]
        samples = soundfile.read(HELDOUT / row["audio_filepath"], dtype="float32")[0]
        parts += [samples, pause]
        end = seconds + len(samples) / SAMPLE_RATE
        turns.append((seconds, end, row["voice"].rpartition("+")[2], row["text"]))
        seconds = end + len(pause) / SAMPLE_RATE
    return np.concatenate(parts), tuple(turns)


def voice_at(seconds: float) -> str:
    """The voice of ``dialogue`` that speaks at a time, or that is nearest to it in a pause."""
    turns = dialogue()[1]
    return min(turns, key=lambda turn: max(turn[0] - seconds, seconds - turn[1], 0.0))[2]


def by_voice(segments: Iterable[Any]) -> dict[str, str]:
    """The speakers of segments by the voice that speaks in their middles: one for each."""
    found: dict[str, str] = {}
    for segment in segments:
        speaker = found.setdefault(voice_at((segment.start + segment.end) / 2), segment.speaker)
        assert speaker == segment.speaker
    return found


def dialogue_turns(waveform: np.ndarray, num_speakers: int | None = None) -> list[Any]:
    """A diarizer of ``dialogue`` alone, with the names of its voices: a plain function."""
    return [turn[:3] for turn in dialogue()[1]]
