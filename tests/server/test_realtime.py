# SPDX-License-Identifier: Apache-2.0
"""``/v1/realtime``: OpenAI's events through the real client, in fair weather and in foul."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from contextlib import asynccontextmanager
from types import SimpleNamespace

import jiwer
import numpy as np
import openai
import pytest
import soundfile
import soxr
import websockets
from openai.types import realtime as types
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from support.audio import DATA
from support.checkpoints import CHECKPOINT
from support.clients import metric

from qwen3_asr_vllm.server.admission import Admission

MODEL = str(CHECKPOINT)
HELLO = DATA / "hello.flac"
RATES = {"audio/pcm": 24_000, "audio/pcmu": 8_000, "audio/pcma": 8_000}
SUBTYPES = {"audio/pcm": "PCM_16", "audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
PATIENCE = {"open_timeout": 300, "ping_timeout": None}  # a busy server proves nothing wrong
MANUAL = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}


# ---- without an engine ----


def test_configs_are_honoured_or_refused():
    from qwen3_asr_vllm.server.session_config import Config, EventError

    config = Config().updated({"audio": {"input": {"transcription": {"prompt": "Ada"}}}})
    config = config.updated({"audio": {"input": MANUAL | {"transcription": {"language": "DE"}}}})
    wanted = config.audio.input
    assert (wanted.transcription.prompt, wanted.transcription.language) == ("Ada", "DE")
    assert wanted.turn_detection is None
    assert wanted.format.rate == 16_000
    again = config.updated({"audio": {"input": {"turn_detection": {"type": "server_vad"}}}})
    assert again.audio.input.turn_detection.threshold == 0.5
    for path, value in {
        "type": "realtime",
        "voice": "alloy",
        "include": ["item.input_audio_transcription.logprobs", "item.audio"],
        "audio.output": {},
        "audio.input.format.rate": 44_100,
        "audio.input.turn_detection.type": "client_vad",
        "audio.input.turn_detection.threshold": 2,
        "audio.input.transcription": None,
        "audio.input.transcription.language": "klingon",
        "audio.input.transcription.languages": ["en", "klingon"],
    }.items():
        changes = value
        for name in reversed(path.split(".")):
            changes = {name: changes}
        with pytest.raises(EventError) as error:
            config.updated(changes)
        assert error.value.param.startswith(f"session.{path}")


@pytest.mark.parametrize("reasons", [["stop"], ["error", "stop"], ["error", "error", "stop"]])
def test_dropped_requests_are_resent_once(reasons):
    from vllm.exceptions import GenerationError

    from qwen3_asr_vllm.decoding import Decoding
    from qwen3_asr_vllm.server.realtime_serving import Realtime

    async def nothing(*_):
        return None

    async def generate(prompt, params, request_id, **_):
        reason = left.pop(0)
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])

    made, left = object.__new__(Realtime), list(reasons)
    made._language_token_ids, made._params = {}, None
    made.render = made._get_trace_headers = nothing
    made.models = SimpleNamespace(lora_requests={})
    made.engine_client = SimpleNamespace(generate=generate)
    request = SimpleNamespace(decoding=Decoding(9), engine_prompt={})
    asked = made.decode(request, None, {})
    if len(reasons) < 3:
        assert asyncio.run(asked).outputs[0].finish_reason == "stop"
    else:
        with pytest.raises(GenerationError):
            asyncio.run(asked)
    assert left == reasons[2:]


def app_with(allowed_origins=("*",), tokens=()):
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from qwen3_asr_vllm.server.realtime import realtime
    from qwen3_asr_vllm.server.realtime_serving import Realtime
    from qwen3_asr_vllm.server.state import ServerState

    app = Starlette(routes=[WebSocketRoute("/v1/realtime", realtime)])
    shared = object.__new__(Realtime)
    shared.allowed_origins = list(allowed_origins)
    shared.admission = Admission(max_recordings=1)
    app.state.qwen3_asr = ServerState(realtime=shared)
    guarded = AuthenticationMiddleware(app, list(tokens)) if tokens else app

    async def served(scope, receive, send):
        await guarded(scope, receive, send)

    return served, shared


def refusal(app, **headers):
    """The status of a handshake that fails."""
    with pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)) as denied:
        with TestClient(app).websocket_connect("/v1/realtime", headers=headers):
            pass
    return getattr(denied.value, "status_code", 403)  # closed before it was accepted


def test_other_origins_may_not_connect():
    app, shared = app_with(["https://friend.example"])
    assert refusal(app, origin="https://foe.example") == 403
    assert shared.allows("https://friend.example", "here:8000")
    assert shared.allows("http://here:8000", "here:8000")  # the server's own page
    assert shared.allows(None, "here:8000")
    assert app_with()[1].allows("https://foe.example", "here:8000")


def test_without_the_key_there_is_no_session():
    app, _ = app_with(["https://friend.example"], tokens=["secret"])
    assert refusal(app) == 401
    assert refusal(app, authorization="Bearer guess") == 401
    assert refusal(app, authorization="Bearer secret", origin="https://foe.example") == 403


def test_full_servers_refuse_sessions_with_retry():
    app, shared = app_with()
    with shared.admission.reserve(), pytest.raises(WebSocketDenialResponse) as denied:
        TestClient(app).websocket_connect("/v1/realtime").__enter__()
    assert (denied.value.status_code, denied.value.headers["Retry-After"]) == (503, "5")
    assert denied.value.json()["error"]["code"] == "busy"


# ---- with the server ----


def samples_of(path, rate=16_000, seconds=None):
    samples, own = soundfile.read(path, dtype="float32")
    samples = samples[: None if seconds is None else round(seconds * own)]
    return samples if rate == own else soxr.resample(samples, own, rate)


def encoded(samples, kind="audio/pcm"):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="RAW", subtype=SUBTYPES[kind])
    return file.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


class Refused(Exception):
    """An error event that came in place of the awaited one."""


class Client:
    """A connection of the official client, and all that came over it."""

    def __init__(self, connection):
        self.connection = connection
        self.events = []

    async def send(self, kind, **fields):
        await self.connection.send({"type": kind, **fields})

    async def configure(self, **audio_input):
        session = {"type": "transcription", "audio": {"input": audio_input}}
        await self.connection.session.update(session=session)
        return await self.until("session.updated")

    async def append(self, data, size=9_600):
        for start in range(0, len(data), size):
            await self.connection.input_audio_buffer.append(audio=b64(data[start : start + size]))

    async def until(self, kind, count=1):
        """The next event of a kind; errors are for who waits for them."""
        while True:
            event = await asyncio.wait_for(self.connection.recv(), 120)
            self.events.append(event)
            if event.type == kind:
                count -= 1
                if not count:
                    return event
            if event.type == "error":
                raise Refused(f"{event.error.code} {event.error.event_id} {event.error.message}")

    async def said(self, samples, **options):
        """The transcript of one utterance that is committed by hand, and its deltas."""
        await self.append(encoded(samples), **options)
        await self.connection.input_audio_buffer.commit()
        return (
            await self.until("conversation.item.input_audio_transcription.completed")
        ).transcript

    def of(self, kind):
        return [event for event in self.events if event.type.endswith(kind)]


@asynccontextmanager
async def connected(server, model=MODEL, **audio_input):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    query = {"intent": "transcription"}
    async with client.realtime.connect(
        model=model, extra_query=query, websocket_connection_options=PATIENCE
    ) as connection:
        made = Client(connection)
        await made.until("session.created")
        if audio_input:
            await made.configure(**audio_input)
        yield made
    await client.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 400))


@pytest.fixture(scope="module")
def hello(server):
    """The transcript of the REST route."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return client.audio.transcriptions.create(model=MODEL, file=HELLO).text


