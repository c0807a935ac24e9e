# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a refusal and nothing else. The cases are those of ``benchmarks/fuzz.py``."""

from __future__ import annotations

import io
import struct

import fuzz
import numpy as np
import pytest
import soundfile

from qwen3_asr_vllm.audio import load_audio


def test_damaged_recordings_are_heard_or_refused():
    """400 of them, in a process that may neither crash, nor hang, nor grow."""
    outcomes = list(fuzz.load_all(range(400)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    heard = sum(outcome.answer.startswith("heard") for outcome in outcomes)
    assert 50 < heard < 350  # the damage is neither none nor total


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_undamaged_they_are_all_heard(name):
    waveform = load_audio(fuzz.recording(name))
    assert len(waveform) == pytest.approx(0.6 * 16_000, abs=900)
    assert waveform[3_000:6_000].std() == pytest.approx(0.25 / 2**0.5, rel=0.1)


# What a fuzzer found once: the numbers of the cases, and what they did.
FOUND = {
    1180: "crash: PyAV reads planar frames of eight channels and more past their end",
    5673: "a gigabyte: FFmpeg reserves what a tag of a wav file says that it holds",
}


@pytest.mark.parametrize("number", FOUND)
def test_what_was_found_stays_found(number):
    (outcome,) = fuzz.load_all([number])
    assert outcome.broken == ""


@pytest.mark.parametrize("channels", [1, 2, 8, 9, 32])
@pytest.mark.parametrize("rate", [1_000, 8_000, 44_100, 768_000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "DOUBLE"])
def test_any_rate_width_and_number_of_channels_is_read(subtype, rate, channels):
    file = io.BytesIO()
    samples = np.full((rate // 8, channels), 0.25)
    soundfile.write(file, samples, rate, subtype, format="WAV")
    waveform = load_audio(file.getvalue())
    assert len(waveform) == 2_000
    assert waveform[500:1_500] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("channels", [1, 8, 32])
def test_64_bit_integers_are_read(channels):
    """libsndfile cannot; FFmpeg does."""
    body = np.full((4_000, channels), 1 << 61, "<i8").tobytes()
    layout = (16, 1, channels, 16_000, 128_000 * channels, 8 * channels, 64)
    chunks = b"fmt " + struct.pack("<IHHIIHH", *layout) + b"data" + struct.pack("<I", len(body))
    wav = b"RIFF" + struct.pack("<I", 36 + len(body)) + b"WAVE" + chunks + body
    assert load_audio(wav) == pytest.approx(0.25)


@pytest.mark.vllm
def test_odd_forms_get_an_answer_or_an_error_object(server):
    outcomes = list(fuzz.ask_all(server.url, range(300)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    assert 20 < sum(outcome.answer.startswith("200") for outcome in outcomes) < 280
