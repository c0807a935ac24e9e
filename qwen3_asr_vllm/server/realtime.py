# SPDX-License-Identifier: Apache-2.0
"""``/v1/realtime``: speech over a WebSocket, text back while it is spoken.

It speaks OpenAI's transcription events, and vLLM's own where a client opens with vLLM's
``session.update {"model": ...}``. What to ask the engine, and which text is final, is decided in
``streaming.py``; here are only the events, the turns of speech, and the tasks of a session:

    reader: client events -> samples -> turns -> items        worker: item by item -> engine -> text

An item is one utterance, from its first sample to its commit; it has a stream of its own, so that
nothing of it reaches the next. A client that sends faster than the engine hears is not read from
for a while; one that goes away takes its requests with it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import ExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState
from vllm.exceptions import GenerationError
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from ..engine import sampling_params, stream_parts
from ..geometry import SAMPLE_RATE
from ..languages import language_code
from ..streaming import Stream, StreamRequest
from .admission import Admission, Busy, Place
from .errors import busy, engine_dead_as_503
from .metrics import SESSIONS, count_utterance
from .serving import EngineServing
from .session_config import Audio, Config, EventError, Input, Transcription
from .settings import setting

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import RequestOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

# Seconds of audio that wait for the engine before the client has to: 19 MB. Not less, for a client
# that waits cannot answer pings, and is taken for dead after 20 s or so.
MAX_BACKLOG_S = 300
FREE_BACKLOG_S = 10  # of it, that no other can make wait: more than the longest step
ROOM_POLL_S = 1.0
MIN_COMMIT_S = 0.1  # OpenAI's
MAX_UTTERANCE_S = 1200.0  # seconds after which an item is committed, unless set otherwise
IDLE_S = 300.0  # seconds without an event, unless set otherwise
ONSET_MS = 40  # that may pass before speech is found to have begun
SEND_S = 30  # seconds for a client to take an event
MAX_EVENT_ID = 512  # characters


# the session's config -------------------------------------------------------------------------


# the engine ---------------------------------------------------------------------------------


class Realtime(EngineServing):
    """The state of the route: what its sessions share."""

    def __init__(
        self,
        engine_client: Any,
        models: OpenAIServingModels,
        *,
        max_clip_s: float,
        admission: Admission,
        allowed_origins: list[str],
    ) -> None:
        super().__init__(engine_client, models)
        self.admission = admission  # a session has the place of one recording
        self.allowed_origins = allowed_origins
        self.max_clip_s = max_clip_s
        self.max_utterance_s = setting("QWEN3_ASR_MAX_UTTERANCE_S", MAX_UTTERANCE_S)
        self.idle_s = setting("QWEN3_ASR_REALTIME_IDLE_S", IDLE_S)
        thinker = self.model_config.hf_config.thinker_config
        self._parts = stream_parts(thinker, self.renderer.get_tokenizer())

    def allows(self, origin: str | None, host: str) -> bool:
        """Whether a page of this origin may connect; what is no browser sends none."""
        allowed = {"*", origin} & set(self.allowed_origins)
        return origin is None or bool(allowed) or urlsplit(origin).netloc == host

    def stream(self, transcription: Transcription) -> Stream:
        options = transcription.stream_options
        clip_s = max(options["step_s"], self.max_clip_s / 2)
        return Stream(
            **self._parts, **options, clip_s=clip_s, max_clip_s=max(clip_s, self.max_clip_s)
        )

    def check_model(self, model: str | None) -> None:
        if model is not None and not self._is_model_supported(model):
            raise EventError(
                f"The model `{model}` does not exist; this server has {self.models.model_name()}.",
                code="model_not_found",
                param="session.audio.input.transcription.model",
            )

    async def decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        """The engine's answer; cancelling who waits for it aborts the request.

        ``headers`` are those of the session, of which the engine's trace is a part.
        """
        try:
            return await self._decode(request, model, headers)
        except GenerationError:  # it may have dropped audio that is sent once: now it comes again
            return await self._decode(request, model, headers)

    async def _decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        params = sampling_params(request.decoding, {})
        params.output_kind = RequestOutputKind.FINAL_ONLY
        request_id = f"realtime-{uuid4().hex}"
        options = {
            "lora_request": self.models.lora_requests.get(model or ""),
            "trace_headers": await self._get_trace_headers(headers),
        }
        with engine_dead_as_503():
            prompt = await self.render(request.engine_prompt)
            outputs = self.engine_client.generate(prompt, params, request_id, **options)
            async with aclosing(outputs):
                async for output in outputs:
                    self._raise_if_error(output.outputs[0].finish_reason, request_id)
        if output.outputs[0].finish_reason == "abort":  # not by its client, who is gone then
            raise RuntimeError("the server is stopping; ask again in a few seconds.")
        return output


# items --------------------------------------------------------------------------------------


class Item:
    """One utterance: the reader gives it samples, the worker its text."""

    def __init__(self, stream: Stream, *, model: str | None, on_taken: Callable[[], None]) -> None:
        self.id = f"item_{uuid4().hex[:24]}"
        self.stream = stream
        self.model = model
        self.num_samples = 0
        self.prompt_tokens = self.output_tokens = 0
        self.is_committed = self.is_dropped = self.is_decoding = False
        self.committed_at = 0.0
        self.task: asyncio.Task[None] | None = None  # the worker's
        self._waiting: list[np.ndarray] = []  # not yet in the stream
        self._changed = asyncio.Event()
        self._on_taken = on_taken

    @property
    def num_waiting(self) -> int:
        """Samples that the engine has not been asked about."""
        return self.stream.num_waiting + sum(map(len, self._waiting))

    def append(self, samples: np.ndarray) -> None:
        self.num_samples += len(samples)
        if not self.is_dropped:
            self._waiting.append(samples)
            self._changed.set()

    def commit(self) -> None:
        self.is_committed = True
        self.committed_at = time.perf_counter()
        self._changed.set()

    def drop(self) -> None:
        """Nobody wants its text any more."""
        self.is_dropped = True
        self._waiting.clear()
        if self.task:
            self.task.cancel()

    async def next_request(self) -> StreamRequest | None:
        """What to ask the engine as soon as there is something; None when all is said."""
        while True:
            self._changed.clear()
            waiting, self._waiting = self._waiting, []
            if waiting:
                self.stream.push(np.concatenate(waiting))
            if self.is_committed:
                self.stream.finish()
            # a spectrogram and a hash of what is new: some milliseconds
            request = await asyncio.to_thread(self.stream.request)
            self._on_taken()
            if request:
                return request
            if self.stream.is_done:
                return None
            await self._changed.wait()

    def accept(self, output: RequestOutput) -> str:
        """The text that the engine's answer made final."""
        answer = output.outputs[0]
        self.prompt_tokens += len(output.prompt_token_ids or ())
        self.output_tokens += len(answer.token_ids)
        self.stream.accept(answer.text, answer.finish_reason)
        return self.stream.update().delta