@pytest.mark.vllm
def test_an_utterance_has_all_events_in_order(server, hello):
    """Turns by the server; the client knows every event, and in OpenAI's order."""

    async def session():
        turns = {"type": "server_vad", "silence_duration_ms": 2_000}  # it pauses between sentences
        async with connected(server, turn_detection=turns) as client:
            silence = np.zeros(3 * 24_000, np.float32)
            samples = np.concatenate([silence, samples_of(HELLO, 24_000), silence])
            await client.append(encoded(samples))
            await client.until("conversation.item.input_audio_transcription.completed")
            return client.events, len(samples) / 24

    events, total_ms = run(session())
    created, updated, started, stopped, committed, added, done, completed = [
        event for event in events if not event.type.endswith("delta")
    ]
    assert isinstance(created, types.SessionCreatedEvent)
    assert isinstance(updated, types.SessionUpdatedEvent)
    assert isinstance(started, types.InputAudioBufferSpeechStartedEvent)
    assert isinstance(stopped, types.InputAudioBufferSpeechStoppedEvent)
    assert isinstance(committed, types.InputAudioBufferCommittedEvent)
    assert isinstance(added, types.ConversationItemAdded)
    assert isinstance(done, types.ConversationItemDone)
    assert isinstance(completed, types.ConversationItemInputAudioTranscriptionCompletedEvent)
    assert 2_000 < started.audio_start_ms < 4_000
    assert started.audio_start_ms < stopped.audio_end_ms <= total_ms
    ids = {e.item_id for e in events if getattr(e, "item_id", None)} | {added.item.id, done.item.id}
    assert len(ids) == 1
    assert len({event.event_id for event in events}) == len(events)
    deltas = [event for event in events if event.type.endswith("delta")]
    delta_type = types.ConversationItemInputAudioTranscriptionDeltaEvent
    assert deltas and all(isinstance(delta, delta_type) for delta in deltas)
    assert "".join(delta.delta for delta in deltas) == completed.transcript
    assert jiwer.wer(hello.lower(), completed.transcript.lower()) < 0.4
    assert completed.usage.type == "duration" and 1 < completed.usage.seconds < total_ms / 1000
    assert [language.code for language in completed.languages] == ["en"]
    assert created.session.audio.input.turn_detection.silence_duration_ms == 500
    assert updated.session.audio.input.turn_detection.silence_duration_ms == 2_000
    assert created.session.audio.input.transcription.model == MODEL


