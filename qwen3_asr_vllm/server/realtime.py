# SPDX-License-Identifier: Apache-2.0
"""``/v1/realtime``: speech over a WebSocket, text back while it is spoken.

    reader: client events -> samples -> turns -> items        worker: item by item -> engine -> text

``streaming.py`` decides which engine request is next and which text is final, ``turns.py`` where
utterances begin and end, ``dialects.py`` how events look. This module runs the tasks of a session.
Back-pressure slows clients that send faster than the engine transcribes; disconnecting cancels
their requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect
from vllm.exceptions import GenerationError
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from ..engine import (
    OutputCollector,
    default_params,
    language_token_ids,
    sampling_params,
    stream_parts,
)
from ..geometry import SAMPLE_RATE
from ..languages import Languages
from ..prompt import NO_CONTEXT, TextProtocol, sanitize_context
from ..streaming import Stream, StreamRequest, Update
from .admission import Admission, Busy, Reservation
from .backlog import Backlog, SessionEnd
from .connection import Connection
from .dialects import VLLM, Events, opened_with, read_audio, read_event
from .errors import IS_ALIGNER, ApiError, busy, engine_dead_as_503
from .metrics import SESSIONS, count_utterance
from .serving import EngineServing
from .session_config import Audio, Config, EventError, Input, Transcription
from .settings import setting
from .state import server_state
from .turns import Item, Speech, Started, Stopped, Turns

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import RequestOutput

    from ..transcription import EngineOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

DECODE_S = 600.0  # seconds for the engine to answer one request
MIN_COMMIT_S = 0.1  # seconds of audio, as in OpenAI's API
TOKENS_PER_S = 26  # tokens per second of a clip: 13 of audio, about as many of text
SECOND = 48_000  # bytes of one second at 24 kHz


# the engine ---------------------------------------------------------------------------------


class Realtime(EngineServing):
    """State of the route, shared by its sessions."""

    def __init__(
        self,
        engine_client: Any,
        models: OpenAIServingModels,
        *,
        max_clip_s: float,
        protocol: TextProtocol,
        admission: Admission,
        allowed_origins: list[str],
    ) -> None:
        super().__init__(engine_client, models)
        self.admission = admission  # a session counts as one recording
        self.allowed_origins = allowed_origins
        self.max_clip_s = max_clip_s
        self._params = default_params(self.model_config)
        self.max_utterance_s = setting("QWEN3_ASR_MAX_UTTERANCE_S")
        self.idle_s = setting("QWEN3_ASR_REALTIME_IDLE_S")
        thinker = self.model_config.hf_config.thinker_config
        self._tokenizer = self.renderer.get_tokenizer()
        self._parts = stream_parts(thinker, self._tokenizer, protocol)
        self._language_token_ids = language_token_ids(self._tokenizer, protocol.languages)
        self._protocol = protocol
        self._template_tokens = len(self._tokenizer.encode(protocol.bare))  # besides the context

    def allows(self, origin: str | None, host: str) -> bool:
        """Return whether a page of this origin may connect; only browsers send an origin."""
        allowed = {"*", origin} & set(self.allowed_origins)
        return origin is None or bool(allowed) or urlsplit(origin).netloc == host

    def serves(self, model: str | None) -> bool:
        return self._is_model_supported(model)

    @property
    def languages(self) -> Languages:
        """The languages of the checkpoint."""
        return self._protocol.languages

    def stream(self, options: Mapping[str, Any]) -> Stream:
        clip_s = max(options["step_s"], self.max_clip_s / 2)
        return Stream(
            **self._parts, **options, clip_s=clip_s, max_clip_s=max(clip_s, self.max_clip_s)
        )

    def stream_options(self, config: Config) -> dict[str, Any]:
        """Return the options of the config, without control tokens in the context."""
        options = config.stream_options
        context = sanitize_context(options["context"], self._protocol.control_tokens)
        return {**options, "context": context}

    def check(self, transcription: Transcription) -> None:
        """Raise EventError for a model that is not served, or a context that does not fit."""
        self.check_model(transcription.model)
        param = "session.audio.input.transcription.prompt"
        if transcription.context and not self._protocol.with_context:
            raise EventError(f"{param}: {NO_CONTEXT}", param=param)
        limit = self.model_config.max_model_len - self._template_tokens
        limit = max(0, limit - round(TOKENS_PER_S * self.max_clip_s))
        tokens = self._tokenizer.encode(transcription.context, add_special_tokens=False)
        if len(tokens) > limit:
            raise EventError(
                f"{param}: prompt and keywords have {len(tokens)} tokens; the limit of this "
                f"server's model is {limit}, beside {self.max_clip_s:g} s of audio.",
                param=param,
            )

    def check_model(self, model: str | None) -> None:
        if model is not None and not self.serves(model):
            raise EventError(
                f"The model `{model}` does not exist; this server has {self.models.model_name()}.",
                code="model_not_found",
                param="session.audio.input.transcription.model",
            )

    async def decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        """Return the engine's output for a request; cancelling the call aborts the request.

        ``headers`` are those of the session, for the engine's traces.
        """
        try:
            return await self._decode(request, model, headers)
        except GenerationError:  # the engine may have evicted audio that was sent once
            return await self._decode(request, model, headers)

    async def _decode(
        self, request: StreamRequest, model: str | None, headers: Mapping[str, str]
    ) -> RequestOutput:
        params = sampling_params(request.decoding, self._language_token_ids, self._params)
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
        if output.outputs[0].finish_reason == "abort":  # the server stops
            raise RuntimeError("the server is stopping; retry, or use another server.")
        return output

    def read(self, request: StreamRequest, output: RequestOutput) -> EngineOutput:
        """Convert vLLM's output, with the log-probabilities that the request wants."""
        collector = OutputCollector(request.decoding, self._language_token_ids)
        collector.push(output.outputs[0])
        return collector.output()


