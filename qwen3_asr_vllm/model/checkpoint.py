# SPDX-License-Identifier: Apache-2.0
"""Checks of a checkpoint while it is loaded: its config, and the shapes of its tensors.

Each refusal is a ValueError of one line that names the field of ``config.json`` or the tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from vllm.model_executor.layers.activation import get_act_fn

from .config import Qwen3ASRThinkerConfig


def check_dimensions(config: Qwen3ASRThinkerConfig) -> None:
    """Refuse a config that encoder and decoder cannot be built from."""
    audio, text = config.audio_config, config.text_config
    audio.geometry  # noqa: B018  (refuses windows that do not hold whole chunks)
    if audio.output_dim != text.hidden_size:
        raise ValueError(
            f"audio_config.output_dim is {audio.output_dim}, but text_config.hidden_size is "
            f"{text.hidden_size}: audio tokens must have the decoder's size."
        )
    if audio.d_model % audio.encoder_attention_heads:
        raise ValueError(
            f"audio_config.d_model is {audio.d_model}; it must be a multiple of "
            f"encoder_attention_heads = {audio.encoder_attention_heads}."
        )
    if audio.d_model % 2:
        raise ValueError(
            f"audio_config.d_model is {audio.d_model}; sinusoidal positions need it even."
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"text_config.num_attention_heads is {text.num_attention_heads}; it must be a "
            f"multiple of num_key_value_heads = {text.num_key_value_heads}."
        )
    _check_functions(config)


def _check_functions(config: Qwen3ASRThinkerConfig) -> None:
    audio, text = config.audio_config, config.text_config
    if text.hidden_act != "silu":
        raise ValueError(
            f"text_config.hidden_act is {text.hidden_act!r}; a Qwen3 decoder needs 'silu'."
        )
    try:
        get_act_fn(audio.activation_function)
    except ValueError as error:
        raise ValueError(
            f"audio_config.activation_function is {audio.activation_function!r}, which vLLM does "
            "not have; published checkpoints have 'gelu'."
        ) from error
    if audio.scale_embedding:
        raise ValueError(
            "audio_config.scale_embedding is true; no Qwen3-ASR encoder scales its input. "
            "Set it to false."
        )


Fields = tuple[str, int]  # the fields that give the size of one dimension, and that size


def checked_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], config: Qwen3ASRThinkerConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors of either layout on; refuse one that the config gives another shape.

    Packed and integer weights are left to the quantization method.
    """
    tower, decoder = _tower_shapes(config), _decoder_shapes(config)
    for name, tensor in weights:
        shapes = tower if "audio_tower" in name or "multi_modal" in name else decoder
        _check_layer(name, shapes["layers"][0])
        sizes = shapes.get(".".join(name.split(".")[-2:]), ())
        for (fields, size), given in zip(sizes, tensor.shape, strict=False):
            if size != given and tensor.is_floating_point():
                raise ValueError(
                    f"{fields} is {size} in the config, but {given} in the checkpoint's {name}; "
                    "take config.json from the checkpoint's publisher."
                )
        yield name, tensor


def _check_layer(name: str, layers: Fields) -> None:
    fields, num_layers = layers
    index = re.search(r"\.layers\.(\d+)\.", name)
    if index and int(index[1]) >= num_layers:
        raise ValueError(
            f"{fields} is {num_layers} in the config, but the checkpoint has {name}; "
            "take config.json from the checkpoint's publisher."
        )


def _tower_shapes(config: Qwen3ASRThinkerConfig) -> dict[str, tuple[Fields, ...]]:
    """Return the shapes of the tower's matrices, by the end of their names."""
    audio = config.audio_config
    channels, num_bins = audio.downsample_hidden_size, math.ceil(audio.num_mel_bins / 8)
    d_model = ("audio_config.d_model", audio.d_model)
    output = ("audio_config.output_dim", audio.output_dim)
    return {
        "layers": (("audio_config.encoder_layers", audio.encoder_layers),),
        "conv2d1.weight": (("audio_config.downsample_hidden_size", channels),),
        "conv_out.weight": (
            d_model,
            ("audio_config.downsample_hidden_size x num_mel_bins / 8", channels * num_bins),
        ),
        "fc1.weight": (("audio_config.encoder_ffn_dim", audio.encoder_ffn_dim), d_model),
        "proj2.weight": (output, d_model),
        "linear_2.weight": (output, d_model),
    }


def _decoder_shapes(config: Qwen3ASRThinkerConfig) -> dict[str, tuple[Fields, ...]]:
    """Return the shapes of the decoder's matrices, by the end of their names."""
    text = config.text_config
    hidden = ("text_config.hidden_size", text.hidden_size)
    vocabulary = ("text_config.vocab_size", text.vocab_size)
    queries, keys = text.num_attention_heads, text.num_key_value_heads
    head = vocabulary if config.classify_num is None else ("classify_num", config.classify_num)
    return {
        "layers": (("text_config.num_hidden_layers", text.num_hidden_layers),),
        "embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (head, hidden),
        "q_proj.weight": (
            ("text_config.num_attention_heads x head_dim", queries * text.head_dim),
            hidden,
        ),
        "k_proj.weight": (
            ("text_config.num_key_value_heads x head_dim", keys * text.head_dim),
            hidden,
        ),
        "gate_proj.weight": (
            ("text_config.intermediate_size", text.intermediate_size),
            hidden,
        ),
    }


def check_fused_parts(names: set[str], packed: Mapping[str, list[str]]) -> None:
    """Raise ValueError where the checkpoint lacks a part of a fused matrix (q, k, v; gate, up)."""
    for parts in packed.values():
        # a KV cache has scales for k and v alone, with names like k_proj.k_scale
        pattern = re.compile(rf"\.(?:{'|'.join(parts)})\.(?=(?:weight|bias|qweight)(?:_packed)?$)")
        groups = {pattern.sub(".{}.", name) for name in names if pattern.search(name)}
        wanted = {group.replace("{}", part) for group in groups for part in parts}
        if missing := sorted(wanted - names):
            raise ValueError(
                f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing in all); "
                "download it again."
            )
