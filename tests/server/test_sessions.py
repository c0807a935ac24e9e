# SPDX-License-Identifier: Apache-2.0
"""Realtime sessions without an engine: limits, dialects and configs, on uvicorn and in memory."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import websockets
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.audio import HELDOUT
from support.fake_sessions import PATH, Aligner, app_of, made
from support.servers import on_a_port

from qwen3_asr_vllm.prompt import PUBLISHED
from qwen3_asr_vllm.server import connection
from qwen3_asr_vllm.server.admission import Admission

MANUAL = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"


def noise(seconds):
    return np.random.default_rng(0).normal(0, 3_000, round(16_000 * seconds)).astype("<i2")


def append(samples):
    audio = base64.b64encode(samples.tobytes()).decode()
    return {"type": "input_audio_buffer.append", "audio": audio}


class Session:
    """A session in memory; ``events`` are all that came."""

    def __init__(self, socket):
        self.socket, self.events = socket, []

    def send(self, kind, **fields):
        self.socket.send_text(json.dumps({"type": kind} | fields))

    def update(self, kind="session.update", **session):
        self.send(kind, session=session)
        return self.next()

    def configure(self, **audio_input):
        return self.update(audio={"input": audio_input})

    def append(self, seconds):
        self.socket.send_text(json.dumps(append(noise(seconds))))

    def commit(self):
        self.send("input_audio_buffer.commit")

    def next(self):
        self.events.append(self.socket.receive_json())
        return self.events[-1]

    def until(self, kind):
        while (event := self.next())["type"] != kind:
            assert event["type"] != "error", event
        return event


class open_session:
    def __init__(self, shared=None, path=PATH, app=None, **options):
        self._context = TestClient(app or app_of(shared or made())).websocket_connect(
            path, **options
        )

    def __enter__(self):
        session = Session(self._context.__enter__())
        session.created = session.next()
        return session

    def __exit__(self, *error):
        try:
            return self._context.__exit__(*error)
        except CancelledError:  # of the client of Starlette, where the server ends at once
            return None


# ---- limits ----


async def flood(url, event):
    """A client that sends and never reads, until nothing more is taken of it."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    _, writer = await asyncio.open_connection(sock=client, limit=1)
    writer.write(
        f"GET {PATH} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    data = json.dumps(event).encode()
    frame = bytes([0x81, 0xFE]) + len(data).to_bytes(2, "big") + bytes(4) + data
    sent = 0
    try:
        while True:
            writer.write(frame * 100)
            await asyncio.wait_for(writer.drain(), 30)
            sent += 100
    except (ConnectionError, asyncio.TimeoutError):
        return sent
    finally:
        writer.transport.abort()


def test_a_flood_that_never_reads_ends(monkeypatch):
    """The server drops the client in time, with its place and its connection."""
    monkeypatch.setattr(connection, "SEND_S", 0.5)
    shared = made()
    with on_a_port(app := app_of(shared)) as url:
        started = time.monotonic()
        sent = asyncio.run(flood(url, {"type": "x", "event_id": "x" * 512}))
        assert sent > 0 and time.monotonic() - started < 60
        while shared.admission.num_recordings or app.state.server.server_state.connections:
            assert time.monotonic() - started < 60
            time.sleep(0.05)


def test_refused_clients_that_stall_are_dropped(monkeypatch):
    monkeypatch.setattr(connection, "SEND_S", 0.01)

    class Stuck:
        scope, app = {}, SimpleNamespace(state=SimpleNamespace())

        async def send_denial_response(self, response):
            await asyncio.sleep(3600)

        accept = send_text = send_denial_response

    from qwen3_asr_vllm.server.errors import ApiError

    async def run():
        stuck = connection.Connection(Stuck())
        for waiting in (stuck.refuse(ApiError(503, "full")), stuck.send({"type": "x"})):
            with pytest.raises(connection.WebSocketDisconnect):
                await waiting

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_session_without_room_for_audio_ends(monkeypatch):
    from qwen3_asr_vllm.server import backlog

    monkeypatch.setattr(backlog, "MAX_ROOM_S", 0.1)
    monkeypatch.setattr(backlog, "ROOM_POLL_S", 0.02)
    monkeypatch.setattr(backlog, "MAX_BACKLOG_S", 3)

    async def never(*_):
        await asyncio.sleep(3600)

    shared = made(decode=never)
    with open_session(shared) as session:
        session.configure(**MANUAL)
        session.append(8)
        event = session.next()
        assert event["error"]["code"] == "busy"
        assert "0.1 s" in event["error"]["message"]


def test_a_silent_engine_fails_the_item(monkeypatch):
    from qwen3_asr_vllm.server import worker

    monkeypatch.setattr(worker, "DECODE_S", 0.1)

    async def never(*_):
        await asyncio.sleep(3600)

    with open_session(made(decode=never)) as session:
        session.configure(**MANUAL)
        session.append(3)
        event = session.until("conversation.item.input_audio_transcription.failed")
        assert "0.1 s" in event["error"]["message"]


def test_compressed_frames_are_not_agreed_on():
    async def agreed(url):
        async with websockets.connect(url.replace("http", "ws") + PATH) as socket:
            return socket.response.headers.get("Sec-WebSocket-Extensions")

    with on_a_port(app_of(made())) as url:
        assert asyncio.run(agreed(url)) is None


@pytest.mark.parametrize(
    "content",
    ["[" + "[]," * 5_000_000 + "1]", '{"a":[' + "{}," * 5_000_000 + "1]}", "[" * 10_000_000,
     '{"type":"session.update","session":{' + '"a":1,' * 2_000_000 + '"b":1}}'],
    ids=["lists", "objects", "depth", "fields"],
)  # fmt: skip
def test_oversized_events_are_refused_unparsed(content):
    """15 MB that would be 670 MB once parsed, and hold the event loop for seconds."""
    import tracemalloc

    from qwen3_asr_vllm.server.dialects import read_event
    from qwen3_asr_vllm.server.session_config import EventError

    tracemalloc.start()
    with pytest.raises(EventError, match="20000 values") as error:
        read_event({"text": content})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.code == "invalid_json"
    assert peak < 1 << 20


def test_a_message_never_echoes_megabytes():
    with open_session() as session:
        for fields in (
            {"type": "session.update", "session": {"x" * 100_000: 1}},
            {"type": "x" * 100_000},
            {"type": "session.update", "model": "x" * 100_000},
            {"type": "session.update", "session": {"audio": {"input": {"transcription": {
                "language": "x" * 100_000}}}}},
            {"type": "x", "event_id": "x" * 100_000},
        ):  # fmt: skip
            session.socket.send_text(json.dumps(fields))
            assert len(json.dumps(session.next())) < 5_000


# ---- what clients send ----


@pytest.mark.parametrize("frame", [b"\x00\x01" * 100, b"\xff\xfe", b"RIFF"])
def test_a_binary_frame_is_named(frame):
    with open_session() as session:
        session.socket.send_bytes(frame)
        message = session.next()["error"]["message"]
        assert "binary frame" in message and "base64" in message


def test_binary_frames_may_hold_events():
    with open_session() as session:
        session.socket.send_bytes(b'{"type": "input_audio_buffer.clear"}')
        assert session.next()["type"] == "input_audio_buffer.cleared"


DATA = bytes(range(256)) + b"\xfb\xff"


@pytest.mark.parametrize(
    "audio",
    [
        base64.b64encode(DATA).decode(),
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.b64encode(DATA).decode().rstrip("="),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        f" {base64.b64encode(DATA).decode()}\n",
    ],
)
def test_every_kind_of_base64_is_read(audio):
    from qwen3_asr_vllm.server.dialects import read_audio

    assert read_audio(audio) == DATA


@pytest.mark.parametrize("audio", [None, 7, "~~~", "äöü", "A", "AAAA*AAA", "AAE=AAE=", ["AAAA"]])
def test_other_audio_is_refused(audio):
    from qwen3_asr_vllm.server.dialects import read_audio
    from qwen3_asr_vllm.server.session_config import EventError

    with pytest.raises(EventError, match="base64"):
        read_audio(audio)


# ---- the config ----


def reported(session, **audio_input):
    """The input of ``session.updated``."""
    event = session.configure(**audio_input)
    assert event["type"] == "session.updated", event
    return event["session"]["audio"]["input"]


@pytest.mark.parametrize("eagerness", [None, "low", "medium", "high", "auto"])
def test_semantic_vad_is_reported_as_given(eagerness):
    from openai.types.realtime import RealtimeTranscriptionSessionAudioInputTurnDetection as Turns
    from pydantic import TypeAdapter

    with open_session() as session:
        turns = {"type": "semantic_vad", "create_response": True, "interrupt_response": False}
        turns |= {"eagerness": eagerness} if eagerness else {}
        done = reported(session, turn_detection=turns)["turn_detection"]
        assert (done["type"], done["eagerness"]) == ("semantic_vad", eagerness or "auto")
        assert done["create_response"] is done["interrupt_response"] is None
        assert "silence_duration_ms" not in done
        again = reported(session, transcription={"language": "de"})["turn_detection"]
        assert again == done
        assert TypeAdapter(Turns).validate_python(done).type == "semantic_vad"


def test_pauses_end_turns_by_completeness():
    from qwen3_asr_vllm.server.session_config import TurnDetection

    for eagerness, patience_ms in {"low": 8_000, "medium": 4_000, "high": 2_000}.items():
        turns = TurnDetection(type="semantic_vad", eagerness=eagerness)
        silences = [turns.silence_ms(number / 10) for number in range(11)]
        assert silences[0] == patience_ms and silences[-1] == 160
        assert silences == sorted(silences, reverse=True)
    assert TurnDetection(type="server_vad").silence_ms(0.0) == 500


def test_fields_without_effect_are_null():
    with open_session() as session:
        turns = {"type": "server_vad", "create_response": True, "interrupt_response": False}
        done = reported(
            session,
            noise_reduction={"type": "near_field"},
            turn_detection=turns | {"idle_timeout_ms": 5_000},
        )
        assert done["noise_reduction"] is None
        names = ("create_response", "interrupt_response", "idle_timeout_ms")
        assert [done["turn_detection"][name] for name in names] == [None] * 3


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("audio.input.turn_detection.eagerness", "very", "low"),
        ("audio.input.turn_detection", {"eagerness": "low"}, "belongs to semantic_vad"),
        (
            "audio.input.turn_detection",
            {"type": "semantic_vad", "silence_duration_ms": 500},
            "belongs to server_vad",
        ),
        ("audio.input.turn_detection.type", "client_vad", "semantic_vad"),
        ("audio.input.turn_detection.create_response", "perhaps", "bool"),
        ("audio.input.noise_reduction.type", "all", "near_field"),
        ("audio.input.transcription.prompt", "x" * 10_001, "10001 characters; the limit is 10000"),
        ("audio.input.transcription.keywords", ["x" * 999] * 11, "the limit is 10000"),
        ("audio.input.transcription.prompt", "\ud800", "surrogate"),
        ("audio.input.transcription.languages", ["en", "klingon"], "klingon"),
        ("audio.input.transcription.skip_special_tokens", "perhaps", "bool"),
        ("include", ["item.audio"], "item.input_audio_transcription.logprobs"),
    ],
)
def test_a_field_at_fault_is_named(path, value, said):
    changes = value
    for name in reversed(path.split(".")):
        changes = {name: changes}
    with open_session() as session:
        error = session.update(**changes)["error"]
        assert error["param"].startswith(f"session.{path}")
        assert said in error["message"]