@pytest.mark.vllm
def test_two_turns_are_two_utterances(server, hello):
    silence, speech = np.zeros(3 * 24_000, np.float32), samples_of(HELLO, 24_000)
    samples = np.concatenate([silence, speech, silence, speech, silence])

    async def session():
        turns = {"type": "server_vad", "silence_duration_ms": 2_000}
        async with connected(server, turn_detection=turns) as client:
            await client.append(encoded(samples))
            for _ in range(2):
                await client.until("conversation.item.input_audio_transcription.completed")
            return client.events

    events = run(session())
    turns = [e for e in events if e.type.startswith("input_audio_buffer.speech")]
    times_ms = [getattr(e, "audio_start_ms", None) or e.audio_end_ms for e in turns]
    assert times_ms == sorted(times_ms) and len(set(times_ms)) == 4
    said = [e for e in events if e.type.endswith("completed")]
    assert [e.item_id for e in said] == [turns[0].item_id, turns[2].item_id]
    assert said[0].item_id != said[1].item_id
    assert all(jiwer.wer(hello.lower(), e.transcript.lower()) < 0.4 for e in said)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", RATES)
def test_every_format_is_transcribed(server, hello, kind):
    async def session():
        async with connected(server, format={"type": kind}, turn_detection=None) as client:
            await client.append(encoded(samples_of(HELLO, RATES[kind]), kind))
            await client.connection.input_audio_buffer.commit()
            kind_of_end = "conversation.item.input_audio_transcription.completed"
            return await client.until(kind_of_end)

    completed = run(session())
    assert completed.usage.seconds == pytest.approx(soundfile.info(HELLO).duration, abs=0.01)
    assert jiwer.wer(hello.lower(), completed.transcript.lower()) < 0.5


