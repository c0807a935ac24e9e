# SPDX-License-Identifier: Apache-2.0
"""The files of a Qwen3-ASR checkpoint as first published, for a tiny model.

``model.safetensors`` names tensors ``thinker.audio_tower.*`` and ``thinker.model.*``;
``config.json`` nests under ``thinker_config``. transformers trains and evaluates the same
model under its own names; ``save_checkpoint`` and ``load_checkpoint`` translate. A forced
aligner has the same files: its config alone tells it, and its head gives times for words.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRForTokenClassification,
)

NUM_BPE_TOKENS = 744  # 256 bytes and the merges
VOCAB_SIZE = 768  # rows of the embedding: some are spare, as in the published checkpoints
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|audio_start|> <|audio_end|> <|audio_pad|>"
).split()
ORDINARY_ADDED_TOKENS = ["<asr_text>", "<timestamp>"]  # they survive skip_special_tokens
TOKEN_IDS = {
    token: NUM_BPE_TOKENS + index
    for index, token in enumerate(SPECIAL_TOKENS + ORDINARY_ADDED_TOKENS)
}

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

AUDIO_CONFIG = {
    "activation_function": "gelu",
    "conv_chunksize": 500,
    "d_model": 192,
    "downsample_hidden_size": 32,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 512,
    "encoder_layers": 4,
    "max_source_positions": 1500,
    "n_window": 50,
    "n_window_infer": 800,
    "num_mel_bins": 128,
    "output_dim": 192,
    "scale_embedding": False,
}
TEXT_CONFIG = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "max_position_embeddings": 65536,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "vocab_size": VOCAB_SIZE,
}
ROPE_THETA = 1_000_000
NUM_CLASSES, CLASS_MS = 5000, 80  # of the aligner: 400 s
MROPE_SECTION = [12, 10, 10]  # half a head: [24, 20, 20] of 128 in the published checkpoints

CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='', audio='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}"
    "{%- if message.role == 'system' -%}"
    "{%- set ns.system = ns.system + message.content -%}"
    "{%- endif -%}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if message.role == 'system' and part.type == 'text' -%}"
    "{%- set ns.system = ns.system + part.text -%}"
    "{%- endif -%}"
    "{%- if part.type == 'audio' or 'audio' in part or 'audio_url' in part -%}"
    "{%- set ns.audio = ns.audio + '<|audio_start|><|audio_pad|><|audio_end|>' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_start|>system\\n' + ns.system + '<|im_end|>\\n' -}}"
    "{{- '<|im_start|>user\\n' + ns.audio + '<|im_end|>\\n' -}}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

PREPROCESSOR_CONFIG = {
    "chunk_length": 30,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen3ASRProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}

# Published name, name in transformers; the first match renames.
TENSOR_PREFIXES = (
    ("thinker.audio_tower.proj1.", "model.multi_modal_projector.linear_1."),
    ("thinker.audio_tower.proj2.", "model.multi_modal_projector.linear_2."),
    ("thinker.audio_tower.", "model.audio_tower."),
    ("thinker.model.", "model.language_model."),
    ("thinker.lm_head.", "score."),  # transcribers have none: it is tied to the embedding
)


def train_tokenizer(texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE in the manner of Qwen2's and write its four files."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=NUM_BPE_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ORDINARY_ADDED_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    _write_json(folder / "tokenizer_config.json", tokenizer_config())
    return AutoTokenizer.from_pretrained(folder)


def tokenizer_config() -> dict:
    named = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(index): {"content": token, "special": token in SPECIAL_TOKENS, **flags}
        for token, index in TOKEN_IDS.items()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        **named,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": named,
        "model_max_length": 65536,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3ASRProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def published_config(languages: Iterable[str], *, is_aligner: bool) -> dict:
    """``config.json`` with the nesting of the published checkpoints."""
    rope = {
        "interleaved": True,
        "mrope_interleaved": True,
        "mrope_section": MROPE_SECTION,
        "rope_type": "default",
        "type": "default",
    }
    text = {"model_type": "qwen3", "rope_theta": ROPE_THETA, "rope_scaling": rope} | TEXT_CONFIG
    audio = {"model_type": "qwen3_asr_audio_encoder"} | AUDIO_CONFIG
    audio["num_hidden_layers"] = audio["encoder_layers"]
    config = {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "support_languages": list(languages),
        "thinker_config": {
            "audio_config": audio,
            "audio_end_token_id": TOKEN_IDS["<|audio_end|>"],
            "audio_start_token_id": TOKEN_IDS["<|audio_start|>"],
            "audio_token_id": TOKEN_IDS["<|audio_pad|>"],
            "dtype": "float16",
            "initializer_range": 0.02,
            "model_type": "qwen3_asr",
            "text_config": text,
        },
    }
    if is_aligner:
        times = {"model_type": "qwen3_forced_aligner", "classify_num": NUM_CLASSES}
        config["thinker_config"] |= times | {"text_config": text | {"tie_word_embeddings": False}}
        config["timestamp_token_id"] = TOKEN_IDS["<timestamp>"]
        config["timestamp_segment_time"] = CLASS_MS
    return config


def generation_config() -> dict:
    return {
        "do_sample": False,
        "eos_token_id": [TOKEN_IDS["<|endoftext|>"], TOKEN_IDS["<|im_end|>"]],
        "pad_token_id": TOKEN_IDS["<|endoftext|>"],
        "temperature": 1e-06,
    }


def new_model(*, is_aligner: bool = False) -> PreTrainedModel:
    """transformers' model of these dimensions, with random weights."""
    audio = {k: v for k, v in AUDIO_CONFIG.items() if not k.startswith(("conv_", "max_source"))}
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    text = {"model_type": "qwen3", "rope_parameters": rope} | TEXT_CONFIG
    config = Qwen3ASRConfig(
        audio_config=audio,
        text_config=text,
        audio_token_id=TOKEN_IDS["<|audio_pad|>"],
        timestamp_token_id=TOKEN_IDS["<timestamp>"],
        pad_token_id=TOKEN_IDS["<|endoftext|>"],
        eos_token_id=generation_config()["eos_token_id"],
        num_labels=NUM_CLASSES,
    )
    kind = Qwen3ASRForTokenClassification if is_aligner else Qwen3ASRForConditionalGeneration
    return kind(config)


def _rename(name: str, *, to_published: bool) -> str:
    for published, transformers_name in TENSOR_PREFIXES:
        old, new = (
            (transformers_name, published) if to_published else (published, transformers_name)
        )
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"tensor {name!r} has no place in a Qwen3-ASR checkpoint.")


def save_checkpoint(
    model: PreTrainedModel, tokenizer_folder: Path, folder: Path, languages: Iterable[str]
) -> None:
    """Write every file of the checkpoint in float16, then put the folder in place at once."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer_folder, partial)
    tensors = {
        _rename(name, to_published=True): tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    is_aligner = isinstance(model, Qwen3ASRForTokenClassification)
    _write_json(partial / "config.json", published_config(languages, is_aligner=is_aligner))
    _write_json(partial / "generation_config.json", generation_config())
    _write_json(partial / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    _write_json(partial / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """Read a checkpoint back into transformers' model, float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_aligner = "classify_num" in config["thinker_config"]
    model = new_model(is_aligner=is_aligner)
    tensors = {
        _rename(name, to_published=False): tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or missing != ([] if is_aligner else ["lm_head.weight"]):
        raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model.eval()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
