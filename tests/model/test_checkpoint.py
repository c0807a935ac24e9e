# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that cannot be served: the field or the tensor at fault is named."""

from __future__ import annotations

import pytest
from support.checkpoints import PUBLISHED_NAMES, reference_config, reference_model

from qwen3_asr_vllm.model.config import Qwen3ASRConfig

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def reference():
    return reference_model(reference_config())


def test_a_missing_tensor_is_named(reference):
    from qwen3_asr_vllm.model.checkpoint import check_fused_parts
    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as architecture

    names = set(reference.state_dict())
    check_fused_parts(names, architecture.packed_modules_mapping)
    missing = "model.audio_tower.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=missing):
        check_fused_parts(names - {missing}, architecture.packed_modules_mapping)
    scale = "model.language_model.layers.0.self_attn.k_proj.k_scale"  # of an FP8 KV cache
    check_fused_parts(names | {scale}, architecture.packed_modules_mapping)


DIMENSIONS = [
    ({"output_dim": 64}, r"audio_config\.output_dim is 64.*hidden_size is 128"),
    ({"encoder_attention_heads": 5}, r"audio_config\.d_model is 64.*encoder_attention_heads = 5"),
    ({"n_window_infer": 130}, r"audio_config\.n_window_infer is 130"),
    ({"scale_embedding": True}, r"audio_config\.scale_embedding is true"),
    ({"num_key_value_heads": 3}, r"num_attention_heads is 2; .* num_key_value_heads = 3"),
    ({"hidden_act": "gelu"}, r"text_config\.hidden_act is 'gelu'"),
    ({"activation_function": "sine"}, r"audio_config\.activation_function is 'sine'"),
]


@pytest.mark.usefixtures("vllm_parallel")
@pytest.mark.parametrize(("change", "message"), DIMENSIONS)
def test_impossible_dimensions_name_the_field(change, message):
    from qwen3_asr_vllm.model.checkpoint import check_dimensions

    flat = reference_config().to_dict()
    for field, value in change.items():
        name = "text_config" if field in flat["text_config"] else "audio_config"
        flat[name][field] = value
    with pytest.raises(ValueError, match=message):
        check_dimensions(Qwen3ASRConfig.from_dict(flat).thinker_config)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_ffn_dim": 80}, r"audio_config\.encoder_ffn_dim is 80 .*, but 128 in .*fc1"),
        ({"d_model": 96}, r"audio_config\.d_model is 96 .*, but 64 in"),
        ({"encoder_layers": 1}, r"audio_config\.encoder_layers is 1 .*layers\.1\."),
        ({"downsample_hidden_size": 8}, r"downsample_hidden_size is 8 .*, but 16 in .*conv2d1"),
        ({"num_mel_bins": 80}, r"num_mel_bins / 8 is 160 .*, but 256 in .*conv_out"),
        ({"output_dim": 96}, r"audio_config\.output_dim is 96 .*, but 128 in"),
        ({"vocab_size": 700}, r"text_config\.vocab_size is 700 .*, but 768 in .*embed_tokens"),
        ({"hidden_size": 96}, r"text_config\.hidden_size is 96 .*, but 128 in"),
        ({"intermediate_size": 96}, r"text_config\.intermediate_size is 96 .*, but 192 in"),
        ({"num_hidden_layers": 1}, r"text_config\.num_hidden_layers is 1 .*layers\.1\."),
        ({"num_attention_heads": 4}, r"num_attention_heads x head_dim is 256 .*, but 128 in"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads x head_dim is 128 .*, but 64 in"),
    ],
)
def test_tensors_of_other_sizes_name_the_field(reference, layout, change, message):
    from qwen3_asr_vllm.model.checkpoint import checked_tensors

    names = PUBLISHED_NAMES.items() if layout == "nested" else ()
    tensors = dict(reference.state_dict())
    for old, new in names:
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    flat = reference.config.to_dict()
    thinker = Qwen3ASRConfig.from_dict(flat).thinker_config
    assert list(checked_tensors(tensors.items(), thinker)) == list(tensors.items())
    for field, value in change.items():
        part = flat["text_config" if field in flat["text_config"] else "audio_config"]
        part[field] = value
    thinker = Qwen3ASRConfig.from_dict(flat).thinker_config
    with pytest.raises(ValueError, match=message):
        list(checked_tensors(tensors.items(), thinker))
