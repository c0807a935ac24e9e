# SPDX-License-Identifier: Apache-2.0
"""Turns of speech: the audio of a session becomes items, one for each utterance.

    bytes -> Turns.decode -> samples -> Turns.push -> Started, Speech, Stopped        Item

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
    """Samples of the open utterance: float32, 16 kHz."""

    samples: np.ndarray


@dataclass(frozen=True)
class Stopped:
    """Speech stops at a sample of the session."""

    sample: int


Event: TypeAlias = Started | Speech | Stopped


class Turns:
    """Finds the utterances in the audio of a session, in the format and turns of its config."""

    def __init__(self, wanted: Input) -> None:
        self.num_samples = 0  # samples of the whole session
        self._recent = np.empty(0, np.float32)  # audio just before speech starts
        self.configure(wanted, is_speaking=False)

    def configure(self, wanted: Input, *, is_speaking: bool) -> None:
        """Set the audio format and the turn detection from now on."""
        turns = wanted.turn_detection
        self._pcm = wanted.format.pcm
        self._activity: VoiceActivity | None = turns.activity if turns else None
        self._padding_ms = 0
        if turns and self._activity:
            self._padding_ms = turns.prefix_padding_ms + self._activity.onset_ms
        self._since = self.num_samples
        self.is_speaking = self._activity is not None and is_speaking
        if self._activity:
            self._activity.is_speech = self.is_speaking
        else:
            self._recent = np.empty(0, np.float32)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the next bytes; returns samples, float32 at 16 kHz."""
        return self._pcm.push(data)

    def flush(self) -> np.ndarray:
        """Return the samples that the resampler still holds."""
        return self._pcm.finish()

    def push(self, samples: np.ndarray) -> Iterator[Event]:
        """Yield the turns in these samples, and the samples of utterances, in order."""
        start = self.num_samples
        self.num_samples += len(samples)
        if self._activity is None:
            yield Speech(samples)
            return
        for turn in self._activity.push(samples):
            end = self._since + turn.sample
            cut = min(max(end - start, 0), len(samples))
            yield from self._between(samples[:cut])
            samples, start = samples[cut:], start + cut
            if turn.is_speech and not self.is_speaking:
                self.is_speaking = True
                padding, self._recent = self._recent, np.empty(0, np.float32)
                yield Started(max(0, start - len(padding)), padding)
            elif not turn.is_speech and self.is_speaking:
                self.is_speaking = False
                yield Stopped(end)
        yield from self._between(samples)

    def end_turn(self) -> None:
        """End the turn: later speech starts another one."""
        self.is_speaking = False
        if self._activity:
            self._activity.is_speech = False

    def clear(self) -> None:
        """Discard the audio that belongs to no item yet."""
        self._pcm.finish()
        self._recent = np.empty(0, np.float32)
        self.end_turn()

    def _between(self, samples: np.ndarray) -> Iterator[Event]:
        """Yield speech; without speech, keep the latest samples as padding."""
        if self.is_speaking:
            yield Speech(samples)
            return
        recent = np.concatenate([self._recent, samples])
        self._recent = recent[max(0, len(recent) - self._padding_ms * SAMPLE_RATE // 1000) :]


class Item:
    """One utterance: the reader appends samples, the worker transcribes them."""

    def __init__(self, stream: Stream, *, model: str | None, on_taken: Callable[[], None]) -> None:
        self.id = f"item_{uuid4().hex[:24]}"
        self.stream = stream
        self.model = model
        self.num_samples = 0
        self.prompt_tokens = self.output_tokens = 0
        self.is_committed = self.is_dropped = self.is_decoding = False
        self.committed_at = 0.0
        self.task: asyncio.Task[None] | None = None  # the worker's task for this item
        self._waiting: list[np.ndarray] = []  # samples not yet in the stream
        self._wanted: dict[str, Any] | None = None  # options that the stream does not have yet
        self._changed = asyncio.Event()
        self._on_taken = on_taken

    @property
    def num_waiting(self) -> int:
        """Return the number of samples that no engine request has taken yet."""
        return self.stream.num_waiting + sum(map(len, self._waiting))

    def append(self, samples: np.ndarray) -> None:
        self.num_samples += len(samples)
        if not self.is_dropped:
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

    def cancel(self) -> None:
        """Stop transcribing: the client has cleared the item."""
        self.drop()
        if self.task:
            self.task.cancel()

    async def next_request(self) -> StreamRequest | None:
        """Return the next engine request once there is one; None once the text is complete."""
        while True:
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
            request = await asyncio.to_thread(self.stream.request)
            self._on_taken()
            if request:
                return request
            if self.stream.is_done:
                return None
            await self._changed.wait()

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
