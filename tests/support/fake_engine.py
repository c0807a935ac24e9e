# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vLLM's ``AsyncLLM``, for routes that are tested without an engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from copy import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

from .checkpoints import CHECKPOINT

ENGLISH = "language English<asr_text>"
ROUND = " and round" * 12  # an answer that ends so is a repetition loop


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


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


def output(text: str, finish_reason: str | None) -> Any:
    """The part of a ``RequestOutput`` that the routes read."""
    completion = SimpleNamespace(
        text=text, finish_reason=finish_reason, token_ids=[1, 2], logprobs=None
    )
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[0] * 10)
