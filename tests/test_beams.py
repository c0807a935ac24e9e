# SPDX-License-Identifier: Apache-2.0
"""The beam search, against transformers' own on random models, and its extra rule for loops."""

from __future__ import annotations

import random
from functools import cache, partial

import pytest

from qwen3_asr_vllm import beams
from qwen3_asr_vllm.beams import Hypothesis, Scored, num_scores, search
from qwen3_asr_vllm.options import Beams
from qwen3_asr_vllm.rounds import Steps

END_IDS = (3, 7)
MAX_TOKENS = 24


@cache
def logits():
    """Random logits of 32 tokens after each token, at each position: beams compete, none loops."""
    import torch

    return 3 * torch.randn(MAX_TOKENS + 1, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def reference():
    """transformers' generation over these logits."""
    import torch
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Table(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=32))
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            position = input_ids.shape[1] - 1
            return CausalLMOutput(logits=logits()[position][input_ids])

    return Table()


def searched(options, score, *, max_tokens=MAX_TOKENS):
    """Run a search whose engine scores one prefix with ``score``; count the requests."""
    steps = Steps(search(options, end_ids=END_IDS, max_tokens=max_tokens))
    num_requests = 0
    while steps.requests:
        num_requests += len(steps.requests)
        steps.send([continuation(prefix, score) for prefix in steps.requests])
    return steps.result, num_requests


def continuation(prefix, score):
    """The greedy continuation of a prefix, as an engine returns it."""
    tokens, logprobs = [], []
    while len(tokens) < prefix.max_tokens and not (tokens and tokens[-1] in END_IDS):
        logprobs.append(score((*prefix.tokens, *tokens)))
        tokens.append(max(logprobs[-1], key=logprobs[-1].get))
    return Scored(tokens, logprobs)


@cache
def likeliest(number, start, prefix):
    """The scores of the likeliest tokens after a prefix, whose first token is ``start``."""
    values, ids = logits()[len(prefix), (start, *prefix)[-1]].log_softmax(-1).topk(number)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("start", range(10, 13))
@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 0.7), (4, -1.0), (5, 0.0), (3, 3.0)])
def test_search_equals_that_of_transformers(start, width, penalty):
    import torch

    options = Beams(width, penalty)
    (expected,) = reference().generate(
        torch.tensor([[start]]),
        num_beams=width,
        length_penalty=penalty,
        early_stopping=False,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=list(END_IDS),
        pad_token_id=0,
        do_sample=False,
        use_cache=False,
    )
    found, _ = searched(options, partial(likeliest, num_scores(options, END_IDS), start))
    padding = [0] * (len(expected) - 1 - len(found.tokens))
    assert [*found.tokens, *padding] == expected[1:].tolist()
    assert found.finish_reason == ("stop" if found.tokens[-1] in END_IDS else "length")


def test_reading_ahead_only_saves_requests(monkeypatch):
    options = Beams(4)
    score = partial(likeliest, num_scores(options, END_IDS), 10)
    found, num_requests = searched(options, score)
    monkeypatch.setattr(beams, "READ_AHEAD", 1)
    alone, most_requests = searched(options, score)
    assert found == alone and num_requests < most_requests


def written(text, *, others):
    """Score a model that is sure of a text, and goes on with it after any other token."""

    def score(prefix):
        chances = random.Random(len(prefix))
        return {text[len(prefix)]: -0.02} | {other: -chances.uniform(4, 12) for other in others}

    return score


def test_a_sure_model_takes_few_requests():
    text = (*range(10, 30), END_IDS[1])
    found, num_requests = searched(Beams(4), written(text, others=(40, 41, 42)))
    assert found.tokens == text and found.finish_reason == "stop"
    assert num_requests < 2 * len(text)  # vLLM's own search sends 4 for each token, to the limit


def test_a_looping_search_ends_with_its_loop():
    text = (10, 11, *[12, 13] * 500)
    found, _ = searched(Beams(3), written(text, others=(40, 41)), max_tokens=1000)
    assert found.finish_reason == "repetition"
    assert found.tokens == text[: len(found.tokens)] and len(found.tokens) < 40


def test_the_token_limit_ends_a_search():
    found, _ = searched(Beams(2), written((*range(50, 99),), others=(40,)), max_tokens=9)
    assert found == Hypothesis(found.tokens, found.logprobs, "length")
    assert found.tokens == tuple(range(50, 59))
