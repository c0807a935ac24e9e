# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the encoder, all but the capture: fixed buffers, vLLM's packing, its fallbacks.

On the CPU a "graph" is the same forward run again on the same buffers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import reference_config, reference_model
from test_encoder import build_encoder

from qwen3_asr_vllm.model.log_mel import FULL_SCALE

MAX_BATCHED_TOKENS = 416  # 32 chunks: budgets of 4, 8, 16 and 32


@pytest.fixture(scope="module")
def encoder(vllm_parallel):
    return build_encoder(reference_model(reference_config()))


@pytest.fixture(scope="module")
def model(encoder):
    return build_model(encoder)


def build_model(encoder):
    """The thinker without a decoder."""
    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration

    model = object.__new__(Qwen3ASRForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.audio_tower = encoder
    model.config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=encoder.config.output_dim)
    )
    return model


def samples_of(frames, geometry, *, seed=0):
    """Chunks of clips with these frames, (C, S), each clip at a loudness of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.chunk_samples,)
    return torch.cat(
        [
            torch.randn(geometry.num_chunks(n), *shape, generator=generator) * 0.1 ** (i % 4)
            for i, n in enumerate(frames)
        ]
    )


def narrowed(frames, geometry, *, seed=0):
    """The same as the processor sends them: clip by clip, every second one as int16."""
    sizes = [geometry.num_chunks(n) for n in frames]
    clips = (samples_of(frames, geometry, seed=seed) * FULL_SCALE).split(sizes)
    return [
        clip.round().clamp(-FULL_SCALE, FULL_SCALE - 1).short() if i % 2 else clip
        for i, clip in enumerate(clips)
    ]


def pad(buffers, num_slots):
    """Buffers of a graph with more slots, holding what earlier clips may have left there."""
    garbage = {
        "chunks": lambda padding: padding.fill_(torch.nan),
        "clip_ids": lambda padding: padding.random_(num_slots),
        "token_index": lambda padding: padding.random_(13 * num_slots),
    }
    padded = {}
    for key, buffer in buffers.items():
        length = 13 * num_slots if key == "token_index" else num_slots
        padding = buffer.new_zeros(length - len(buffer), *buffer.shape[1:])
        padded[key] = torch.cat([buffer, garbage.get(key, lambda zeros: zeros)(padding)])
    return padded


@torch.inference_mode()
def assert_graph_equals_eager(encoder, frames, num_slots):
    chunks = samples_of(frames, encoder.geometry)
    eager = encoder.encode_waveforms(chunks, frames)
    tokens = encoder.encode_graph(pad(encoder.graph_buffers(chunks, frames), num_slots))
    assert tokens.shape == (13 * num_slots, encoder.config.output_dim)
    assert tokens.isfinite().all()
    expected = torch.cat(eager)
    torch.testing.assert_close(tokens[: len(expected)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tail", range(1, 101))
def test_every_tail_survives_the_buffers(encoder, tail):
    assert_graph_equals_eager(encoder, [tail, 100 + tail], 4)


@pytest.mark.parametrize("num_clips", range(1, 9))
def test_every_number_of_clips_fits(encoder, num_clips):
    assert_graph_equals_eager(encoder, [100, 7, 51, 93, 1, 100, 80, 8][:num_clips], 8)


@settings(max_examples=25, deadline=None)
@given(frames=st.lists(st.integers(1, 1000), min_size=1, max_size=5), spare=st.integers(0, 20))
def test_graph_buffers_equal_eager(encoder, frames, spare):
    slots = sum(map(encoder.geometry.num_chunks, frames)) + spare
    assert_graph_equals_eager(encoder, frames, slots)


def test_long_graphs_split_the_stem(encoder):
    """130 chunks take two rounds of at most 128."""
    seen = []
    hook = encoder.conv2d1.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    with torch.inference_mode():
        frames = [12_950]
        encoder.encode_graph(encoder.graph_buffers(samples_of(frames, encoder.geometry), frames))
    hook.remove()
    assert seen == [128, 2]


def vllm_config(**options):
    """As much of a VllmConfig as the manager reads."""
    from vllm.config import CompilationConfig, MultiModalConfig

    return SimpleNamespace(
        compilation_config=CompilationConfig(cudagraph_mm_encoder=True, **options),
        model_config=SimpleNamespace(multimodal_config=MultiModalConfig()),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_BATCHED_TOKENS),
        lora_config=None,
    )


@pytest.fixture(scope="module")
def captured(model):
    """vLLM's own manager, whose graphs run the forward again, and the budgets it replays."""
    from vllm.v1.worker.encoder_cudagraph import BudgetGraphMetadata, EncoderCudaGraphManager

    replayed = []

    def capture(manager, budget, path, axis_keys):
        sizes = (manager.max_batch_size, manager.max_frames_per_batch)
        like = (torch.device("cpu"), torch.float32, path, axis_keys)
        inputs = model.prepare_encoder_cudagraph_capture_inputs(budget, *sizes, *like).values
        output = model.encoder_cudagraph_forward({**inputs}, path=path)

        def replay():
            replayed.append(budget)
            output.copy_(model.encoder_cudagraph_forward({**inputs}, path=path))

        graph = SimpleNamespace(replay=replay)
        graphs = manager._get_graph_set(path)
        graphs[budget] = BudgetGraphMetadata(budget, *sizes, graph, inputs, output)

    manager = EncoderCudaGraphManager(vllm_config(), torch.device("cpu"), torch.float32, model)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(EncoderCudaGraphManager, "_capture_budget_graph", capture)
        manager.capture(graph_pool=object())
    return manager, replayed


