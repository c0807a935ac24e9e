# SPDX-License-Identifier: Apache-2.0
"""The forced aligner through vLLM's engine, float32 on the CPU, against transformers' own class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.audio import noise
from support.checkpoints import reference_config, reference_model, save_flat, save_nested
from support.engines import engine
from test_model import audio_tokens_by_transformers

from qwen3_asr_vllm.prompt import AUDIO_PLACEHOLDER

pytestmark = pytest.mark.vllm

NUM_CLASSES = 500
CLIPS_S = (0.5, 0.99, 3.05, 8.01, 17.3, 31)
WORDS = "one two three vier fünf sechs 七 八 九".split()


@pytest.fixture(scope="module", params=[save_nested, save_flat], ids=["nested", "flat"])
def aligner(request, tmp_path_factory):
    """An engine with default options, and transformers' own model."""
    reference = reference_model(reference_config(), num_classes=NUM_CLASSES)
    checkpoint = request.param(reference, tmp_path_factory.mktemp("aligner"))
    # A budget below the longest prompts, so that these come in parts.
    with engine(checkpoint, max_num_batched_tokens=256) as llm:
        yield llm, reference


def bare(waveform, words=WORDS):
    prompt = AUDIO_PLACEHOLDER + "".join(f"{word}<timestamp><timestamp>" for word in words)
    return {"prompt": prompt, "multi_modal_data": {"audio": waveform}}


@torch.inference_mode()
def logits_by_transformers(model, output, waveform):
    """(timestamps, classes)"""
    ids = torch.tensor([output.prompt_token_ids])
    embeds = model.get_input_embeddings()(ids)
    is_audio = ids == model.config.audio_token_id
    embeds[is_audio] = audio_tokens_by_transformers(model.model, waveform)
    return model(inputs_embeds=embeds).logits[ids == model.config.timestamp_token_id]


def test_many_clips_are_classified_like_transformers(aligner):
    from vllm import PoolingParams

    llm, reference = aligner
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate(CLIPS_S)]
    asked = [bare(w, WORDS * (1 + i)) for i, w in enumerate(waveforms)]
    best = llm.encode(asked, pooling_task="token_classify", use_tqdm=False)
    raw = PoolingParams(use_activation=False)
    logits = llm.encode(asked, raw, pooling_task="token_classify", use_tqdm=False)
    for output, scored, waveform in zip(best, logits, waveforms, strict=True):
        expected = logits_by_transformers(reference, output, waveform)
        torch.testing.assert_close(scored.outputs.data, expected, atol=1e-4, rtol=0)
        assert output.outputs.data.tolist() == expected.argmax(-1).tolist()
    assert len(best[-1].prompt_token_ids) > 256


def classified(pooler, hidden, prompt, cuts):
    """The pooler's output for one prompt whose stretches are computed in turn."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    params, state = PoolingParams(task="token_classify"), PoolingStates()
    for start, end in cuts:
        metadata = PoolingMetadata(
            torch.tensor([len(prompt)]), None, prompt[None], [params], [state]
        )
        metadata.build_pooling_cursor(np.array([end - start]), torch.tensor([end]), hidden.device)
        (output,) = pooler(hidden[start:end], metadata)
    return output.tolist()


@torch.inference_mode()
def test_a_restarted_prompt_keeps_nothing():
    from qwen3_asr_vllm.model.aligner import TimestampPooler

    torch.manual_seed(0)
    pooler = TimestampPooler(8, 500, bias=False, timestamp_token_id=1, dtype=torch.float32)
    hidden, prompt = torch.randn(20, 8), torch.arange(20) % 2
    whole = classified(pooler, hidden, prompt, [(0, 20)])
    assert len(whole) == 10
    assert classified(pooler, hidden, prompt, [(0, 7), (7, 20)]) == whole
    assert classified(pooler, hidden, prompt, [(0, 7), (7, 12), (0, 9), (9, 20)]) == whole


def test_memory_is_shared_between_two_models():
    from qwen3_asr_vllm.engine import split_memory

    for gib, utilization in ((16, 0.9), (24, 0.9), (80, 0.5), (141, 0.9)):
        aligner, transcriber = split_memory(gib << 30, utilization)
        assert aligner + transcriber == pytest.approx(utilization)
        assert aligner * gib <= 6.001 and aligner <= utilization / 3


def test_only_two_integers_per_word_leave(aligner):
    output = aligner[0].encode(bare(noise(2)), pooling_task="token_classify", use_tqdm=False)[0]
    assert output.outputs.data.nbytes == 8 * len(WORDS)
