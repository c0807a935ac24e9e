# SPDX-License-Identifier: Apache-2.0
"""vLLM's input processing without an engine, against transformers' processor.

The claims are those of vLLM's own tests of its Qwen3-ASR processor.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from support.checkpoints import CHECKPOINT, reference_config, reference_model, save_flat

from qwen3_asr_vllm.prompt import AUDIO_PLACEHOLDER

pytestmark = pytest.mark.vllm

SAMPLES = (321, 15_999, 16_000, 16_001, 16_159, 16_160, 16_161, 32_001, 480_001)


@pytest.fixture(scope="module", params=["nested", "flat"])
def model_config(request, tmp_path_factory):
    from vllm.engine.arg_utils import EngineArgs

    folder = CHECKPOINT
    if request.param == "flat":
        folder = save_flat(reference_model(reference_config()), tmp_path_factory.mktemp("flat"))
    options = {"limit_mm_per_prompt": {"audio": 2}, "enable_mm_embeds": True}
    options |= {"dtype": "float32", "max_model_len": 4096, "mm_processor_cache_gb": 1}
    return EngineArgs(str(folder), **options).create_model_config()


@pytest.fixture(scope="module")
def processor(model_config):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(model_config)


def clip(samples, seed=42):
    return 0.1 * np.random.RandomState(seed).randn(samples).astype(np.float32)


def processed(processor, audio, prompt=None, cache=None):
    audio = audio if isinstance(audio, (list, dict)) else [audio]
    prompt = prompt or AUDIO_PLACEHOLDER * (len(audio) if isinstance(audio, list) else 1)
    items = processor.info.parse_mm_data({"audio": audio} if audio else {})
    return processor(prompt, mm_items=items, hf_processor_mm_kwargs={}, cache=cache)


@pytest.mark.parametrize(("samples", "num_audios"), list(product(SAMPLES, (1, 2))))
def test_prompt_tokens_are_those_of_transformers(processor, samples, num_audios):
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor, Qwen3ASRProcessor

    native = Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), processor.info.get_tokenizer())
    clips = [clip(samples + 160 * index) for index in range(num_audios)]
    expected = [
        token
        for one in clips
        for token in native(text=AUDIO_PLACEHOLDER, audio=one)["input_ids"][0]
    ]
    assert processed(processor, clips)["prompt_token_ids"] == expected


def test_batch_and_cache_change_no_clip(model_config, processor):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    clips = [clip(16_001), clip(32_000, seed=1)]
    alone = [processed(processor, one)["mm_kwargs"].get_data() for one in clips]
    for known in ([], [0], [1], [0, 1]):
        cache = MultiModalProcessorOnlyCache(model_config)
        for index in known:
            processed(processor, clips[index], cache=cache)
        for order in ([0, 1], [1, 0]):
            batch = [clips[index] for index in order]
            both = processed(processor, batch, cache=cache)["mm_kwargs"].get_data()
            chunks = [part for index in order for part in alone[index]["audio_chunks"]]
            assert all(map(torch.equal, both["audio_chunks"], chunks))
            lengths = torch.cat([alone[index]["audio_feature_lengths"] for index in order])
            assert torch.equal(both["audio_feature_lengths"], lengths)


def test_text_alone_needs_no_audio(processor):
    prompt = "Transcribe the audio."
    output = processed(processor, [], prompt)
    assert output["prompt_token_ids"] == processor.info.get_tokenizer().encode(prompt)
    assert output["mm_kwargs"].get_data() == {}


def test_precomputed_features_pass_unchanged(processor):
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    waveform = clip(16_001)
    extract = Qwen3ASRFeatureExtractor()
    options = {"sampling_rate": 16_000, "padding": "longest", "return_tensors": "pt"}
    features = extract(waveform, **options)["input_features"][0]
    lengths = torch.tensor([features.shape[1]])
    given = {"input_audio_features": features, "audio_feature_lengths": lengths}
    output = processed(processor, given)
    data = output["mm_kwargs"].get_data()
    assert output["prompt_token_ids"] == processed(processor, waveform)["prompt_token_ids"]
    torch.testing.assert_close(data["input_audio_features"], features, rtol=0, atol=0)


def test_tokens_without_an_embedding_are_refused(processor):
    from qwen3_asr_vllm.model.processor import check_vocabulary

    thinker, tokenizer = processor.info.get_hf_config(), processor.info.get_tokenizer()
    check_vocabulary(tokenizer, thinker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thinker.text_config, "vocab_size", 700)
        with pytest.raises(ValueError, match=r"vocab_size is 700, but .*<timestamp> is 751"):
            check_vocabulary(tokenizer, thinker)
