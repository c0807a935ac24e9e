# SPDX-License-Identifier: Apache-2.0
"""The processor: what it accepts, refuses by name, and sends to the encoder."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from support.audio import HELLO, noise, poisoned
from support.checkpoints import CHECKPOINT, reference_config
from test_bounds import VALUES
from test_encoder_graph import build_model, encoder  # noqa: F401  (a fixture)
from test_model import generate, request

from qwen3_asr_vllm.geometry import num_frames
from qwen3_asr_vllm.model.config import Qwen3ASRConfig
from qwen3_asr_vllm.model.log_mel import cut_chunks, widen
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
    from vllm import SamplingParams

    samples, _ = soundfile.read(HELLO, dtype="int16")
    asked = [request(samples), request(samples / np.float32(32_768))]
    params = SamplingParams(temperature=0, max_tokens=48)
    scaled, floats = llm.generate(asked, params, use_tqdm=False)
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


# to the encoder, through vLLM's own transport ---------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = ModelConfig(str(CHECKPOINT), dtype="bfloat16", max_model_len=4096)
    return MULTIMODAL_REGISTRY.create_processor(config)


def sixteen_bits(waveform):
    """The same with 16 bits a sample, as float32."""
    return (np.round(waveform * 2**15) / 2**15).astype(np.float32)


def sent(processor, waveforms):
    """The items of these clips, as the engine receives them."""
    from vllm.multimodal.inputs import MultiModalKwargsItems
    from vllm.multimodal.processing import ProcessorInputs, TimingContext
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    items = processor.info.parse_mm_data({"audio": [(w, 16_000) for w in waveforms]})
    inputs = ProcessorInputs([processor.info.audio_token_id] * len(waveforms), items)
    made = processor.apply(inputs, TimingContext(enabled=False))["mm_kwargs"]
    decode = MsgpackDecoder(MultiModalKwargsItems).decode
    return decode(MsgpackEncoder().encode(made))["audio"]


def batches(items):
    """The inputs of the model, batch by batch, as vLLM's model runner groups them."""
    from vllm.multimodal.utils import group_and_batch_mm_items

    return [batch for _, batch in group_and_batch_mm_items(items, device="cpu")]


CLIPS = [sixteen_bits(noise(3)), noise(3, seed=1), sixteen_bits(noise(2.3, seed=2)), noise(0.1)]


@pytest.mark.vllm
def test_samples_reach_the_encoder_bit_by_bit(processor):
    (batch,) = batches(sent(processor, CLIPS))
    chunks = batch["audio_chunks"]
    kinds = [torch.int16, torch.float32, torch.int16, torch.float32]
    assert [clip.dtype for clip in chunks] == kinds
    expected = np.concatenate([cut_chunks(clip, processor.info.geometry) for clip in CLIPS])
    np.testing.assert_array_equal(widen(chunks), expected)
    assert batch["audio_feature_lengths"].flatten().tolist() == [num_frames(len(c)) for c in CLIPS]


@pytest.mark.vllm
def test_the_engine_copies_no_samples(processor):
    """vLLM batches clips on the engine's thread; each stays where it was received."""
    items = sent(processor, CLIPS)
    received = [item["audio_chunks"].data[0].data_ptr() for item in items]
    (batch,) = batches(items)
    assert [clip.data_ptr() for clip in batch["audio_chunks"]] == received


@pytest.mark.vllm
def test_int16_input_is_that_of_its_floats(processor):
    integers = (CLIPS[0] * 2**15).astype(np.int16)
    ours, floats = sent(processor, [integers, CLIPS[0]])
    assert ours == floats


@pytest.mark.vllm
@torch.inference_mode()
def test_a_mixed_batch_equals_one_by_one(processor, encoder):  # noqa: F811
    model = build_model(encoder)
    items = sent(processor, CLIPS)
    (together,) = [model.embed_multimodal(**batch) for batch in batches(items)]
    for tokens, item in zip(together, items, strict=True):
        (alone,) = model.embed_multimodal(**batches([item])[0])
        torch.testing.assert_close(tokens, alone, atol=1e-5, rtol=0)
