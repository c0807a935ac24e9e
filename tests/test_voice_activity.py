# SPDX-License-Identifier: Apache-2.0
"""Voice activity: turns, on clean and noisy speech, with the network and by loudness."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import DATA
from support.noises import NOISES, at_snr

from qwen3_asr_vllm import voice_activity as module
from qwen3_asr_vllm.pauses import Pauses, split_at_pauses
from qwen3_asr_vllm.voice_activity import (
    LoudnessActivity,
    NeuralActivity,
    SpeechNetwork,
    speech_frames,
    voice_activity,
)

RATE = 16_000
KINDS = pytest.mark.parametrize("kind", [NeuralActivity, LoudnessActivity])


def speech():
    return soundfile.read(DATA / "three_languages.flac", dtype="float32")[0]


def turns(samples, size=1_000, *, kind=NeuralActivity, **options):
    activity = kind(**options)
    pieces = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [(t.is_speech, t.sample) for piece in pieces for t in activity.push(piece)]


def hum(seconds, level):
    return (level * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype("f4")


@KINDS
@pytest.mark.parametrize("background", [0.0, 0.0003, 0.003])
def test_speech_between_pauses_is_two_turns(background, kind):
    pause, spoken = np.zeros(2 * RATE, "f4"), speech()[: 3 * RATE]
    samples = np.concatenate([pause, spoken, pause, spoken, pause]) + hum(12, background)
    found = turns(samples, threshold=0.5, silence_ms=900, kind=kind)
    assert [is_speech for is_speech, _ in found] == [True, False] * 2
    assert [n / RATE for _, n in found] == pytest.approx([2, 5.9, 7, 10.9], abs=0.5)


@KINDS
@given(st.integers(50, 5_000))
@settings(max_examples=20)
def test_turns_do_not_depend_on_pieces(kind, size):
    samples = np.concatenate([hum(1, 0.001), speech()[:64_000], hum(1, 0.001)])
    assert turns(samples, size, kind=kind) == turns(samples, len(samples), kind=kind)


@KINDS
def test_pauses_are_reported_inside_turns(kind):
    """A pause of 0.6 s, after which speech goes on, and one of 2 s, which ends the turn."""
    word = speech()[8_000:20_000]
    gaps = [np.zeros(round(s * RATE), "f4") for s in (1, 0.6, 2)]
    samples = np.concatenate([gaps[0], word, gaps[1], word, gaps[2]])
    activity = kind(silence_ms=1_500, pause_ms=200)
    found = list(activity.push(samples))
    assert [(t.is_speech, t.is_pause) for t in found] == [
        *[(True, False), (False, True), (True, True)],
        *[(False, True), (False, False)],
    ]
    paused, ended = found[3].sample / RATE, found[4].sample / RATE
    assert ended - paused == pytest.approx(1.3, abs=0.04)


@KINDS
def test_a_pause_may_change_how_long_it_is(kind):
    samples = np.concatenate([speech()[8_000:20_000], np.zeros(RATE, "f4")])
    activity = kind(silence_ms=1_500, pause_ms=200)
    found = []
    for turn in activity.push(samples):
        found.append((turn.is_speech, turn.is_pause))
        activity.silence_ms = 400
    assert found == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize("name", sorted(set(NOISES) - {"babble"}))
def test_noise_alone_is_no_speech(name):
    assert turns(0.05 * NOISES[name](20 * RATE)) == []


@pytest.mark.parametrize("name", NOISES)
def test_no_speech_is_lost_in_noise(name):
    """At 10 dB; in babble, which is speech too, its turn may start early."""
    pause, spoken = np.zeros(2 * RATE, "f4"), speech()[: 3 * RATE]
    found = turns(at_snr(np.concatenate([pause, spoken, pause]), NOISES[name](7 * RATE), 10))
    assert found[0][0] and found[0][1] < 2.5 * RATE  # it begins at 2.4 s
    assert all(sample > 4.7 * RATE for is_speech, sample in found if not is_speech)


def test_a_higher_threshold_asks_for_more():
    samples = at_snr(speech()[:160_000], NOISES["white"](160_000), -5)
    frames = [speech_frames(samples, threshold=threshold) for threshold in (0.1, 0.5, 0.9)]
    assert frames[0].sum() > frames[1].sum() > frames[2].sum() > 0


def test_frames_match_those_of_a_stream():
    samples = speech()[: 30 * RATE]
    network = SpeechNetwork()
    whole = samples[: len(samples) // 512 * 512].reshape(-1, 512)
    streamed = np.concatenate([network.probabilities(part) for part in np.array_split(whole, 9)])
    np.testing.assert_allclose(streamed, SpeechNetwork().probabilities(whole), atol=1e-5)
    marked = speech_frames(samples)
    assert len(marked) == len(samples) // 160
    assert (marked[::160] == (streamed >= 0.5)[np.arange(0, len(marked), 160) * 160 // 512]).all()


def test_server_vad_cuts_at_pauses_in_noise():
    pause, spoken = np.zeros(RATE, "f4"), speech()[: 3 * RATE]  # silent for its first 0.4 s
    clean = np.concatenate([spoken, pause, spoken, pause, spoken])
    samples = at_snr(clean, NOISES["music"](len(clean)), 10)
    clips = split_at_pauses(samples, Pauses(silence_s=0.5, padding_s=0.3), max_clip_s=60)
    first, second = (end / RATE for _, end in clips[:-1])
    assert 3 < first < 4.4 and 7 < second < 8.4


def test_loudness_decides_without_the_network(monkeypatch):
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(module, "_network", module._network.__wrapped__)
    monkeypatch.setattr(module.logger, "warning", said.append)
    assert isinstance(voice_activity(), LoudnessActivity)
    assert speech_frames(speech()) is None
    assert all("pip install silero-vad onnxruntime" in line for line in said) and said


def test_the_network_leaves_torch_its_threads():
    import torch

    before = torch.get_num_threads()
    turns(speech()[:RATE])
    assert torch.get_num_threads() == before
    assert "silero_vad" not in sys.modules


def test_loudness_ignores_steady_noise():
    noise = hum(20, 0.02)
    assert [n for n in turns(noise, kind=LoudnessActivity) if n[1] > 8 * RATE] == []
    quiet_speech = np.pad(speech()[:48_000] * 0.06, (96_000, 32_000)) + hum(11, 0.003)
    assert turns(quiet_speech, threshold=0.2, kind=LoudnessActivity) != []
    assert turns(quiet_speech, threshold=1.0, kind=LoudnessActivity) == []