def test_too_long_prompts_are_refused():
    """Not at every utterance, as a fault of the server."""
    with open_session(made(model_config=SimpleNamespace(max_model_len=1_000))) as session:
        error = session.configure(transcription={"prompt": "x" * 700})["error"]
        assert error["param"] == "session.audio.input.transcription.prompt"
        assert "700 tokens" in error["message"] and "672" in error["message"]
        assert reported(session, transcription={"prompt": "x" * 672})


def test_prompts_without_a_place_are_refused():
    protocol = replace(PUBLISHED, with_context=None)
    with open_session(made(_protocol=protocol)) as session:
        error = session.configure(transcription={"prompt": "Kathrin"})["error"]
        assert error["param"] == "session.audio.input.transcription.prompt"
        assert "no place for a context" in error["message"]


def test_served_models_override_the_urls():
    with open_session(path=f"{PATH}?model=gpt-4o-transcribe") as session:
        session.append(1)
        assert session.next()["error"]["code"] == "model_not_found"
        session.configure(**MANUAL)
        session.append(1)
        assert session.next()["error"]["code"] == "model_not_found"
        assert session.configure(transcription={"model": "whisper-1"})["type"] == "error"
        session.configure(transcription={"model": "other"})
        session.append(2)
        session.commit()
        assert session.until(COMPLETED)["transcript"] == "En0 En1"


