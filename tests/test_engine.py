# SPDX-License-Identifier: Apache-2.0
"""Requests in vLLM's words, and its answers in ours: with vLLM's own classes, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm.decoding import LOOP_PENALTY, Decoding
from qwen3_asr_vllm.engine import OutputCollector, language_token_ids, sampling_params
from qwen3_asr_vllm.languages import LANGUAGES

pytestmark = pytest.mark.vllm

NAMES = ("None", "English", "German")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def verify(tokenizer):
    """What vLLM does with the parameters of a request that comes in."""
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
    ids = language_token_ids(tokenizer)
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


@pytest.mark.parametrize("scored_languages", [(), NAMES])
def test_tokens_and_language_logprobs_are_read(tokenizer, scored_languages):
    raw = "language German<asr_text>Hallo 你好."
    ids = language_token_ids(tokenizer)
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


def test_no_scores_are_read_where_none_are_wanted(tokenizer):
    collector = OutputCollector(Decoding(100), language_token_ids(tokenizer))
    collector.push(SimpleNamespace(text="Hi.", finish_reason="stop", logprobs=None))
    output = collector.output()
    assert (output.text, output.finish_reason, output.tokens) == ("Hi.", "stop", None)