@pytest.mark.vllm
def test_odd_pieces_transcribe_like_the_whole(server):
    async def session():
        samples = samples_of(HELLO)
        async with connected(server, **MANUAL) as client:
            whole = await client.said(samples, size=1 << 20)
            data, start = encoded(samples), 0
            for size in [1] * 300 + [3] * 200 + [777] * 20 + [4_801] * 1_000:
                await client.append(data[start : start + size])
                start += size
            await client.connection.input_audio_buffer.commit()
            kind = "conversation.item.input_audio_transcription.completed"
            return whole, (await client.until(kind)).transcript

    whole, pieces = run(session())
    assert pieces == whole != ""


@pytest.mark.vllm
def test_nothing_of_an_utterance_reaches_the_next(server):
    """Two back to back, in either order, and after one that was cleared: the same texts."""
    one, two = samples_of(HELLO), samples_of(DATA / "three_languages.flac", seconds=6)

    async def session(*utterances):
        async with connected(server, **MANUAL) as client:
            for samples in utterances:
                await client.append(encoded(samples))
                await client.connection.input_audio_buffer.commit()
            completed = "conversation.item.input_audio_transcription.completed"
            await client.until(completed, count=len(utterances))
            ends = client.of("transcription.completed")
            committed = client.of("committed")
            assert [c.item_id for c in committed] == [e.item_id for e in ends]
            assert [c.previous_item_id for c in committed][1:] == [c.item_id for c in committed][
                :-1
            ]
            return [end.transcript for end in ends]

    async def cleared():
        async with connected(server, **MANUAL) as client:
            await client.append(encoded(two))
            await client.connection.input_audio_buffer.clear()
            await client.until("input_audio_buffer.cleared")
            return await client.said(one)

    first, second = run(session(one, two))
    assert first and second and first != second
    assert run(session(two, one, two)) == [second, first, second]
    assert run(cleared()) == first


PATIENT = {"type": "server_vad", "silence_duration_ms": 10_000}


@pytest.mark.vllm
@pytest.mark.parametrize("turns", [None, PATIENT], ids=["by hand", "by turns"])
def test_long_utterances_are_split_without_loss(server, turns):
    """88 s in one burst; this server's utterances hold 20 s."""
    path = DATA / "three_languages.flac"

    async def session():
        async with connected(server, **MANUAL | {"turn_detection": turns}) as client:
            await client.append(encoded(samples_of(path)), size=200_001)
            await client.connection.input_audio_buffer.commit()
            completed = "conversation.item.input_audio_transcription.completed"
            await client.until(completed, count=5)
            return client.of("transcription.completed")

    ends = run(session())
    assert [end.usage.seconds for end in ends[:-1]] == [20] * 4
    assert sum(e.usage.seconds for e in ends) == pytest.approx(soundfile.info(path).duration, abs=1)
    text = re.sub(r"\s+", "", "".join(end.transcript for end in ends))
    assert jiwer.cer(re.sub(r"\s+", "", path.with_suffix(".txt").read_text()), text) < 0.35


@pytest.mark.vllm
def test_minutes_of_silence_cost_the_engine_nothing(server):
    silence = np.zeros(180 * 16_000, np.float32)

    async def session():
        async with connected(server, format=MANUAL["format"]) as client:
            await client.append(encoded(silence), size=400_000)
            turns = len(client.events)
            await client.configure(turn_detection=None)
            assert turns == len(client.events) - 1  # no speech was found
            text = await client.said(silence[: 15 * 16_000], size=400_000)
            return text

    before = metric(server, "vllm:prompt_tokens_total")
    assert run(session()) == ""
    assert metric(server, "vllm:prompt_tokens_total") == before