# ---- the open item ----


def utterance(session, seconds=2.0):
    session.append(seconds)
    session.commit()
    return session.until(COMPLETED)


def test_an_update_applies_to_the_open_item():
    shared = made()
    with open_session(shared) as session:
        session.configure(**MANUAL)
        session.append(3)
        reported(session, transcription={"language": "de", "prompt": "Ada", "model": "other"})
        end = utterance(session, 3)
        assert end["transcript"] == "Ge0 Ge1 Ge2 Ge3 Ge4 Ge5"
        assert end["languages"] == [{"code": "de"}]
        request, model = shared.requests[-1]
        assert "Ada" in request.prompt and model == "other"


def test_final_text_survives_an_update():
    with open_session() as session:
        session.configure(**MANUAL)
        session.append(9)
        said = session.until(DELTA)["delta"]
        reported(session, transcription={"language": "de"})
        session.append(2)
        session.commit()
        end = session.until(COMPLETED)
        deltas = [event["delta"] for event in session.events if event["type"] == DELTA]
        assert "".join(deltas) == end["transcript"]
        assert end["transcript"].startswith(said) and end["transcript"].endswith("Ge10")
        assert [word[2:] for word in end["transcript"].split()] == list(map(str, range(11)))


def test_clearing_never_blocks_later_items():
    """Each is cleared about when the engine answers."""
    with open_session() as session:
        session.configure(**MANUAL)
        for _ in range(5):
            session.append(3)
            session.send("input_audio_buffer.clear")
        assert utterance(session)["transcript"] == "En0 En1"


