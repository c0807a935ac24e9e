# SPDX-License-Identifier: Apache-2.0
"""How much speech does each voice activity detector miss in noise, and how much does it invent?

    python benchmarks/voice_activity.py

Held-out recordings stand between pauses of 0.8 to 2 s, in noises of daily life at several
signal-to-noise ratios. Missed: speech that is in no turn. False: time in turns, of the time that
is neither speech nor the silence that ends a turn. Lost: utterances of which more than half is in
no turn. Error: the median distance of an utterance from the nearest start of a turn.

A second table counts the cuts of long recordings, which go by loudness, that are within speech.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import soundfile
from common import print_result, print_table
from support.audio import HELDOUT, SAMPLE_RATE, heldout
from support.noises import NOISES, at_snr

from qwen3_asr_vllm.pauses import split_at_silence
from qwen3_asr_vllm.voice_activity import LoudnessActivity, NeuralActivity, VoiceActivity

DETECTORS = {"loudness": LoudnessActivity, "neural": NeuralActivity}
PIECE = SAMPLE_RATE // 20  # samples that a client sends at once
SILENCE_MS = 500


def recording(num_utterances: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return utterances between pauses, (samples,), and the start and end of each."""
    rng = np.random.default_rng(0)
    rows = [row for row in heldout() if row["text"]][:num_utterances]
    parts: list[np.ndarray] = []
    spoken = []
    start = 0
    for row in rows:
        samples = soundfile.read(HELDOUT / row["audio_filepath"], dtype="float32")[0]
        samples *= 0.05 / np.sqrt(np.mean(np.square(samples)))
        pause = np.zeros(int(rng.uniform(0.8, 2) * SAMPLE_RATE), np.float32)
        power = np.convolve(np.square(samples), np.full(800, 1 / 800), "same")
        loud = np.flatnonzero(power > 1e-3 * power.max())
        start += len(pause)
        spoken.append((start + int(loud[0]), start + int(loud[-1])))
        start += len(samples)
        parts += [pause, samples]
    return np.concatenate([*parts, np.zeros(SAMPLE_RATE, np.float32)]), spoken


def turns_of(activity: VoiceActivity, samples: np.ndarray) -> np.ndarray:
    """Mark the samples in turns, shape of ``samples``, bool."""
    marked = np.zeros(len(samples), bool)
    start: int | None = None
    for first in range(0, len(samples), PIECE):
        for turn in activity.push(samples[first : first + PIECE]):
            if turn.is_speech:
                start = turn.sample
            elif start is not None:
                marked[start : turn.sample] = True
                start = None
    if start is not None:
        marked[start:] = True
    return marked


def scores(marked: np.ndarray, spoken: list[tuple[int, int]]) -> dict[str, Any]:
    is_speech, may_be = np.zeros_like(marked), np.zeros_like(marked)
    for start, end in spoken:
        is_speech[start:end] = True
        may_be[start : end + (SILENCE_MS + 100) * SAMPLE_RATE // 1000] = True
    starts = np.flatnonzero(np.diff(marked.astype(int), prepend=0) == 1)
    errors = [np.abs(starts - start).min() / SAMPLE_RATE for start, _ in spoken if len(starts)]
    return {
        "missed %": 100 * float((is_speech & ~marked).sum() / is_speech.sum()),
        "false %": 100 * float((marked & ~may_be).sum() / (~may_be).sum()),
        "lost": sum(float(marked[start:end].mean()) < 0.5 for start, end in spoken),
        "turns": len(starts),
        "error s": float(np.median(errors)) if errors else None,
    }


def cuts_in_speech(samples: np.ndarray, spoken: list[tuple[int, int]], clip_s: float) -> str:
    cuts = [end for _, end in split_at_silence(samples, max_clip_s=clip_s)][:-1]
    bad = sum(any(start < cut < end for start, end in spoken) for cut in cuts)
    return f"{bad} of {len(cuts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=60)
    parser.add_argument("--snr", type=float, nargs="+", default=[20, 10, 5, 0])
    args = parser.parse_args()
    clean, spoken = recording(args.utterances)
    noises = {name: make(len(clean)) for name, make in NOISES.items()}
    inputs = {("none", None): clean} | {
        (name, snr): at_snr(clean, noise, snr) for name, noise in noises.items() for snr in args.snr
    }
    rows = []
    for (noise, snr), samples in inputs.items():
        for name, detector in DETECTORS.items():
            before = time.process_time()
            marked = turns_of(detector(silence_ms=SILENCE_MS), samples)
            cost = (time.process_time() - before) * 1000 / (len(samples) / SAMPLE_RATE)
            row = {"noise": noise, "SNR dB": snr, "detector": name, **scores(marked, spoken)}
            rows.append(row | {"CPU ms per s": cost})
    for noise, samples in noises.items():
        for name, detector in DETECTORS.items():
            share = float(turns_of(detector(silence_ms=SILENCE_MS), 0.05 * samples).mean())
            empty = dict.fromkeys(("missed %", "lost", "turns", "error s", "CPU ms per s"))
            row = {"noise": noise, "SNR dB": "alone", "detector": name, **empty}
            rows.append({key: row.get(key) for key in rows[0]} | {"false %": 100 * share})
    print_table(rows)
    print()
    cuts = [
        {"noise": noise, "SNR dB": snr}
        | {f"{clip_s} s clips": cuts_in_speech(samples, spoken, clip_s) for clip_s in (6, 12, 30)}
        for (noise, snr), samples in inputs.items()
    ]
    print_table(cuts)
    print_result(
        "voice activity", rows, cuts=cuts, utterances=len(spoken), seconds=len(clean) / SAMPLE_RATE
    )


if __name__ == "__main__":
    main()
