# SPDX-License-Identifier: Apache-2.0
"""Turns of speech: the audio of a session becomes items, one for each utterance.

    bytes -> Turns.decode -> samples -> Turns.push -> Started, Speech, Paused, Stopped     Item

``Turns`` finds where speech starts and stops, or takes all audio as speech where the client
commits by hand. An ``Item`` is one utterance, from its first sample to its commit; it has a
stream of its own, so nothing leaks into the next. This module needs neither a WebSocket nor
an engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

import numpy as np

from ..geometry import SAMPLE_RATE
from ..live_words import LiveWords
from ..streaming import Stream, StreamRequest, Update
from ..voice_activity import VoiceActivity

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from ..transcription import EngineOutput
    from .session_config import Input


@dataclass(frozen=True, eq=False)
class Started:
    """Speech starts at a sample of the session; ``padding`` is the audio just before it."""

    sample: int
    padding: np.ndarray


@dataclass(frozen=True, eq=False)
class Speech:
    """Samples of the open utterance, from a sample of the session: float32, 16 kHz."""

    sample: int
    samples: np.ndarray


@dataclass(frozen=True)
class Paused:
    """Speech pauses at a sample of the session; the turn may go on."""

    sample: int


@dataclass(frozen=True)
class Stopped:
    """Speech stops at a sample of the session."""

    sample: int


Event: TypeAlias = Started | Speech | Paused | Stopped


class Turns:
    """Finds the utterances in the audio of a session, in the format and turns of its config."""

    def __init__(self, wanted: Input) -> None:
        self.num_samples = 0  # samples of the whole session
        self._recent = np.empty(0, np.float32)  # audio just before speech starts or goes on
        self._is_paused = False
        self.configure(wanted, is_speaking=False)

    def configure(self, wanted: Input, *, is_speaking: bool) -> None:
        """Set the audio format and the turn detection from now on."""
        self._detection = turns = wanted.turn_detection
        self._pcm = wanted.format.pcm
        self._activity: VoiceActivity | None = turns.activity if turns else None
        self._padding_ms = 0
        if turns and self._activity:
            self._padding_ms = turns.prefix_padding_ms + self._activity.onset_ms
        self._since = self.num_samples
        self.is_speaking = self._activity is not None and is_speaking
        if self._activity:
            self._activity.enter(is_speech=self.is_speaking)
        else:
            self._recent = np.empty(0, np.float32)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the next bytes; returns samples, float32 at 16 kHz."""
        return self._pcm.push(data)

    def flush(self) -> Iterator[Event]:
        """Yield what the samples that the resampler still holds are, and the audio of a pause."""
        yield from self.push(self._pcm.finish())
        yield from self._resume(self.num_samples)

    @property
    def patience_s(self) -> float:
        """The longest pause of a turn in seconds."""
        return self._detection.silence_ms(0.0) / 1000 if self._detection else 0.0

    def judge(self, completeness: float) -> None:
        """Set how long this pause has to be to end the turn."""
        if self._activity and self._detection:
            self._activity.silence_ms = self._detection.silence_ms(completeness)

    def push(self, samples: np.ndarray) -> Iterator[Event]:
        """Yield the turns in these samples, and the samples of utterances, in order."""
        start = self.num_samples
        self.num_samples += len(samples)
        if self._activity is None:
            yield Speech(start, samples)
            return
        for turn in self._activity.push(samples):
            end = self._since + turn.sample
            cut = min(max(end - start, 0), len(samples))
            yield from self._between(start, samples[:cut])
            samples, start = samples[cut:], start + cut
            if turn.is_pause and turn.is_speech:
                yield from self._resume(start)
            elif turn.is_pause:
                self._is_paused = True
                yield Paused(end)
            elif turn.is_speech and not self.is_speaking:
                self.is_speaking = True
                padding, self._recent = self._recent, np.empty(0, np.float32)
                yield Started(max(0, start - len(padding)), padding)
            elif not turn.is_speech and self.is_speaking:
                self.is_speaking = self._is_paused = False
                yield Stopped(end)
        yield from self._between(start, samples)

    def end_turn(self) -> None:
        """End the turn: later speech starts another one."""
        self.is_speaking = self._is_paused = False
        if self._activity:
            self._activity.enter(is_speech=False)

    def _resume(self, start: int) -> Iterator[Event]:
        """Yield the audio of a pause, which is part of the utterance and ends at ``start``."""
        if self._is_paused:
            held, self._recent = self._recent, np.empty(0, np.float32)
            self._is_paused = False
            yield Speech(start - len(held), held)

    def clear(self) -> None:
        """Discard the audio that belongs to no item yet."""
        self._pcm.finish()
        self._recent = np.empty(0, np.float32)
        self.end_turn()

    def _between(self, start: int, samples: np.ndarray) -> Iterator[Event]:
        """Yield speech; keep a pause, and the latest samples without speech as padding."""
        if self.is_speaking and not self._is_paused:
            yield Speech(start, samples)
            return
        recent = np.concatenate([self._recent, samples])
        padding = self._padding_ms * SAMPLE_RATE // 1000
        self._recent = recent if self._is_paused else recent[max(0, len(recent) - padding) :]