def test_a_committed_item_keeps_its_config():
    with open_session() as session:
        session.configure(**MANUAL)
        session.append(2)
        session.commit()
        session.send("session.update", session={"audio": {"input": {"transcription": {
            "language": "de"}}}})  # fmt: skip
        assert session.until(COMPLETED)["transcript"] == "En0 En1"
        assert utterance(session)["transcript"] == "Ge0 Ge1"


def test_several_languages_constrain_detection():
    """The model detects English, which is none of the candidates."""
    with open_session() as session:
        reported(session, **MANUAL, transcription={"languages": ["de", "fr"]})
        end = utterance(session, 6)
        assert end["transcript"] == "Ge0 Ge1 Ge2 Ge3 Ge4 Ge5"
        assert end["languages"] == [{"code": "de"}]
        reported(session, transcription={"languages": ["de", "en"]})
        assert utterance(session)["languages"] == [{"code": "en"}]
        reported(session, transcription={"languages": ["fr"]})
        assert utterance(session)["languages"] == [{"code": "fr"}]
        reported(session, transcription={"languages": None})
        assert utterance(session)["languages"] == [{"code": "en"}]


def test_sessions_keep_special_tokens_on_request():
    shared = made(lambda request: "language English<asr_text><|spk_0|>Hi.")
    shared._parts["protocol"] = replace(PUBLISHED, special_tokens=("<|spk_0|>",))
    with open_session(shared) as session:
        session.configure(**MANUAL)
        for keep, text in ((None, "Hi."), (False, "<|spk_0|>Hi."), (True, "Hi.")):
            reported(session, transcription={"skip_special_tokens": keep})
            assert utterance(session)["transcript"] == text


def test_a_header_of_several_languages_never_leaks():
    with open_session(made(lambda request: "language English, Chinese<asr_text>hi")) as session:
        session.configure(**MANUAL)
        end = utterance(session)
        assert end["transcript"] == "hi"
        assert end["languages"] == [{"code": "en"}, {"code": "zh"}]


# ---- turns by what was said ----


def speech(silence_s):
    """A sentence of 2.8 s, and silence after it."""
    samples = soundfile.read(HELDOUT / "english_14.flac", dtype="int16")[0]
    return np.concatenate([samples, np.zeros(round(16_000 * silence_s), np.int16)])


def saying(text):
    """An engine that writes the text, each token with a probability of 0.78."""
    return made(lambda request: f"language English<asr_text>{text}")


