# SPDX-License-Identifier: Apache-2.0
"""Through vLLM's engine, float32 on the CPU, against transformers' own classes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from support.audio import noise
from support.checkpoints import reference_config, reference_model, save_flat, save_nested
from support.engines import engine

from qwen3_asr_vllm.model.config import Qwen3ASRConfig
from qwen3_asr_vllm.prompt import AUDIO_PLACEHOLDER, build_prompt

pytestmark = pytest.mark.vllm

CLIPS_S = (0.5, 0.99, 1, 3.05, 8, 8.01, 17.3, 31)
NUM_NEW = 12
ODD_HEADS = {"d_model": 96, "encoder_attention_heads": 3, "encoder_layers": 3}


@pytest.fixture(scope="module")
def reference():
    return reference_model(reference_config())


@pytest.fixture(scope="module")
def llm(reference, tmp_path_factory):
    checkpoint = save_nested(reference, tmp_path_factory.mktemp("nested"))
    options = {
        "max_logprobs": 40,
        "limit_mm_per_prompt": {"audio": 4},
        "enable_mm_embeds": True,
        "enable_lora": True,
        "enable_tower_connector_lora": True,
        "max_lora_rank": 8,
        "max_loras": 3,  # one more than there are: see test_adapters_share_a_batch
    }
    with engine(checkpoint, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def odd_reference():
    return reference_model(reference_config(**ODD_HEADS), seed=1)


@pytest.fixture(scope="module")
def parallel_llm(odd_reference, tmp_path_factory):
    """Two ranks, of which each holds half the decoder and, for want of a half, all 3 heads."""
    checkpoint = save_flat(odd_reference, tmp_path_factory.mktemp("flat"))
    options = {"max_logprobs": 40, "tensor_parallel_size": 2}
    with engine(checkpoint, **options) as llm:
        yield llm


def request(*audios, num_audios=None, context=""):
    prompt = build_prompt(context=context, num_audios=num_audios or len(audios))
    return {"prompt": prompt, "multi_modal_data": {"audio": list(audios)}}


def generate(llm, requests, **options):
    from vllm import SamplingParams

    lora_request = options.pop("lora_request", None)
    params = SamplingParams(
        temperature=0, max_tokens=NUM_NEW, logprobs=40, ignore_eos=True, **options
    )
    outputs = llm.generate(requests, params, use_tqdm=False, lora_request=lora_request)
    return outputs


def log_mel_by_transformers(waveform):
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    extract = Qwen3ASRFeatureExtractor()
    return extract(waveform, sampling_rate=16_000, padding="longest", return_attention_mask=True)


@torch.inference_mode()
def logprobs_by_transformers(model, output, *waveforms):
    """(NUM_NEW, vocab) for the tokens that the engine chose, in one teacher-forced pass."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    if waveforms:
        tokens = [audio_tokens_by_transformers(model, waveform) for waveform in waveforms]
        embeds[torch.tensor([ids]) == model.config.audio_token_id] = torch.cat(tokens)
    logits = model(inputs_embeds=embeds).logits[0]
    return logits.log_softmax(-1)[len(output.prompt_token_ids) - 1 : -1]


@torch.inference_mode()
def audio_tokens_by_transformers(model, waveform):
    inputs = log_mel_by_transformers(waveform)
    features = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    return features.pooler_output


def assert_same(output, expected):
    """Greedy tokens equal, and every top-40 log-probability within 1e-4."""
    assert output.outputs[0].token_ids == expected.argmax(-1).tolist()
    assert_close(output, expected, atol=1e-4)


def assert_close(output, expected, *, atol):
    """Every top-40 log-probability is within ``atol``."""
    for step, top in enumerate(output.outputs[0].logprobs):
        assert len(top) >= 40
        ours = torch.tensor([entry.logprob for entry in top.values()])
        torch.testing.assert_close(ours, expected[step, list(top)], atol=atol, rtol=0)


ENGINES = {
    "nested": ("llm", "reference"),
    "flat, two ranks, odd heads": ("parallel_llm", "odd_reference"),
}


