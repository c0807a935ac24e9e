# SPDX-License-Identifier: Apache-2.0
"""Events of ``/v1/realtime``: read the client's, write the server's, in three dialects.

Dialects differ in names and shapes, not in behaviour: OpenAI's events of today, those
of OpenAI's beta (``transcription_session.update`` and its flat fields), and vLLM's own
(``session.update {"model": ...}``, errors as strings). A dialect turns what happens in a session
into events; each method returns the events to send.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ..formats import logprobs
from ..geometry import SAMPLE_RATE
from .bodies import decode_base64
from .session_config import Config, EventError

if TYPE_CHECKING:
    from ..streaming import Update
    from ..transcript import Token, Word
    from .turns import Item

MAX_PARTS = 20_000  # values in one event: a prompt and its keywords have fewer
MAX_EVENT_ID = 512  # characters

Events: TypeAlias = list[dict[str, Any]]

_BETA_HEADER, _BETA_PROTOCOL = "realtime=v1", "openai-beta.realtime-v1"
_TRANSCRIPTION = "conversation.item.input_audio_transcription"
_NO_BINARY = (
    " It was sent in a binary frame: send events as JSON in text frames, and audio as base64 in "
    "input_audio_buffer.append."
)


# from the client ------------------------------------------------------------------------------


def read_event(message: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the JSON object of one WebSocket message. Raises EventError for anything else.

    Lists and objects need a hundred times the memory of their text, and a message may have 16 MiB,
    so they are counted before they are parsed.
    """
    text = message.get("text")
    try:
        content: str = (message.get("bytes") or b"").decode() if text is None else text
        if sum(map(content.count, ",[{")) > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} values")
        event = json.loads(content)
        if not isinstance(event, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        hint = "" if text is not None else _NO_BINARY
        raise EventError(f"not an event: {error}.{hint}", code="invalid_json") from error
    return event


def read_audio(audio: Any) -> bytes:
    """Decode an event's base64, which may be URL-safe, unpadded, or broken into lines."""
    try:
        if not isinstance(audio, str):
            raise ValueError("it is no string")
        return b"".join(decode_base64(audio))
    except ValueError as error:
        message = f"audio must be base64: {error}."
        raise EventError(message, code="invalid_audio", param="audio") from error


# to the client --------------------------------------------------------------------------------


class OpenAI:
    """OpenAI's transcription events."""

    announces_audio = False  # True: clients also commit before they send audio

    def of_update(self, kind: str, changes: Mapping[str, Any]) -> OpenAI:
        """Return the dialect of a client that updates its session with this event."""
        return Beta() if kind.startswith(Beta.SESSION) else self

    def created(self, session_id: str, config: Config) -> Events:
        return [self._session("session.created", session_id, config)]

    def updated(self, session_id: str, config: Config) -> Events:
        return [self._session("session.updated", session_id, config)]

    def speech_started(self, item: Item, sample: int) -> Events:
        return [
            {
                "type": "input_audio_buffer.speech_started",
                "item_id": item.id,
                "audio_start_ms": _ms(sample),
            }
        ]

    def speech_stopped(self, item: Item, sample: int) -> Events:
        return [
            {
                "type": "input_audio_buffer.speech_stopped",
                "item_id": item.id,
                "audio_end_ms": _ms(sample),
            }
        ]

    def committed(self, item: Item, previous_id: str | None) -> Events:
        committed = {
            "type": "input_audio_buffer.committed",
            "item_id": item.id,
            "previous_item_id": previous_id,
        }
        return [committed, *self._item_created(item, previous_id)]

    def cleared(self) -> Events:
        return [{"type": "input_audio_buffer.cleared"}]

    def delta(self, item: Item, update: Update, config: Config) -> Events:
        return [
            {
                "type": f"{_TRANSCRIPTION}.delta",
                "item_id": item.id,
                "content_index": 0,
                "delta": update.delta,
                **_logprobs(update.tokens, config),
            }
        ]

    def completed(self, item: Item, config: Config) -> Events:
        stream = item.stream
        return [
            {
                "type": f"{_TRANSCRIPTION}.completed",
                "item_id": item.id,
                "content_index": 0,
                "transcript": stream.text,
                "languages": [{"code": code} for code in stream.codes],
                "usage": {"type": "duration", "seconds": round(item.num_samples / SAMPLE_RATE, 3)},
                **_logprobs(stream.tokens, config),
            }
        ]

    def words(self, item: Item, words: Iterable[Word], *, error: str = "") -> Events:
        """Return this server's own event: words in seconds of the session, or an error."""
        rows = [{"word": w.word, "start": round(w.start, 3), "end": round(w.end, 3)} for w in words]
        event = {"type": f"{_TRANSCRIPTION}.words", "item_id": item.id, "content_index": 0}
        failure = {"type": "server_error", "code": "words_failed", "message": error}
        return [event | {"words": rows} | ({"error": failure} if error else {})]

    def failed(self, item: Item, message: str) -> Events:
        error = {"type": "server_error", "code": "transcription_failed", "message": message}
        kind = f"{_TRANSCRIPTION}.failed"
        return [{"type": kind, "item_id": item.id, "content_index": 0, "error": error}]

    def error(self, error: EventError, event_id: Any) -> Events:
        described = {
            "type": "invalid_request_error",
            "code": error.code,
            "message": str(error),
            "param": error.param,
            "event_id": str(event_id)[:MAX_EVENT_ID] if event_id is not None else None,
        }
        return [{"type": "error", "error": described}]

    def _session(self, kind: str, session_id: str, config: Config) -> dict[str, Any]:
        """Return a session event; its ``id`` and ``created`` are for vLLM's clients."""
        about = {"id": session_id, "object": "realtime.transcription_session", "expires_at": None}
        session = about | self._described(config)
        return {"type": kind, "session": session, "id": session_id, "created": int(time.time())}

    def _described(self, config: Config) -> dict[str, Any]:
        return config.model_dump()

    def _item_created(self, item: Item, previous_id: str | None) -> Events:
        about = {"previous_item_id": previous_id, "item": _message(item)}
        return [{"type": f"conversation.item.{kind}"} | about for kind in ("added", "done")]


class Beta(OpenAI):
    """OpenAI's events before they were generally available: a flat session, other names."""

    SESSION = "transcription_session"

    def __init__(self, *, prefix: str = SESSION) -> None:
        self._prefix = prefix  # prefix of session event names

    def of_update(self, kind: str, changes: Mapping[str, Any]) -> OpenAI:
        is_of_today = kind == "session.update" and changes.keys() & {"type", "audio"}
        return OpenAI() if is_of_today else Beta(prefix=kind.removesuffix(".update"))

    def created(self, session_id: str, config: Config) -> Events:
        return [self._session(f"{self._prefix}.created", session_id, config)]

    def updated(self, session_id: str, config: Config) -> Events:
        return [self._session(f"{self._prefix}.updated", session_id, config)]

    def _described(self, config: Config) -> dict[str, Any]:
        return config.flat()

    def _item_created(self, item: Item, previous_id: str | None) -> Events:
        created = {"type": "conversation.item.created", "previous_item_id": previous_id}
        return [created | {"item": _message(item)}]


class VLLM(OpenAI):
    """vLLM's own events: text without items, errors as strings."""

    announces_audio = True

    def committed(self, item: Item, previous_id: str | None) -> Events:
        return []

    def delta(self, item: Item, update: Update, config: Config) -> Events:
        return [{"type": "transcription.delta", "delta": update.delta}]

    def completed(self, item: Item, config: Config) -> Events:
        usage = {
            "prompt_tokens": item.prompt_tokens,
            "completion_tokens": item.output_tokens,
            "total_tokens": item.prompt_tokens + item.output_tokens,
        }
        return [{"type": "transcription.done", "text": item.stream.text, "usage": usage}]

    def failed(self, item: Item, message: str) -> Events:
        return self.error(EventError(message, code="processing_error"), None)

    def error(self, error: EventError, event_id: Any) -> Events:
        return [{"type": "error", "error": str(error), "code": error.code}]


def opened_with(headers: Mapping[str, str], subprotocols: list[str], intent: str | None) -> OpenAI:
    """Return the dialect of a handshake: the beta's if it has its header or subprotocol."""
    is_beta = _BETA_HEADER in headers.get("openai-beta", "") or _BETA_PROTOCOL in subprotocols
    if not is_beta:
        return OpenAI()
    return Beta(prefix=Beta.SESSION if intent == "transcription" else "session")


def _message(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_audio", "transcript": None}],
    }


def _logprobs(tokens: Iterable[Token], config: Config) -> dict[str, Any]:
    return {"logprobs": logprobs(tokens)} if config.wants_logprobs else {}


def _ms(sample: int) -> int:
    return sample * 1000 // SAMPLE_RATE
