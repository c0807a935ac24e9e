# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio/alignments`` and who asks it, with an aligner's engine of six lines."""

from __future__ import annotations

import asyncio
import io
import socket
from types import SimpleNamespace

import pytest
import soundfile
import srt
import torch
from prometheus_client import REGISTRY
from support.audio import HOSTILE, noise, poisoned
from support.servers import on_a_port

from qwen3_asr_vllm.alignment import AlignmentRequest

pytestmark = pytest.mark.vllm

TEXT = "Guten Tag, Welt. Hallo!"


class Engine:
    """Each unit takes three classes of 80 ms, from the second on."""

    errored = False
    input_processor = None

    def __init__(self):
        config = SimpleNamespace(is_aligner=True, timestamp_segment_time=80)
        self.model_config = SimpleNamespace(
            hf_config=config, is_encoder_decoder=False, max_model_len=4096, model="aligner"
        )
        self.vllm_config = None
        self.renderer = SimpleNamespace(render_cmpl_async=self.render)
        self.prompts = []

    async def render(self, prompts):
        return prompts

    def check_admission(self, n):
        pass

    async def encode(self, prompt, params, request_id, *, trace_headers):
        self.prompts.append(prompt["prompt"])
        assert params.task == "token_classify"
        units = prompt["prompt"].count("<timestamp>") // 2
        edges = [2 + 3 * i for word in range(units) for i in (word, word + 1)]
        yield SimpleNamespace(outputs=SimpleNamespace(data=torch.tensor(edges)))


@pytest.fixture
def app():
    from fastapi import FastAPI
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from qwen3_asr_vllm.server.alignments import AlignerServing
    from qwen3_asr_vllm.server.plugin import EndpointPlugin
    from qwen3_asr_vllm.server.state import ServerState

    app, engine = FastAPI(), Engine()
    EndpointPlugin().attach_router(app)
    models = OpenAIServingModels(engine, [BaseModelPath("aligner", "aligner")])
    app.state.qwen3_asr = ServerState(aligner=AlignerServing(engine, models))
    app.state.engine = engine
    app.add_api_route("/health", lambda: "ok")
    return app


@pytest.fixture
def client(app):
    from fastapi.testclient import TestClient

    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def post(client):
    file = io.BytesIO()
    soundfile.write(file, noise(3), 16_000, format="WAV")

    def post(route="/v1/audio/alignments", **fields):
        return client.post(route, files={"file": ("a.wav", file.getvalue())}, data=fields)

    return post


def test_words_segments_and_duration(app, post):
    answer = post(text=TEXT, language="de").json()
    assert app.state.engine.prompts[0].endswith("Hallo<timestamp><timestamp>")
    assert answer["words"] == [
        {"word": "Guten", "start": 0.16, "end": 0.4},
        {"word": " Tag,", "start": 0.4, "end": 0.64},
        {"word": " Welt.", "start": 0.64, "end": 0.88},
        {"word": " Hallo!", "start": 0.88, "end": 1.12},
    ]
    assert answer["segments"] == [
        {"id": 0, "start": 0.16, "end": 0.88, "text": "Guten Tag, Welt."},
        {"id": 1, "start": 0.88, "end": 1.12, "text": " Hallo!"},
    ]
    assert (answer["text"], answer["language"], answer["duration"]) == (TEXT, "German", 3.0)


def test_requests_are_counted(post):
    def count(status):
        labels = {"model_name": "aligner", "route": "/v1/audio/alignments", "status": status}
        return REGISTRY.get_sample_value("qwen3_asr_requests_total", labels) or 0

    before = [count("200"), count("400")]
    post(text=TEXT), post()
    assert [count("200"), count("400")] == [each + 1 for each in before]


def test_subtitles(post):
    cues = srt.parse(post(text=TEXT, response_format="srt", highlight_words="true").text)
    assert next(cues).content == "<u>Guten</u> Tag, Welt."
    assert post(text=TEXT, response_format="vtt").text.startswith("WEBVTT\n\n00:00:00.160 -->")


