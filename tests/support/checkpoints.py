# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the two trained ones, random ones in both layouts, and transformers' own models.

Published checkpoints have the nested layout (``thinker_config``), which transformers cannot read;
its own is flat.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "asr"
ALIGNER = CHECKPOINT.with_name("aligner")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
# Prefixes of weights: flat, and nested.
PUBLISHED_NAMES = {
    "model.audio_tower.": "thinker.audio_tower.",
    "model.multi_modal_projector.linear_1.": "thinker.audio_tower.proj1.",
    "model.multi_modal_projector.linear_2.": "thinker.audio_tower.proj2.",
    "model.language_model.": "thinker.model.",
    "lm_head.": "thinker.lm_head.",
    "score.": "thinker.lm_head.",  # of a forced aligner
}

# random weights ----


def reference_config(
    *, text_sizes: dict[str, Any] | None = None, is_tied: bool = True, **sizes: Any
) -> Any:
    """transformers' own config (the flat layout), small.

    ``sizes`` override the audio tower, ``text_sizes`` the decoder; ``is_tied``: its head is its
    embedding.
    """
    from transformers.models.qwen3_asr import Qwen3ASRConfig

    special = _thinker(CHECKPOINT)
    audio = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "downsample_hidden_size": 16,
        "n_window": 50,
        "n_window_infer": 800,
    } | sizes
    text = {
        "vocab_size": special["text_config"]["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    } | (text_sizes or {})
    return Qwen3ASRConfig(
        audio_config=audio | {"output_dim": text["hidden_size"]},
        text_config=text | {"model_type": "qwen3", "tie_word_embeddings": is_tied},
        audio_token_id=special["audio_token_id"],
        timestamp_token_id=special["audio_token_id"] + 2,  # <|audio_pad|> <asr_text> <timestamp>
        tie_word_embeddings=is_tied,
    )


def reference_model(config: Any, *, seed: int = 0, num_classes: int = 0) -> Any:
    """transformers' own model with random weights, float32, large enough to show differences.

    With ``num_classes`` it is a forced aligner.
    """
    import torch
    from transformers.models import qwen3_asr

    torch.manual_seed(seed)
    architecture = qwen3_asr.Qwen3ASRForConditionalGeneration
    if num_classes:
        config.num_labels = num_classes
        architecture = qwen3_asr.Qwen3ASRForTokenClassification
    model = architecture._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def save_flat(model: Any, path: Path) -> Path:
    """Save the layout of ``Qwen/Qwen3-ASR-*-hf``."""
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    model.save_pretrained(path)
    Qwen3ASRFeatureExtractor().save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(CHECKPOINT / name, path)
    return path


def save_nested(model: Any, path: Path) -> Path:
    """Save the layout of ``Qwen/Qwen3-ASR-*``: thinker_config, and tensors under ``thinker.``."""
    from safetensors.torch import save_file

    save_flat(model, path)
    flat = json.loads((path / "config.json").read_text())
    text = flat["text_config"] | {"tie_word_embeddings": flat["tie_word_embeddings"]}
    text["rope_scaling"] = {
        "rope_type": "default",
        "mrope_section": [12, 10, 10],
        "interleaved": True,
    }
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    thinker = {"audio_token_id": flat["audio_token_id"], "audio_config": flat["audio_config"]}
    nested = {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "thinker_config": thinker | {"text_config": text},
    }
    if hasattr(model, "score"):  # published aligners differ in nothing else
        nested["timestamp_token_id"] = flat["timestamp_token_id"]
        nested["timestamp_segment_time"] = 80
        nested["thinker_config"] |= {"classify_num": model.num_labels}
    (path / "config.json").write_text(json.dumps(nested))
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old in PUBLISHED_NAMES if name.startswith(old))
        tensors[name.replace(old, PUBLISHED_NAMES[old], 1)] = tensor.contiguous().clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


# trained weights ----


def published_model(
    path: Path = CHECKPOINT,
    *,
    kind: str = "Qwen3ASRForConditionalGeneration",
    head: str = "lm_head",
    has_weights: bool = True,
    **config: Any,
) -> Any:
    """transformers' own model of a checkpoint in the nested layout, float32.

    ``kind`` is its class, ``head`` its name of the checkpoint's ``lm_head``; ``config`` overrides
    the checkpoint's. Without ``has_weights`` they are random.
    """
    from transformers.models import qwen3_asr

    flat = qwen3_asr.Qwen3ASRConfig(**_flat_config(path) | config)
    model = getattr(qwen3_asr, kind)._from_config(flat, attn_implementation="sdpa")
    if has_weights:
        missing, unexpected = model.load_state_dict(_flat_weights(path, head), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
    return model.eval()


def _thinker(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["thinker_config"]


def _flat_config(path: Path) -> dict[str, Any]:
    thinker = _thinker(path)
    text = thinker["text_config"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text.pop("rope_scaling", None)
    thinker["audio_config"].pop("model_type", None)  # its name in the nested layout
    return {
        "audio_config": thinker["audio_config"],
        "text_config": text | {"model_type": "qwen3", "rope_parameters": rope},
        "audio_token_id": thinker["audio_token_id"],
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _flat_weights(path: Path, head: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    names = {nested: flat for flat, nested in PUBLISHED_NAMES.items()}
    names["thinker.lm_head."] = f"{head}."
    weights = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        nested = max(filter(name.startswith, names), key=len)
        weights[name.replace(nested, names[nested], 1)] = tensor.float()
    return weights


# the sizes of published checkpoints ----

# From their audio_config and text_config.
AUDIO_SIZES: dict[str, dict[str, int]] = {
    "0.6B": {
        "d_model": 896,
        "encoder_layers": 18,
        "encoder_attention_heads": 14,
        "encoder_ffn_dim": 3584,
        "output_dim": 1024,
    },
    "1.7B": {
        "d_model": 1024,
        "encoder_layers": 24,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "output_dim": 2048,
    },
}
TEXT_SIZES: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}


def checkpoint_like(size: str, folder: Path) -> Path:
    """Write the tiny checkpoint with the dimensions of a published one, for random weights."""
    return resized(CHECKPOINT, folder, audio=AUDIO_SIZES[size], text=TEXT_SIZES[size])


def resized(checkpoint: Path, folder: Path, *, audio: dict[str, int], text: dict[str, int]) -> Path:
    """Write a checkpoint's tokenizer and config with other dimensions, and no weights."""
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    thinker = config["thinker_config"]
    thinker["audio_config"] |= {"num_mel_bins": 128, "downsample_hidden_size": 480} | audio
    thinker["text_config"] |= {
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 65_536,
    } | text
    thinker["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
