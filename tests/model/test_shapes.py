# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other shapes than the published ones, through vLLM's loader and engine.

Tiny random ones, in an engine of this process; the reference is transformers' own model. vLLM's
CPU engine has no kernels for nvfp4, which is therefore not among them.
"""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.audio import noise
from support.checkpoints import (
    CHECKPOINT,
    reference_config,
    reference_model,
    save_flat,
    save_nested,
)
from support.engines import engine
from test_model import (
    NUM_NEW,
    assert_close,
    assert_same,
    audio_tokens_by_transformers,
    generate,
    logprobs_by_transformers,
    request,
)
from transformers import AutoTokenizer

from qwen3_asr_vllm.prompt import build_prompt

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


# quantized decoders; their tower is not ----

WEIGHTS = {
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "W4A16": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
}
INPUTS = {
    "fp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "token",
        "dynamic": True,
        "symmetric": True,
    },
    "W4A16": None,
}


def quantized(weight, kind):
    """The tensors of a weight as compressed-tensors stores it, and the weight that they mean."""
    from compressed_tensors.compressors import pack_to_int32

    if kind == "fp8":
        scale = weight.abs().amax(-1, keepdim=True) / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale
    groups = weight.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    stored = (groups / scale).round().clamp(-8, 7)
    tensors = {
        "weight_packed": pack_to_int32(stored.flatten(-2).to(torch.int8), 4),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, (stored * scale).flatten(-2)


def through_fp8(module, inputs):
    """Round the inputs of a layer as vLLM does before it multiplies: a scale for each token."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 448
    return (inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale


def quantize(checkpoint, reference, kind):
    """Quantize the matrices of the decoder in a checkpoint; the reference gets what they mean.

    The config spares each matrix of the tower by its name.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    spared = {name for name in tensors if "audio_tower" in name or "multi_modal" in name}
    for name in [name for name in tensors if "_proj.weight" in name and name not in spared]:
        parts, weight = quantized(tensors.pop(name), kind)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        layer = reference.get_submodule(module.replace("thinker.model.", "model.language_model."))
        layer.weight.data.copy_(weight)
        if kind == "fp8":
            layer.register_forward_pre_hook(through_fp8)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    form, weights = WEIGHTS[kind]
    scheme = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False} | weights,
        "input_activations": INPUTS[kind],
    }
    edit_config(
        checkpoint,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": scheme},
            "ignore": ["thinker.lm_head", "lm_head"]
            + sorted(name.removesuffix(".weight") for name in spared if name.endswith("weight")),
        },
    )


@pytest.mark.parametrize(
    ("kind", "save", "dtype", "atol"),
    [
        ("fp8", save_nested, "float32", 1e-4),
        ("W4A16", save_flat, "float16", 0.02),  # vLLM has none in float32
    ],
)
def test_quantized_decoder_equals_its_weights(kind, save, dtype, atol, tmp_path):
    """Log-probabilities of one step have a standard deviation of 1.5 nats."""
    sizes = {"text_sizes": {"intermediate_size": 256, "num_key_value_heads": 2}}
    reference, checkpoint = saved(tmp_path, sizes, save)
    quantize(checkpoint, reference, kind)
    clip = noise(2.2)
    eager = {"custom_ops": ["+quant_fp8"]}  # else vLLM compiles the rounding
    with engine(checkpoint, **OPTIONS, dtype=dtype, compilation_config=eager) as llm:
        (output,) = generate(llm, [request(clip)])
    assert_close(output, logprobs_by_transformers(reference, output, clip), atol=atol)


# speculative decoding ----


def save_draft(folder, reference, token):
    """An EAGLE3 head that proposes one token, whatever it reads."""
    text = reference.config.text_config
    hidden, size = text.hidden_size, 64
    folder.mkdir()
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (2 * 64, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (64, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (64, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, 2 * 64),
        "midlayer.mlp.gate_proj.weight": (96, hidden),
        "midlayer.mlp.up_proj.weight": (96, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, 96),
        "norm.weight": (hidden,),
        "lm_head.weight": (size, hidden),
    }
    generator = torch.Generator().manual_seed(3)
    tensors = {n: torch.randn(shape, generator=generator) / 16 for n, shape in shapes.items()}
    tensors["lm_head.weight"].zero_()  # the first draft token is as likely as any
    tensors["d2t"] = torch.full((size,), token)  # added to the draft token
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": text.vocab_size,
        "draft_vocab_size": size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def greedy_by_transformers(reference, clip):
    num_tokens = len(audio_tokens_by_transformers(reference, clip))
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = tokenizer.encode(build_prompt(num_windows=num_tokens))
    ids = []
    for _ in range(NUM_NEW):
        written = SimpleNamespace(token_ids=[*ids, 0])
        output = SimpleNamespace(prompt_token_ids=prompt, outputs=[written])
        ids.append(int(logprobs_by_transformers(reference, output, clip)[-1].argmax()))
    return ids


def test_eagle3_proposals_are_accepted(tmp_path):
    """The head proposes the token that the model writes most; the text stays the same."""
    sizes = {"text_sizes": {"num_hidden_layers": 8}}
    reference, checkpoint = saved(tmp_path / "target", sizes, save_nested)
    clip = noise(2.2)
    ids = greedy_by_transformers(reference, clip)
    token, count = Counter(ids).most_common(1)[0]
    draft = save_draft(tmp_path / "draft", reference, token)
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    with engine(checkpoint, **OPTIONS | options) as llm:
        (output,) = generate(llm, [request(clip)])
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert output.outputs[0].token_ids == ids
    assert_same(output, logprobs_by_transformers(reference, output, clip))
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"].value <= count