def test_lines_and_cues_of_a_text_stay(post):
    lines = {"text": "Guten Tag\nWelt. Hallo!", "response_format": "srt", "keep_lines": "true"}
    cue = "1\n00:00:09,000 --> 00:00:10,000\nGuten\nTag\n\n"
    cues = {"text": f"{cue}2\n00:00:11,000 --> 00:00:12,000\nHallo"}
    for fields, expected in (
        (lines, ["Guten Tag", "Welt. Hallo!"]),
        (lines | {"keep_lines": "false"}, ["Guten Tag Welt.", "Hallo!"]),
        (cues | {"response_format": "srt"}, ["Guten\nTag", "Hallo"]),
    ):
        written = list(srt.parse(post(**fields).text))
        assert [cue.content for cue in written] == expected
        assert written[0].start.total_seconds() == 0.16


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({}, 400, "text", "required"),
        ({"text": TEXT, "language": "pl"}, 400, "language", "does not know Polish"),
        ({"text": [TEXT, "Hallo."]}, 400, "text", "'Hallo.'; send it once"),
        ({"text": TEXT, "language": ["de", "en"]}, 400, "language", "'de' and 'en'; send it once"),
        ({"text": TEXT, "response_format": "docx"}, 400, "response_format", "srt"),
        ({"text": TEXT, "language": "he"}, 400, "language", "does not know Hebrew; it times"),
        ({"text": TEXT, "language": "Elbonian"}, 400, "language", "unsupported"),
        ({"text": TEXT, "model": "other"}, 404, "model", "does not exist"),
        ({"text": TEXT, "response_format": "docx"}, 400, "response_format", "srt"),
        ({"text": TEXT, "highlight_words": "true"}, 400, "highlight_words", "lrc"),
    ],
)
def test_wrong_fields_are_named(post, fields, status, param, message):
    response = post(**fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_alignments_warn_about_unreadable_audio(client):
    file = io.BytesIO()
    soundfile.write(file, noise(3), 16_000, format="WAV")
    data = file.getvalue()
    place = data.index(b"data") + 4
    files = {"file": ("a.wav", data[:place] + bytes(4) + data[place + 4 :])}
    warning = "the header states 0 bytes of sound; all 96,000 in the file were read."
    answer = client.post("/v1/audio/alignments", files=files, data={"text": TEXT})
    assert answer.json()["warnings"] == [warning]
    form = {"text": TEXT, "response_format": "srt"}
    answer = client.post("/v1/audio/alignments", files=files, data=form)
    assert answer.headers["X-Warnings"] == warning


def test_how_korean_is_cut_is_said(post, monkeypatch, tmp_path):
    from qwen3_asr_vllm import units

    monkeypatch.setattr(units, "find_spec", lambda name: None)
    monkeypatch.delenv("QWEN3_ASR_KOREAN_DICT", raising=False)
    units.korean_dictionary.cache_clear()
    assert post(text="친구를").json()["warnings"] == [units.NO_DICTIONARY]
    assert "warnings" not in post(text=TEXT).json()
    units.korean_dictionary.cache_clear()
    monkeypatch.setenv("QWEN3_ASR_KOREAN_DICT", str(tmp_path))
    response = post(text="친구를")
    assert response.status_code == 501 and "QWEN3_ASR_KOREAN_DICT" in response.text


def test_fields_that_change_nothing_are_named(post):
    assert post(text=TEXT, speed="2", a="b").headers["X-Ignored-Params"] == "speed, a"
    assert "X-Ignored-Params" not in post(text=TEXT, response_format="srt").headers


@pytest.mark.parametrize(
    ("samples", "units", "message"),
    [
        (b"", '["a"]', "audio is empty"),
        (b"abc", '["a"]', "samples"),
        (b"abcd" * 9, '["\\ud800"]', "units"),
        (b"abcd" * 9, "a", "units"),
    ],
)
def test_untimeable_input_names_its_field(client, samples, units, message):
    files = {"samples": ("samples.f32", samples)}
    response = client.post("/v1/audio/alignments/times", files=files, data={"units": units})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_an_aligner_transcribes_nothing(client, post):
    for response in (post("/v1/audio/transcriptions"), client.get("/about")):
        assert response.status_code == 404 and "aligner" in response.text


def test_an_aligner_has_no_sessions(client):
    from starlette.testclient import WebSocketDenialResponse

    with pytest.raises(WebSocketDenialResponse) as denied:
        client.websocket_connect("/v1/realtime").__enter__()
    assert denied.value.status_code == 404
    assert "forced aligner" in denied.value.json()["error"]["message"]


def test_a_transcriber_aligns_nothing(app, post):
    from qwen3_asr_vllm.server.state import ServerState

    app.state.qwen3_asr = ServerState(transcriber=app.state.qwen3_asr.aligner)
    response = post(text=TEXT)
    assert response.status_code == 404 and "ForcedAligner" in response.text


def times(client, samples, **fields):
    files = {"samples": ("samples.f32", samples)}
    data = {"units": '["Guten", "Tag"]'} | fields
    return client.post("/v1/audio/alignments/times", files=files, data=data)


def test_times_reserve_their_audio(app, client):
    """And give it back."""
    admission = app.state.qwen3_asr.aligner.admission
    admission.max_audio_s = 2.5
    samples = noise(2).tobytes()
    assert times(client, samples).json() == {"times": [160, 400, 400, 640]}
    with admission.reserve() as other:
        other.hold(1.0)
        response = times(client, samples)
        assert response.status_code == 503 and response.headers["Retry-After"] == "5"
        other.hold(0.0)
        admission.max_bytes = len(samples)
        assert "QWEN3_ASR_MAX_UPLOADS_MB" in times(client, samples).text
    assert (admission.num_recordings, admission.audio_s, admission.num_bytes) == (0, 0, 0)


def test_samples_are_whole_floats(client):
    response = times(client, bytes(7))
    assert response.status_code == 400 and "samples has 7 bytes" in response.text


def test_the_text_of_four_hours_is_taken(post):
    assert post(text="word " * 50_000, language="en").status_code == 200
    assert post(text="a" * ((1 << 20) + 1)).status_code == 413


# who asks -----------------------------------------------------------------------------------


@pytest.fixture
def url(app):
    """The app, served."""
    with on_a_port(app) as address:
        yield address


REQUEST = AlignmentRequest(("Guten", "今"), noise(2))


def ask(url, do):
    from qwen3_asr_vllm.server.aligner_client import RemoteAligner

    async def run():
        aligner = RemoteAligner(url)
        try:
            return await do(aligner)
        finally:
            await aligner.close()

    return asyncio.run(run())


def test_handshakes_become_no_requests_of_aligners(url):
    """A session's headers are those of its WebSocket; only its trace goes on."""
    handshake = {"host": "a.org", "connection": "Upgrade", "upgrade": "websocket"}
    answer = ask(url, lambda aligner: aligner.answer(REQUEST, handshake | {"traceparent": "00"}))
    assert (answer.times, answer.error) == ([160, 400, 400, 640], "")


def test_remote_aligners_answer_like_their_engine(url):
    assert ask(url, lambda aligner: aligner.is_up()) is True
    answer = ask(f"{url}/v1/", lambda aligner: aligner.answer(REQUEST))
    assert (answer.times, answer.error) == ([160, 400, 400, 640], "")


def test_an_aligner_that_is_down_says_so():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert ask(url, lambda aligner: aligner.is_up()) is False
        answer = ask(url, lambda aligner: aligner.answer(REQUEST))
    assert answer.times == () and f"the aligner at {url} does not answer" in answer.error


@pytest.fixture
def stub(monkeypatch):
    """An aligner that answers with these statuses in turn, and then with times."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    from qwen3_asr_vllm.server import aligner_client

    monkeypatch.setattr(aligner_client, "RETRY_DELAYS_S", (0.01,) * 4)
    app, answers = FastAPI(), []

    @app.post(aligner_client.TIMES)
    async def times():
        status = answers.pop(0) if answers else 200
        body = {"times": [0, 80, 80, 160]} if status == 200 else {"error": "no units"}
        return JSONResponse(body, status)

    def answer_to(*statuses):
        answers[:] = statuses
        return ask(url, lambda aligner: aligner.answer(REQUEST)), answers

    with on_a_port(app) as url:
        yield answer_to


def test_a_full_aligner_is_retried(stub):
    answer, _ = stub(503, 503, 200)
    assert (answer.times, answer.error) == ([0, 80, 80, 160], "")
    answer, left = stub(*[503] * 6)
    assert left == [503] and not answer.is_permanent
    assert "does not answer (503: " in answer.error and "no units" in answer.error


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusing_aligner_is_not_retried(stub, status):
    answer, left = stub(status, 200)
    assert left == [200] and answer.times == () and answer.is_permanent
    assert f"rejects the request ({status}, permanent: " in answer.error
    assert "no units" in answer.error


@pytest.mark.parametrize("status", [429, 500, 502])
def test_temporary_errors_are_not_permanent(stub, status):
    answer, left = stub(status, 200)
    assert left == [200] and not answer.is_permanent and f"({status}: " in answer.error


def test_invalid_addresses_are_refused(monkeypatch):
    from qwen3_asr_vllm.server.aligner_client import remote_aligner

    monkeypatch.setenv("QWEN3_ASR_ALIGNER_URL", "localhost:8001")
    with pytest.raises(ValueError, match="'localhost:8001'.*such as http://127.0.0.1:8001"):
        remote_aligner()


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_samples_are_refused_by_value(app, client, value):
    samples = poisoned(noise(1), value).astype("<f4").tobytes()
    files = {"samples": ("samples.f32", samples)}
    answer = client.post("/v1/audio/alignments/times", files=files, data={"units": '["one"]'})
    assert answer.status_code == 400
    assert f"{value:g} at 0.500 s" in answer.json()["error"]["message"]
    assert not app.state.engine.prompts


def test_the_benchmark_aligns_every_clip(app):
    import gpu

    wave = {"requests": 3, "concurrency": 2, "clip_s": 4.0}
    with on_a_port(app) as url:
        target = gpu.Running("aligner", url, 0, 0)
        row = asyncio.run(gpu.align_all(target, wave, first_seed=0))
    assert (row["requests"], row["words"]) == (3, 10) and row["audio-s/s"] > 0
    assert len(app.state.engine.prompts) == 3
