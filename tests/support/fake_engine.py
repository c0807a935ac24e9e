# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vLLM's ``AsyncLLM``, for routes that are tested without an engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from copy import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from qwen3_asr_vllm.prompt import PUBLISHED, TextProtocol, control_tokens

from .checkpoints import CHECKPOINT

ENGLISH = "language English<asr_text>"
PROMPT = [1, 2, 3]  # tokens of a rendered prompt
ROUND = " and round" * 12  # an answer that ends so is a repetition loop


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@cache
def protocol() -> TextProtocol:
    """The published protocol, with the tokenizer's tokens and one of a fine-tune."""
    special = (*tokenizer().all_special_tokens, "<|spk_0|>")
    return replace(PUBLISHED, control_tokens=control_tokens(tokenizer()), special_tokens=special)


class FakeEngine:
    """Answers each request with the next of ``answers``, in pieces of three characters.

    ``finish_reason`` ends each answer, unless it is a loop. An answer that is an exception is
    raised.
    """

    errored = False

    def __init__(
        self, *answers: str | Exception, max_num_seqs: int = 64, finish_reason: str = "stop"
    ) -> None:
        self.answers = answers
        self.finish_reason = finish_reason
        self.asked: list[Any] = []  # (prompt, sampling parameters, options)
        self.running = self.most_running = self.aborted = 0
        self.request_states: dict[str, Any] = {}
        self.output_processor = SimpleNamespace(
            request_states=self.request_states, external_req_ids=defaultdict(list)
        )
        self.input_processor = None
        self.model_config = SimpleNamespace(
            generation_config="vllm",
            override_generation_config={},
            try_get_generation_config=dict,
            is_encoder_decoder=False,
            max_model_len=4096,
            logits_processors=["of.an:Operator"],
        )
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, policy="priority")
        )
        self.renderer = SimpleNamespace(render_cmpl_async=self.render, get_tokenizer=tokenizer)

    async def render(self, prompts: Any) -> Any:
        return prompts

    def check_admission(self, n: int) -> None:
        pass

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        answer = self.answers[len(self.asked) % len(self.answers)]
        self.asked.append((prompt, copy(params), options))
        self.output_processor.external_req_ids[request_id] = [request_id]
        self.request_states[request_id] = SimpleNamespace(stream_interval=params.stream_interval)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for piece in self.pieces(answer, params):
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def pieces(self, answer: str | Exception, params: Any) -> AsyncIterator[Any]:
        if isinstance(answer, Exception):
            raise answer
        reason = "repetition" if answer.endswith(ROUND) else self.finish_reason
        size = 3 if params.output_kind.name == "DELTA" else len(answer)
        for start in range(0, len(answer), size):
            await asyncio.sleep(0)
            is_last = start + size >= len(answer)
            yield output(answer[start : start + size], reason if is_last else None)


class EndlessEngine(FakeEngine):
    """Answers with a word every 10 ms and never ends."""

    async def pieces(self, answer: str | Exception, params: Any) -> AsyncIterator[Any]:
        yield output(ENGLISH, None)
        while True:
            await asyncio.sleep(0.01)
            yield output("word ", None)


class ScoringEngine(FakeEngine):
    """Writes one text, of which it is nearly sure, after any tokens; all others are unlikely.

    Its prompts are rendered, as a beam search needs them.
    """

    def __init__(self, text: str, **generation_config: Any) -> None:
        super().__init__(text)
        ends = [tokenizer().pad_token_id, tokenizer().eos_token_id]
        config = {"eos_token_id": ends} | generation_config
        self.model_config.generation_config = "auto"
        self.model_config.try_get_generation_config = lambda: config
        self.written = [*tokenizer().encode(text, add_special_tokens=False), ends[1]]

    async def render(self, prompts: Any) -> Any:
        return [rendered() for _ in prompts]

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, options))
        yield self.scored(prompt, params, request_id)

    def scored(self, prompt: Any, params: Any, request_id: str) -> Any:
        """Return vLLM's output for a prompt that holds the tokens of a beam."""
        from vllm.logprobs import FlatLogprobs, Logprob
        from vllm.outputs import CompletionOutput, RequestOutput

        start = len(prompt["prompt_token_ids"]) - len(PROMPT)
        ids = self.written[start : start + params.max_tokens]
        scores = FlatLogprobs()
        for token in ids:
            others = params.logprob_token_ids or range(params.logprobs or 0)
            unlikely = {other: Logprob(-5.0) for other in others if other != token}
            scores.append({token: Logprob(-0.01)} | unlikely)
        reason = "stop" if ids[-1] == tokenizer().eos_token_id else "length"
        text = tokenizer().decode(ids, skip_special_tokens=True)
        completion = CompletionOutput(0, text, ids, None, scores, finish_reason=reason)
        return RequestOutput(request_id, None, PROMPT, None, [completion], finished=True)


def rendered() -> Any:
    """A rendered prompt of one clip."""
    from vllm.inputs import mm_input

    clip: Any = {"mm_kwargs": {}, "mm_hashes": {"audio": ["clip"]}, "mm_placeholders": {}}
    return mm_input(prompt_token_ids=PROMPT, **clip)


def output(text: str, finish_reason: str | None) -> Any:
    """The part of a ``RequestOutput`` that the routes read."""
    completion = SimpleNamespace(
        text=text, finish_reason=finish_reason, token_ids=[1, 2], logprobs=None
    )
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[0] * 10)
