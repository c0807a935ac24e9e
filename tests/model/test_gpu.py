# SPDX-License-Identifier: Apache-2.0
"""GPU only: kernels agree, graphs replay, no host waits, engines transcribe.

    pytest tests/model/test_gpu.py   # -n 4 with pytest-xdist: small engines start at once

Each test says what it compares with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.audio import DATA, HOSTILE, heldout, noise, poisoned
from support.checkpoints import ALIGNER, CHECKPOINT, reference_config, reference_model
from support.checks import MOST_ERRORS, MOST_TIMING_ERROR_S, assert_timed, error_rate
from support.engines import engine
from test_bounds import ENCODINGS
from test_encoder import CLIPS_S, build_encoder, chunks_of, encode_by_transformers
from test_encoder_graph import build_model, narrowed, vllm_config
from test_isolation import assert_unchanged, attack, generate, recordings

from qwen3_asr_vllm.model.bounds import LIMIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
# Of the norm of all tokens of a clip, against transformers in float32 on the CPU.
# cuDNN multiplies float32 as TF32, by default, and vLLM leaves it so.
MOST_ERROR = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float().cpu()
    return float((ours.float().cpu() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def reference():
    """Heads of 64, as the published checkpoints have."""
    return reference_model(reference_config(d_model=128, encoder_attention_heads=2))


@pytest.fixture(scope="module", params=MOST_ERROR, ids=lambda dtype: str(dtype).split(".")[1])
def encoder(request, reference, vllm_parallel):
    torch.set_default_dtype(request.param)
    try:
        return build_encoder(reference, device=DEVICE)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
def test_log_mel_is_that_of_the_cpu(encoder):
    chunks, frames = chunks_of([noise(s, seed=i) for i, s in enumerate(CLIPS_S)], encoder.geometry)
    layout = encoder.layout(frames)
    on_host = [chunks, torch.from_numpy(layout.chunk_frames), torch.from_numpy(layout.clip_ids)]
    options = {"num_clips": len(frames), "chunks_at_once": 20}
    ours = encoder.log_mel(*(tensor.to(DEVICE) for tensor in on_host), **options)
    expected = encoder.log_mel.cpu()(*on_host, **options)
    encoder.log_mel.to(DEVICE)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("bins", "frames"), [(128, 100), (80, 37)])
def test_the_kernels_of_the_stem_are_convolutions(encoder, bins, frames):
    log_mel = torch.randn(7, frames, bins, device=DEVICE).transpose(1, 2)
    ours = encoder._convolve_by_kernels(log_mel)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert distance(ours, encoder._convolve(log_mel)) < MOST_ERROR[encoder.dtype]


@torch.inference_mode()
def test_tokens_are_those_of_transformers(encoder, reference):
    """All clips in one batch, by flash attention where the dtype has it."""
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate(CLIPS_S)]
    chunks, frames = chunks_of(waveforms, encoder.geometry)
    for ours, waveform in zip(
        encoder.encode_waveforms(chunks.to(DEVICE), frames), waveforms, strict=True
    ):
        expected = encode_by_transformers(reference, waveform)
        assert distance(ours, expected) < MOST_ERROR[encoder.dtype]


@torch.inference_mode()
def test_clips_are_independent_of_their_batch(encoder):
    """Up to the rounding of kernels of another size."""
    chunks, frames = chunks_of([noise(s, seed=i) for i, s in enumerate(CLIPS_S)], encoder.geometry)
    together = encoder.encode_waveforms(chunks.to(DEVICE), frames)
    sizes = [encoder.geometry.num_chunks(n) for n in frames]
    for ours, part, n in zip(together, chunks.split(sizes), frames, strict=True):
        (alone,) = encoder.encode_waveforms(part.to(DEVICE), [n])
        assert distance(ours, alone) < MOST_ERROR[encoder.dtype]


@torch.inference_mode()
def test_encoding_never_waits_for_the_device(encoder):
    chunks, frames = chunks_of([noise(31), noise(3.3)], encoder.geometry)
    chunks = chunks.to(DEVICE)
    encoder.encode_waveforms(chunks, frames)  # cuFFT makes its plans, cuBLAS its workspace
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.encode_waveforms(chunks, frames)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("encode", ENCODINGS)
def test_a_hostile_clip_leaves_its_batch_alone(encoder, encode):
    """Flash attention multiplies what it masks by zero, and zero times NaN is NaN."""
    clips = [noise(2.3), noise(9.1, seed=1), noise(3, seed=2)]
    clean = encode(encoder, clips)
    for value in HOSTILE:
        before, hostile, after = encode(encoder, [clips[0], poisoned(clips[1], value), clips[2]])
        assert distance(before, clean[0]) < MOST_ERROR[encoder.dtype]
        assert distance(after, clean[2]) < MOST_ERROR[encoder.dtype]
        assert hostile.isfinite().all() and hostile.abs().max() <= LIMIT


def capture(encoder: Any) -> tuple[Any, Any]:
    """The thinker without a decoder, and its graphs."""
    from vllm.distributed.parallel_state import graph_capture
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

    if encoder.dtype == torch.float32:
        pytest.skip("float32 has no attention that can be captured")
    model = build_model(encoder)
    manager = EncoderCudaGraphManager(vllm_config(), DEVICE, encoder.dtype, model)
    with graph_capture(device=DEVICE):
        manager.capture(graph_pool=torch.cuda.graph_pool_handle())
    return model, manager


@torch.inference_mode()
def test_graphs_forget_hostile_clips(encoder):
    """A replay bounds its tokens and leaves nothing behind for the next one."""
    model, manager = capture(encoder)
    frames = [300, 100, 420]
    chunks = [clip.to(DEVICE) for clip in narrowed(frames, encoder.geometry)]
    batch = {"audio_chunks": chunks, "audio_feature_lengths": torch.tensor(frames)}
    clean = [tokens.clone() for tokens in manager.execute(batch)]
    for value in HOSTILE:
        hostile = [chunks[0], chunks[1].float(), chunks[2]]
        hostile[1][0, 8_000] = value
        ours = [tokens.clone() for tokens in manager.execute(batch | {"audio_chunks": hostile})]
        assert ours[1].isfinite().all() and ours[1].abs().max() <= LIMIT
        for neighbour in (0, 2):
            assert distance(ours[neighbour], clean[neighbour]) < MOST_ERROR[encoder.dtype]
        for again, before in zip(manager.execute(batch), clean, strict=True):
            assert distance(again, before) < MOST_ERROR[encoder.dtype]
    assert manager.graph_misses == 0


@torch.inference_mode()
def test_replayed_graphs_equal_eager(encoder):
    model, manager = capture(encoder)
    for seed, frames in enumerate([[50], [3200], [300, 1, 100, 420, 850], [77] * 20, [99]]):
        chunks = [clip.to(DEVICE) for clip in narrowed(frames, encoder.geometry, seed=seed)]
        batch = {"audio_chunks": chunks, "audio_feature_lengths": torch.tensor(frames)}
        for ours, eager in zip(
            manager.execute(batch), model.embed_multimodal(**batch), strict=True
        ):
            assert distance(ours, eager) < MOST_ERROR[encoder.dtype]
    assert manager.graph_misses == 0


# engines ------------------------------------------------------------------------------------

SMALL = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}


@pytest.fixture(autouse=True)
def spawned(monkeypatch) -> None:
    """Looking for a device spoils forks for CUDA, which vLLM does not see."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def graph_hits(worker: Any) -> int:
    """Runs in the engine: how many clips a captured graph has encoded."""
    runner = worker.model_runner
    manager = (
        runner.model_state.encoder_runner.cudagraph_manager
        if hasattr(runner, "model_state")
        else runner.encoder_cudagraph_manager
    )
    return manager.graph_hits