GARBAGE = {
    "not json": "invalid_json",
    '"text"': "invalid_json",
    "[" * 2_000: "invalid_json",
    b"\xff\xfe": "invalid_json",
    "{}": "unknown_event",
    '{"type": ["x"]}': "unknown_event",
    '{"type": "response.create"}': "unknown_event",
    '{"type": "input_audio_buffer.append"}': "invalid_audio",
    '{"type": "input_audio_buffer.append", "audio": 7}': "invalid_audio",
    '{"type": "input_audio_buffer.append", "audio": "~~~"}': "invalid_audio",
    '{"type": "input_audio_buffer.commit"}': "input_audio_buffer_commit_empty",
    '{"type": "session.update"}': "invalid_value",
    '{"type": "session.update", "session": 1, "event_id": 3}': "invalid_value",
    '{"type": "session.update", "session": {"model": "gpt"}}': "invalid_value",
}


@asynccontextmanager
async def raw(server):
    url = server.url.replace("http", "ws") + "/v1/realtime"
    async with websockets.connect(url, max_size=None, **PATIENCE) as socket:
        assert json.loads(await socket.recv())["type"] == "session.created"
        yield socket


@pytest.mark.vllm
def test_the_server_agrees_on_no_compression(server):
    async def session():
        async with raw(server) as socket:
            return socket.response.headers.get("Sec-WebSocket-Extensions")

    assert run(session()) is None


@pytest.mark.vllm
def test_logprobs_and_candidates_reach_the_engine(server):
    """The model detects English, which is none of the candidates."""
    logprobs = "item.input_audio_transcription.logprobs"

    async def session():
        async with connected(server, **MANUAL) as client:
            transcription = {"languages": ["de", "zh"]}
            audio = {"input": {"transcription": transcription}}
            await client.connection.session.update(
                session={"type": "transcription", "include": [logprobs], "audio": audio}
            )
            await client.until("session.updated")
            await client.said(samples_of(HELLO))
            return client.of("delta"), client.of("completed")[0]

    deltas, completed = run(session())
    assert completed.languages[0].code in ("de", "zh")
    assert completed.logprobs and all(entry.logprob <= 0 for entry in completed.logprobs)
    assert "".join(entry.token for entry in completed.logprobs).strip() == completed.transcript
    assert sum((delta.logprobs for delta in deltas), []) == completed.logprobs


@pytest.mark.vllm
def test_sessions_survive_garbage(server):
    async def session():
        async with raw(server) as socket:
            codes = []
            for message in GARBAGE:
                await socket.send(message)
                event = json.loads(await socket.recv())
                assert event["type"] == "error" and event["error"]["message"]
                codes.append(event["error"]["code"])
        async with connected(server, **MANUAL) as client:
            with pytest.raises(Refused, match="model_not_found"):
                await client.configure(transcription={"model": "gpt-4o-transcribe"})
            await client.send("nonsense", event_id="mine")
            with pytest.raises(Refused, match="mine"):
                await client.until("never")
            return codes, await client.said(samples_of(HELLO))

    codes, text = run(session())
    assert codes == list(GARBAGE.values())
    assert text


@pytest.mark.vllm
def test_a_session_is_updated_in_mid_stream(server):
    """The open utterance goes on in the new language; the format changes at once."""
    samples = samples_of(HELLO)
    half = len(samples) // 2

    async def session():
        async with connected(server, **MANUAL) as client:
            await client.said(samples)
            await client.append(encoded(samples[:half]))
            event = await client.configure(transcription={"language": "de", "prompt": "Ada"})
            assert event.session.audio.input.transcription.language == "de"
            assert event.session.audio.input.turn_detection is None  # what was not sent stays
            assert await client.said(samples[half:])
            assert await client.said(samples)
            codes = [[one.code for one in e.languages] for e in client.of("completed")]
            turns = {"type": "server_vad", "prefix_padding_ms": 0, "silence_duration_ms": 2_000}
            await client.configure(turn_detection=turns)
            await client.append(encoded(np.pad(samples, (16_000, 48_000))))
            await client.until("conversation.item.input_audio_transcription.completed")
            (started,) = client.of("speech_started")
            assert 1_000 < started.audio_start_ms - 3_000 * len(samples) / 16_000 < 2_000
            return codes

    assert run(session()) == [["en"], ["de"], ["de"]]


