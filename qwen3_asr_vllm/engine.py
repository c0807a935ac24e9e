# SPDX-License-Identifier: Apache-2.0
"""What vLLM's engine is asked and what it answers, in the words of ``transcription.py``.

    EngineRequest -> engine_prompt(), sampling_params() -> vLLM -> read_output() -> EngineOutput

The same for ``LLM`` in this process and for the asynchronous engine of a server.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import ENGINE_PARENT, end_with_parent
from .decoding import LOOP_MAX_PATTERN, LOOP_MIN_COUNT, Decoding
from .geometry import SAMPLE_RATE
from .languages import LANGUAGES
from .transcript import Token
from .transcription import EngineOutput, EngineRequest

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams


def engine_prompt(request: EngineRequest) -> dict[str, Any]:
    audio = {"audio": (request.waveform, SAMPLE_RATE)}
    return {"prompt": request.prompt, "multi_modal_data": audio}


def slot_ids(tokenizer: Any) -> dict[str, int]:
    """The first token of each language's name, and of "None", as it follows "language"."""
    names = ("None", *LANGUAGES.values())
    return {name: tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names}


def sampling_params(
    decoding: Decoding, ids: Mapping[str, int], base: SamplingParams | None = None
) -> SamplingParams:
    """vLLM's parameters of one request; ``base`` is what a user wants of all, else greedy.

    ``ids`` are those of ``slot_ids``: vLLM scores tokens, so a name at the language slot counts by
    its first. Their scores come with every token of the answer; vLLM has no other way.
    """
    from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

    made = SamplingParams(temperature=0.0, max_tokens=None) if base is None else base.clone()
    made.max_tokens = min(decoding.max_tokens, made.max_tokens or decoding.max_tokens)
    if decoding.repetition_penalty > 1:
        made.repetition_penalty = max(decoding.repetition_penalty, made.repetition_penalty)
    made.repetition_detection = RepetitionDetectionParams(
        max_pattern_size=LOOP_MAX_PATTERN, min_count=LOOP_MIN_COUNT
    )
    if decoding.slot_names:
        made.logprob_token_ids = sorted({ids[name] for name in decoding.slot_names})
    elif decoding.wants_logprobs:
        made.logprobs = 0  # of the token that is written, and no other
    made.flat_logprobs = made.num_logprobs is not None
    return made


class Answer:
    """The engine's answer to one request, which comes whole or in pieces."""

    def __init__(self, decoding: Decoding, ids: Mapping[str, int]) -> None:
        self._slot_ids = {name: ids[name] for name in decoding.slot_names}
        self._has_logprobs = decoding.wants_logprobs or bool(self._slot_ids)
        self._output = EngineOutput("")
        self._is_before_slot = True
        self.tokens: list[Token] = []

    def push(self, completion: CompletionOutput) -> None:
        for scores in completion.logprobs or ():
            id, chosen = next(iter(scores.items()))
            if self._is_before_slot:
                self._read_slot(scores)
            self.tokens.append(Token(id, chosen.decoded_token or "", chosen.logprob))
        self._output = replace(
            self._output,
            text=self._output.text + completion.text,
            finish_reason=completion.finish_reason,
        )

    def output(self, *, shown: str = "") -> EngineOutput:
        """``shown`` is as much of the text as somebody has seen."""
        tokens = tuple(self.tokens) if self._has_logprobs else None
        return replace(self._output, tokens=tokens, shown=shown)

    def _read_slot(self, scores: Mapping[int, Logprob]) -> None:
        """The scores at the place where the language is named, if this is it."""
        header = "".join(token.text for token in self.tokens).strip()
        if header == "language":
            slot = {n: scores[id].logprob for n, id in self._slot_ids.items() if id in scores}
            self._output = replace(self._output, slot=slot)
        self._is_before_slot = header != "language" and "language".startswith(header)


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Engines that are started here end with this process, even where it is killed.

    Not those of other threads: for Linux, a child's parent is a thread, and threads end early.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    os.environ[ENGINE_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[ENGINE_PARENT]


if hasattr(os, "register_at_fork"):  # a forked engine does not load plugins; a spawned one does
    os.register_at_fork(after_in_child=end_with_parent)