@contextmanager
def semantic(shared, **turns):
    with open_session(shared) as session:
        detection = {"type": "semantic_vad"} | turns
        session.configure(format=MANUAL["format"], turn_detection=detection)
        yield session


def stop_of(session):
    """Seconds of audio after which speech stopped."""
    return session.until("input_audio_buffer.speech_stopped")["audio_end_ms"] / 1000


def test_complete_sentences_end_their_turn_early():
    shared = saying("Go.")
    with semantic(shared) as session:
        session.socket.send_text(json.dumps(append(speech(silence_s=1.0))))
        assert 2.6 < stop_of(session) < 3.4
        end = session.until(COMPLETED)
        assert end["transcript"] == "Go."
        last, _ = shared.requests[-1]  # of the pause: nothing is decoded after it
        decoded_s = sum(window.num_frames for window in last.windows) / 100
        assert decoded_s == pytest.approx(end["usage"]["seconds"], abs=0.02)


@pytest.mark.parametrize("eagerness", ["low", "auto"])
def test_unfinished_sentences_go_on_after_pauses(eagerness):
    with semantic(saying("I go to"), eagerness=eagerness) as session:
        for _ in range(2):
            session.socket.send_text(json.dumps(append(speech(silence_s=1.6))))
        session.commit()
        end = session.until(COMPLETED)
        (start_ms,) = [e["audio_start_ms"] for e in session.events if "audio_start_ms" in e]
        assert not any(event["type"].endswith("stopped") for event in session.events)
        spoken_s = 2 * len(speech(silence_s=1.6)) / 16_000 - start_ms / 1000
        assert end["usage"]["seconds"] == pytest.approx(spoken_s, abs=0.01)  # nothing is lost


def test_eager_turns_end_in_unfinished_sentences():
    with semantic(saying("I go to"), eagerness="high") as session:
        session.socket.send_text(json.dumps(append(speech(silence_s=1.6))))
        assert 3.4 < stop_of(session) < 4.4


def test_slow_engines_delay_no_turn(monkeypatch):
    from qwen3_asr_vllm.server import session_config

    monkeypatch.setitem(session_config.PATIENCE_BY_EAGERNESS, "high", 600)

    async def never(*_):
        await asyncio.sleep(3600)

    with semantic(made(decode=never), eagerness="high") as session:
        session.socket.send_text(json.dumps(append(speech(silence_s=1.5))))
        assert 3.0 < stop_of(session) < 3.8


def test_a_failing_engine_judges_no_pause():
    async def fails(*_):
        raise RuntimeError("out of order")

    with semantic(made(decode=fails), eagerness="high") as session:
        session.socket.send_text(json.dumps(append(speech(silence_s=3.0))))
        kinds = {session.next()["type"] for _ in range(5)}
        assert "conversation.item.input_audio_transcription.failed" in kinds
        assert "input_audio_buffer.speech_stopped" in kinds


# ---- log-probabilities ----

LOGPROBS = "item.input_audio_transcription.logprobs"


@pytest.mark.parametrize("language", [None, "de"])
def test_delta_logprobs_join_to_the_transcripts(language):
    with open_session() as session:
        done = session.update(include=[LOGPROBS], audio={"input": MANUAL})
        assert done["session"]["include"] == [LOGPROBS]
        session.configure(transcription={"language": language})
        end = utterance(session, 15)  # two clips
        deltas = [event for event in session.events if event["type"] == DELTA]
        assert len(deltas) > 1
        assert sum((event["logprobs"] for event in deltas), []) == end["logprobs"]
        assert "".join(entry["token"] for entry in end["logprobs"]) == end["transcript"]
        for entry in end["logprobs"]:
            assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] == -0.25


def test_updates_keep_logprobs_complete():
    with open_session() as session:
        session.configure(**MANUAL)
        session.append(9)
        session.until(DELTA)
        session.update(include=[LOGPROBS])
        session.append(2)
        session.commit()
        end = session.until(COMPLETED)
        said = "".join(entry["token"] for entry in end["logprobs"])
        assert said and end["transcript"].endswith(said)


def test_logprobs_come_only_where_they_are_wanted():
    with open_session() as session:
        session.configure(**MANUAL)
        assert "logprobs" not in utterance(session)
        assert not any("logprobs" in event for event in session.events)


