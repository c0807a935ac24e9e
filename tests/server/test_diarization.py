# SPDX-License-Identifier: Apache-2.0
"""Speakers over HTTP: a fake engine, and a diarizer's real server with a plain function."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from openai.types.audio import TranscriptionDiarized, TranscriptionTextSegmentEvent
from support.audio import noise, speech, wav, wav_bytes
from support.clients import error, events
from support.fake_engine import ENGLISH, FakeEngine
from support.servers import on_a_port, reserved_port

from qwen3_asr_vllm.diarizers import DiarizerError
from qwen3_asr_vllm.server.diarizer_client import RemoteDiarizer, remote_diarizer
from qwen3_asr_vllm.server.diarizer_server import DiarizerServer, main
from qwen3_asr_vllm.speakers import DiarizationRequest, SpeakerTurn

TEXT = "One two three four. Five six seven eight."
FOUR = wav(noise(4.0))


class Diarizer:
    """Finds the turns that a test gives it, and knows voices by the sign of their samples."""

    same_voice = 0.9

    def __init__(self):
        self.turns = [(0, 2, 0), (2, 4, 1)]
        self.asked = []

    def __call__(self, waveform, num_speakers=None, *, min_speakers=None, max_speakers=None):
        self.asked.append((len(waveform), num_speakers, min_speakers, max_speakers))
        if isinstance(self.turns, Exception):
            raise self.turns
        return self.turns

    def embed(self, waveform):
        return [1.0, float(np.sign(waveform.mean()))]


@pytest.fixture
def diarizer():
    return Diarizer()


@pytest.fixture
def post(serve, diarizer, monkeypatch):
    """Post forms to a server with a diarizer, on one event loop."""
    with on_a_port(DiarizerServer(diarizer).app) as url:
        monkeypatch.setenv("QWEN3_ASR_DIARIZER_URL", url)
        post = serve(FakeEngine(f"{ENGLISH}{TEXT}"))
        with post.client as client:
            yield post
            client.portal.call(client.app.state.qwen3_asr.transcriber.diarizer.close)


def spoken(body):
    return [(segment.get("speaker"), segment["text"]) for segment in body["segments"]]


BOTH = [("A", "One two three four."), ("B", " Five six seven eight.")]


# ---- formats ----


def test_mono_is_diarized(post, diarizer):
    body = post(FOUR, response_format="diarized_json").json()
    assert spoken(body) == BOTH and body["text"] == TEXT
    assert TranscriptionDiarized.model_validate(body).segments[1].speaker == "B"
    assert diarizer.asked == [(64_000, None, None, None)]


def test_unknown_speakers_are_called_so(post, diarizer):
    diarizer.turns = [(0, 2, "Ada")]
    body = post(FOUR, response_format="diarized_json").json()
    assert [name for name, _ in spoken(body)] == ["Ada", "unknown"]


def test_verbose_json_has_speakers_on_request(post):
    body = post(FOUR, response_format="verbose_json", diarize="true").json()
    assert spoken(body) == BOTH
    assert spoken(post(FOUR, response_format="verbose_json").json()) == [
        (None, text) for _, text in BOTH
    ]


def test_subtitles_name_speakers(post):
    assert "[A]: One two three four." in post(FOUR, response_format="srt", diarize="true").text
    assert "<v B>Five six seven eight." in post(FOUR, response_format="vtt", diarize="1").text
    body = post(FOUR, diarize="true", **{"include[]": "vtt"}).json()
    assert "<v A>" in body["vtt"] and "segments" not in body


def test_a_stream_ends_with_its_segments(post):
    *deltas, first, second, done = events(post(FOUR, response_format="diarized_json", stream="1"))
    assert "".join(event["delta"] for event in deltas) == TEXT == done["text"]
    segments = [TranscriptionTextSegmentEvent.model_validate(event) for event in (first, second)]
    assert [(s.speaker, s.text) for s in segments] == BOTH
    assert done["type"] == "transcript.text.done"


def test_text_streams_before_the_diarizer_ends(serve, diarizer):
    """The diarizer waits for what the engine has decoded: both run at once."""
    engine = FakeEngine(f"{ENGLISH}{TEXT}")
    post = serve(engine)
    transcriber = post.client.app.state.qwen3_asr.transcriber

    async def answer(request):
        while not engine.asked or engine.running:
            await asyncio.sleep(0.001)
        return SimpleNamespace(turns=(SpeakerTurn(0, 4, 0),), error="")

    async def is_up():
        return True

    transcriber.diarizer = SimpleNamespace(answer=answer, is_up=is_up, url="")
    *deltas, one, two, _ = events(post(FOUR, response_format="diarized_json", stream="true"))
    assert len(deltas) > 5 and one["speaker"] == two["speaker"] == "A"


# ---- channels ----


def test_a_call_keeps_its_channels(post, diarizer):
    call = wav(np.stack([noise(4.0), noise(4.0, seed=1)], axis=1))
    body = post(call, response_format="diarized_json").json()
    assert sorted({name for name, _ in spoken(body)}) == ["A", "B"] and not diarizer.asked
    body = post(call, response_format="verbose_json", diarize="true").json()
    assert {s["speaker"] for s in body["segments"]} == {"A", "B"} and not diarizer.asked


def test_a_call_can_be_streamed(post):
    call = wav(np.stack([noise(4.0), noise(4.0, seed=1)], axis=1))
    found = events(post(call, response_format="diarized_json", stream="true"))
    segments = [event for event in found if event["type"] == "transcript.text.segment"]
    text = "".join(e["delta"] for e in found if e["type"] == "transcript.text.delta")
    assert "".join(s["text"] for s in segments) == text == found[-1]["text"]


@pytest.mark.parametrize("right", [1.0, 0.5, 0.0])
def test_a_mix_in_stereo_is_diarized(post, diarizer, right):
    left = speech(4.0, seed=2)
    stereo = wav(np.stack([left, right * left + 1e-4 * noise(4.0)], axis=1))
    assert spoken(post(stereo, response_format="diarized_json").json()) == BOTH
    assert len(diarizer.asked) == 1


def test_counts_diarize_the_mix_of_channels(post, diarizer):
    call = wav(np.stack([noise(4.0), noise(4.0, seed=1)], axis=1))
    post(call, response_format="diarized_json", num_speakers="2")
    assert diarizer.asked == [(64_000, 2, None, None)]


# ---- what is known of speakers ----


def test_numbers_of_speakers_reach_the_diarizer(post, diarizer):
    fields = {"response_format": "diarized_json", "min_speakers": "2", "max_speakers": "3"}
    post(FOUR, **fields)
    assert diarizer.asked == [(64_000, None, 2, 3)]


def reference(sign, seconds=2.0, *, head="data:audio/wav;base64,"):
    samples = np.full(int(16_000 * seconds), 0.2 * sign, np.float32)
    return head + base64.b64encode(wav_bytes(samples)).decode()


SIGNS = wav(np.repeat(np.float32([0.2, -0.2]), 32_000))


@pytest.mark.parametrize("head", ["data:audio/wav;base64,", ""])
def test_known_voices_get_their_names(post, head):
    fields = {
        "known_speaker_names[]": ["Bea", "Ada"],
        "known_speaker_references[]": [reference(-1, head=head), reference(1, head=head)],
    }
    body = post(SIGNS, response_format="diarized_json", **fields).json()
    assert [name for name, _ in spoken(body)] == ["Ada", "Bea"]


def test_known_voices_come_in_json_too(post):
    body = {
        "file": base64.b64encode(SIGNS[1]).decode(),
        "response_format": "diarized_json",
        "known_speaker_names": ["Bea"],
        "known_speaker_references": [reference(-1)],
    }
    answer = post.client.post("/v1/audio/transcriptions", json=body).json()
    assert [name for name, _ in spoken(answer)] == ["A", "Bea"]


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ("data:audio/wav;base64,!!!", "known_speaker_references[0]: "),
        (base64.b64encode(b"words" * 100).decode(), "known_speaker_references[0]: not audio"),
        (reference(1, 0.5), "known_speaker_references[0]: it has 0.5 s of audio; send 1 to 30 s"),
        (reference(1, 31), "30 s"),
    ],
)
def test_wrong_voices_are_named(post, voice, message):
    fields = {"known_speaker_names[]": "Ada", "known_speaker_references[]": voice}
    body = error(post(FOUR, response_format="diarized_json", **fields), 400)
    assert body["param"] == "known_speaker_references" and message in body["message"]


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_speakers": "2"}, "num_speakers", "with diarize=true"),
        ({"diarize": "true"}, "diarize", "json has no speakers; use diarized_json"),
        ({"diarize": "true", "response_format": "text"}, "diarize", "text has no speakers"),
        ({"response_format": "diarized_json", "num_speakers": "0"}, "num_speakers", "equal to 1"),
        ({"response_format": "diarized_json", "max_speakers": "65"}, "max_speakers", "equal to 64"),
        (
            {"response_format": "diarized_json", "min_speakers": "3", "max_speakers": "2"},
            "min_speakers",
            "no number of speakers fits",
        ),
        (
            {"response_format": "diarized_json", "known_speaker_references[]": "x"},
            "known_speaker_references",
            "a different name for each",
        ),
        (
            {"response_format": "diarized_json", "known_speaker_names[]": ["a", "b"]},
            "known_speaker_names",
            "send known_speaker_references",
        ),
        (
            {"response_format": "diarized_json", "known_speaker_names[]": ["a", "b", "c"]},
            "known_speaker_names",
            "one for each name",
        ),
    ],
)
def test_wrong_fields_of_speakers_are_named(post, fields, param, message):
    body = error(post(FOUR, **fields), 400)
    assert body["param"] == param and message in body["message"]


def test_the_advice_is_to_start_a_diarizer(serve):
    post = serve(FakeEngine(f"{ENGLISH}{TEXT}"))
    for fields in ({}, {"num_speakers": "2"}):
        body = error(post(FOUR, response_format="diarized_json", **fields), 400)
        assert "qwen3-asr serve MODEL --diarizer" in body["message"]


def test_a_diarizer_that_is_down_is_a_503(serve, monkeypatch):
    with reserved_port() as port:
        monkeypatch.setenv("QWEN3_ASR_DIARIZER_URL", f"http://127.0.0.1:{port}")
        engine = FakeEngine(f"{ENGLISH}{TEXT}")
        response = serve(engine)(FOUR, response_format="diarized_json")
    body = error(response, 503)
    assert body["code"] == "diarizer_unavailable" and response.headers["Retry-After"]
    assert not engine.asked


def test_a_failing_diarizer_is_reported(post, diarizer):
    diarizer.turns = RuntimeError("out of memory")
    body = error(post(FOUR, response_format="diarized_json"), 503)
    assert "RuntimeError: out of memory" in body["message"]
    assert post(FOUR).json()["text"] == TEXT


def test_an_impossible_number_is_a_400(serve, monkeypatch):
    with on_a_port(DiarizerServer(lambda waveform: []).app) as url:
        monkeypatch.setenv("QWEN3_ASR_DIARIZER_URL", url)
        post = serve(FakeEngine(f"{ENGLISH}{TEXT}"))
        response = post(FOUR, response_format="diarized_json", num_speakers="2")
    body = error(response, 400)
    assert body["param"] == "num_speakers" and "does not take it" in body["message"]


def test_too_many_voices_are_refused(post):
    fields = {"known_speaker_references[]": ["x"] * 17, "known_speaker_names[]": ["a"] * 17}
    error(post(FOUR, response_format="diarized_json", **fields), 413)


def test_invalid_addresses_are_refused(monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_DIARIZER_URL", "localhost:8002")
    with pytest.raises(ValueError, match="QWEN3_ASR_DIARIZER_URL is 'localhost:8002'"):
        remote_diarizer()


# ---- the server of a diarizer ----


async def answer(url, request):
    client = RemoteDiarizer(url)
    try:
        return await client.answer(request)
    finally:
        await client.close()


def test_samples_arrive_unchanged():
    waveform, known = noise(3.0), {"Ada": noise(1.0, seed=1), "Bea": noise(2.0, seed=2)}
    received = []

    class Notes(Diarizer):
        def __call__(self, waveform, num_speakers=None):
            received.append(waveform)
            return [(0, 3, 0)]

        def embed(self, waveform):
            received.append(waveform)
            return [1.0]

    with on_a_port(DiarizerServer(Notes()).app) as url:
        found = asyncio.run(answer(url, DiarizationRequest(waveform, known_speakers=known)))
    for samples, sent in zip(received, [waveform, waveform, *known.values()], strict=True):
        np.testing.assert_array_equal(samples, sent)
    assert found.turns == (SpeakerTurn(0.0, 3.0, "Ada"),)


def test_requests_wait_for_one_another():
    running, most = 0, 0

    def slow(waveform):
        nonlocal running, most
        running += 1
        most = max(most, running)
        httpx.get(f"{url}/health").raise_for_status()  # the event loop is free
        running -= 1
        return [(0, 1, 0)]

    async def three():
        return await asyncio.gather(
            *(answer(url, DiarizationRequest(noise(1.0))) for _ in range(3))
        )

    with on_a_port(DiarizerServer(slow).app) as url:
        assert [len(found.turns) for found in asyncio.run(three())] == [1, 1, 1]
    assert most == 1


def test_a_refusal_is_raised_by_the_client():
    with on_a_port(DiarizerServer(lambda waveform: []).app) as url:
        with pytest.raises(DiarizerError, match="min_speakers: this diarizer does not take it"):
            asyncio.run(answer(url, DiarizationRequest(noise(1.0), min_speakers=2)))


@pytest.mark.parametrize(("num_samples", "message"), [(5, "has 4 of its 5"), (3, "longer than")])
def test_bodies_of_another_length_are_refused(num_samples, message):
    described = json.dumps({"num_samples": num_samples, "known_speakers": {}})
    with on_a_port(DiarizerServer(Diarizer()).app) as url:
        url += "/v1/audio/speakers"
        response = httpx.post(url, params={"request": described}, content=bytes(16))
    assert response.status_code == 400 and message in response.json()["error"]


def test_a_diarizer_that_cannot_be_loaded_ends(capsys):
    assert main(["no_such_module:diarize", "--port", "1"]) == 1
    assert "no_such_module:diarize cannot be imported" in capsys.readouterr().err