@pytest.mark.vllm
def test_audio_of_gone_clients_is_dropped(server):
    """It disconnects at its first text, with minutes of audio pending."""
    samples = np.tile(samples_of(HELLO), 20)

    async def session():
        async with raw(server) as socket:
            update = {"type": "session.update", "session": {"audio": {"input": MANUAL}}}
            await socket.send(json.dumps(update))
            append = {"type": "input_audio_buffer.append", "audio": b64(encoded(samples))}
            await socket.send(json.dumps(append))
            while not json.loads(await socket.recv())["type"].endswith("delta"):
                pass
            socket.transport.abort()
        tokens, idle = -1.0, 0
        while idle < 20:  # two seconds in which the engine has nothing to do
            await asyncio.sleep(0.1)
            before, tokens = tokens, metric(server, "vllm:prompt_tokens_total")
            busy = metric(server, "vllm:num_requests_running") or tokens != before
            idle = 0 if busy else idle + 1
        return tokens

    before = metric(server, "vllm:prompt_tokens_total")
    assert run(session()) - before < 13 * len(samples) / 16_000 / 2
    assert metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.vllm
def test_a_client_that_reads_late_loses_nothing(server):
    """Four minutes at once, and not an event read before they are sent."""
    samples = np.tile(samples_of(HELLO), 24)

    async def session():
        async with connected(server, **MANUAL) as client:
            await client.append(encoded(samples), size=64_000)
            await client.connection.input_audio_buffer.commit()
            count = -(-len(samples) // (20 * 16_000))
            completed = "conversation.item.input_audio_transcription.completed"
            await client.until(completed, count=count)
            return client.of("transcription.completed"), client.of("delta")

    ends, deltas = run(session())
    assert sum(e.usage.seconds for e in ends) == pytest.approx(len(samples) / 16_000, abs=0.01)
    text = {end.item_id: end.transcript for end in ends}
    assert text == {item: "".join(d.delta for d in deltas if d.item_id == item) for item in text}


@pytest.mark.vllm
def test_idle_sessions_end_with_a_reason(server):
    async def session():
        async with raw(server) as socket:
            event = json.loads(await asyncio.wait_for(socket.recv(), 60))
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(socket.recv(), 60)
            return event["error"]["code"], socket.close_code

    assert run(session()) == ("idle_timeout", 1001)


@pytest.mark.vllm
def test_unknown_models_are_refused_at_first_audio(server):
    async def session():
        async with connected(server, model="whisper-1") as client:
            await client.append(bytes(100))
            with pytest.raises(Refused, match="model_not_found"):
                await client.until("never")

    run(session())


@pytest.mark.vllm
def test_the_dialect_of_vllm_is_understood(server, hello):
    """Its own client: session.update, commit to begin, 16 kHz, commit with ``final`` to end."""

    async def session():
        async with raw(server) as socket:
            events = [
                {"type": "session.update", "model": MODEL},
                {"type": "input_audio_buffer.commit"},
                {"type": "input_audio_buffer.append", "audio": b64(encoded(samples_of(HELLO)))},
                {"type": "input_audio_buffer.commit", "final": True},
            ]
            for event in events:
                await socket.send(json.dumps(event))
            text = ""
            while (event := json.loads(await socket.recv()))["type"] == "transcription.delta":
                text += event["delta"]
            return text, event

    text, done = run(session())
    assert done["type"] == "transcription.done"
    assert done["text"] == text
    assert done["usage"]["completion_tokens"] > 0
    assert jiwer.wer(hello.lower(), text.lower()) < 0.4