# ---- words ----

WORDS = "item.input_audio_transcription.words"
TIMED = f"conversation.{WORDS}"


@contextmanager
def timed_session(shared, **audio_input):
    with open_session(shared) as session:
        done = session.update(include=[WORDS], audio={"input": MANUAL | audio_input})
        assert done["session"]["include"] == [WORDS]
        yield session


def timed(session, text):
    """The words that came, and those to come until they are as long as the text."""
    words = [word for e in session.events if e["type"] == TIMED for word in e["words"]]
    while len("".join(word["word"] for word in words)) < len(text):
        event = session.next()
        words += event["words"] if event["type"] == TIMED else []
    assert "".join(word["word"] for word in words) == text
    return words


def test_final_words_come_with_their_times():
    with timed_session(made(aligner=Aligner())) as session:
        session.append(3)
        session.send("input_audio_buffer.clear")  # its audio counts, as in audio_start_ms
        end = utterance(session, 15)  # two clips
        words = timed(session, end["transcript"])
        assert len(words) >= 14
        for number, word in enumerate(words):
            assert word["start"] == pytest.approx(3 + number, abs=1)
            assert 0.5 < word["end"] - word["start"] < 1.5
        starts = [word["start"] for word in words]
        assert starts == sorted(starts)
        assert [event["type"] for event in session.events].count(TIMED) > 1


def test_text_never_waits_for_words():
    shared = made(aligner=Aligner())
    shared.aligner.gate.clear()
    with timed_session(shared) as session:
        ends = [utterance(session, 4) for _ in range(2)]
        assert not any(event["type"] == TIMED for event in session.events)
        shared.idle_s = 0.1
        session.send("input_audio_buffer.clear")  # from here on, it is idle
        time.sleep(0.5)
        shared.aligner.gate.set()
        words = timed(session, "".join(end["transcript"] for end in ends))
        assert words[4]["start"] == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize(
    ("aligner", "language", "reason"),
    [(Aligner(error="it is down"), None, "it is down"), (Aligner(), "th", "does not know Thai")],
)
def test_untimed_words_are_reported_once(aligner, language, reason):
    with timed_session(made(aligner=aligner), transcription={"language": language}) as session:
        end = utterance(session, 9)
        assert end["transcript"]
        came = [event for event in session.events if event["type"] == TIMED]
        (event,) = came or [session.until(TIMED)]
        assert event["words"] == [] and reason in event["error"]["message"]
        assert event["item_id"] == end["item_id"]


def test_words_need_an_aligner():
    with open_session() as session:
        error = session.update(include=[WORDS])["error"]
        assert error["param"] == "session.include" and "--aligner" in error["message"]


# ---- dialects ----

BETA = {"headers": {"OpenAI-Beta": "realtime=v1"}}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (BETA | {"path": f"{PATH}?intent=transcription"}, "transcription_session.created"),
        ({"path": f"{PATH}?intent=transcription", "subprotocols": [
            "realtime", "openai-beta.realtime-v1"]}, "transcription_session.created"),
        (BETA, "session.created"),
        ({"path": f"{PATH}?intent=transcription"}, "session.created"),
    ],
)  # fmt: skip
def test_the_beta_is_known_by_its_handshake(options, kind):
    with open_session(**options) as session:
        assert session.created["type"] == kind
        is_flat = "input_audio_format" in session.created["session"]
        assert is_flat == (options.keys() != {"path"})


def test_beta_sessions_work_end_to_end():
    from openai.types.beta import realtime as types

    wanted = {
        "input_audio_format": "g711_ulaw",
        "input_audio_transcription": {"model": "asr", "language": "de", "prompt": "Ada"},
        "turn_detection": None,
        "input_audio_noise_reduction": {"type": "far_field"},
        "include": [LOGPROBS],
        "modalities": ["text", "audio"],
    }
    with open_session(**BETA, path=f"{PATH}?intent=transcription") as session:
        event = session.update("transcription_session.update", **wanted)
        updated = types.TranscriptionSessionUpdatedEvent.construct(**event)
        assert updated.session.input_audio_format == "g711_ulaw"
        assert updated.session.input_audio_transcription.language == "de"
        assert updated.session.turn_detection is None
        assert event["session"]["input_audio_noise_reduction"] is None
        audio = base64.b64encode(bytes(range(256)) * 63).decode()  # 2 s at 8 kHz
        session.send("input_audio_buffer.append", audio=audio)
        session.commit()
        end = session.until(COMPLETED)
        types.ConversationItemInputAudioTranscriptionCompletedEvent.model_validate(end)
        assert end["transcript"] == "Ge0 Ge1" and end["logprobs"]
        kinds = [event["type"] for event in session.events]
        assert "conversation.item.created" in kinds and "conversation.item.added" not in kinds