@pytest.mark.parametrize("layout", ENGINES)
def test_tokens_and_logprobs_are_those_of_transformers(request, layout):
    llm, reference = map(request.getfixturevalue, ENGINES[layout])
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate(CLIPS_S)]
    outputs = generate(llm, [globals()["request"](w) for w in waveforms])
    for output, waveform in zip(outputs, waveforms, strict=True):
        assert_same(output, logprobs_by_transformers(reference, output, waveform))
    logprobs = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in outputs]
    assert all(abs(a - b) > 1e-3 for a, b in pairwise(logprobs))  # the audio matters


def test_several_audios_in_one_prompt(llm, reference):
    waveforms = [noise(1.2), noise(0.7, seed=1), noise(2.4, seed=2)]
    output = generate(llm, [request(*waveforms)])[0]
    assert_same(output, logprobs_by_transformers(reference, output, *waveforms))


def test_adjacent_placeholders_share_one_pair_of_marks(llm, reference):
    """Two clips inside one <|audio_start|>...<|audio_end|>, as streaming sends its windows."""
    waveforms = [noise(1.2), noise(0.7, seed=1)]
    double = AUDIO_PLACEHOLDER.replace("<|audio_pad|>", "<|audio_pad|><|audio_pad|>")
    prompt = build_prompt().replace(AUDIO_PLACEHOLDER, double)
    data = {"prompt": prompt, "multi_modal_data": {"audio": waveforms}}
    output = generate(llm, [data])[0]
    assert_same(output, logprobs_by_transformers(reference, output, *waveforms))


def test_growing_clips_reuse_finished_windows(llm, reference):
    from qwen3_asr_vllm.decoding import Decoding
    from qwen3_asr_vllm.engine import stream_parts
    from qwen3_asr_vllm.geometry import Geometry
    from qwen3_asr_vllm.streaming import StreamRequest
    from qwen3_asr_vllm.windows import GrowingClip

    config = Qwen3ASRConfig.from_dict(reference.config.to_dict()).thinker_config
    parts = stream_parts(config, llm.get_tokenizer())
    waveform = noise(27, seed=41)
    waveform[:16_000] *= 3  # the loudest moment, so that no later one moves the floor
    clip = GrowingClip(waveform, Geometry(), parts["loudest"])
    block = llm.llm_engine.vllm_config.cache_config.block_size
    for num_samples in (7 * 16_000, 9 * 16_000, 17 * 16_000, 17 * 16_000, 27 * 16_000):
        windows = clip.windows(num_samples)
        asked = StreamRequest(build_prompt(num_windows=len(windows)), windows, Decoding(NUM_NEW))
        output = generate(llm, [asked.engine_prompt])[0]
        assert_same(output, logprobs_by_transformers(reference, output, waveform[:num_samples]))
    start = output.prompt_token_ids.index(reference.config.audio_token_id)
    known = (start + 2 * 104) // block * block  # two windows were finished at 17 s
    assert output.num_cached_tokens == known > 0


def test_a_prompt_without_audio_is_plain_text(llm, reference):
    output = generate(llm, [{"prompt": "one two three"}])[0]
    assert_same(output, logprobs_by_transformers(reference, output))


