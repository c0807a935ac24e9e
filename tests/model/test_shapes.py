# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other shapes than the published ones, through vLLM's loader and engine.

Tiny random ones, in an engine of this process; the reference is transformers' own model.
"""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from support.audio import noise
from support.checkpoints import reference_config, reference_model, save_flat, save_nested
from support.engines import engine
from test_model import assert_same, generate, logprobs_by_transformers, request

pytestmark = pytest.mark.vllm

OPTIONS = {"in_process": True, "max_model_len": 256, "max_num_seqs": 4, "max_logprobs": 40}
SHAPES = {  # the config's sizes, and the layout
    "14 decoder layers": ({"text_sizes": {"num_hidden_layers": 14}}, save_flat),
    "narrow, odd heads, untied": (
        {
            "text_sizes": {
                "hidden_size": 96,
                "intermediate_size": 160,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 32,
            },
            "is_tied": False,
            "d_model": 48,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 80,
            "encoder_layers": 1,
            "downsample_hidden_size": 8,
        },
        save_nested,
    ),
    "a key for each query, heads of 128": (
        {"text_sizes": {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}},
        save_flat,
    ),
    "windows of 4 s": ({"n_window_infer": 400}, save_nested),
    "resized vocabulary": ({"text_sizes": {"vocab_size": 771}, "is_tied": False}, save_flat),
}


def saved(folder, sizes, save):
    reference = reference_model(reference_config(**sizes))
    return reference, save(reference, folder)


def assert_equal(checkpoint, reference, **options):
    """Greedy tokens and log-probabilities of two clips equal those of transformers."""
    clips = [noise(1.23), noise(9.5, seed=1)]
    with engine(checkpoint, **OPTIONS | options) as llm:
        outputs = generate(llm, [request(clip) for clip in clips])
    for output, clip in zip(outputs, clips, strict=True):
        assert_same(output, logprobs_by_transformers(reference, output, clip))


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_equals_transformers(shape, tmp_path):
    reference, checkpoint = saved(tmp_path, *SHAPES[shape])
    assert_equal(checkpoint, reference)


def test_a_missing_head_is_the_embedding(tmp_path):
    """As quantizers save them: the head is left out, and the config does not say tied."""
    reference, checkpoint = saved(tmp_path, {}, save_flat)
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    text["tie_word_embeddings"] = False
    edit_config(checkpoint, tie_word_embeddings=False, text_config=text)
    assert_equal(checkpoint, reference)
