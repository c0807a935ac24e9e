# SPDX-License-Identifier: Apache-2.0
"""The processor: which audio vLLM accepts, and what it refuses by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.audio import noise, poisoned
from support.checkpoints import reference_config
from test_bounds import VALUES
from test_model import generate, request

from qwen3_asr_vllm.model.config import Qwen3ASRConfig
from qwen3_asr_vllm.prompt import build_prompt
from qwen3_asr_vllm.windows import Window


@pytest.fixture(scope="module")
def llm(model):
    return model.llm


@pytest.fixture(scope="module")
def parse():
    """The processor's reading of ``multi_modal_data["audio"]``."""
    from qwen3_asr_vllm.model.processor import DataParser

    return DataParser(num_mel_bins=128, target_sr=16_000, target_channels=1)._parse_audio_data


def features(value: float = 0.0) -> dict[str, torch.Tensor]:
    packed = poisoned(torch.zeros(128, 200), value)
    return {"input_audio_features": packed, "audio_feature_lengths": torch.tensor([80, 120])}


def padded_features(value: float = 0.0) -> dict[str, torch.Tensor]:
    padded = poisoned(torch.zeros(2, 128, 120), value)
    return {"input_audio_features": padded, "audio_feature_lengths": torch.tensor([80, 120])}


INPUTS = {
    "array": lambda value: poisoned(noise(1), value),
    "array of float64": lambda value: poisoned(noise(1).astype(np.float64), value),
    "array of another rate": lambda value: (poisoned(noise(1), value), 16_000),
    "one of two arrays": lambda value: [noise(1), poisoned(noise(1), value)],
    "window": lambda value: [Window(poisoned(noise(1), value), False, -np.inf)],
    "array beside a window": lambda value: [
        Window(noise(1), False, -np.inf),
        poisoned(noise(1), value),
    ],
    "features": features,
    "padded features": padded_features,
    "embeddings": lambda value: [torch.zeros(13, 64), poisoned(torch.zeros(7, 64), value)],
    "embeddings in one tensor": lambda value: poisoned(torch.zeros(2, 13, 64), value),
}


@pytest.mark.parametrize("value", [1.01e4, *VALUES[1:]])
@pytest.mark.parametrize("kind", INPUTS)
def test_hostile_input_is_refused_by_value(parse, kind, value):
    with pytest.raises(ValueError, match=r"hold.*(give|export|Send|Compute)") as error:
        parse(INPUTS[kind](value))
    assert f"{value:g}" in str(error.value)


@pytest.mark.parametrize("value", [-1.5, 0.0, 2.2])
@pytest.mark.parametrize("kind", INPUTS)
def test_ordinary_input_is_accepted(parse, kind, value):
    assert parse(INPUTS[kind](value)).get_count()


def test_a_refusal_names_time_range_and_advice(parse):
    with pytest.raises(ValueError, match=r"8\.5 at 0\.500 s; .* \[-1, 1\], .* 8 .* 32768"):
        parse(poisoned(noise(1), 8.5))


def test_integers_are_no_features(parse):
    with pytest.raises(ValueError, match=r"are torch\.int64; give float32"):
        parse({**features(), "input_audio_features": torch.zeros(128, 200, dtype=torch.int64)})


def test_empty_embeddings_are_refused(parse):
    with pytest.raises(ValueError, match="audio_embeds are empty; a clip has at least one frame"):
        parse([torch.zeros(13, 64), torch.zeros(0, 64)])


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.array([0.1] * 9000 + [np.nan], np.float32), "NaN"),
        (np.zeros(1201 * 16_000, np.float32), r"1201\.0 s; the model takes at most 1200 s"),
        (np.zeros(9000, np.int64), "array of int64; pass float"),
    ],
)
def test_bad_audio_is_refused(llm, audio, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [request(audio)])


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((80, 123), [123], r"\(80, 123\) for audio_feature_lengths \[123\]"),
        ((128, 123), [500], r"give \(128, 500\)"),
        ((2, 128, 123), [123, 124], r"\(2, 128, 123\)"),
        ((2, 128, 123), [123], r"\(2, 128, 123\)"),
    ],
)
def test_features_that_fit_nothing_are_refused(llm, shape, lengths, message):
    audio = {
        "input_audio_features": torch.zeros(shape),
        "audio_feature_lengths": torch.tensor(lengths),
    }
    prompt = build_prompt(num_audios=len(lengths))
    with pytest.raises(ValueError, match=message):
        generate(llm, [{"prompt": prompt, "multi_modal_data": {"audio": audio}}])


@pytest.mark.vllm
def test_integers_are_scaled(llm):
    waveform = noise(1.3)
    samples = np.round(waveform * 32_768).astype(np.int16)
    scaled, floats = generate(llm, [request(samples), request(samples / np.float32(32_768))])
    assert scaled.outputs[0].token_ids == floats.outputs[0].token_ids


@pytest.mark.vllm
def test_front_end_options_are_refused(llm):
    asked = request(noise(1)) | {"mm_processor_kwargs": {"padding": "max_length"}}
    with pytest.raises(ValueError, match="padding"):
        generate(llm, [asked])


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampling_rate", 8000), ("hop_length", 80), ("n_fft", 512), ("feature_size", 80)],
)
def test_another_spectrogram_is_refused(field, value):
    from qwen3_asr_vllm.model.processor import check_front_end

    thinker = Qwen3ASRConfig.from_dict(reference_config().to_dict()).thinker_config
    with pytest.raises(ValueError, match=rf"{field} is {value} in the checkpoint's"):
        check_front_end({field: value}, thinker)
