# SPDX-License-Identifier: Apache-2.0
"""No number that a client sends reaches the decoder unless it is finite and float16 holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.audio import HOSTILE, noise, poisoned
from support.checkpoints import reference_config, reference_model
from test_encoder import build_encoder, chunks_of
from test_encoder_graph import build_model

from qwen3_asr_vllm.geometry import Geometry, num_frames
from qwen3_asr_vllm.model.bounds import LIMIT, LOG_MEL_RANGE, bounded
from qwen3_asr_vllm.model.log_mel import LogMel, cut_chunks
from qwen3_asr_vllm.peaks import MAX_PEAK

VALUES = (*HOSTILE, -3e38, -np.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_waveforms_in_range_have_features_in_range():
    """The loudest, the quietest and the sharpest waveforms that are accepted."""
    square = np.where(np.arange(32_000) // 20 % 2, MAX_PEAK, -MAX_PEAK).astype(np.float32)
    for waveform in (square, np.full_like(square, MAX_PEAK), np.zeros_like(square)):
        values = LogMel(128)(
            torch.from_numpy(cut_chunks(waveform, Geometry())),
            torch.tensor([100, 100]),
            torch.tensor([0, 0]),
            num_clips=1,
            chunks_at_once=2,
        )
        low, high = values.aminmax()
        assert LOG_MEL_RANGE[0] <= low and high <= LOG_MEL_RANGE[1]


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def encoder(request, vllm_parallel):
    torch.set_default_dtype(request.param)
    try:
        return build_encoder(reference_model(reference_config()).to(request.param))
    finally:
        torch.set_default_dtype(torch.float32)


def by_waveforms(encoder, clips):
    chunks, frames = chunks_of(clips, encoder.geometry)
    return encoder.encode_waveforms(chunks.to(encoder.device), frames)


def by_graph(encoder, clips):
    chunks, frames = chunks_of(clips, encoder.geometry)
    sizes = [encoder.geometry.num_tokens(n) for n in frames]
    tokens = encoder.encode_graph(encoder.graph_buffers(chunks.to(encoder.device), frames))
    return tokens[: sum(sizes)].split(sizes)


def by_features(encoder, clips):
    """Of samples in the place of log-mel: nothing here depends on what they mean."""
    frames = [num_frames(len(clip)) for clip in clips]
    columns = [
        torch.from_numpy(clip[: 160 * n].reshape(n, 160)[:, :128].T)
        for clip, n in zip(clips, frames, strict=True)
    ]
    features = torch.cat(columns, dim=1).to(encoder.device, encoder.dtype)
    return encoder.encode_features(features, frames)


ENCODINGS = (by_waveforms, by_graph, by_features)


@torch.inference_mode()
@pytest.mark.parametrize("encode", ENCODINGS)
def test_a_hostile_clip_leaves_its_batch_alone(encoder, encode):
    clips = [noise(2.3), noise(9.1, seed=1), noise(3, seed=2)]
    clean = encode(encoder, clips)
    for value in VALUES:
        before, hostile, after = encode(encoder, [clips[0], poisoned(clips[1], value), clips[2]])
        assert torch.equal(before, clean[0]) and torch.equal(after, clean[2])
        assert hostile.isfinite().all() and hostile.abs().max() <= LIMIT
        assert not torch.equal(hostile, clean[1])


@torch.inference_mode()
def test_embeddings_are_bounded_on_the_device(encoder):
    clips = [torch.randn(7, 128, dtype=encoder.dtype), torch.randn(9, 128, dtype=encoder.dtype)]
    for value in VALUES:
        ours = build_model(encoder).embed_multimodal(
            audio_embeds=[clips[0], poisoned(clips[1], value)]
        )
        assert torch.equal(ours[0], clips[0])
        assert ours[1].isfinite().all() and ours[1].abs().max() <= LIMIT


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_stays_finite_at_the_limit(dtype):
    """The residual stream, every key and every value, of random weights."""
    decoder = reference_model(reference_config()).model.language_model.to(dtype)
    embeds = LIMIT * torch.where(torch.rand(1, 60, 128) < 0.5, -1, 1).to(dtype)
    embeds[:, ::2] = torch.randn(1, 30, 128)
    output = decoder(inputs_embeds=embeds, use_cache=True)
    assert output.last_hidden_state.isfinite().all()
    for layer in output.past_key_values.layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()


def test_bounding_changes_no_bit_of_ordinary_values():
    values = torch.randn(10_000) * torch.logspace(-30, 3, 10_000)
    values[:2] = torch.tensor([-0.0, LIMIT])
    assert torch.equal(bounded(values).view(torch.int32), values.view(torch.int32))
