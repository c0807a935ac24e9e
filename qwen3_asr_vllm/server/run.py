# SPDX-License-Identifier: Apache-2.0
"""A running request: the clips of a recording on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from ..alignment import AlignmentOutput, AlignmentRequest
from ..decoding import place_tokens
from ..engine import OutputCollector
from ..languages import separator
from ..live_text import LiveText
from ..rounds import Steps
from ..speakers import DiarizationOutput, DiarizationRequest
from ..transcript import Token, Transcript
from ..transcription import CUT_OFF, EngineOutput, EngineRequest

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput


class Delta(NamedTuple):
    """The next piece of text, and its tokens if they were requested."""

    text: str
    tokens: Sequence[Token]


class ClipOutput:
    """Output of one engine request, while it is generated."""

    def __init__(self, request: EngineRequest, ids: Mapping[str, int]) -> None:
        self.inbox: asyncio.Queue[RequestOutput | Exception | None] = asyncio.Queue()
        self._request = request
        self._collector = OutputCollector(request.decoding, ids)
        self._live = LiveText(request)
        self._num_sent = 0  # tokens that ``deltas`` has yielded

    async def deltas(self, left: str) -> AsyncIterator[Delta]:
        """Yield the text once it is final, joined to the text on its ``left``."""
        async for piece in self._pieces():
            yield Delta(separator(left, piece) + piece, self._new_tokens())
            left = ""  # the first piece alone follows other text

    async def wait(self) -> None:
        """Wait for the end of the output without yielding text."""
        async for _ in self._messages():
            pass

    @property
    def output(self) -> EngineOutput:
        return self._collector.output(shown=self._live.shown)

    @property
    def is_settled(self) -> bool:
        """Return whether ``deltas`` yielded the whole text."""
        return self._live.is_settled

    async def _pieces(self) -> AsyncIterator[str]:
        finish_reason = None
        async for completion in self._messages():
            finish_reason = completion.finish_reason
            if piece := self._live.push(completion.text):
                yield piece
        if piece := self._live.finish(finish_reason):
            yield piece

    def _new_tokens(self) -> list[Token]:
        """Return the tokens of the text yielded since the last call, if they were requested."""
        if not self._collector.tokens:
            return []
        request, tokens = self._request, self._collector.tokens
        placed = place_tokens(
            tokens, self._live.shown, language=request.language, protocol=request.protocol
        )
        new = [token for _, token in placed[self._num_sent :]]
        self._num_sent = len(placed)
        return new

    async def _messages(self) -> AsyncIterator[CompletionOutput]:
        while (message := await self.inbox.get()) is not None:
            if isinstance(message, Exception):
                raise message
            self._collector.push(message.outputs[0])
            yield message.outputs[0]


@dataclass
class Run:
    """One running request: a recording, decoded by the engine some clips at a time."""

    request_id: str
    model: str
    steps: Steps[Transcript]
    generate: Callable[..., AsyncIterator[RequestOutput]]
    align: Callable[[AlignmentRequest], Awaitable[AlignmentOutput]]
    diarize: Callable[[DiarizationRequest], Awaitable[DiarizationOutput]]
    language_token_ids: Mapping[str, int]
    in_pool: Callable[..., Awaitable[Any]]  # runs a function in the decoding threads
    parallel_clips: asyncio.Semaphore  # acquired by a clip while the engine decodes it
    on_end: Callable[..., None]  # receives the transcript and the number of decoded clips
    numbers: Iterator[int] = field(default_factory=count)  # suffixes of engine request ids
    is_live: bool = False  # yield text clip by clip, not only at the end
    prompt_tokens: int = 0
    output_tokens: int = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the text in the order of the clips; afterwards ``steps.result`` is set.

        After a clip that must be decoded again, and unless ``is_live``, the rest of the text is
        yielded at the end. Closing the generator, or cancelling its consumer, aborts the pending
        engine requests.
        """
        text = ""
        num_clips = num_tokens = 0
        is_live = self.is_live
        is_one_clip = sum(isinstance(r, EngineRequest) for r in self.steps.requests) == 1
        while requests := self.steps.requests:
            beside = [r for r in requests if not isinstance(r, EngineRequest)]
            to_decode = [r for r in requests if isinstance(r, EngineRequest)]
            clips = [ClipOutput(request, self.language_token_ids) for request in to_decode]
            tasks = list(map(asyncio.create_task, map(self._decode, to_decode, clips)))
            waiting = list(map(asyncio.create_task, map(self._ask_beside, beside)))
            try:
                for clip in clips:
                    if not is_live:
                        await clip.wait()
                        continue
                    async for delta in clip.deltas(text):
                        text += delta.text
                        num_tokens += len(delta.tokens)
                        yield delta
                    is_live = clip.is_settled
                answers = iter(await asyncio.gather(*waiting))
            finally:
                for task in (*tasks, *waiting):
                    task.cancel()
            decoded = (clip.output for clip in clips)
            outputs = [next(decoded if isinstance(r, EngineRequest) else answers) for r in requests]
            if is_one_clip:  # cheaper than switching to a thread and back
                self.steps.send(outputs)
            else:
                await self.in_pool(self.steps.send, outputs)
            is_live = False
            num_clips += len(to_decode)
        self.on_end(self.steps.result, num_clips=num_clips)
        if rest := self.steps.result.text[len(text) :]:
            yield Delta(rest, written_tokens(self.steps.result)[num_tokens:])

    async def _ask_beside(
        self, request: AlignmentRequest | DiarizationRequest
    ) -> AlignmentOutput | DiarizationOutput:
        """Ask the aligner or the diarizer; the diarizer runs beside all clips."""
        if isinstance(request, DiarizationRequest):
            return await self.diarize(request)
        async with self.parallel_clips:
            return await self.align(request)

    async def _decode(self, request: EngineRequest, clip: ClipOutput) -> None:
        end: Exception | None = None
        prompt_tokens = 0
        try:
            async with self.parallel_clips:
                request_id = f"{self.request_id}-{next(self.numbers)}"
                async for output in self.generate(request, request_id=request_id):
                    prompt_tokens = len(output.prompt_token_ids or ()) or prompt_tokens
                    self.output_tokens += len(output.outputs[0].token_ids)
                    clip.inbox.put_nowait(output)
        except Exception as error:  # the reader of the clip raises it
            end = error
        self.prompt_tokens += prompt_tokens
        clip.inbox.put_nowait(end)

    @property
    def finish_reason(self) -> str:
        """Return "length" if a clip reached its token limit, else "stop"."""
        is_cut_off = any(warning.endswith(CUT_OFF) for warning in self.steps.result.warnings)
        return "length" if is_cut_off else "stop"

    @property
    def usage(self) -> dict[str, int | str]:
        """Return the tokens so far, under OpenAI's and vLLM's names."""
        return {
            "type": "tokens",
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


def written_tokens(transcript: Transcript) -> list[Token]:
    return [token for segment in transcript.segments for token in segment.tokens or ()]