class Item:
    """One utterance: the reader appends samples, the worker transcribes them."""

    def __init__(
        self,
        stream: Stream,
        *,
        start: int,
        model: str | None,
        words: LiveWords | None,
        on_taken: Callable[[], None],
    ) -> None:
        self.id = f"item_{uuid4().hex[:24]}"
        self.stream = stream
        self.start = start  # sample of the session
        self.model = model
        self.words = words
        self.num_samples = 0
        self.prompt_tokens = self.output_tokens = 0
        self.is_committed = self.is_dropped = self.is_decoding = False
        self.committed_at = 0.0
        self.task: asyncio.Task[None] | None = None  # the worker's task for this item
        self._waiting: list[np.ndarray] = []  # samples not yet in the stream
        self._wanted: dict[str, Any] | None = None  # options that the stream does not have yet
        self._judged: asyncio.Future[float] | None = None  # the completeness that is waited for
        self._changed = asyncio.Event()
        self._on_taken = on_taken

    @property
    def num_waiting(self) -> int:
        """Return the number of samples that no engine request has taken yet."""
        return self.stream.num_waiting + sum(map(len, self._waiting))

    def append(self, samples: np.ndarray) -> None:
        self.num_samples += len(samples)
        if not self.is_dropped:
            if self.words:
                self.words.push(samples)
            self._waiting.append(samples)
            self._changed.set()

    def configure(self, model: str | None, **options: Any) -> None:
        """Transcribe with other options from now on; final text stays."""
        self.model, self._wanted = model, options
        self._changed.set()

    def commit(self) -> None:
        self.is_committed = True
        self.committed_at = time.perf_counter()
        self._changed.set()

    def drop(self) -> None:
        """Drop pending and later samples: the item was cleared, or has failed."""
        self.is_dropped = True
        self._waiting.clear()
        self._changed.set()
        self._answer_judge(0.0)

    def cancel(self) -> None:
        """Stop transcribing: the client has cleared the item."""
        self.drop()
        if self.task:
            self.task.cancel()

    async def completeness(self, patience_s: float) -> float:
        """Decode all audio so far; returns the probability that it is a complete utterance.

        It is 0 if the engine does not answer within ``patience_s`` seconds.
        """
        if self.is_dropped:
            return 0.0
        self._judged = asyncio.get_running_loop().create_future()
        self._changed.set()
        try:
            return await asyncio.wait_for(self._judged, patience_s)
        except asyncio.TimeoutError:
            return 0.0
        finally:
            self._judged = None

    def _answer_judge(self, completeness: float) -> None:
        if self._judged and not self._judged.done():
            self._judged.set_result(completeness)

    async def next_request(self) -> StreamRequest | None:
        """Return the next engine request once there is one.

        None once the text is complete, or the item is dropped: ``asyncio.wait_for`` of Python 3.11
        loses a cancellation that comes together with the engine's output.
        """
        while not self.is_dropped:
            self._changed.clear()
            waiting, self._waiting = self._waiting, []
            if waiting:
                self.stream.push(np.concatenate(waiting))
            if self._wanted is not None:
                wanted, self._wanted = self._wanted, None
                self.stream.configure(**wanted)
            if self.is_committed:
                self.stream.finish()
            # a thread: a spectrogram and a hash of new audio take some milliseconds
            is_paused = self._judged is not None
            request = await asyncio.to_thread(self.stream.request, is_paused=is_paused)
            self._on_taken()
            if request:
                return request
            if is_paused:
                self._answer_judge(self.stream.completeness)
            if self.stream.is_done:
                return None
            await self._changed.wait()
        return None

    def count(self, output: RequestOutput) -> None:
        """Add the tokens of an engine output to those of the item."""
        self.prompt_tokens += len(output.prompt_token_ids or ())
        self.output_tokens += len(output.outputs[0].token_ids)

    def accept(self, output: EngineOutput) -> Update:
        """Add an engine output; returns the text that it made final."""
        self.stream.accept(
            output.text,
            output.finish_reason,
            tokens=output.tokens or (),
            language_logprobs=output.language_logprobs,
        )
        return self.stream.update()
