# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of real dimensions whose text neither ends nor loops: it counts.

    prompt ... "\\n" -> word 17 -> word 18 -> word 19 -> ... until max_tokens

Random weights end at random or repeat a token, and this package decodes a clip again whose output
loops: two servers with random weights do unequal work. Here the embedding of token t passes
through all layers almost unchanged, and the row of the next word in ``lm_head`` is that embedding.
All matrices have the size of the published checkpoint, so a step costs what it costs there, but
for ``lm_head``, which is a matrix of its own instead of the embeddings once more.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.checkpoints import AUDIO_SIZES, CHECKPOINT, TEXT_SIZES, resized

COUNTING = ("counting", *AUDIO_SIZES)
WEIGHT = 0.02  # standard deviation of an ordinary matrix
QUIET_WEIGHT = 1e-4  # of the last matrix of a block, which adds to the residual stream


def chosen_checkpoint(model: str, folder: Path, *, ends_after: int | None = None) -> Path:
    """Return the path of ``--model``; a checkpoint that counts is written into ``folder``."""
    if model in COUNTING:
        return counting_checkpoint(model, folder, ends_after=ends_after)
    return CHECKPOINT if model == "tiny" else Path(model)


def counting_checkpoint(
    size: str, folder: Path, *, ends_after: int | None = None, seed: int = 0
) -> Path:
    """Write a checkpoint with the dimensions of ``size``, one of ``COUNTING``; returns ``folder``.

    Those of "counting" are of the tiny checkpoint. ``ends_after`` is the number of words, if they
    are to end.
    """
    if size == "counting":
        for file in CHECKPOINT.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
    else:
        resized(CHECKPOINT, folder, audio=AUDIO_SIZES[size], text=TEXT_SIZES[size])
    return write_weights(folder, ends_after=ends_after, seed=seed)


def write_weights(folder: Path, *, ends_after: int | None = None, seed: int = 0) -> Path:
    """Write weights that count for the config and the tokenizer in ``folder``, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    path = folder / "config.json"
    config = json.loads(path.read_text())
    thinker = config["thinker_config"]
    thinker["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(thinker):
        if len(shape) == 1:
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            deviation = (
                QUIET_WEIGHT if name.endswith(("o_proj.weight", "down_proj.weight")) else WEIGHT
            )
            value = torch.empty(shape).normal_(0, deviation, generator=generator)
        tensors[f"thinker.{name}"] = value.to(torch.bfloat16)
    embeddings = torch.randint(
        0, 2, tensors["thinker.model.embed_tokens.weight"].shape, generator=generator
    )
    tensors["thinker.model.embed_tokens.weight"] = (2 * embeddings - 1).to(torch.bfloat16)
    tensors["thinker.lm_head.weight"] = _successors(
        tensors["thinker.model.embed_tokens.weight"], _cycle(folder, ends_after)
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def words(folder: Path) -> list[int]:
    """Return the tokens that are words or parts of words, in the order of the counting."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [id for token, id in vocabulary.items() if re.fullmatch("Ġ?[A-Za-z]+", token)]


def _cycle(folder: Path, ends_after: int | None) -> list[int]:
    """Return the tokens that follow each other, the first after the last."""
    if ends_after is None:
        return words(folder)
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return [*words(folder)[:ends_after], end[0] if isinstance(end, list) else end]


def _successors(embeddings: Any, ids: list[int]) -> Any:
    """Build ``lm_head``, (vocabulary, hidden): the row of each word is what precedes it.

    The first word follows any token that is no word, such as the end of the prompt.
    """
    import torch

    head = torch.zeros_like(embeddings)
    for before, after in zip(ids, [*ids[1:], ids[0]], strict=True):
        head[after] = embeddings[before]
    return head


def _shapes(thinker: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a thinker, as published checkpoints name them."""
    audio, text = thinker["audio_config"], thinker["text_config"]
    yield from _audio_shapes(audio)
    hidden, heads, key_heads = (
        text[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    size, inner = text["head_dim"], text["intermediate_size"]
    yield "model.embed_tokens.weight", (text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", (hidden,)
        for norm in ("q_norm", "k_norm"):
            yield f"{block}.self_attn.{norm}.weight", (size,)
        yield f"{block}.self_attn.q_proj.weight", (heads * size, hidden)
        for name in ("k_proj", "v_proj"):
            yield f"{block}.self_attn.{name}.weight", (key_heads * size, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, heads * size)
        for name in ("gate_proj", "up_proj"):
            yield f"{block}.mlp.{name}.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def _audio_shapes(audio: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, channels = audio["d_model"], audio["downsample_hidden_size"]
    for number in (1, 2, 3):
        yield f"audio_tower.conv2d{number}.weight", (channels, 1 if number == 1 else channels, 3, 3)
        yield f"audio_tower.conv2d{number}.bias", (channels,)
    yield "audio_tower.conv_out.weight", (width, channels * audio["num_mel_bins"] // 8)
    for layer in range(audio["encoder_layers"]):
        block = f"audio_tower.layers.{layer}"
        linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linear |= {
            "fc1": (audio["encoder_ffn_dim"], width),
            "fc2": (width, audio["encoder_ffn_dim"]),
        }
        for name, shape in linear.items():
            yield f"{block}.{name}.weight", shape
            yield f"{block}.{name}.bias", shape[:1]
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield from _norm(f"{block}.{norm}", width)
    yield from _norm("audio_tower.ln_post", width)
    for name, rows in (("proj1", width), ("proj2", audio["output_dim"])):
        yield f"audio_tower.{name}.weight", (rows, width)
        yield f"audio_tower.{name}.bias", (rows,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
