# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from support.audio import noise
from support.checkpoints import reference_config, reference_model
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_asr_vllm.geometry import num_frames
from qwen3_asr_vllm.model.log_mel import cut_chunks
from qwen3_asr_vllm.windows import GrowingClip

CLIPS_S = (0.5, 0.99, 1, 3.05, 8, 8.01, 17.3, 31)


@pytest.fixture(scope="module", params=[{}, {"d_model": 96, "encoder_attention_heads": 3}])
def reference(request):
    return reference_model(reference_config(**request.param))


@pytest.fixture(scope="module")
def encoder(reference, vllm_parallel):
    """Ours, with the weights of transformers' encoder and projector."""
    return build_encoder(reference)


def build_encoder(reference, *, device="cpu", keep_order=False, **overrides):
    from qwen3_asr_vllm.model.config import Qwen3ASRConfig
    from qwen3_asr_vllm.model.encoder import AudioEncoder

    config = Qwen3ASRConfig.from_dict(reference.config.to_dict()).thinker_config.audio_config
    config.update(overrides)
    encoder = AudioEncoder(config, keep_order=keep_order)
    tower = reference.model.audio_tower.state_dict()
    projector = reference.model.multi_modal_projector.state_dict()
    for name, tensor in projector.items():
        tower[name.replace("linear_", "proj")] = tensor
    encoder.load_weights(tower.items())
    encoder.to(device)
    for module in encoder.modules():
        if quant_method := getattr(module, "quant_method", None):
            quant_method.process_weights_after_loading(module)
    return encoder.eval()


@torch.inference_mode()
def encode(encoder, waveforms):
    return encoder.encode_waveforms(*chunks_of(waveforms, encoder.geometry))


def chunks_of(waveforms, geometry):
    chunks = [torch.from_numpy(cut_chunks(w, geometry)) for w in waveforms]
    return torch.cat(chunks), [num_frames(len(w)) for w in waveforms]


@torch.inference_mode()
def encode_by_transformers(reference, waveform):
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    extract = Qwen3ASRFeatureExtractor()
    inputs = extract(waveform, sampling_rate=16_000, padding="longest", return_attention_mask=True)
    return reference.get_audio_features(
        inputs["input_features"], inputs["attention_mask"]
    ).pooler_output


@pytest.mark.parametrize("seconds", CLIPS_S)
def test_tokens_are_those_of_transformers(encoder, reference, seconds):
    waveform = noise(seconds)
    ours = encode(encoder, [waveform])[0]
    torch.testing.assert_close(ours, encode_by_transformers(reference, waveform), atol=2e-5, rtol=0)


def test_one_batch_equals_one_by_one(encoder):
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate(CLIPS_S)]
    batch = encode(encoder, waveforms)
    alone = [encode(encoder, [waveform])[0] for waveform in waveforms]
    for together, single in zip(batch, alone, strict=True):
        torch.testing.assert_close(together, single, atol=1e-5, rtol=0)


def test_encoding_whole_equals_encoding_its_windows(encoder):
    """Nothing in the encoder reaches across 8 s; only the log-mel's floor and edges do."""
    features = torch.randn(128, 1730)
    with torch.inference_mode():
        whole = encoder.encode_features(features, [1730])[0]
        parts = [encoder.encode_features(f, [f.shape[1]])[0] for f in features.split(800, dim=1)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-6, rtol=0)


@torch.inference_mode()
def test_growing_clips_are_encoded_like_whole_ones(encoder):
    """With their context and the clip's peak, eagerly and from the buffers of a graph."""
    waveform = noise(27.3)
    waveform[-16_000:] *= 4  # the loudest moment is in the last window only
    loudest = partial(encoder.log_mel.loudest, geometry=encoder.geometry)
    clip = GrowingClip(
        waveform, encoder.geometry, lambda w: loudest(w.samples, has_context=w.has_context)
    )
    windows = clip.windows(len(waveform))
    parts = [cut_chunks(w.samples, encoder.geometry, has_context=w.has_context) for w in windows]
    chunks = torch.from_numpy(np.concatenate(parts))
    frames, peaks = [w.num_frames for w in windows], torch.tensor([w.peak for w in windows])
    whole = encode(encoder, [waveform])[0]
    eager = torch.cat(encoder.encode_waveforms(chunks, frames, peaks))
    torch.testing.assert_close(eager, whole, atol=1e-5, rtol=0)
    graph = encoder.encode_graph(encoder.graph_buffers(chunks, frames, peaks))
    torch.testing.assert_close(graph[: len(whole)], whole, atol=1e-5, rtol=0)
    without = torch.cat(encoder.encode_waveforms(chunks, frames))
    assert (without - whole).abs().max() > 1e-3  # the peak matters


