# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from support.checkpoints import reference_config

from qwen3_asr_vllm.model.config import (
    Qwen3ASRAudioEncoderConfig,
    Qwen3ASRConfig,
    Qwen3ASRTextConfig,
    Qwen3ASRThinkerConfig,
)

# vLLM's documentation of vllm.transformers_utils.configs.qwen3_asr: every field and its default.
AUDIO_DEFAULTS = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "dropout": 0,
    "attention_dropout": 0,
    "activation_function": "gelu",
    "activation_dropout": 0,
    "scale_embedding": False,
    "initializer_range": 0.02,
    "max_source_positions": 1500,
    "n_window": 100,
    "output_dim": 3584,
    "n_window_infer": 400,
    "conv_chunksize": 500,
    "downsample_hidden_size": 480,
    "num_hidden_layers": 32,
}
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 5000000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
THINKER_DEFAULTS = {
    "audio_token_id": 151646,
    "audio_start_token_id": 151647,
    "user_token_id": 872,
    "initializer_range": 0.02,
}
DEFAULTS = [
    (cls, name, value)
    for cls, fields in (
        (Qwen3ASRAudioEncoderConfig, AUDIO_DEFAULTS),
        (Qwen3ASRTextConfig, TEXT_DEFAULTS),
        (Qwen3ASRThinkerConfig, THINKER_DEFAULTS),
        (Qwen3ASRConfig, {"support_languages": None}),
    )
    for name, value in fields.items()
]


@pytest.mark.parametrize(("cls", "name", "value"), DEFAULTS)
def test_default_is_that_of_the_documentation(cls, name, value):
    assert getattr(cls(), name) == value


@pytest.mark.parametrize(
    ("cls", "model_type"),
    [
        (Qwen3ASRAudioEncoderConfig, "qwen3_asr_audio_encoder"),
        (Qwen3ASRTextConfig, "qwen3_asr_text"),
        (Qwen3ASRThinkerConfig, "qwen3_asr_thinker"),
        (Qwen3ASRConfig, "qwen3_asr"),
    ],
)
def test_model_type_is_that_of_the_documentation(cls, model_type):
    assert cls.model_type == cls().model_type == model_type


def test_configs_nest_as_the_documentation_says():
    assert Qwen3ASRConfig.sub_configs == {"thinker_config": Qwen3ASRThinkerConfig}
    assert Qwen3ASRThinkerConfig.sub_configs == {
        "audio_config": Qwen3ASRAudioEncoderConfig,
        "text_config": Qwen3ASRTextConfig,
    }
    assert Qwen3ASRTextConfig.base_config_key == "text_config"
    config = Qwen3ASRConfig()
    assert isinstance(config.thinker_config, Qwen3ASRThinkerConfig)
    assert isinstance(config.thinker_config.audio_config, Qwen3ASRAudioEncoderConfig)
    assert config.get_text_config() is config.thinker_config.text_config
    assert config.get_text_config(decoder=True) is config.thinker_config.text_config


def test_fields_given_reach_their_place():
    config = Qwen3ASRConfig(
        thinker_config={
            "audio_config": {"n_window": 50, "n_window_infer": 800},
            "text_config": {"hidden_size": 64, "num_key_value_heads": None},
            "audio_token_id": 7,
            "classify_num": 5000,
        },
        support_languages=["English"],
        timestamp_token_id=9,
        timestamp_segment_time=80,
    )
    thinker = config.thinker_config
    assert thinker.audio_config.geometry.window_tokens == 104
    assert thinker.text_config.num_key_value_heads == 32  # as many as there are heads
    assert (thinker.audio_token_id, thinker.classify_num) == (7, 5000)
    assert (config.timestamp_token_id, config.timestamp_segment_time) == (9, 80)
    assert config.support_languages == ["English"]


def test_rope_type_takes_the_old_key():
    text = Qwen3ASRTextConfig(rope_scaling={"type": "linear", "factor": 2.0})
    assert text.rope_scaling["rope_type"] == "linear"
    assert text.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize("kind", [{"rope_type": "default"}, {"type": "mrope"}])
def test_mrope_is_read_as_plain_rope(kind):
    given = kind | {"mrope_section": [24, 20, 20], "interleaved": True}
    text = Qwen3ASRTextConfig(rope_theta=1e6, rope_scaling=given)
    assert text.rope_parameters["rope_type"] == "default"
    assert text.rope_parameters["rope_theta"] == text.rope_theta == 1e6
    assert "mrope_section" not in text.rope_parameters


def test_flat_layout_becomes_a_thinker():
    flat = reference_config(n_window=50)
    config = Qwen3ASRConfig.from_dict(flat.to_dict())
    thinker = config.thinker_config
    assert thinker.audio_token_id == flat.audio_token_id
    assert thinker.audio_config.d_model == flat.audio_config.d_model
    assert thinker.text_config.rope_theta == flat.text_config.rope_parameters["rope_theta"]
    assert thinker.text_config.tie_word_embeddings is flat.tie_word_embeddings
    assert config.timestamp_token_id == flat.timestamp_token_id


def test_config_survives_a_round_trip():
    config = Qwen3ASRConfig.from_dict(reference_config().to_dict())
    assert Qwen3ASRConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