@pytest.fixture
def manager(captured):
    captured[1].clear()
    return captured


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("frames", "budgets"),
    [
        ([50], [52]),
        ([400], [52]),
        ([401], [104]),
        ([300, 1, 100, 420, 850], [416]),  # 3 + 1 + 1 + 5 + 9 chunks
        ([1600, 90], [52, 208]),  # one chunk and 16: cheaper apart
        ([77] * 20, [104, 104, 52]),  # at most 8 clips in a graph of this encoder
        ([3100, 3150], [416, 416]),
        ([3300, 60], [52]),  # 33 chunks fit no graph and go eager
    ],
)
@torch.inference_mode()
def test_clips_are_packed_by_chunk_budget(manager, model, frames, budgets):
    manager, replayed = manager
    chunks = narrowed(frames, model.audio_tower.geometry)
    batch = {"audio_chunks": chunks, "audio_feature_lengths": torch.tensor(frames)[:, None]}
    ours = manager.execute(batch)
    assert replayed == budgets
    assert_same(ours, model.embed_multimodal(**batch))


@pytest.mark.parametrize("kind", ["packed", "padded", "apart", "embeds"])
@torch.inference_mode()
def test_features_and_embeddings_pass_the_graphs_by(manager, model, kind):
    manager, replayed = manager
    frames = [120, 61, 80, 300, 51, 75, 90, 100, 801, 66]
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(128, n, generator=generator) for n in frames]
    batch = {"audio_feature_lengths": torch.tensor(frames)}
    if kind == "packed":
        batch["input_audio_features"] = torch.cat(clips, dim=1)
    elif kind == "padded":
        widest = [torch.nn.functional.pad(clip, (0, 801 - clip.shape[1])) for clip in clips]
        batch["input_audio_features"] = torch.stack(widest)
    elif kind == "apart":
        batch["input_audio_features"] = clips
    else:
        batch = {"audio_embeds": [torch.randn(n, 128, generator=generator) for n in frames]}
    ours = manager.execute(batch)
    assert replayed == []
    assert_same(ours, model.embed_multimodal(**batch))


@pytest.mark.parametrize("in_a_step", [16, 416, 2048, 100_000])
def test_budgets_are_chunks_of_one_step(model, in_a_step):
    config = vllm_config()
    config.scheduler_config.max_num_batched_tokens = in_a_step
    budgets = model.graph_budgets(config)
    assert all(budget % 13 == 0 for budget in budgets)
    assert budgets[0] == 52  # also where it exceeds a short step
    assert max(budgets[1:], default=0) <= in_a_step
    assert all(larger <= 2 * smaller for smaller, larger in zip(budgets, budgets[1:], strict=False))
    assert model.get_encoder_cudagraph_budget_range(config) == (budgets[0], budgets[-1])


def test_obstacles_to_graphs_are_named(encoder):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from qwen3_asr_vllm.model.thinker import graph_obstacle

    config = vllm_config()
    assert "TORCH_SDPA" in graph_obstacle(encoder, config)
    varlen = SimpleNamespace(attn_backend=AttentionBackendEnum.FLASH_ATTN)
    assert graph_obstacle(varlen, config) is None
    config.lora_config = SimpleNamespace(enable_tower_connector_lora=True)
    assert "adapters" in graph_obstacle(varlen, config)
    config.compilation_config.cudagraph_mm_encoder = False
    assert graph_obstacle(varlen, config) is None
