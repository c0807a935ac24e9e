# SPDX-License-Identifier: Apache-2.0
"""Common parts of the routes: admission, the engine's state, and how requests are counted."""

from __future__ import annotations

import asyncio
import errno
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from starlette.datastructures import UploadFile
from support.audio import noise, wav
from support.clients import counted, error, events
from support.fake_engine import FakeEngine, tokenizer

from qwen3_asr_vllm.server.serving import set_stream_interval

SECOND = wav(noise(1.0))


def test_a_full_disk_is_a_busy_server(serve, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(UploadFile, "write", write)
    response = serve(FakeEngine("language English<asr_text>Hi."))()
    assert error(response, 503)["code"] == "busy" and response.headers["Retry-After"] == "5"


def test_a_full_server_refuses_before_it_reads(serve, monkeypatch):
    """And each way to end gives the place back: an answer, a stream, a refusal, an error."""
    monkeypatch.setenv("QWEN3_ASR_MAX_RECORDINGS", "1")
    post = serve(FakeEngine("language English<asr_text>Good morning."))
    admission = post.client.app.state.qwen3_asr.transcriber.admission
    for fields in ({}, {"stream": True}, {"language": "tlh"}, {"file": ("a", b"words")}):
        assert post(**fields).status_code in (200, 400)
        assert (admission.num_recordings, admission.audio_s) == (0, 0)
    with admission.reserve():
        response = post(file=("endless.wav", b"RIFF"))
    assert error(response, 503)["code"] == "busy"
    assert response.headers["Retry-After"] == "5"


def test_audio_beside_others_must_find_room(serve, monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_MAX_AUDIO_S", "10")
    post = serve(FakeEngine("language English<asr_text>Good morning."))
    with post.client.app.state.qwen3_asr.transcriber.admission.reserve() as other:
        other.hold(9.5)
        assert error(post(), 503)["code"] == "busy"
        other.hold(8.5)
        assert post().status_code == 200
    assert "limit is 10 s" in error(post(wav(noise(11.0))), 400)["message"]


def test_streams_in_full_servers_have_longer_events(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
    post = serve(engine)
    with ExitStack() as others:
        for number in (0, 31, 480):  # more of them
            for _ in range(number):
                others.enter_context(
                    post.client.app.state.qwen3_asr.transcriber.admission.reserve()
                )
            assert events(post(stream=True))[-1]["text"] == "Hi."
    assert [state.stream_interval for state in engine.request_states.values()] == [1, 3, 16]


def test_first_text_comes_early_in_full_servers(serve):
    """At the fourth token, after the header, as in-tree."""
    engine = FakeEngine("language English<asr_text>Hi.")
    post = serve(engine)
    admission = post.client.app.state.qwen3_asr.transcriber.admission
    with ExitStack() as others:
        for _ in range(480):
            others.enter_context(admission.reserve())
        post(stream=True)
        post(stream=True, language="en")  # without a header, the first token is text
    assert [params.stream_interval for _, params, _ in engine.asked] == [3, 16]


def test_running_requests_take_another_stream_interval():
    """Outputs of vLLM's own processor, token by token: the first one, then three at a time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    processor = OutputProcessor(tokenizer(), log_stats=False)
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, stream_interval=2)
    request = EngineCoreRequest("internal", [1], None, params, None, 0.0, None, None, None)
    request.external_req_id = "external"
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "internal")
    processor.add_request(request, None, queue=queue)
    sent = []
    for token in tokenizer().encode("one two three four five six seven eight nine ten eleven")[:8]:
        processor.process_outputs([EngineCoreOutput("internal", [token])])
        output = queue.get_nowait()
        sent.append(len(output.outputs[0].token_ids) if output else 0)
        set_stream_interval(SimpleNamespace(output_processor=processor), "external", 3)
    assert sent == [1, 0, 0, 3, 0, 0, 3, 0]


def test_one_recording_never_fills_the_engine(serve):
    engine = FakeEngine("language English<asr_text>Hi.", max_num_seqs=24)
    text = serve(engine, max_clip_s=1)(wav(noise(30.0))).json()["text"]
    assert len(engine.asked) >= 30
    assert engine.most_running == 3
    assert text == " ".join(["Hi."] * len(engine.asked))


def test_a_dead_engine_is_503_with_retry(serve):
    from vllm.v1.engine.exceptions import EngineDeadError

    response = serve(FakeEngine(EngineDeadError()))()
    assert error(response, 503)["code"] == "engine_dead"
    assert "Retry-After" in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_servers_send_no_partial_text(serve, stream):
    """vLLM ends requests that it drops with the text so far and the reason "abort"."""
    engine = FakeEngine("language English<asr_text>Good", finish_reason="abort")
    response = serve(engine)(stream=stream)
    if stream:
        *_, last = events(response)
        assert last["error"]["code"] == "stopping"
        assert "transcript.text.done" not in response.text
    else:
        assert error(response, 503)["code"] == "stopping"
        assert response.headers["Retry-After"] == "5"


def test_a_missing_decoder_is_a_server_error(serve, monkeypatch):
    from qwen3_asr_vllm.media import blocks

    def import_module(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(blocks, "import_module", import_module)
    body = error(serve(FakeEngine(""))(), 501)
    assert "pip install av" in body["message"] and body["type"] == "server_error"


def test_other_models_are_not_served():
    from qwen3_asr_vllm.server.plugin import EndpointPlugin

    engine = FakeEngine("")
    engine.model_config.hf_config = SimpleNamespace(model_type="whisper")
    with pytest.raises(ValueError, match="this model is whisper"):
        asyncio.run(EndpointPlugin().init_state(engine, SimpleNamespace(), None))


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"stream": "true"}, 200),
        ({"language": "tlh"}, 400),
        ({"file": ("notes.wav", b"words" * 99)}, 400),
        ({"model": "whisper-1"}, 404),
    ],
)
def test_requests_are_counted_by_how_they_end(post, fields, status):
    before = counted(status)
    post(**fields)
    assert counted(status) == before + 1


@pytest.mark.parametrize("stream", ["true", "false"])
def test_failures_are_counted_once(serve, stream):
    engine = FakeEngine("language English<asr_text>Good morning.", RuntimeError("out of order"))
    before = counted(200), counted(500)
    serve(engine, max_clip_s=5)(wav(noise(9.0)), stream=stream)
    assert (counted(200), counted(500)) == (before[0], before[1] + 1)
