# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import noise

from qwen3_asr_vllm.geometry import Geometry, num_frames
from qwen3_asr_vllm.model.log_mel import NARROWED_AT_ONCE, LogMel, cut_chunks, narrow, widen
from qwen3_asr_vllm.peaks import MAX_PEAK

GEOMETRY = Geometry()


def log_mel(*waveforms: np.ndarray, chunks_at_once: int = 500) -> list[torch.Tensor]:
    """(128, frames) of each waveform, all transformed in one batch."""
    chunks = [cut_chunks(waveform, GEOMETRY) for waveform in waveforms]
    by_clip = [GEOMETRY.frames_by_chunk(num_frames(len(w))) for w in waveforms]
    packed = LogMel(128)(
        torch.from_numpy(np.concatenate(chunks)),
        torch.tensor([n for clip in by_clip for n in clip]),
        torch.tensor([i for i, clip in enumerate(by_clip) for _ in clip]),
        num_clips=len(waveforms),
        chunks_at_once=chunks_at_once,
    )
    parts = packed.split([len(clip) for clip in by_clip])
    return [
        part.transpose(0, 1).flatten(1)[:, : sum(clip)]
        for part, clip in zip(parts, by_clip, strict=True)
    ]


def by_transformers(waveform: np.ndarray) -> torch.Tensor:
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    extract = Qwen3ASRFeatureExtractor()
    out = extract(waveform, sampling_rate=16_000, padding="longest", n_window=0)
    return out["input_features"][0]


@pytest.mark.parametrize("seconds", [0.01, 0.5, 0.99, 1, 1.0099, 3.05, 8, 8.01, 17.3, 31])
def test_log_mel_is_that_of_transformers(seconds):
    waveform = noise(seconds)
    ours, theirs = log_mel(waveform)[0], by_transformers(waveform)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_filters_are_those_of_librosa():
    expected = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128)
    np.testing.assert_allclose(LogMel(128).filters.T.numpy(), expected, atol=1e-7)


def test_batches_equal_one_by_one():
    waveforms = [noise(s, seed=i) * 10.0**-i for i, s in enumerate((0.3, 2.5, 1, 7.77))]
    for at_once in (1, 3, 500):
        batch = log_mel(*waveforms, chunks_at_once=at_once)
        for together, waveform in zip(batch, waveforms, strict=True):
            torch.testing.assert_close(together, log_mel(waveform)[0], atol=1e-6, rtol=0)


def test_silence_has_a_spectrogram():
    assert torch.isfinite(log_mel(np.zeros(16_000, np.float32))[0]).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60_000))
def test_chunks_hold_the_reflected_waveform(num_samples):
    """Every frame's samples are those of a centred STFT with reflect padding."""
    waveform = np.arange(1, num_samples + 1, dtype=np.float32)
    chunks = cut_chunks(waveform, GEOMETRY)
    padded = np.pad(waveform, (0, max(0, 8_000 - num_samples)))
    reflected = np.pad(padded, 200, mode="reflect")
    for frame in range(num_frames(num_samples)):
        chunk, offset = divmod(frame, 100)
        ours = chunks[chunk, offset * 160 : offset * 160 + 400]
        np.testing.assert_array_equal(ours, reflected[frame * 160 : frame * 160 + 400])


# what the engine carries ----------------------------------------------------------------------


def widened(*clips: np.ndarray) -> np.ndarray:
    """The samples that the worker sees of clips."""
    return widen([torch.from_numpy(narrow(clip))[None] for clip in clips])[0].numpy()


def test_16_bit_samples_travel_as_int16():
    every = (np.arange(-(2**15), 2**15) / 2**15).astype(np.float32)
    assert narrow(every).dtype == np.int16
    np.testing.assert_array_equal(widened(every), every)


@given(st.lists(st.floats(-MAX_PEAK, MAX_PEAK, width=32), min_size=1, max_size=50))
def test_other_samples_keep_their_bits(samples):
    waveform = np.array(samples, np.float32)
    np.testing.assert_array_equal(widened(waveform), waveform)


@pytest.mark.parametrize("value", [1.0, -1.001, 2**-16, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("index", [0, NARROWED_AT_ONCE + 7, -1])
def test_one_other_sample_keeps_a_clip_float(value, index):
    waveform = np.zeros(2 * NARROWED_AT_ONCE + 99, np.float32)
    waveform[index] = value
    assert narrow(waveform).dtype == np.float32
    np.testing.assert_array_equal(widened(waveform), waveform)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1, 3.05, 8.01])
@pytest.mark.parametrize("has_context", [False, True])
def test_16_bit_chunks_equal_those_of_floats(seconds, has_context):
    waveform = np.round(noise(seconds + has_context) * 2**15).astype(np.float32) / 2**15
    chunks = cut_chunks(narrow(waveform), GEOMETRY, has_context=has_context)
    assert chunks.dtype == np.int16
    expected = cut_chunks(waveform, GEOMETRY, has_context=has_context)
    np.testing.assert_array_equal(widen([torch.from_numpy(chunks)]), expected)
