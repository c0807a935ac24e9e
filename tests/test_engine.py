# SPDX-License-Identifier: Apache-2.0
"""Requests in vLLM's words, and its answers in ours: with vLLM's own classes, without an engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from support.audio import heldout
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm.decoding import (
    LOOP_MAX_PATTERN,
    LOOP_MIN_COUNT,
    LOOP_PENALTY,
    Decoding,
    max_new_tokens,
)
from qwen3_asr_vllm.engine import (
    OutputCollector,
    capture_sizes,
    engine_defaults,
    graph_options,
    language_token_ids,
    load_engine,
    sampling_params,
)
from qwen3_asr_vllm.languages import LANGUAGES

pytestmark = pytest.mark.vllm

NAMES = ("None", "English", "German")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def verify(tokenizer):
    """Verify parameters as vLLM does for a new request."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(CHECKPOINT), max_model_len=1024).create_engine_config()
    rest = config.speculative_config, config.structured_outputs_config, tokenizer
    return lambda params: params.verify(config.model_config, *rest)


def completions(tokenizer, params, text):
    """The completions of vLLM, token by token; a token scores a thousandth of its id."""
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    request = SimpleNamespace(sampling_params=params)
    processor = LogprobsProcessor.from_new_request(tokenizer, request)
    for token in [*tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|im_end|>")]:
        scored = np.array([[token, *(params.logprob_token_ids or ())]])
        processor._update_sample_logprobs(
            LogprobsLists(scored, -scored / 1000, np.array([1]), None)
        )
        yield SimpleNamespace(
            text=tokenizer.decode([token], skip_special_tokens=True),
            finish_reason=None,
            logprobs=processor.logprobs[-1:],
        )


def test_vllm_takes_the_parameters_of_every_request(tokenizer, verify):
    ids = language_token_ids(tokenizer, LANGUAGES)
    for decoding in (
        Decoding(100),
        Decoding(100, LOOP_PENALTY),
        Decoding(100, wants_logprobs=True),
        Decoding(100, wants_logprobs=True, scored_languages=("None", *LANGUAGES.values())),
    ):
        verify(sampling_params(decoding, ids))


def test_user_options_stay_within_the_policy():
    from vllm import SamplingParams

    base = SamplingParams(temperature=0.5, max_tokens=50, repetition_penalty=0.9, seed=1)
    made = sampling_params(Decoding(100), {}, base)
    assert (made.temperature, made.max_tokens, made.seed) == (0.5, 50, 1)
    assert made.repetition_penalty == 0.9 and made.repetition_detection is not None
    made = sampling_params(Decoding(20, LOOP_PENALTY), {}, base)
    assert (made.max_tokens, made.repetition_penalty) == (20, LOOP_PENALTY)
    assert (base.max_tokens, base.repetition_detection) == (50, None)


# repetition loops -----------------------------------------------------------------------------


def loops(tokens, max_tokens, **changed):
    """Whether vLLM stops these tokens as a loop, with the parameters of a request."""
    from vllm.v1.core.sched.utils import check_sequence_repetition

    params = sampling_params(Decoding(max_tokens), {}).repetition_detection
    return check_sequence_repetition(tokens, replace(params, **changed))


@pytest.fixture(scope="module")
def spoken(tokenizer):
    """The tokens of all recordings, one after the other."""
    texts = [row["text"] for row in heldout() if row["text"]]
    return [token for text in texts for token in tokenizer.encode(text)]


@pytest.mark.parametrize("clip_s", [0.5, 2, 5, 10, 20, 25, 26, 30, 45, 60, 1200])
def test_every_loop_ends_within_the_budget(spoken, clip_s):
    """Recorded words that loop after as much speech as a clip may hold: all that vLLM finds."""
    budget = max_new_tokens(clip_s)
    for spoken_per_s, size in product((0, 4, 8, 20), range(1, LOOP_MAX_PATTERN + 2)):
        speech = spoken[: int(spoken_per_s * clip_s)]
        pattern = spoken[-size:]
        tokens = (speech + pattern * budget)[:budget]
        assert loops(tokens, budget) == loops(tokens, budget, min_pattern_size=1), size
    assert not loops(spoken[:budget], budget)


@pytest.mark.parametrize("size", range(1, LOOP_MAX_PATTERN + 1))
def test_a_loop_has_at_least_twelve_copies(spoken, size):
    for clip_s in (5, 30):
        budget = max_new_tokens(clip_s)
        tokens = spoken[:3] + spoken[-size:] * (LOOP_MIN_COUNT - 1)
        assert not loops(tokens, budget)
        assert loops(tokens + spoken[-size:] * 181, budget)


def test_looking_for_loops_costs_ordinary_speech_nothing(spoken):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    for length in range(1, 108):  # half a minute of English has about 100 tokens
        loops(Counted(spoken[:length]), max_new_tokens(30))
    assert Counted.reads == 0


@pytest.mark.parametrize("scored_languages", [(), NAMES])
def test_tokens_and_language_logprobs_are_read(tokenizer, scored_languages):
    raw = "language German<asr_text>Hallo 你好."
    ids = language_token_ids(tokenizer, LANGUAGES)
    decoding = Decoding(100, wants_logprobs=True, scored_languages=scored_languages)
    params = sampling_params(decoding, ids)
    collector = OutputCollector(decoding, ids)
    for completion in completions(tokenizer, params, raw):
        collector.push(completion)
    output = collector.output(shown="Ha")
    assert (output.text, output.shown) == (raw, "Ha")
    assert "".join(token.text for token in output.tokens) == raw + "<|im_end|>"
    assert [token.logprob for token in output.tokens] == [-t.id / 1000 for t in output.tokens]
    assert output.language_logprobs == {name: -ids[name] / 1000 for name in scored_languages}


def test_scores_are_read_only_on_request(tokenizer):
    collector = OutputCollector(Decoding(100), language_token_ids(tokenizer, LANGUAGES))
    collector.push(SimpleNamespace(text="Hi.", finish_reason="stop", logprobs=None))
    output = collector.output()
    assert (output.text, output.finish_reason, output.tokens) == ("Hi.", "stop", None)


# CUDA graphs of the decoder ----


@pytest.mark.parametrize("most", [1, 5, 100, 512, 600, 2048, 8192, 10_000, 16_384])
def test_every_step_fits_a_graph(most):
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    for smaller, size in zip(sizes, sizes[1:], strict=False):
        assert size - smaller <= max(16, smaller // 4)
    assert len(sizes) <= 80


def test_small_steps_have_the_sizes_of_vllm():
    from vllm.config import VllmConfig

    compilation = SimpleNamespace(
        cudagraph_mode="PIECEWISE",
        cudagraph_capture_sizes=None,
        max_cudagraph_capture_size=512,
        post_init_cudagraph_sizes=lambda: None,
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        compilation_config=compilation,
        performance_mode="balanced",
    )
    VllmConfig._set_cudagraph_sizes(config)
    assert compilation.cudagraph_capture_sizes == capture_sizes(512)


@pytest.fixture
def on_cuda(monkeypatch):
    """The arguments of ``vllm.LLM`` where its platform claims to be an H100."""
    import vllm
    from vllm.engine import arg_utils

    gpu = vllm.platforms.current_platform
    monkeypatch.setattr(gpu, "is_cuda", lambda: True)
    monkeypatch.setattr(gpu, "is_cpu", lambda: False)
    monkeypatch.setattr(gpu, "get_device_total_memory", lambda: 80 << 30)
    monkeypatch.setattr(gpu, "get_device_name", lambda: "NVIDIA H100")
    assert arg_utils.current_platform is gpu
    monkeypatch.setattr(vllm, "LLM", lambda model, **options: options)
    return lambda **options: load_engine("some/model", options)


def test_a_gpu_captures_graphs_for_every_step(on_cuda):
    made = on_cuda()
    assert made["compilation_config"] == {"cudagraph_mm_encoder": True}
    assert made["cudagraph_capture_sizes"] == capture_sizes(16_384)
    assert on_cuda(max_num_batched_tokens=4096)["cudagraph_capture_sizes"][-1] == 4096


def test_servers_take_smaller_steps_than_batches(on_cuda):
    from vllm.usage.usage_lib import UsageContext

    made = graph_options(engine_defaults(()), UsageContext.OPENAI_API_SERVER)
    assert made == {"cudagraph_capture_sizes": capture_sizes(8192)}


@pytest.mark.parametrize(
    "given",
    [
        {"enforce_eager": True},
        {"cudagraph_capture_sizes": [1, 8]},
        {"max_cudagraph_capture_size": 512},
        {"compilation_config": {"cudagraph_mode": "NONE"}},
        {"compilation_config": 0},
        {"performance_mode": "interactivity"},
        {"speculative_config": {"method": "ngram"}},
    ],
)
def test_the_sizes_of_a_user_stay(on_cuda, given):
    made = on_cuda(**given)
    assert made.get("cudagraph_capture_sizes") == given.get("cudagraph_capture_sizes")
    assert given.items() <= made.items()


def test_a_cpu_has_no_graphs(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "LLM", lambda model, **options: options)
    assert "cudagraph_capture_sizes" not in load_engine("some/model", {})
