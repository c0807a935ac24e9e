# SPDX-License-Identifier: Apache-2.0
"""``/v1/realtime``: speech over a WebSocket, text back while it is spoken.

    reader: client events -> samples -> turns -> items        worker: item by item -> engine -> text

``streaming.py`` decides which engine request is next and which text is final, ``turns.py`` where
utterances begin and end, ``dialects.py`` how events look. This module has the reader and
``worker.py`` the worker.
Back-pressure slows clients that send faster than the engine transcribes; disconnecting cancels
their requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any
from uuid import uuid4

import numpy as np
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect
from vllm.logger import init_logger

from ..geometry import SAMPLE_RATE
from ..live_words import LiveWords
from .admission import Busy, Reservation
from .backlog import Backlog, SessionEnd
from .connection import Client, Connection
from .dialects import VLLM, opened_with, read_audio, read_event
from .errors import IS_ALIGNER, ApiError, busy
from .metrics import SESSIONS
from .realtime_serving import Realtime
from .session_config import Audio, Config, EventError, Input, Transcription
from .state import server_state
from .turns import Event, Item, Paused, Speech, Started, Stopped, Turns
from .word_timer import WordTimer
from .worker import Worker

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MIN_COMMIT_S = 0.1  # seconds of audio, as in OpenAI's API
SECOND = 48_000  # bytes of one second at 24 kHz


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
    """One connection: its client, its turns, its open item, its reader and its worker."""

    def __init__(self, connection: Connection, shared: Realtime, reservation: Reservation) -> None:
        self.shared = shared
        websocket = connection.websocket
        self.id = f"sess_{uuid4().hex[:24]}"
        query = websocket.query_params
        self.url_model = query.get("model") or shared.models.model_name()
        model = self.url_model if shared.serves(self.url_model) else None
        transcription = Transcription(model=model)
        config = Config(audio=Audio(input=Input(transcription=transcription)))
        subprotocols = websocket.scope.get("subprotocols", [])
        dialect = opened_with(websocket.headers, subprotocols, query.get("intent"))
        self.client = Client(connection, dialect, config)
        self.turns = Turns(config.audio.input)
        self.item: Item | None = None  # the open item, not committed yet
        self.last_id: str | None = None  # id of the last committed item
        self.backlog = Backlog(reservation)
        headers = websocket.headers
        self.word_timer = WordTimer(self.client, shared.aligner, headers)
        self.worker = Worker(self.client, shared, self.backlog, self.word_timer, headers)

    async def run(self) -> None:
        """Serve until the client disconnects or stays idle, or the server stops."""
        client = self.client
        await client.send(client.dialect.created(self.id, client.config))
        running = self._read(), self.worker.run(), self.word_timer.run()
        tasks = list(map(asyncio.create_task, running))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        except SessionEnd as error:
            with suppress(WebSocketDisconnect):
                await client.send(client.dialect.error(error, None))
        except Exception:
            logger.exception("Realtime session %s failed.", self.id)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.connection.close(1001)

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
                await self.client.send(self.client.dialect.error(error, event.get("event_id")))

    async def _messages(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the client's messages. Raises SessionEnd if it is idle and no text is pending."""
        while True:
            receiving = self.client.connection.receive()
            try:
                while not (await asyncio.wait({receiving}, timeout=self.shared.idle_s))[0]:
                    if not (self.backlog.is_text_pending or self.word_timer.is_pending):
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
        client = self.client
        config = client.config.updated(changes, self.shared.languages)
        self.shared.check(config)
        old, client.config = client.config, config
        client.dialect = client.dialect.of_update(event["type"], event["session"])
        before, now = old.audio.input, config.audio.input
        if (now.format, now.turn_detection) != (before.format, before.turn_detection):
            await self._take(self.turns.flush())
            self.turns.configure(now, is_speaking=self.item is not None)
        if self.item and config.stream_options != old.stream_options:
            self.item.configure(now.transcription.model, **self.shared.stream_options(config))
        await client.send(client.dialect.updated(self.id, config))

    def _switch_to_vllm(self, model: Any) -> None:
        """Switch to vLLM's own dialect: 16 kHz, no turns, other event names."""
        self.client.dialect = VLLM()
        if not model:
            raise EventError("Missing required field: model", code="invalid_event", param="model")
        self.shared.check_model(str(model))
        audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
        changes = {"audio": {"input": audio | {"transcription": {"model": str(model)}}}}
        self.client.config = self.client.config.updated(changes, self.shared.languages)
        self.turns.configure(self.client.config.audio.input, is_speaking=False)

    async def _append(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        data = read_audio(event.get("audio"))
        for start in range(0, len(data), SECOND):
            samples = self.turns.decode(data[start : start + SECOND])
            await self._take(self.turns.push(samples))
            await self.backlog.wait_for_room()
            await asyncio.sleep(0)  # let other sessions run: an event may hold minutes

    def _check_known_model(self) -> None:
        """Raise EventError if the URL names an unknown model and no update named another."""
        if self.client.config.audio.input.transcription.model is None:
            self.shared.check_model(self.url_model)

    async def _take(self, events: Iterable[Event]) -> None:
        """Pass samples to the open item, or to one item for each turn."""
        client = self.client
        for event in events:
            match event:
                case Speech(sample=sample, samples=samples):
                    await self._append_speech(sample, samples)
                case Started(sample=sample, padding=padding):
                    item = self._open_item(sample)
                    await client.send(client.dialect.speech_started(item, sample))
                    item.append(padding)
                case Paused() if self.item:
                    self.turns.judge(await self.item.completeness(self.turns.patience_s))
                case Stopped(sample=sample) if self.item:
                    await client.send(client.dialect.speech_stopped(self.item, sample))
                    await self._close_item()

    async def _append_speech(self, sample: int, samples: np.ndarray) -> None:
        """Append to the open item; at its maximum length it is committed and another opens."""
        limit = round(self.shared.max_utterance_s * SAMPLE_RATE)
        while len(samples):
            item = self.item or self._open_item(sample)
            part, samples = np.split(samples, [limit - item.num_samples])
            item.append(part)
            sample += len(part)
            if item.num_samples >= limit:
                await self._close_item()

    async def _commit(self, event: dict[str, Any]) -> None:
        self._check_known_model()
        if self.client.dialect.announces_audio and not event.get("final"):
            return
        await self._take(self.turns.flush())
        num_samples = self.item.num_samples if self.item else 0
        if self.item is None and self.client.dialect.announces_audio:
            self._open_item(self.turns.num_samples)
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
        await self.client.send(self.client.dialect.cleared())

    def _open_item(self, sample: int) -> Item:
        """Open an item that starts at a sample of the session."""
        config = self.client.config
        self.item = Item(
            self.shared.stream(self.shared.stream_options(config)),
            start=sample,
            model=config.audio.input.transcription.model,
            words=LiveWords(sample) if config.wants_words else None,
            on_taken=self.backlog.make_room,
        )
        self.backlog.items.append(self.item)
        self.worker.items.put_nowait(self.item)
        return self.item

    async def _close_item(self) -> None:
        """Commit the open item: its text is completed, and later audio opens another."""
        item, self.item = self.item, None
        assert item is not None
        await self.client.send(self.client.dialect.committed(item, self.last_id))
        self.last_id = item.id
        item.commit()