def test_features_give_the_tokens_of_their_waveform(encoder):
    waveforms = [noise(3.05), noise(8.01, seed=1)]
    frames = [num_frames(len(w)) for w in waveforms]
    features = []
    with torch.inference_mode():
        for waveform, length in zip(waveforms, frames, strict=True):
            chunks = torch.from_numpy(cut_chunks(waveform, encoder.geometry))
            layout = encoder.layout([length])
            log_mel = encoder.log_mel(
                chunks,
                torch.from_numpy(layout.chunk_frames),
                torch.from_numpy(layout.clip_ids),
                num_clips=1,
                chunks_at_once=500,
            )
            features.append(log_mel.transpose(0, 1).flatten(1)[:, :length])
        from_features = encoder.encode_features(torch.cat(features, dim=1), frames)
    for ours, expected in zip(from_features, encode(encoder, waveforms), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_conv_chunksize_bounds_the_stem(reference, encoder):
    """31 chunks through a stem that holds 4: never more at once, and the same tokens."""
    bounded = build_encoder(reference, conv_chunksize=4)
    seen = []
    bounded.conv2d1.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    waveform = noise(31)
    tokens = encode(bounded, [waveform])[0]
    assert seen == [4] * 7 + [3]
    torch.testing.assert_close(tokens, encode(encoder, [waveform])[0], atol=1e-6, rtol=0)


class OperatorCount(TorchDispatchMode):
    """Counts what reaches the device, each operator by its name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs or {})


# What makes the host wait for the device: a shape or a number that only the device knows.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"}


@pytest.mark.parametrize("keep_order", [False, True], ids=["dense", "with bounds"])
def test_32_clips_take_the_operators_of_one(encoder, keep_order, monkeypatch):
    """As on an accelerator: a CPU convolves few chunks at a time."""
    monkeypatch.setattr("qwen3_asr_vllm.model.encoder.CPU_CHUNKS_AT_ONCE", 500)
    encoder.keep_order = keep_order
    counts = []
    for num_clips in (1, 32):
        chunks, frames = chunks_of([noise(9.3)] * num_clips, encoder.geometry)
        with torch.inference_mode(), OperatorCount() as count:
            encoder.encode_waveforms(chunks, frames)
        counts.append(count.calls)
    encoder.keep_order = False
    assert counts[0] == counts[1]
    assert counts[0]["torch_sdpa_wrapper"] >= encoder.config.encoder_layers
    assert not WAITS & counts[0].keys()


@torch.inference_mode()
def test_the_host_reads_nothing_from_the_device(reference, vllm_parallel):
    """On a device without data every read raises: the layout is known before the first kernel."""
    encoder = build_encoder(reference, device="meta", keep_order=True)
    chunks, frames = chunks_of([noise(9.3), noise(0.7)], encoder.geometry)
    chunks = chunks.to("meta")
    tokens = encoder.encode_waveforms(chunks, frames)
    assert [len(clip) for clip in tokens] == [121, 9]
    features = torch.empty(128, sum(frames), device="meta")
    assert [len(clip) for clip in encoder.encode_features(features, frames)] == [121, 9]
    assert len(encoder.encode_graph(encoder.graph_buffers(chunks, frames))) == 130
    with pytest.raises(RuntimeError):
        tokens[0].sum().item()


def test_both_layouts_hold_the_same_windows():
    """Sorted by length for dense attention, or in order for variable-length kernels."""
    from qwen3_asr_vllm.geometry import Geometry
    from qwen3_asr_vllm.model.encoder import Layout

    frames = [num_frames(round(seconds * 16_000)) for seconds in CLIPS_S]
    in_order = Layout(frames, Geometry(), by_length=False)
    by_length = Layout(frames, Geometry(), by_length=True)
    assert sorted(in_order.windows) == sorted(by_length.windows)
    assert list(by_length.windows) == sorted(by_length.windows, reverse=True)
    np.testing.assert_array_equal(by_length.token_index[by_length.restore], in_order.token_index)