# the session --------------------------------------------------------------------------------


async def realtime(websocket: WebSocket) -> None:
    """One session, from its handshake to its end."""
    shared: Realtime = websocket.app.state.qwen3_asr_realtime
    headers = websocket.headers
    if not shared.allows(headers.get("origin"), headers.get("host", "")):
        await websocket.close(1008, "origin not allowed")  # before accept: 403
        return
    with ExitStack() as place:
        try:
            admitted = place.enter_context(shared.admission.place())
        except Busy as error:
            await websocket.send_denial_response(busy(error).response())
            return
        protocols = websocket.scope.get("subprotocols", [])
        await websocket.accept("realtime" if "realtime" in protocols else None)
        with SESSIONS.labels(shared.models.model_name()).track_inprogress():
            await Session(websocket, shared, admitted).run()


class Session:
    """One connection: its config, its open item, its reader and its worker."""

    def __init__(self, websocket: WebSocket, shared: Realtime, place: Place) -> None:
        self.websocket, self.shared, self.place = websocket, shared, place
        self.id = f"sess_{uuid4().hex[:24]}"
        model = websocket.query_params.get("model")
        known = model if model and shared._is_model_supported(model) else None
        self.unknown_model = model if known is None else None
        transcription = Transcription(model=known or shared.models.model_name())
        self.config = Config(audio=Audio(input=Input(transcription=transcription)))
        self.is_vllm_dialect = False
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.item: Item | None = None  # open: not committed
        self.last_id: str | None = None  # of the last committed item
        self.live: list[Item] = []  # without a transcript
        self.num_samples = 0  # of all audio of the session
        self.recent = np.empty(0, np.float32)  # before speech begins
        self.sending = asyncio.Lock()
        self.room = asyncio.Event()
        self._listen()

    def _listen(self) -> None:
        """Take audio in the config's format and turns from now on."""
        self.pcm = self.config.audio.input.format.pcm
        turns = self.config.audio.input.turn_detection
        self.activity = turns.activity if turns else None
        self.listening_since = self.num_samples
        self.is_speaking = self.activity is not None and self.item is not None
        if self.activity:
            self.activity.is_speech = self.is_speaking
        else:
            self.recent = np.empty(0, np.float32)

    async def run(self) -> None:
        """Until the client goes away, stays idle, or the server stops."""
        await self._send("session.created", **self._described())
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._work())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        except Exception:
            logger.exception("Realtime session %s failed.", self.id)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.websocket.client_state is WebSocketState.CONNECTED:
                with suppress(Exception):
                    await self.websocket.close(1001)

    # --- reader -----------------------------------------------------------------------------------

    async def _read(self) -> None:
        handlers = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }
        async for event in self._events():
            event_id = event.get("event_id")
            try:
                kind = event.get("type")
                if not isinstance(kind, str) or kind not in handlers:
                    known = ", ".join(handlers)
                    message = f"unknown event type {str(kind)[:100]!r}; use one of {known}."
                    raise EventError(message, code="unknown_event", param="type")
                await handlers[kind](event)
            except EventError as error:
                await self._send_error(error, event_id)

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        """What the client sends, as objects; ends when it has been idle for too long."""
        while message := await self._receive():
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            try:
                event = json.loads(message.get("text") or message.get("bytes") or "")
                if not isinstance(event, dict):
                    raise ValueError("an event is a JSON object")
            except (ValueError, RecursionError) as error:
                told = EventError(f"not an event: {str(error)[:200]}.", code="invalid_json")
                await self._send_error(told, None)
                continue
            yield event

    async def _receive(self) -> MutableMapping[str, Any] | None:
        """The next message; None when there was none for too long, and no text is on its way."""
        receiving = asyncio.ensure_future(self.websocket.receive())
        try:
            while not (await asyncio.wait({receiving}, timeout=self.shared.idle_s))[0]:
                if not any(item.is_committed or item.is_decoding for item in self.live):
                    text = f"no event came for {self.shared.idle_s:g} s; the session ends."
                    await self._send_error(EventError(text, code="idle_timeout"), None)
                    return None
            return receiving.result()
        finally:
            receiving.cancel()

    async def _update(self, event: dict[str, Any]) -> None:
        if "session" not in event and "model" in event:
            await self._speak_vllm(event["model"])
            return
        config = self.config.updated(event.get("session"))
        self.shared.check_model(config.audio.input.transcription.model)
        old, self.config = self.config.audio.input, config
        if (config.audio.input.format, config.audio.input.turn_detection) != (
            old.format,
            old.turn_detection,
        ):
            await self._hear(self.pcm.finish())
            self._listen()
        await self._send("session.updated", **self._described())

    async def _speak_vllm(self, model: Any) -> None:
        """vLLM's own dialect: 16 kHz, no turns, other names for the text."""
        if not model:
            raise EventError("Missing required field: model", param="model")
        self.shared.check_model(str(model))
        self.is_vllm_dialect = True
        audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
        changes = {"audio": {"input": audio | {"transcription": {"model": model}}}}
        self.config = self.config.updated(changes)
        self._listen()

    async def _append(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        audio = event.get("audio")
        try:
            data = base64.b64decode(audio or "", validate=True)
            if not isinstance(audio, str):
                raise TypeError
        except (binascii.Error, TypeError, ValueError) as error:
            raise EventError(
                "audio must be base64.", code="invalid_audio", param="audio"
            ) from error
        second = 48_000  # bytes at 24 kHz; others take another time's worth, which does not matter
        for start in range(0, len(data), second):
            await self._hear(self.pcm.push(data[start : start + second]))
            await self._wait_for_room()

    def _check_known_model(self) -> None:
        if self.unknown_model is not None:
            self.shared.check_model(self.unknown_model)

    async def _hear(self, samples: np.ndarray) -> None:
        """Samples for the open item, or in turns for one item after the other."""
        start = self.num_samples
        self.num_samples += len(samples)
        if self.activity is None:
            if len(samples):
                await self._take(samples)
            return
        for turn in self.activity.push(samples):
            end = self.listening_since + turn.sample
            cut = min(max(end - start, 0), len(samples))
            await self._between(samples[:cut])
            samples, start = samples[cut:], start + cut
            if turn.is_speech and not self.is_speaking:
                await self._begin_turn(start)
            elif not turn.is_speech and self.is_speaking:
                self.is_speaking = False
                await self._send_turn("stopped", audio_end_ms=end * 1000 // SAMPLE_RATE)
                if self.item:
                    await self._close_item()
        await self._between(samples)

    async def _between(self, samples: np.ndarray) -> None:
        if self.is_speaking:
            await self._take(samples)
            return
        turns = self.config.audio.input.turn_detection
        padding_ms = (turns.prefix_padding_ms if turns else 0) + ONSET_MS
        recent = np.concatenate([self.recent, samples])
        self.recent = recent[max(0, len(recent) - padding_ms * SAMPLE_RATE // 1000) :]

    async def _begin_turn(self, sample: int) -> None:
        padding, self.recent = self.recent, np.empty(0, np.float32)
        self.is_speaking = True
        item = self._open_item()
        begin_ms = max(0, sample - len(padding)) * 1000 // SAMPLE_RATE
        await self._send_turn("started", audio_start_ms=begin_ms)
        item.append(padding)

    async def _send_turn(self, what: str, **times: int) -> None:
        if self.item:
            kind = f"input_audio_buffer.speech_{what}"
            await self._send(kind, item_id=self.item.id, **times)

    async def _take(self, samples: np.ndarray) -> None:
        """For the open item; one that gets too long is committed, and the rest opens another."""
        limit = round(self.shared.max_utterance_s * SAMPLE_RATE)
        while len(samples):
            item = self.item or self._open_item()
            part, samples = np.split(samples, [limit - item.num_samples])
            item.append(part)
            if item.num_samples >= limit:
                await self._close_item()

    async def _wait_for_room(self) -> None:
        """Back-pressure: the client is not read from while too much waits for the engine."""
        while not self._has_room():
            self.room.clear()
            with suppress(asyncio.TimeoutError):  # other sessions and recordings make room, too
                await asyncio.wait_for(self.room.wait(), ROOM_POLL_S)

    def _has_room(self) -> bool:
        """Whether what waits is little enough for a session, and for the server with all others."""
        waiting_s = sum(item.num_waiting for item in self.live) / SAMPLE_RATE
        try:
            self.place.hold(max(0.0, waiting_s - FREE_BACKLOG_S))
        except Busy:
            return False
        return waiting_s <= MAX_BACKLOG_S

    def _make_room(self) -> None:
        self._has_room()  # holds less from now on
        self.room.set()

    async def _commit(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        if self.is_vllm_dialect and not event.get("final"):
            return  # its clients announce their audio
        await self._hear(self.pcm.finish())
        num_samples = self.item.num_samples if self.item else 0
        if self.item is None and self.is_vllm_dialect:
            self._open_item()
        elif num_samples < MIN_COMMIT_S * SAMPLE_RATE:
            raise EventError(
                f"the buffer holds {num_samples / SAMPLE_RATE * 1000:.0f} ms of audio; a commit "
                f"needs {MIN_COMMIT_S * 1000:.0f} ms.",
                code="input_audio_buffer_commit_empty",
            )
        await self._close_item()
        self._be_silent()

    def _be_silent(self) -> None:
        """Whatever is spoken now begins another turn."""
        self.is_speaking = False
        if self.activity:
            self.activity.is_speech = False

    async def _clear(self, event: dict[str, Any]) -> None:
        self.pcm.finish()
        self.recent = np.empty(0, np.float32)
        if self.item:
            self.item.drop()
            self._forget(self.item)
            self.item = None
        self._be_silent()
        await self._send("input_audio_buffer.cleared")

    def _open_item(self) -> Item:
        wanted = self.config.audio.input.transcription
        stream = self.shared.stream(wanted)
        self.item = Item(stream, model=wanted.model, on_taken=self._make_room)
        self.live.append(self.item)
        self.items.put_nowait(self.item)
        return self.item

    async def _close_item(self) -> None:
        """Commit the open item: its text is completed, and what comes is the next one's."""
        item, self.item = self.item, None
        assert item is not None
        if not self.is_vllm_dialect:
            about = {"previous_item_id": self.last_id}
            message = {
                "id": item.id,
                "type": "message",
                "role": "user",
                "status": "completed",
                "content": [{"type": "input_audio", "transcript": None}],
            }
            await self._send("input_audio_buffer.committed", item_id=item.id, **about)
            await self._send("conversation.item.added", item=message, **about)
            await self._send("conversation.item.done", item=message, **about)
        self.last_id = item.id
        item.commit()

    def _forget(self, item: Item) -> None:
        if item in self.live:
            self.live.remove(item)
        self._make_room()

    # --- worker -----------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Item after item, in the order of their audio."""
        while True:
            item = await self.items.get()
            if item.is_dropped:
                continue
            item.task = asyncio.create_task(self._transcribe(item))
            try:
                await asyncio.wait({item.task})
            finally:
                item.task.cancel()  # if this task is being cancelled
                self._forget(item)
            if not item.task.cancelled():
                item.task.result()

    async def _transcribe(self, item: Item) -> None:
        try:
            while request := await item.next_request():
                item.is_decoding = True
                output = await self.shared.decode(request, item.model, self.websocket.headers)
                item.is_decoding = False
                await self._send_delta(item, item.accept(output))
        except WebSocketDisconnect:
            raise
        except Exception as error:  # the engine's; the session goes on
            logger.exception("Item %s of realtime session %s failed.", item.id, self.id)
            item.drop()
            await self._send_failed(item, str(error))
            return
        await self._send_delta(item, item.stream.update().delta)
        await self._send_completed(item)
        delay_s = time.perf_counter() - item.committed_at
        model = self.shared.models.model_name()
        count_utterance(
            item.num_samples / SAMPLE_RATE, delay_s=delay_s, model=model, item_id=item.id
        )

    # --- server events ----------------------------------------------------------------------------

    async def _send_delta(self, item: Item, delta: str) -> None:
        if delta and self.is_vllm_dialect:
            await self._send("transcription.delta", delta=delta)
        elif delta:
            kind = "conversation.item.input_audio_transcription.delta"
            await self._send(kind, item_id=item.id, content_index=0, delta=delta)

    async def _send_completed(self, item: Item) -> None:
        stream = item.stream
        if self.is_vllm_dialect:
            usage = {
                "prompt_tokens": item.prompt_tokens,
                "completion_tokens": item.output_tokens,
                "total_tokens": item.prompt_tokens + item.output_tokens,
            }
            await self._send("transcription.done", text=stream.text, usage=usage)
            return
        await self._send(
            "conversation.item.input_audio_transcription.completed",
            item_id=item.id,
            content_index=0,
            transcript=stream.text,
            languages=[{"code": language_code(name) or name} for name in stream.languages],
            usage={"type": "duration", "seconds": round(item.num_samples / SAMPLE_RATE, 3)},
        )

    async def _send_failed(self, item: Item, message: str) -> None:
        if self.is_vllm_dialect:
            await self._send_error(EventError(message, code="processing_error"), None)
            return
        error = {"type": "server_error", "code": "transcription_failed", "message": message}
        kind = "conversation.item.input_audio_transcription.failed"
        await self._send(kind, item_id=item.id, content_index=0, error=error)

    async def _send_error(self, error: EventError, event_id: Any) -> None:
        if self.is_vllm_dialect:
            await self._send("error", error=str(error), code=error.code)
            return
        told = {
            "type": "invalid_request_error",
            "code": error.code,
            "message": str(error),
            "param": error.param,
            "event_id": str(event_id)[:MAX_EVENT_ID] if event_id is not None else None,
        }
        await self._send("error", error=told)

    def _described(self) -> dict[str, Any]:
        """The session; ``id`` and ``created`` are where vLLM's clients look."""
        about = {"id": self.id, "object": "realtime.transcription_session", "expires_at": None}
        session = about | self.config.model_dump()
        return {"session": session, "id": self.id, "created": int(time.time())}

    async def _send(self, kind: str, **fields: Any) -> None:
        """Raises WebSocketDisconnect where the client is gone or takes nothing."""
        event = {"type": kind, "event_id": f"event_{uuid4().hex[:24]}"} | fields
        async with self.sending:
            try:
                # escaped: what a client sent and is told again may hold half a surrogate pair
                await asyncio.wait_for(self.websocket.send_text(json.dumps(event)), SEND_S)
            except (RuntimeError, asyncio.TimeoutError) as error:  # closed; or never read
                raise WebSocketDisconnect(1006) from error