@pytest.fixture(params=["V2", "V1"])
def model(request, monkeypatch) -> Iterator[Any]:
    """The tiny transcriber as a user has it on a GPU, under either of vLLM's model runners."""
    from qwen3_asr_vllm import Qwen3ASR

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(request.param == "V2")))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for graph_hits
    options = {"dtype": "auto", "enforce_eager": False, "max_model_len": 4096, "max_num_seqs": 64}
    with engine(CHECKPOINT, start=Qwen3ASR, enable_mm_embeds=True, **options, **SMALL) as made:
        yield made


def test_heldout_recordings_are_transcribed(model):
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout()]
    transcripts = [result.transcript for result in model.transcribe(paths)]
    answers = [transcript.text for transcript in transcripts]
    for language, most in MOST_ERRORS.items():
        assert error_rate(heldout(), answers, language) < most
    right = [t.language == row["language"] for t, row in zip(transcripts, heldout(), strict=True)]
    assert np.mean(right) >= 0.98
    assert model.llm.collective_rpc(graph_hits)[0] >= len([row for row in heldout() if row["text"]])


def test_hostile_audio_changes_no_later_answer(model):
    """By flash attention and captured graphs, from arrays, features and embeddings."""
    llm, clips = model.llm, recordings()

    def answers() -> list[list[list[int]]]:  # one by one: batches of other sizes round differently
        return [generate(llm, [clip], max_tokens=24) for clip in clips]

    assert_unchanged(answers, lambda value: attack(llm, value))


def test_streams_end_with_the_whole_text(model):
    import soundfile

    samples, _ = soundfile.read(DATA / "hello.flac", dtype="float32")
    pieces = np.array_split(samples, len(samples) // 8000)
    streamed = "".join(update.delta for update in model.stream(pieces))
    assert streamed == model.transcribe(samples).text


def test_words_are_timed():
    from qwen3_asr_vllm import Qwen3ASR
    from qwen3_asr_vllm.offline import ForcedAligner

    rows = list(map(json.loads, (DATA / "timed" / "manifest.jsonl").read_text().splitlines()))
    paths = [DATA / "timed" / row["audio_filepath"] for row in rows]
    aligner = ForcedAligner(str(ALIGNER), enforce_eager=True, **SMALL)
    errors = []
    with engine(CHECKPOINT, start=Qwen3ASR, aligner=aligner, dtype="auto", **SMALL) as made:
        for row, result in zip(rows, made.transcribe(paths, word_timestamps=True), strict=True):
            assert_timed(result.transcript)
            if [word.word.strip() for word in result.transcript.words] == row["text"].split():
                said = [time for _, *span in row["words"] for time in span]
                ours = [time for word in result.transcript.words for time in (word.start, word.end)]
                errors += np.abs(np.subtract(ours, said)).tolist()
    assert len(errors) > 100
    assert np.mean(errors) < MOST_TIMING_ERROR_S