@pytest.mark.parametrize("padded", [False, True])
def test_precomputed_features_equal_their_waveforms(llm, reference, padded):
    waveforms = [noise(1.23), noise(2.5, seed=1)]
    lengths = [len(w) // 160 for w in waveforms]
    features = [
        log_mel_by_transformers(w)["input_features"][0][:, :n]
        for w, n in zip(waveforms, lengths, strict=True)
    ]
    if padded:  # (clips, mels, frames): the layout of vLLM's Rust front end
        widest = max(lengths)
        features = [torch.nn.functional.pad(f, (0, widest - f.shape[1])) for f in features]
        packed = torch.stack(features)
    else:
        packed = torch.cat(features, dim=1)
    audio = {"input_audio_features": packed, "audio_feature_lengths": torch.tensor(lengths)}
    data = {"prompt": build_prompt(num_audios=2), "multi_modal_data": {"audio": audio}}
    output = generate(llm, [data])[0]
    assert_same(output, logprobs_by_transformers(reference, output, *waveforms))


def test_audio_embeddings_take_the_place_of_audio(llm, reference):
    waveforms = [noise(1.23), noise(2.5, seed=1)]
    embeds = [audio_tokens_by_transformers(reference, w).clone() for w in waveforms]
    data = {"prompt": build_prompt(num_audios=2), "multi_modal_data": {"audio": embeds}}
    output = generate(llm, [data])[0]
    assert_same(output, logprobs_by_transformers(reference, output, *waveforms))


def test_prefix_caching_reuses_audio_and_changes_nothing(llm):
    block = llm.llm_engine.vllm_config.cache_config.block_size
    asked = request(noise(30, seed=11))
    first, again = (generate(llm, [asked])[0] for _ in range(2))
    other = generate(llm, [request(noise(30, seed=12))])[0]
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == (len(again.prompt_token_ids) - 1) // block * block > 0
    assert other.num_cached_tokens == 0  # other audio, other key
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_request_batches_equal_one_by_one(llm):
    requests = [request(noise(s, seed=20 + i)) for i, s in enumerate((0.6, 9, 1.7, 0.5))]
    batch = generate(llm, requests)
    for together, asked in zip(batch, requests, strict=True):
        alone = generate(llm, [asked])[0]
        assert together.outputs[0].token_ids == alone.outputs[0].token_ids


LORA_TARGETS = {
    "thinker.model.layers.1.self_attn.q_proj": "model.language_model.layers.1.self_attn.q_proj",
    "thinker.model.layers.0.mlp.down_proj": "model.language_model.layers.0.mlp.down_proj",
    "thinker.audio_tower.layers.1.self_attn.v_proj": "model.audio_tower.layers.1.self_attn.v_proj",
    "thinker.audio_tower.layers.0.fc2": "model.audio_tower.layers.0.fc2",
}


def save_adapter(reference, path, part):
    """A PEFT adapter on the layers whose name holds ``part``, and the weights it adds."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    modules = dict(reference.named_modules())
    targets = {ours: theirs for ours, theirs in LORA_TARGETS.items() if part in ours}
    tensors, deltas = {}, {}
    for ours, theirs in targets.items():
        outputs, inputs = modules[theirs].weight.shape
        a = torch.randn(4, inputs, generator=generator) * inputs**-0.5
        b = torch.randn(outputs, 4, generator=generator) * 0.5
        tensors[f"base_model.model.{ours}.lora_A.weight"] = a
        tensors[f"base_model.model.{ours}.lora_B.weight"] = b
        deltas[theirs] = b @ a
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("part", ["thinker.model", "audio_tower"])
def test_lora_adapts_decoder_and_tower(llm, reference, tmp_path, part):
    from vllm.lora.request import LoRARequest

    deltas = save_adapter(reference, tmp_path, part)
    waveform = noise(2.2, seed=31)
    lora = LoRARequest(part, 1 + ("tower" in part), str(tmp_path))
    output = generate(llm, [request(waveform)], lora_request=lora)[0]
    plain = logprobs_by_transformers(reference, output, waveform)
    adapted = logprobs_with_adapter(reference, deltas, output, waveform)
    assert (adapted - plain).abs().max() > 0.05
    assert_same(output, adapted)


@torch.no_grad()
def logprobs_with_adapter(reference, deltas, output, waveform):
    modules = dict(reference.named_modules())
    for name, delta in deltas.items():
        modules[name].weight += delta
    adapted = logprobs_by_transformers(reference, output, waveform)
    for name, delta in deltas.items():
        modules[name].weight -= delta
    return adapted


def test_adapters_share_a_batch(llm, reference, tmp_path):
    """Each request has its own adapter, or none.

    vLLM's CPU kernels give a request without one the last slot, which therefore stays empty here.
    """
    from vllm.lora.request import LoRARequest

    deltas, loras = [{}], [None]
    for number, part in enumerate(("thinker.model", "audio_tower"), 1):
        (folder := tmp_path / str(number)).mkdir()
        deltas.append(save_adapter(reference, folder, part))
        loras.append(LoRARequest(part, number, str(folder)))
    waveforms = [noise(2.2, seed=31), noise(1.7, seed=32), noise(9.1, seed=33)]
    for step in (1, -1):  # adapters go by row
        outputs = generate(llm, list(map(request, waveforms)), lora_request=loras[::step])
        for output, waveform, delta in zip(outputs, waveforms, deltas[::step], strict=True):
            assert_same(output, logprobs_with_adapter(reference, delta, output, waveform))


def test_the_longest_clip_that_fits_is_accepted(llm):
    """78 s at 13 tokens a second fill 1024: the encoder's budget follows, not 30 s."""
    output = generate(llm, [request(noise(76))])[0]
    assert len(output.prompt_token_ids) > 13 * 76
    budget = llm.llm_engine.vllm_config.scheduler_config.max_num_encoder_input_tokens
    assert budget >= 1014


RAW = "language Cantonese<asr_text>唔係你。<asr_text>我"
UNTAGGED = "language learning is fun, language by language"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("language English<asr_text>Hello.", "Hello."),
        ("language None<asr_text>", ""),
        (RAW, "唔係你。我"),
        ("language German\nGuten Tag.", "Guten Tag."),
        (UNTAGGED, UNTAGGED),
    ],
)
def test_the_core_route_gets_clean_text(raw, text):
    """V14: in-tree loses what stands before a second tag."""
    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as architecture

    assert architecture.post_process_output(raw) == text
    for size in (1, 2, 5, 100):
        cleaner = architecture.get_streaming_post_processor_cls()()
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        deltas = [cleaner.process_delta(p, i == len(pieces) - 1) for i, p in enumerate(pieces)]
        assert "".join(deltas) == text


