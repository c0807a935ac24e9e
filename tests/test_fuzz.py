# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a refusal and nothing else. The cases come from ``robustness/fuzz.py``."""

from __future__ import annotations

import io
import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from fuzzing.audio import FORMATS, recording
from fuzzing.decoding import load_all
from fuzzing.forms import ask
from fuzzing.manifests import read_manifest
from fuzzing.outcomes import at_once
from fuzzing.sessions import converse

from qwen3_asr_vllm import audio
from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.media import sndfile


def test_damaged_recordings_are_decoded_or_refused():
    """400 of them, in decoders that may neither crash, nor hang, nor grow."""
    outcomes = list(load_all(range(400)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    decoded = sum(outcome.answer.startswith("decoded") for outcome in outcomes)
    assert 50 < decoded < 350  # the damage is neither none nor total


@pytest.mark.parametrize("name", FORMATS)
def test_undamaged_recordings_are_all_decoded(name):
    waveform = load_audio(recording(name))
    assert len(waveform) == pytest.approx(0.6 * 16_000, abs=900)
    assert waveform[3_000:6_000].std() == pytest.approx(0.25 / 2**0.5, rel=0.1)


# What a fuzzer found once: the numbers of the cases, and what they did.
FOUND = {
    1180: "crash: PyAV reads planar frames of eight channels and more past their end",
    5673: "a gigabyte: FFmpeg reserves what a tag of a wav file says that it holds",
}


@pytest.mark.parametrize("number", FOUND)
def test_found_faults_stay_mended(number):
    (outcome,) = load_all([number])
    assert outcome.broken == ""


@pytest.mark.parametrize("channels", [1, 2, 8, 9, 32])
@pytest.mark.parametrize("rate", [1_000, 8_000, 44_100, 768_000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "DOUBLE"])
def test_any_rate_width_and_channels_are_read(subtype, rate, channels):
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


class Endless(io.RawIOBase):
    """A pipe that goes on for ever, and begins like a recording."""

    def __init__(self) -> None:
        self.head = io.BytesIO(recording("wav"))

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "all of it would be asked for"
        return self.head.read(size) or bytes(size)


def test_a_pipe_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(audio, "MAX_PIPE_BYTES", 8 << 20)
    with pytest.raises(ValueError, match="the pipe holds more than 8 MiB; write it to a file"):
        load_audio(Endless())


def test_endless_devices_are_not_audio():
    with pytest.raises(ValueError, match="zero: not audio"):
        load_audio("/dev/zero")


def test_a_named_pipe_is_read(tmp_path):
    path, data = tmp_path / "pipe", recording("m4a")
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(path.write_bytes, data)
        np.testing.assert_array_equal(load_audio(path), load_audio(data))


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "m4a", "webm", "64bit.wav"])
@pytest.mark.parametrize("change", ["cut", "emptied", "overwritten", "removed"])
def test_files_may_change_while_read(tmp_path, monkeypatch, name, change):
    """The content before the change, or a refusal; never a crash."""
    monkeypatch.setattr(sndfile, "BLOCK_VALUES", 4_000)
    path = tmp_path / name
    path.write_bytes(recording(name))
    whole = load_audio(path)

    def meddle(_: float) -> None:
        size = path.stat().st_size if path.exists() else 0
        if change == "removed":
            path.unlink(missing_ok=True)
        elif change == "overwritten":
            with path.open("r+b") as file:
                file.write(b"\xff" * size)
        else:
            os.truncate(path, size // 2 if change == "cut" else 0)

    try:
        waveform = load_audio(path, on_progress=meddle)
    except ValueError as error:
        assert re.search(f"{name}: (audio (is broken|holds)|not audio, or cut off)", str(error))
        return
    assert len(waveform) <= len(whole) + 1_000
    if change == "removed":
        np.testing.assert_array_equal(waveform, whole)


def test_odd_manifests_stay_in_their_folder(tmp_path):
    outcomes = [read_manifest(tmp_path.resolve(), number) for number in range(400)]
    assert [outcome for outcome in outcomes if outcome.broken] == []
    assert 20 < sum(outcome.answer.startswith("read") for outcome in outcomes) < 380


@pytest.mark.vllm
def test_odd_forms_get_answers_or_errors(server):
    outcomes = list(at_once(ask, server.url, range(300)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    assert 20 < sum(outcome.answer.startswith("200") for outcome in outcomes) < 280


@pytest.mark.vllm
def test_odd_sessions_go_on(server):
    outcomes = list(at_once(converse, server.url, range(100)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    assert any(not outcome.answer.startswith("1:") for outcome in outcomes)  # one is the last's