# the session --------------------------------------------------------------------------------


async def realtime(websocket: WebSocket) -> None:
    """Run one session, from its handshake to its end."""
    shared, connection = server_state(websocket.app).realtime, Connection(websocket)
    with suppress(WebSocketDisconnect):
        if shared is None:
            await connection.refuse(ApiError(404, IS_ALIGNER))
        else:
            await _serve(connection, shared)


async def _serve(connection: Connection, shared: Realtime) -> None:
    headers = connection.websocket.headers
    if not shared.allows(headers.get("origin"), headers.get("host", "")):
        await connection.close(1008, "origin not allowed")  # before accept: 403
        return
    with ExitStack() as reservations:
        try:
            reservation = reservations.enter_context(shared.admission.reserve())
        except Busy as error:
            await connection.refuse(busy(error))
            return
        await connection.accept()
        with SESSIONS.labels(shared.models.model_name()).track_inprogress():
            await Session(connection, shared, reservation).run()


class Session:
    """One connection: its config, its turns, its open item, its reader and its worker."""

    def __init__(self, connection: Connection, shared: Realtime, reservation: Reservation) -> None:
        self.connection, self.shared = connection, shared
        websocket = connection.websocket
        self.headers = websocket.headers
        self.id = f"sess_{uuid4().hex[:24]}"
        query = websocket.query_params
        self.url_model = query.get("model") or shared.models.model_name()
        model = self.url_model if shared.serves(self.url_model) else None
        transcription = Transcription(model=model)
        self.config = Config(audio=Audio(input=Input(transcription=transcription)))
        subprotocols = websocket.scope.get("subprotocols", [])
        self.dialect = opened_with(self.headers, subprotocols, query.get("intent"))
        self.turns = Turns(self.config.audio.input)
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.item: Item | None = None  # the open item, not committed yet
        self.last_id: str | None = None  # id of the last committed item
        self.backlog = Backlog(reservation)

    async def run(self) -> None:
        """Serve until the client disconnects or stays idle, or the server stops."""
        await self._send(self.dialect.created(self.id, self.config))
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._work())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        except SessionEnd as error:
            with suppress(WebSocketDisconnect):
                await self._send(self.dialect.error(error, None))
        except Exception:
            logger.exception("Realtime session %s failed.", self.id)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.connection.close(1001)

    async def _send(self, events: Events) -> None:
        for event in events:
            await self.connection.send(event)

    # --- reader -----------------------------------------------------------------------------------

    async def _read(self) -> None:
        handlers = {
            "session.update": self._update,
            "transcription_session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }
        async for message in self._messages():
            event: dict[str, Any] = {}
            try:
                event = read_event(message)
                kind = event.get("type")
                if not isinstance(kind, str) or kind not in handlers:
                    known = ", ".join(handlers)
                    text = f"unknown event type {str(kind)[:100]!r}; use one of {known}."
                    raise EventError(text, code="unknown_event", param="type")
                await handlers[kind](event)
            except SessionEnd:
                raise
            except EventError as error:
                await self._send(self.dialect.error(error, event.get("event_id")))

    async def _messages(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the client's messages. Raises SessionEnd if it is idle and no text is pending."""
        while True:
            receiving = self.connection.receive()
            try:
                while not (await asyncio.wait({receiving}, timeout=self.shared.idle_s))[0]:
                    if not self.backlog.is_text_pending:
                        text = f"no event arrived for {self.shared.idle_s:g} s; the session ends."
                        raise SessionEnd(text, code="idle_timeout")
                message = receiving.result()
            finally:
                receiving.cancel()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            yield message

    async def _update(self, event: dict[str, Any]) -> None:
        """Apply a new config, also to the open item; final text stays."""
        changes = event.get("session")
        if "session" not in event and "model" in event:
            self._switch_to_vllm(event["model"])
            return
        config = self.config.updated(changes, self.shared.languages)
        self.shared.check(config.audio.input.transcription)
        old, self.config = self.config, config
        self.dialect = self.dialect.of_update(event["type"], event["session"])
        before, now = old.audio.input, config.audio.input
        if (now.format, now.turn_detection) != (before.format, before.turn_detection):
            await self._take(self.turns.flush())
            self.turns.configure(now, is_speaking=self.item is not None)
        if self.item and config.stream_options != old.stream_options:
            self.item.configure(now.transcription.model, **self.shared.stream_options(config))
        await self._send(self.dialect.updated(self.id, self.config))

    def _switch_to_vllm(self, model: Any) -> None:
        """Switch to vLLM's own dialect: 16 kHz, no turns, other event names."""
        self.dialect = VLLM()
        if not model:
            raise EventError("Missing required field: model", code="invalid_event", param="model")
        self.shared.check_model(str(model))
        audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
        changes = {"audio": {"input": audio | {"transcription": {"model": str(model)}}}}
        self.config = self.config.updated(changes, self.shared.languages)
        self.turns.configure(self.config.audio.input, is_speaking=False)

    async def _append(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        data = read_audio(event.get("audio"))
        for start in range(0, len(data), SECOND):
            await self._take(self.turns.decode(data[start : start + SECOND]))
            await self.backlog.wait_for_room()
            await asyncio.sleep(0)  # let other sessions run: an event may hold minutes

    def _check_known_model(self) -> None:
        """Raise EventError if the URL names an unknown model and no update named another."""
        if self.config.audio.input.transcription.model is None:
            self.shared.check_model(self.url_model)

    async def _take(self, samples: np.ndarray) -> None:
        """Pass samples to the open item, or to one item for each turn."""
        for event in self.turns.push(samples):
            match event:
                case Speech(samples=speech):
                    await self._append_speech(speech)
                case Started(sample=sample, padding=padding):
                    item = self._open_item()
                    await self._send(self.dialect.speech_started(item, sample))
                    item.append(padding)
                case Stopped(sample=sample) if self.item:
                    await self._send(self.dialect.speech_stopped(self.item, sample))
                    await self._close_item()

    async def _append_speech(self, samples: np.ndarray) -> None:
        """Append to the open item; at its maximum length it is committed and another opens."""
        limit = round(self.shared.max_utterance_s * SAMPLE_RATE)
        while len(samples):
            item = self.item or self._open_item()
            part, samples = np.split(samples, [limit - item.num_samples])
            item.append(part)
            if item.num_samples >= limit:
                await self._close_item()

    async def _commit(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        if self.dialect.announces_audio and not event.get("final"):
            return
        await self._take(self.turns.flush())
        num_samples = self.item.num_samples if self.item else 0
        if self.item is None and self.dialect.announces_audio:
            self._open_item()
        elif num_samples < MIN_COMMIT_S * SAMPLE_RATE:
            raise EventError(
                f"the buffer holds {num_samples / SAMPLE_RATE * 1000:.0f} ms of audio; a commit "
                f"needs {MIN_COMMIT_S * 1000:.0f} ms.",
                code="input_audio_buffer_commit_empty",
            )
        await self._close_item()
        self.turns.end_turn()

    async def _clear(self, event: dict[str, Any]) -> None:
        self.turns.clear()
        if self.item:
            self.item.cancel()
            self.backlog.remove(self.item)
            self.item = None
        await self._send(self.dialect.cleared())

    def _open_item(self) -> Item:
        stream = self.shared.stream(self.shared.stream_options(self.config))
        model = self.config.audio.input.transcription.model
        self.item = Item(stream, model=model, on_taken=self.backlog.make_room)
        self.backlog.items.append(self.item)
        self.items.put_nowait(self.item)
        return self.item

    async def _close_item(self) -> None:
        """Commit the open item: its text is completed, and later audio opens another."""
        item, self.item = self.item, None
        assert item is not None
        await self._send(self.dialect.committed(item, self.last_id))
        self.last_id = item.id
        item.commit()

    # --- worker -----------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Transcribe the items in the order of their audio."""
        while True:
            item = await self.items.get()
            if item.is_dropped:
                continue
            item.task = asyncio.create_task(self._transcribe(item))
            try:
                await asyncio.wait({item.task})
            finally:
                item.task.cancel()  # if this task is being cancelled
                await asyncio.gather(item.task, return_exceptions=True)
                self.backlog.remove(item)
            if not item.task.cancelled():
                item.task.result()

    async def _transcribe(self, item: Item) -> None:
        try:
            while request := await item.next_request():
                update = await self._decode(item, request)
                await self._send_delta(item, update)
        except WebSocketDisconnect:
            raise
        except Exception as error:  # an engine error; the session continues
            logger.exception("Item %s of realtime session %s failed.", item.id, self.id)
            item.drop()
            await self._send(self.dialect.failed(item, str(error)))
            return
        await self._send_delta(item, item.stream.update())
        await self._send(self.dialect.completed(item, self.config))
        delay_s = time.perf_counter() - item.committed_at
        model = self.shared.models.model_name()
        count_utterance(
            item.num_samples / SAMPLE_RATE, delay_s=delay_s, model=model, item_id=item.id
        )

    async def _decode(self, item: Item, request: StreamRequest) -> Update:
        """Run one engine request; returns the text that it made final."""
        item.is_decoding = True
        decoding = self.shared.decode(request, item.model, self.headers)
        try:
            output = await asyncio.wait_for(decoding, DECODE_S)
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"the engine did not answer within {DECODE_S:g} s.") from error
        item.is_decoding = False
        item.count(output)
        return item.accept(self.shared.read(request, output))

    async def _send_delta(self, item: Item, update: Update) -> None:
        if update.delta:
            await self._send(self.dialect.delta(item, update, self.config))
