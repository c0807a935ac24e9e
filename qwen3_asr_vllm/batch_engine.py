# SPDX-License-Identifier: Apache-2.0
"""The engine of a ``Batcher``: a ``vllm.LLM``, with an aligner and a diarizer beside it.

EngineRequest       -> vllm.LLM
AlignmentRequest    -> aligner, when the engine is stepped
DiarizationRequest  -> diarizer, in a thread
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from .alignment import AlignmentOutput, AlignmentRequest
from .diarizers import Diarizer, DiarizerThread
from .engine import (
    OutputCollector,
    default_params,
    engine_prompt,
    language_token_ids,
    raising_engine_died,
    sampling_params,
)
from .languages import Languages
from .rounds import Steps
from .speakers import DiarizationRequest
from .streaming import StreamRequest
from .transcription import EngineOutput, EngineRequest

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    from .beam_requests import BeamSearcher


class Aligner(Protocol):
    """Times the words of requests."""

    def time_units(self, requests: Sequence[AlignmentRequest]) -> list[AlignmentOutput]: ...


class BatchEngine:
    """The engine of a ``Batcher``: a ``vllm.LLM``, its aligner and its diarizer.

    Batchers may share it.
    """

    def __init__(
        self,
        llm: Any,
        aligner: Aligner | None,
        languages: Languages,
        diarizer: Diarizer | None = None,
    ) -> None:
        self._llm, self._aligner = llm, aligner
        self._diarizations = DiarizerThread(diarizer)
        self.capacity: int = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._language_token_ids = language_token_ids(llm.get_tokenizer(), languages)
        self._params = default_params(llm.model_config)
        # By request id, to call with the output of vLLM.
        self._waiting: dict[str, Callable[[RequestOutput], None]] = {}
        self._to_align: dict[str, tuple[AlignmentRequest, Callable[[AlignmentOutput], None]]] = {}
        self._numbers = count()

    def submit(
        self,
        request: EngineRequest | AlignmentRequest | DiarizationRequest,
        deliver: Callable[[Any], None],
    ) -> str:
        from vllm.exceptions import VLLMValidationError

        if isinstance(request, DiarizationRequest):
            request_id = f"diarize-{next(self._numbers)}"
            self._diarizations.submit(request_id, request, deliver)
            return request_id
        if isinstance(request, AlignmentRequest):
            request_id = f"align-{next(self._numbers)}"
            self._to_align[request_id] = request, deliver
            return request_id
        collector = OutputCollector(request.decoding, self._language_token_ids)

        def finish(output: RequestOutput) -> None:
            collector.push(output.outputs[0])
            deliver(collector.output())

        try:
            if request.decoding.beams:
                return self._search(request, finish)
            params = self._params_of(request)
            (internal_id,) = self._llm.enqueue(engine_prompt(request), params, use_tqdm=False)
        except VLLMValidationError as error:  # such as a clip that is longer than max_model_len
            raise ValueError(str(error)) from error
        request_id = internal_id.partition("-")[0]  # the id in the outputs of vLLM
        self._waiting[request_id] = finish
        return request_id

    def answer(self, request: StreamRequest) -> EngineOutput:
        """Return the output of one request of a stream, while no recordings are transcribed."""
        params = self._params_of(request)
        with raising_engine_died():
            (output,) = self._llm.generate(request.engine_prompt, params, use_tqdm=False)
        collector = OutputCollector(request.decoding, self._language_token_ids)
        collector.push(output.outputs[0])
        return collector.output()

    def _params_of(self, request: EngineRequest | StreamRequest) -> SamplingParams:
        return sampling_params(request.decoding, self._language_token_ids, self._params)

    def _search(self, request: EngineRequest, finish: Callable[[RequestOutput], None]) -> str:
        """Start a beam search; the ids of its requests start with the id that is returned."""
        prompt = self._render(engine_prompt(request))
        steps = Steps(self._searcher.search(prompt, request.decoding))
        search_id = f"beams{next(self._numbers)}"
        outputs: dict[int, RequestOutput] = {}

        def start() -> None:
            outputs.clear()
            for index, (continued, params) in enumerate(steps.requests):
                request_id = f"{search_id}-{next(self._numbers)}"
                lora = self._llm._resolve_mm_lora(continued, None)  # as LLM does
                self._llm.llm_engine.add_request(request_id, continued, params, lora_request=lora)
                self._waiting[request_id] = partial(take, index)

        def take(index: int, output: RequestOutput) -> None:
            outputs[index] = output
            if len(outputs) < len(steps.requests):
                return
            steps.send([outputs[i] for i in range(len(outputs))])
            if steps.requests:
                start()
            else:
                finish(steps.result)

        start()
        return search_id

    def _render(self, prompt: dict[str, Any]) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        parsed = parse_model_prompt(self._llm.model_config, prompt)
        return self._llm.renderer.render_cmpl([parsed])[0]

    @cached_property
    def _searcher(self) -> BeamSearcher:
        from .beam_requests import BeamSearcher

        tokenizer = self._llm.get_tokenizer()
        return BeamSearcher.of(self._llm.model_config, tokenizer, self._language_token_ids)

    def step(self) -> None:
        self._diarizations.step(is_alone=not (self._waiting or self._to_align))
        if self._to_align:  # all pending ones; the other engine runs on in its process
            self._align()
            return
        if not self._waiting:
            return
        with raising_engine_died():
            outputs = self._llm.llm_engine.step()
        for output in outputs:
            if output.finished and (finish := self._waiting.pop(output.request_id, None)):
                finish(output)

    def _align(self) -> None:
        assert self._aligner is not None  # checked by transcribe()
        request_ids = list(self._to_align)
        requests = [request for request, _ in self._to_align.values()]
        outputs = self._aligner.time_units(requests)
        for request_id, output in zip(request_ids, outputs, strict=True):
            if waiting := self._to_align.pop(request_id, None):  # None: aborted
                waiting[1](output)

    def abort(self, request_ids: list[str]) -> None:
        left = [i for i in request_ids if not self._diarizations.abort(i)]
        to_abort = [i for i in left if self._to_align.pop(i, None) is None]
        # of a beam search, all requests
        to_abort = [i for i in self._waiting if i.partition("-")[0] in to_abort]
        for request_id in to_abort:
            del self._waiting[request_id]
        self._llm.llm_engine.abort_request(to_abort)
