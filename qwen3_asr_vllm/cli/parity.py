# SPDX-License-Identifier: Apache-2.0
"""The model in vLLM against transformers' own classes, on the same weights.

The engine decodes greedily; transformers scores the tokens that it chose in one pass, in float32
on the CPU, from its own log-mel features on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import engine_prompt
from ..geometry import SAMPLE_RATE
from ..offline import Qwen3ASR
from ..transcription import transcribe

TOP = 40  # log-probabilities compared at each token
NUM_TOKENS = 24  # compared in each clip, at most
# The largest difference that the arithmetic of a dtype explains.
BOUNDS = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
# Prefixes of tensors: of published checkpoints, and of transformers' classes.
PREFIXES = {
    "thinker.audio_tower.proj1.": "model.multi_modal_projector.linear_1.",
    "thinker.audio_tower.proj2.": "model.multi_modal_projector.linear_2.",
    "thinker.audio_tower.": "model.audio_tower.",
    "thinker.model.": "model.language_model.",
    "thinker.lm_head.": "lm_head.",
}


def compare(model: Qwen3ASR, waveforms: Sequence[np.ndarray]) -> str:
    """Return the largest difference of two log-probabilities.

    Raises RuntimeError if it is beyond the bound of the dtype.
    """
    config = model.llm.model_config
    if config.quantization:
        return f"not compared: the checkpoint is quantized ({config.quantization})"
    try:
        reference = load_reference(_folder(config.model, config.revision))
    except ImportError as error:
        return f"not compared: {error}"
    differences = [_difference(model, reference, waveform) for waveform in waveforms]
    largest, dtype = max(differences), str(config.dtype).removeprefix("torch.")
    bound = BOUNDS[dtype]
    found = f"log-probabilities differ by {largest:.2g} at most ({dtype}; bound {bound:g})"
    if not largest <= bound:
        raise RuntimeError(f"{found}. Do: report it, with the name of the checkpoint")
    return found


def load_reference(folder: Path) -> Any:
    """Return transformers' model of a checkpoint in either layout, float32, on the CPU."""
    import torch
    from transformers.models import qwen3_asr

    config = json.loads((folder / "config.json").read_text())
    architecture = qwen3_asr.Qwen3ASRForConditionalGeneration
    if "thinker_config" not in config:
        return architecture.from_pretrained(folder, dtype=torch.float32).eval()
    made = architecture._from_config(qwen3_asr.Qwen3ASRConfig(**_flat(config["thinker_config"])))
    missing, unexpected = made.load_state_dict(_weights(folder), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"transformers lacks {unexpected}, and the checkpoint {missing}.")
    made.tie_weights()
    return made.float().eval()


def _folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(name if Path(name).is_dir() else snapshot_download(name, revision=revision))


def _flat(thinker: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' config for a published ``thinker_config``."""
    audio = {n: value for n, value in thinker["audio_config"].items() if n != "model_type"}
    text = {n: v for n, v in thinker["text_config"].items() if n not in ("rope_scaling", "dtype")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    return {
        "audio_config": audio,
        "text_config": text | {"model_type": "qwen3"},
        "audio_token_id": thinker["audio_token_id"],
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
    }


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            prefix = next(filter(name.startswith, PREFIXES))  # the longest comes first
            weights[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor.float()
    return weights


def _difference(model: Qwen3ASR, reference: Any, waveform: np.ndarray) -> float:
    """Return the largest difference at the tokens that the engine chooses for a clip."""
    import torch
    from vllm import SamplingParams

    (request,) = next(transcribe(waveform))
    num_top = min(TOP, model.llm.model_config.max_logprobs)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=num_top)
    output = model.llm.generate(engine_prompt(request), params, use_tqdm=False)[0]  # type: ignore[arg-type]
    chosen = output.outputs[0]
    ids = torch.tensor([[*output.prompt_token_ids, *chosen.token_ids]])
    with torch.inference_mode():
        embeds = reference.get_input_embeddings()(ids)
        embeds[ids == reference.config.audio_token_id] = _audio_tokens(reference, waveform)
        logits = reference(inputs_embeds=embeds).logits[0, -len(chosen.token_ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    return max(
        abs(entry.logprob - float(expected[step, token]))
        for step, top in enumerate(chosen.logprobs)
        for token, entry in top.items()
    )


def _audio_tokens(reference: Any, waveform: np.ndarray) -> Any:
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    inputs = Qwen3ASRFeatureExtractor()(
        waveform, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
    )
    features = reference.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    return features.pooler_output
