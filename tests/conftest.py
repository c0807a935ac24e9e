# SPDX-License-Identifier: Apache-2.0
"""What the tests share: random checkpoints built by transformers, and one vLLM per session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHECKPOINT = Path(__file__).parent / "checkpoints" / "asr"
DATA = Path(__file__).parent / "data"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    """A waveform that is nothing in particular: (samples,) float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * 16_000)
    swell = np.sin(np.linspace(0, 9 * seconds, samples)) ** 2 + 0.05
    return (0.1 * swell * rng.standard_normal(samples)).astype(np.float32)


def reference_config(**sizes: Any) -> Any:
    """transformers' own config (the flat layout), small; ``sizes`` override the audio tower."""
    from transformers.models.qwen3_asr import Qwen3ASRConfig

    special = json.loads((CHECKPOINT / "config.json").read_text())["thinker_config"]
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
    }
    return Qwen3ASRConfig(
        audio_config=audio | {"output_dim": text["hidden_size"]},
        text_config=text | {"model_type": "qwen3", "tie_word_embeddings": True},
        audio_token_id=special["audio_token_id"],
        tie_word_embeddings=True,
    )


def reference_model(config: Any, *, seed: int = 0) -> Any:
    """transformers' own model with random weights, float32; large enough to disagree by."""
    import torch
    from transformers.models.qwen3_asr import Qwen3ASRForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen3ASRForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def save_flat(model: Any, path: Path) -> Path:
    """The layout of ``Qwen/Qwen3-ASR-*-hf``."""
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    model.save_pretrained(path)
    Qwen3ASRFeatureExtractor().save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(CHECKPOINT / name, path)
    return path


def save_nested(model: Any, path: Path) -> Path:
    """The layout of ``Qwen/Qwen3-ASR-*``: thinker_config, and tensors under ``thinker.``."""
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
    (path / "config.json").write_text(json.dumps(nested))
    renames = {
        "model.audio_tower.": "thinker.audio_tower.",
        "model.multi_modal_projector.linear_1.": "thinker.audio_tower.proj1.",
        "model.multi_modal_projector.linear_2.": "thinker.audio_tower.proj2.",
        "model.language_model.": "thinker.model.",
        "lm_head.": "thinker.lm_head.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old in renames if name.startswith(old))
        tensors[name.replace(old, renames[old], 1)] = tensor.contiguous().clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def vllm_parallel() -> Iterator[None]:
    """One rank, so that vLLM's parallel layers can be built without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig()):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield


@contextmanager
def engine(model: Path, *, in_process: bool = True, **options: Any) -> Iterator[Any]:
    """A real vLLM engine on the CPU in float32; in this process it starts in half the time."""
    import torch
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(not in_process)))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks outnumber memory nodes
        defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        llm = LLM(str(model), **defaults | {"max_num_seqs": 16} | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        torch.set_num_threads(2)  # the engine in this process pins them