def test_beta_events_work_in_any_session():
    with open_session() as session:
        flat = {"input_audio_transcription": {"language": "de"}, "turn_detection": None}
        event = session.update("transcription_session.update", input_audio_format="pcm16", **flat)
        assert event["type"] == "transcription_session.updated"
        assert event["session"]["input_audio_transcription"]["language"] == "de"
        event = session.configure(transcription={"prompt": "Ada"})
        assert event["type"] == "session.updated"
        assert event["session"]["audio"]["input"]["transcription"]["language"] == "de"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_audio_format", "mp3"),
        ("input_audio_format", 7),
        ("input_audio_transcription.language", "klingon"),
        ("input_audio_transcription.prompt", "x" * 10_001),
        ("turn_detection.threshold", 2),
        ("voice", "alloy"),
    ],
)
def test_beta_fields_keep_their_names(name, value):
    field, _, inner = name.partition(".")
    changes = {"modalities": ["text"], field: {inner: value} if inner else value}
    with open_session(**BETA) as session:
        error = session.update("transcription_session.update", **changes)["error"]
        assert error["param"] == f"session.{name}"


def test_the_dialect_of_vllm_has_its_errors():
    with open_session() as session:
        for event, code in (
            ({"model": "gpt"}, "model_not_found"),
            ({"model": None}, "invalid_event"),
        ):
            session.send("session.update", **event)
            error = session.next()
            assert isinstance(error["error"], str) and error["code"] == code
        session.send("session.update", model="asr")
        session.send("input_audio_buffer.append", audio="~~~")
        assert session.next()["code"] == "invalid_audio"
        session.socket.send_text("not json")
        assert isinstance(session.next()["error"], str)
        session.append(2)
        session.send("input_audio_buffer.commit")
        session.send("input_audio_buffer.commit", final=True)
        assert session.until("transcription.done")["text"] == "En0 En1"


@pytest.mark.parametrize(
    ("architecture", "is_named"),
    [("Qwen3ASRRealtimeGeneration", True), ("Qwen3ASRForConditionalGeneration", False)],
)
def test_needless_overrides_are_named(monkeypatch, architecture, is_named):
    from qwen3_asr_vllm.server import plugin

    warnings = []
    monkeypatch.setattr(plugin.logger, "warning", warnings.append)
    for name in ("Transcriber", "Realtime", "middleware", "load_protocol"):
        monkeypatch.setattr(plugin, name, Mock())
    model_config = Mock(architectures=[architecture])
    model_config.hf_config.model_type, model_config.hf_config.is_aligner = "qwen3_asr", False
    made, state = plugin.EndpointPlugin(), Mock()

    async def start():
        made.attach_router(FastAPI())
        args = SimpleNamespace(
            api_key=["key"], allowed_origins=["*"], api_server_count=None, chat_template=None
        )
        await made.init_state(Mock(model_config=model_config, errored=False), state, args)
        state.qwen3_asr.watch.cancel()

    asyncio.run(start())
    assert any("needs no override" in text for text in warnings) == is_named


def test_broken_events_leave_a_session_alive():
    from fuzzing.sessions import converse

    with on_a_port(app_of(made(admission=Admission(max_recordings=10)))) as url:
        outcomes = [converse(url, number) for number in range(100)]
    assert [outcome for outcome in outcomes if outcome.broken] == []


def test_the_benchmark_times_every_session():
    import sessions

    with on_a_port(app_of(made(admission=Admission(max_recordings=10)))) as url:
        row = sessions.session_row(url, 3, 1.0)
    assert row["with text"] == row["sessions"] == 3
    assert 0 < row["p50 s"] <= row["p95 s"] and row["first p50 s"] > 0