@pytest.mark.parametrize(("given", "seconds"), [("", 60), ("1200", 1200), ("25", 25)])
def test_the_core_route_splits_at(monkeypatch, given, seconds):
    from qwen3_asr_vllm.model import transcriber as model

    if given:
        monkeypatch.setenv("QWEN3_ASR_MAX_CLIP_S", given)
    assert model._max_clip_s(65_536) == seconds
    assert model._max_clip_s(640) == 20  # at most the context length


@pytest.mark.parametrize("given", ["0", "1201", "long"])
def test_clip_lengths_out_of_range_are_refused(monkeypatch, given):
    from qwen3_asr_vllm.model import transcriber as model

    monkeypatch.setenv("QWEN3_ASR_MAX_CLIP_S", given)
    with pytest.raises(ValueError, match=f"QWEN3_ASR_MAX_CLIP_S is '{given}'.*1 to 1200"):
        model._max_clip_s(65_536)


def test_the_tower_is_quantized_like_the_checkpoint(reference, vllm_parallel):
    """Every matrix of the encoder asks for its method, under the name that vLLM maps to.

    V18: in-tree never quantizes the tower.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from qwen3_asr_vllm.model.encoder import AudioEncoder

    class Recorder:
        online_quantization_config = None

        def get_quant_method(self, layer, prefix):
            asked.add(prefix.removeprefix("audio_tower."))
            return UnquantizedLinearMethod()

    asked: set[str] = set()
    config = Qwen3ASRConfig.from_dict(reference.config.to_dict()).thinker_config.audio_config
    AudioEncoder(config, quant_config=Recorder(), prefix="audio_tower")
    per_layer = ("self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2")
    assert asked == {"conv_out", "proj1", "proj2"} | {
        f"layers.{i}.{name}" for i in range(config.encoder_layers) for name in per_layer
    }


@pytest.mark.parametrize(
    ("module", "ours"),
    [
        ("model.multi_modal_projector.linear_1", "audio_tower.proj1"),
        ("model.audio_tower.layers.0.fc1", "audio_tower.layers.0.fc1"),
        ("thinker.audio_tower.proj2", "audio_tower.proj2"),
        ("thinker.lm_head", "language_model.lm_head"),
    ],
)
def test_spared_modules_may_have_either_name(module, ours):
    """A quantized checkpoint lists the modules that are not quantized."""
    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as architecture

    assert architecture.hf_to_vllm_mapper.apply_list([module]) == [ours]


@pytest.mark.parametrize(
    ("method", "listed", "is_quantized"),
    [("gptq", None, False), ("awq", [], False), ("awq", ["lm_head"], True), ("fp8", None, True)],
)
def test_methods_without_lists_spare_the_tower(method, listed, is_quantized):
    from types import SimpleNamespace

    from qwen3_asr_vllm.model.thinker import _tower_quantization

    config = SimpleNamespace(get_name=lambda: method, modules_to_not_convert=listed)
    assert _tower_quantization(config) is (config if is_quantized else None)
