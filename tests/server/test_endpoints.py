# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio/transcriptions``: first with an engine of six lines, then as the server has it."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import re
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import av
import httpx
import jiwer
import numpy as np
import openai
import pytest
import soundfile
import srt
import webvtt
from conftest import CHECKPOINT, DATA, eventually, noise, on_a_port
from openai.types.audio import Transcription, TranscriptionDiarized, TranscriptionVerbose
from prometheus_client import REGISTRY
from starlette.datastructures import UploadFile

from qwen3_asr_vllm.alignment import AlignmentOutput
from qwen3_asr_vllm.languages import LANGUAGES
from qwen3_asr_vllm.prompt import parse_output

pytestmark = pytest.mark.vllm

HELLO = DATA / "hello.flac"
ROUTE = "/v1/audio/transcriptions"


def wav(samples, sampling_rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, format="WAV")
    return ("audio.wav", file.getvalue(), "audio/wav")


SECOND = wav(noise(1.0))
STOP = "stop"  # why each answer of the engine ends
ROUND = " and round" * 12  # unless it ends so: that is a loop


# --- without an engine ------------------------------------------------------------------------


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


class Engine:
    """Answers each request with the next of ``answers``, in pieces of three characters."""

    errored = False
    renderer = input_processor = None

    def __init__(self, *answers: str | Exception, max_num_seqs: int = 64) -> None:
        self.answers = answers
        self.asked: list[Any] = []  # (prompt, sampling parameters, options)
        self.running = self.most_running = self.aborted = 0
        self.model_config = SimpleNamespace(
            get_diff_sampling_param=dict,
            is_encoder_decoder=False,
            max_model_len=4096,
            logits_processors=["of.an:Operator"],
        )
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, policy="priority")
        )
        self.renderer = SimpleNamespace(render_cmpl_async=self.render, get_tokenizer=tokenizer)

    async def render(self, prompts):
        return prompts

    def check_admission(self, n):
        pass

    async def generate(self, prompt, params, request_id, **options):
        index = len(self.asked)
        self.asked.append((prompt, params, options))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = self.answers[index % len(self.answers)]
            if isinstance(answer, Exception):
                raise answer
            size = 3 if params.output_kind.name == "DELTA" else len(answer)
            for start in range(0, len(answer), size):
                await asyncio.sleep(0)
                last = start + size >= len(answer)
                reason = "repetition" if answer.endswith(ROUND) else STOP
                yield output(answer[start : start + size], reason if last else None)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1


def output(text, finish_reason):
    completion = SimpleNamespace(
        text=text, finish_reason=finish_reason, token_ids=[1, 2], logprobs=None
    )
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[0] * 10)


@pytest.fixture
def serve():
    """Start the route on an engine; returns a function that posts a form to it."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from qwen3_asr_vllm.server.plugin import EndpointPlugin
    from qwen3_asr_vllm.server.state import ServerState
    from qwen3_asr_vllm.server.transcriptions import Transcriber

    def start(engine, *, max_clip_s=60.0):
        app = FastAPI()
        EndpointPlugin().attach_router(app)
        models = OpenAIServingModels(engine, [BaseModelPath("asr", "asr"), BaseModelPath("b", "b")])
        transcriber = Transcriber(engine, models, max_clip_s=max_clip_s)
        app.state.qwen3_asr = ServerState(transcriber)
        client = TestClient(app, raise_server_exceptions=False)

        def post(file=SECOND, **fields):
            return client.post(ROUTE, files={"file": file} if file else {}, data=fields)

        post.client = client
        return post

    return start


@pytest.fixture
def post(serve):
    return serve(Engine("language English<asr_text>Good morning."))


def error(response, status):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def events(response):
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_full_disk_is_a_busy_server(serve, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(UploadFile, "write", write)
    response = serve(Engine("language English<asr_text>Hi."))()
    assert error(response, 503)["code"] == "busy" and response.headers["Retry-After"] == "5"


def test_a_full_server_refuses_before_it_reads(serve, monkeypatch):
    """And each way to end gives the place back: an answer, a stream, a refusal, an error."""
    monkeypatch.setenv("QWEN3_ASR_MAX_RECORDINGS", "1")
    post = serve(Engine("language English<asr_text>Good morning."))
    admission = post.client.app.state.qwen3_asr.transcriber.admission
    for fields in ({}, {"stream": True}, {"language": "tlh"}, {"file": ("a", b"words")}):
        assert post(**fields).status_code in (200, 400)
        assert (admission.num_recordings, admission.audio_s) == (0, 0)
    with admission.reserve():
        response = post(file=("endless.wav", b"RIFF"))
    assert error(response, 503)["code"] == "busy"
    assert response.headers["Retry-After"] == "5"


def test_an_engine_that_died_sends_clients_to_another_server(serve):
    from vllm.v1.engine.exceptions import EngineDeadError

    response = serve(Engine(EngineDeadError()))()
    assert error(response, 503)["code"] == "engine_dead"
    assert "Retry-After" in response.headers


@pytest.mark.parametrize("field", ["keywords", "n", "chunking_strategy", "vllm_xargs"])
def test_json_of_any_depth_is_answered(post, field):
    for text in ("[" * 10_000, '{"a": ' * 10_000):
        assert post(**{field: text}).status_code in (200, 400)


@pytest.mark.parametrize("field", ["seed", "priority", "top_k"])
def test_numbers_that_no_engine_can_hold_are_refused(post, field):
    for number in (2**63, -(2**63) - 1):
        assert error(post(**{field: str(number)}), 400)["param"] == field


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_says_so_and_not_half_of_the_text(serve, monkeypatch, stream):
    """vLLM ends requests that it drops with the text so far and the reason "abort"."""
    monkeypatch.setitem(globals(), "STOP", "abort")
    response = serve(Engine("language English<asr_text>Good"))(stream=stream)
    if stream:
        *_, last = events(response)
        assert last["error"]["code"] == "stopping"
        assert "transcript.text.done" not in response.text
    else:
        assert error(response, 503)["code"] == "stopping"
        assert response.headers["Retry-After"] == "5"


def test_audio_beside_others_must_find_room(serve, monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_MAX_AUDIO_S", "10")
    post = serve(Engine("language English<asr_text>Good morning."))
    with post.client.app.state.qwen3_asr.transcriber.admission.reserve() as other:
        other.hold(9.5)
        assert error(post(), 503)["code"] == "busy"
        other.hold(8.5)
        assert post().status_code == 200
    assert "limit is 10 s" in error(post(wav(noise(11.0))), 400)["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=b", b"--c--"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: x\r\n\r\n--b--"),
        ("application/json", b"{}"),
        ("", b""),
    ],
)
def test_a_body_that_is_no_form_is_a_bad_request(post, kind, body):
    response = post.client.post(ROUTE, content=body, headers={"Content-Type": kind})
    assert error(response, 400)["type"] == "invalid_request_error"


def test_json_says_text_languages_and_seconds(post):
    response = post()
    assert response.json() == {
        "text": "Good morning.",
        "language": "en",
        "languages": [{"code": "en"}],
        "usage": {"type": "duration", "seconds": 1.0},
    }
    assert "X-Ignored-Params" not in response.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"keywords[]": ["Ada", "Grace Hopper"]},
        {"keywords": ["Ada", "Grace Hopper"]},
        {"keywords": "Ada, Grace Hopper"},
        {"keywords": '["Ada", "Grace Hopper"]'},
        {"hotwords": "Ada,Grace Hopper"},
        {"prompt": "Ada, Grace Hopper"},
        {"keywords[]": "Ada", "hotwords": "Grace Hopper"},
    ],
)
def test_context_in_any_spelling(serve, fields):
    engine = Engine("language English<asr_text>Hi.")
    assert serve(engine)(**fields).status_code == 200
    prompt = engine.asked[0][0]["prompt"]
    assert prompt.startswith("<|im_start|>system\nAda, Grace Hopper<|im_end|>\n")


def test_tokens_of_the_tokenizer_leave_the_context(serve):
    engine = Engine("language English<asr_text>Hi.")
    assert serve(engine)(prompt="Ada<time<timestamp>stamp> L.").status_code == 200
    prompt = engine.asked[0][0]["prompt"]
    assert prompt.startswith("<|im_start|>system\nAdatimestamp> L.<|im_end|>\n")


@pytest.mark.parametrize(
    "fields",
    [{"language": "yue"}, {"language": "Cantonese"}, {"languages[]": "zh-HK"}],
)
def test_a_language_is_forced(serve, fields):
    engine = Engine("早晨。")
    assert serve(engine)(**fields).json()["languages"] == [{"code": "yue"}]
    assert engine.asked[0][0]["prompt"].endswith("assistant\nlanguage Cantonese<asr_text>")


def test_sampling_fields_reach_the_engine(serve):
    engine = Engine("language English<asr_text>Hi.")
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7}
    given |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    fields = {"max_completion_tokens": 9, "vllm_xargs": '{"a": 1}', "priority": -2}
    assert serve(engine)(**given, **fields).status_code == 200
    _, params, options = engine.asked[0]
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.extra_args, options["priority"]) == (9, {"a": 1}, -2)


def test_a_stream_has_fewer_and_longer_events_in_a_full_server(serve):
    engine = Engine("language English<asr_text>Hi.")
    post = serve(engine)
    with ExitStack() as others:
        for number in (0, 31, 480):  # more of them
            for _ in range(number):
                others.enter_context(
                    post.client.app.state.qwen3_asr.transcriber.admission.reserve()
                )
            assert events(post(stream=True))[-1]["text"] == "Hi."
    assert [params.stream_interval for _, params, _ in engine.asked] == [1, 3, 16]


@pytest.mark.parametrize("fields", [{}, {"max_completion_tokens": 100_000}])
def test_decoding_is_greedy_and_bounded_by_the_duration(serve, fields):
    """V11: in-tree lets an answer fill the context."""
    from qwen3_asr_vllm.decoding import max_new_tokens

    engine = Engine("language English<asr_text>Hi.")
    serve(engine)(**fields)
    params = engine.asked[0][1]
    assert (params.temperature, params.max_tokens) == (0, max_new_tokens(1.0))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"language": "tlh"}, "language", "zh Chinese"),
        ({"languages": "en,tlh"}, "languages", "zh Chinese"),
        ({"languages": "en,de", "language": "fr"}, "languages", "to choose from"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater"),
        ({"response_format": "docx"}, "response_format", "verbose_json"),
        ({"response_format": "diarized_json"}, "response_format", "verbose_json"),
        ({"response_format": "srt", "stream": "true"}, "response_format", "stream"),
        ({"response_format": "text", "include[]": "srt"}, "include", "use json"),
        ({"include[]": "docx"}, "include", "srt"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities", "verbose_json"),
        (
            {"timestamp_granularities[]": "word", "response_format": "verbose_json"},
            "timestamp_granularities",
            "serve MODEL --aligner",
        ),
        (
            {"timestamp_granularities[]": "segment", "response_format": "text"},
            "timestamp_granularities",
            "verbose_json",
        ),
        ({"timestamp_granularities[0]": "word"}, "timestamp_granularities", "verbose_json"),
        ({"include[0]": "srt", "include[1]": "docx"}, "include", "lrc"),
        ({"task": "translate"}, "task", "does not translate"),
        ({"task": "diarize"}, "task", "Send transcribe"),
        ({"language": ["de", "en"]}, "language", "'de' and 'en'; send it once"),
        ({"language": "de", "language[]": "en"}, "language", "'de' and 'en'; send it once"),
        ({"prompt": ["a" * 999, "b"]}, "prompt", "... and 'b'; send it once"),
        ({"stream": ["true", "false"]}, "stream", "send it once"),
        (
            {"chunking_strategy": "auto", "chunking_strategy[threshold]": "0.5"},
            "chunking_strategy",
            "send it once",
        ),
        ({"chunking_strategy[threshold]": ["0.5", "0.6"]}, "chunking_strategy[threshold]", "once"),
        ({"chunking_strategy[silence_duration_ms]": "1" + "0" * 30}, "chunking_strategy", "60000"),
        ({"chunking_strategy[prefix_padding_ms]": "60001"}, "chunking_strategy", "60000"),
        ({"top_p": "nan"}, "top_p", "finite"),
        ({"repetition_penalty": "inf"}, "repetition_penalty", "finite"),
        ({"keywords": '["\\ud800"]'}, "keywords", "surrogate"),
        ({"vllm_xargs": '{"a": [1180591620717411303424]}'}, "vllm_xargs", "2**64"),
        (
            {"response_format": "diarized_json", "known_speaker_names[]": ["a" * 201, "b"]},
            "known_speaker_names",
            "200 characters",
        ),
        ({"include[]": "logprobs", "response_format": "srt"}, "include", "use json"),
        ({"include[]": "entropy"}, "include", "logprobs"),
        ({"chunking_strategy": "semantic_vad"}, "chunking_strategy", "auto"),
        ({"chunking_strategy": "{"}, "chunking_strategy", "JSON"),
        ({"chunking_strategy[threshold]": "2"}, "chunking_strategy", "less than"),
        ({"chunking_strategy[eagerness]": "low"}, "chunking_strategy", "eagerness"),
        ({"to_language": "de"}, "to_language", "does not translate"),
        ({"known_speaker_names[]": "Ada"}, "known_speaker_names", "channels"),
        ({"known_speaker_references[]": "x"}, "known_speaker_references", "voices"),
        ({"use_beam_search": "true"}, "use_beam_search", "beam search"),
        ({"n": "3"}, "n", "one transcript"),
        ({"max_tokens": "9"}, "max_tokens", "max_completion_tokens"),
        ({"initial_prompt": "Ada"}, "initial_prompt", "prompt"),
        ({"word_timestamps": "true"}, "word_timestamps", "timestamp_granularities"),
        ({"stop": "."}, "stop", "leave it out"),
        ({"logit_bias": "{}"}, "logit_bias", "keywords"),
        ({"vllm_xargs": "{"}, "vllm_xargs", "JSON"),
        ({"file": None}, "file", "required"),
    ],
)
def test_what_would_change_the_answer_is_refused(post, fields, param, message):
    body = error(post(**fields), 400)
    assert body["param"] == param
    assert message in body["message"]
    assert body["type"] == "invalid_request_error"


def test_what_is_ignored_is_named(post):
    response = post(
        **{"vad_filter": "true", "x \xe9": "1"},
        n="1",
        use_beam_search="False",
        word_timestamps="false",
        chunking_strategy="auto",
    )
    assert response.status_code == 200
    assert response.headers["X-Ignored-Params"] == "vad_filter, x??"


def read_by_ai_sdk(body):
    """As @ai-sdk/openai 3 and 4 read a language: a code, or a name in small letters."""
    code_by_name = {name.lower(): code for code, name in LANGUAGES.items() if len(code) == 2}
    named = code_by_name.get(body["language"])
    return body["language"] if re.fullmatch("[a-z]{2}", body["language"]) else named


@pytest.mark.parametrize(("name", "language"), [("json", "de"), ("verbose_json", "german")])
def test_a_language_is_spelled_as_clients_read_it(serve, name, language):
    body = serve(Engine("language German<asr_text>Guten Tag."))(response_format=name).json()
    assert body["language"] == language and read_by_ai_sdk(body) == "de"
    assert body["languages"] == [{"code": "de"}]
    kind = Transcription if name == "json" else TranscriptionVerbose
    assert kind.model_validate(body, strict=True).text == "Guten Tag."


def test_fields_of_the_query_string_are_honoured(post):
    response = post.client.post(f"{ROUTE}?response_format=SRT&language=en", files={"file": SECOND})
    assert response.text.startswith("1\n00:00:0") and "-->" in response.text
    response = post.client.post(
        f"{ROUTE}?language=de&api-version=1", files={"file": SECOND}, data={"language": "en"}
    )
    assert "'de' and 'en'; send it once" in error(response, 400)["message"]


def test_many_ignored_names_fit_a_header(post):
    response = post(**{f"field_{number}".ljust(150, "_"): "x" for number in range(60)})
    header = response.headers["X-Ignored-Params"]
    assert len(header) < 2100 and header.endswith("(60 in all)")


@pytest.mark.parametrize(
    "fields",
    [
        {"timestamp_granularities[0]": "segment", "timestamp_granularities[1]": "word"},
        {"timestamp_granularities": "WORD"},
    ],
)
def test_lists_may_be_numbered_or_upper_case(fields):
    from starlette.datastructures import FormData

    from qwen3_asr_vllm.server.form import parse_form

    file = UploadFile(io.BytesIO(), filename="a.wav")
    form = parse_form(FormData({"file": file, "response_format": "VERBOSE_JSON"} | fields))
    assert form.needs_words and form.response_format == "verbose_json" and not form._ignored


def test_fields_may_be_sent_twice_with_one_value(post):
    response = post(language=["en", "en"], task="transcribe", **{"language[]": "en"})
    assert response.status_code == 200 and "X-Ignored-Params" not in response.headers


def test_two_recordings_in_one_request_are_refused(post):
    files = [("file", SECOND), ("file", wav(noise(2.0)))]
    body = error(post.client.post(ROUTE, files=files), 400)
    assert body["param"] == "file" and "send one per request" in body["message"]


def test_segments_are_no_part_of_json(post):
    response = post(**{"timestamp_granularities[]": "segment"})
    assert response.status_code == 200 and "segments" not in response.json()
    assert response.headers["X-Ignored-Params"] == "timestamp_granularities"


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("value", ['"x"', "[]", '{"do_remote_prefill": true}', "null", "1e999"])
def test_what_engines_tell_each_other_is_not_for_clients(serve, name, value):
    """One of these, and no object, ended in a 500."""
    engine = Engine("language English<asr_text>Hi.")
    response = serve(engine)(vllm_xargs=f'{{"{name}": {value}, "a": 1}}')
    assert response.headers["X-Ignored-Params"] == f"vllm_xargs.{name}"
    assert engine.asked[0][1].extra_args == {"a": 1}


def test_what_the_engine_does_not_read_is_named(serve):
    engine = Engine("language English<asr_text>Hi.")
    engine.vllm_config.scheduler_config.policy = "fcfs"
    engine.model_config.logits_processors = None
    post = serve(engine)
    response = post(vllm_xargs='{"a": 1, "b\\r\\nc": 2}', priority=3)
    assert response.headers["X-Ignored-Params"] == "priority, vllm_xargs.a, vllm_xargs.b??c"
    assert engine.asked[0][1].extra_args is None
    files, headers = {"file": SECOND}, {"X-Vllm-Priority": "3"}
    response = post.client.post(ROUTE, files=files, headers=headers)
    assert response.headers["X-Ignored-Params"] == "X-Vllm-Priority"


def test_empty_fields_are_fields_left_out(post):
    response = post(language="", prompt="", temperature="", response_format="")
    assert response.json()["text"] == "Good morning."


def test_text_is_plain(post):
    """V6: in-tree sends a JSON document as text."""
    response = post(response_format="text")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "Good morning.\n"


@pytest.mark.parametrize("name", ["json", "verbose_json"])
def test_subtitles_come_beside_the_text(post, name):
    whole = post(response_format=name, **{"include[]": ["srt", "vtt"]}).json()
    for subtitles in ("srt", "vtt"):
        assert whole[subtitles] == post(response_format=subtitles).text


def test_a_stream_ends_with_the_segments(post):
    *deltas, done = events(post(response_format="verbose_json", stream="true"))
    whole = post(response_format="verbose_json").json()
    assert "".join(event["delta"] for event in deltas) == whole["text"]
    assert done["type"] == "transcript.text.done" and done["usage"]["type"] == "tokens"
    for event in (whole, done):
        del event["usage"]
    assert whole.items() <= done.items()


@pytest.mark.parametrize("name", ["verbose_json", "srt", "vtt"])
def test_formats_are_those_of_the_command_line(post, name):
    from qwen3_asr_vllm.formats import FORMATS

    assert name in FORMATS
    response = post(response_format=name)
    assert response.status_code == 200
    assert "Good morning." in response.text


def test_a_model_is_found_by_any_of_its_names(post):
    for name in ("asr", "b", ""):
        assert post(model=name).status_code == 200
    body = error(post(model="whisper-1"), 404)
    assert body["param"] == "model" and body["code"] == "model_not_found"
    assert "whisper-1" in body["message"] and "asr, b" in body["message"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (("notes.wav", b"these are words" * 100), "not audio"),
        (("notes.wav", b"these are words" * 100_000), "not audio"),
        (("empty.wav", b""), "empty"),
        (wav(np.zeros(0, np.float32)), "empty"),
        ("a string", "file"),
    ],
)
def test_bad_audio_is_the_clients_mistake(post, file, message):
    if isinstance(file, str):
        response = post.client.post(ROUTE, data={"file": file})
    else:
        response = post(file)
    body = error(response, 400)
    assert body["param"] == "file" and message in body["message"]


@pytest.mark.parametrize("seconds", [2, 120])  # in memory, and in a temporary file
def test_a_recording_that_only_ffmpeg_reads(serve, seconds):
    file = io.BytesIO()
    with av.open(file, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono", bit_rate=128_000)
        samples = np.tile(noise(1.0), seconds)[None]
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    response = serve(Engine("language English<asr_text>Hi."))(("a.m4a", file.getvalue()))
    assert response.json()["usage"]["seconds"] == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize("kind", ["audio/L16;rate=16000", "audio/pcmu", "audio/basic"])
def test_audio_without_a_header_is_read_by_its_content_type(post, kind):
    samples = (noise(2.0) * 20_000).astype(">i2").tobytes()
    raw = samples if "L16" in kind else samples[:16_000]  # a byte for each sample, at 8 kHz
    body = post.client.post(ROUTE, content=raw, headers={"Content-Type": kind})
    part = post(("a.raw", raw, kind))
    assert body.json() == part.json() and body.json()["usage"]["seconds"] == 2.0


def test_what_needs_a_rate_says_so(post):
    response = post.client.post(ROUTE, content=bytes(999), headers={"Content-Type": "audio/L16"})
    assert "states no rate" in error(response, 400)["message"]


def test_a_recording_too_long_is_refused_with_the_limit(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "2")
    body = error(serve(Engine(""))(wav(noise(3.0))), 400)
    assert "3.0 s" in body["message"] and "limit is 2 s" in body["message"]
    assert "VLLM_MAX_AUDIO_DECODE_DURATION_S" in body["message"]


def test_an_upload_too_large_is_refused(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    post = serve(Engine("language English<asr_text>Hi."))
    body = error(post(wav(noise(60.0))), 413)
    assert "limit is 1 MiB" in body["message"]
    assert post(wav(noise(20.0))).status_code == 200


def test_an_upload_of_unknown_size_ends_at_the_limit(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    post = serve(Engine(""))
    sent = 0

    def body():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(64):
            sent += 1
            yield bytes(1 << 16)
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    error(post.client.post(ROUTE, content=body(), headers=headers), 413)


def test_a_missing_decoder_is_named_and_not_the_clients_mistake(serve, monkeypatch):
    from qwen3_asr_vllm.media import blocks

    def import_module(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(blocks, "import_module", import_module)
    body = error(serve(Engine(""))(), 501)
    assert "pip install av" in body["message"] and body["type"] == "server_error"


def test_silence_is_no_text_and_no_language(serve):
    engine = Engine("")
    body = serve(engine)(wav(np.zeros(32_000, np.float32))).json()
    assert (body["text"], body["language"], body["languages"]) == ("", None, [])
    assert engine.asked == []


# What two clips say: joined without a space, with one, after nothing, around a repeated tag.
SEAMS = [
    ("language Chinese<asr_text>早上好", "language Chinese<asr_text>谢谢。"),
    ("language English<asr_text>Good morning.", "language German<asr_text>Guten Tag."),
    ("language None<asr_text>", "language English<asr_text>Hi there"),
    ("language English<asr_text>One <asr_text>two", "language English<asr_text> three "),
    ("no header at all", "language English\n"),
]


@pytest.mark.parametrize("answers", SEAMS)
def test_streamed_deltas_join_to_the_text(serve, answers):
    long = wav(noise(9.0))
    whole = serve(Engine(*answers), max_clip_s=5)(long).json()
    streamed = events(serve(Engine(*answers), max_clip_s=5)(long, stream="true"))
    *deltas, done = streamed
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in deltas) == done["text"] == whole["text"]
    assert [e["choices"][0]["delta"]["content"] for e in deltas] == [e["delta"] for e in deltas]
    assert done["type"] == "transcript.text.done"
    assert done["languages"] == whole["languages"]


@pytest.mark.parametrize(
    ("fields", "num_choices", "has_usage"),
    [
        ({}, 1, True),
        ({"stream_include_usage": "true"}, 0, True),
        ({"stream_include_usage": "false"}, 1, False),
    ],
)
def test_only_a_chunk_of_usage_has_no_choice(post, fields, num_choices, has_usage):
    *chunks, done = events(post(stream="true", **fields))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == done["text"]
    assert (len(done["choices"]), "usage" in done) == (num_choices, has_usage)
    reasons = [choice["finish_reason"] for e in (*chunks, done) for choice in e["choices"]]
    assert [reason for reason in reasons if reason] == ["stop"]


def test_a_stream_finishes_once_and_counts_tokens(post):
    """V16: in-tree says a reason for each of its pieces."""
    *deltas, done = events(post(stream="true", stream_include_usage="true"))
    reasons = [event["choices"][0]["finish_reason"] for event in deltas]
    assert reasons == [None] * (len(deltas) - 1) + ["stop"]
    assert {event["object"] for event in (*deltas, done)} == {"transcription.chunk"}
    assert len({(e["id"], e["model"], e["created"]) for e in (*deltas, done)}) == 1
    usage = done["usage"]
    assert usage["input_tokens"] == usage["prompt_tokens"] == 10
    assert usage["output_tokens"] == usage["completion_tokens"] > 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_that_reached_the_token_limit_says_so(serve, monkeypatch):
    monkeypatch.setattr("test_endpoints.STOP", "length")
    *_, finish, done = events(serve(Engine("language English<asr_text>Hi."))(stream="true"))
    assert finish["choices"][0]["finish_reason"] == "length"
    assert "token limit" in done["warnings"][0]


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_a_format_without_warnings_has_them_in_a_header(serve, monkeypatch, response_format):
    monkeypatch.setattr("test_endpoints.STOP", "length")
    post = serve(Engine("language English<asr_text>Hi."))
    assert "token limit" in post(response_format=response_format).headers["X-Warnings"]
    prompt = "Zürich " * 3000  # what is cut off is named
    header = post(response_format=response_format, prompt=prompt).headers["X-Warnings"]
    assert "token limit" in header and "rich Z?rich" in header
    assert "X-Warnings" not in post(response_format="json").headers


UNFINISHED = "the header states 0 bytes of sound; all 32,000 in the file were read."


def unfinished_wav():
    """As of a recorder that crashed before it wrote the header."""
    name, data, kind = SECOND
    place = data.index(b"data") + 4
    return name, data[:place] + bytes(4) + data[place + 4 :], kind


@pytest.mark.parametrize("response_format", ["json", "verbose_json"])
def test_json_says_what_could_not_be_read(post, response_format):
    body = post(unfinished_wav(), response_format=response_format).json()
    assert body["warnings"] == [UNFINISHED]
    assert body["usage"]["seconds"] == 1.0


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_a_header_says_what_could_not_be_read(post, response_format):
    response = post(unfinished_wav(), response_format=response_format)
    assert response.headers["X-Warnings"] == UNFINISHED


def test_a_stream_says_at_its_end_what_could_not_be_read(post):
    *_, done, _ = post(unfinished_wav(), stream="true").text.split("data: ")
    assert json.loads(done)["warnings"] == [UNFINISHED]


@pytest.mark.parametrize(
    ("name", "seconds", "warnings"),
    [
        ("joined.mp3", 4.02, []),
        ("chained_vorbis.ogg", 4.02, []),
        ("mono_then_stereo.mp3", 4.1, []),
        ("gap_of_2_s.webm", 12.4, []),
        ("out_of_phase.flac", 1.86, []),
        (
            "garbage_in_the_middle.mp3",
            4.07,
            ["2 damaged packets at 0:01, about 0.1 s, could not be read."],
        ),
    ],
)
def test_files_of_users_are_read_to_their_end(post, name, seconds, warnings):
    body = post((name, (DATA / "field" / name).read_bytes())).json()
    assert body["usage"]["seconds"] == pytest.approx(seconds, abs=0.02)
    assert body.get("warnings", []) == warnings


def test_speakers_have_the_warnings_of_their_file(post):
    name, data, kind = wav(np.stack([noise(1.0), noise(1.0, seed=1)], axis=1))
    place = data.index(b"data") + 4
    stereo = name, data[:place] + bytes(4) + data[place + 4 :], kind
    body = post(stereo, response_format="diarized_json").json()
    assert body["warnings"] == [UNFINISHED.replace("32,000", "64,000")]


def test_a_track_that_is_not_there_is_named(post):
    assert post(SECOND, audio_track="1").status_code == 200
    body = error(post(SECOND, audio_track="2"), 400)
    assert "audio_track is 2; the file has 1" in body["message"]
    assert error(post(SECOND, audio_track="0"), 400)["param"] == "audio_track"


def test_a_header_does_not_grow_with_the_warnings():
    from qwen3_asr_vllm.server.responses import warning_headers

    header = warning_headers(["The clip at 0:30 looped."] * 500)["X-Warnings"]
    assert len(header) < 2100 and header.endswith("(500 in all)")


def test_text_that_begins_like_a_header_is_streamed_at_once(serve):
    """V15: where the language is forced, in-tree withholds 50 characters after "language"."""
    text = "language is what makes us human, said the linguist to the engineer."
    *deltas, done = events(serve(Engine(text))(stream="true", language="en"))
    assert done["text"] == text == "".join(event["delta"] for event in deltas)
    assert len(deltas[0]["delta"]) < 12


def test_usage_comes_with_every_event_on_request(post):
    streamed = events(post(stream="true", stream_continuous_usage_stats="true"))
    tokens = [event["usage"]["completion_tokens"] for event in streamed]
    assert tokens == sorted(tokens)


def test_an_error_in_the_stream_is_an_error_object(serve):
    engine = Engine("language English<asr_text>Good morning.", RuntimeError("out of order"))
    *deltas, last = events(serve(engine, max_clip_s=5)(wav(noise(9.0)), stream="true"))
    assert "".join(event["delta"] for event in deltas) == "Good morning."
    assert "out of order" in last["error"]["message"]


def test_an_error_before_the_stream_has_a_status(post):
    error(post(("notes.wav", b"words" * 100), stream="true"), 400)


ENGLISH = "language English<asr_text>"


def test_what_a_stream_has_shown_of_a_loop_stays(serve):
    """The first of two clips loops, and is asked for again from where it was good."""
    engine = Engine(f"{ENGLISH}Round{ROUND}", f"{ENGLISH}Bye.", " we go.")
    speech = noise(15.0)
    speech[7 * 16_000 : 8 * 16_000] = 0  # where it is cut
    *deltas, done = events(serve(engine, max_clip_s=10)(wav(speech), stream="true"))
    assert done["text"] == "Round and round and round and round we go. Bye."
    assert "".join(event["delta"] for event in deltas) == done["text"]
    prompt, params, _ = engine.asked[-1]
    assert prompt["prompt"].endswith("<asr_text>Round and round and round and round")
    assert params.repetition_penalty > 1
    assert "warnings" not in done


def test_what_is_not_streamed_and_loops_is_heard_in_halves(serve):
    engine = Engine(f"{ENGLISH}Round{ROUND}", f"{ENGLISH}One.", f"{ENGLISH}Two.")
    body = serve(engine)(wav(noise(9.0))).json()
    assert body["text"] == "One. Two." and len(engine.asked) == 3
    assert all(params.repetition_detection.min_count > 1 for _, params, _ in engine.asked)


def words_of(serve, output, text="language English<asr_text>Hi.", granularity="word"):
    """A request for words, where this is what the aligner says."""

    async def is_up():
        return True

    async def answer(request, headers):
        return output

    post = serve(Engine(text))
    aligner = SimpleNamespace(url="http://aligner", is_up=is_up, answer=answer)
    post.client.app.state.qwen3_asr.transcriber.aligner = aligner
    return post(response_format="verbose_json", **{"timestamp_granularities[]": granularity})


def test_an_aligner_that_is_down_is_worth_another_try(serve):
    response = words_of(serve, AlignmentOutput((), error="it is gone"))
    assert error(response, 503)["code"] == "aligner_unavailable"
    assert response.headers["Retry-After"] == "5" and "x-should-retry" not in response.headers


def test_an_aligner_that_refuses_is_not(serve):
    response = words_of(serve, AlignmentOutput((), error="401: no key", is_permanent=True))
    body = error(response, 502)
    assert body["code"] == "aligner_refuses" and "401: no key" in body["message"]
    assert response.headers["x-should-retry"] == "false" and "Retry-After" not in response.headers


def test_words_are_in_segments_only_where_they_were_asked_for(serve):
    timed = AlignmentOutput((0, 400, 400, 800))
    text = "language English<asr_text>Hi there."
    asked = words_of(serve, timed, text).json()
    assert [word["word"] for word in asked["segments"][0]["words"]] == ["Hi", " there."]
    unasked = words_of(serve, timed, text, granularity="segment").json()
    assert "words" not in unasked and "words" not in unasked["segments"][0]
    assert unasked["segments"][0]["start"] == asked["segments"][0]["start"]


def test_a_language_that_the_aligner_does_not_know_has_segments_and_a_warning(serve):
    text = "language Polish<asr_text>Dzień dobry."
    body = words_of(serve, AlignmentOutput(()), text).json()
    assert body["words"] == [] and [s["text"] for s in body["segments"]] == ["Dzień dobry."]
    assert "Polish" in body["warnings"][0]


def test_each_channel_is_a_speaker(serve):
    engine = Engine(f"{ENGLISH}Hello? Bye.", f"{ENGLISH}Hello!")
    left, right = noise(9.0), noise(9.0, seed=1)
    left[48_000:96_000] = right[:64_000] = right[80_000:] = 0  # Hello? - Hello! - Bye.
    file = wav(np.stack([left, right], axis=1))
    body = serve(engine)(file, response_format="diarized_json").json()
    said = [(s["speaker"], s["text"], s["type"]) for s in body["segments"]]
    kind = "transcript.text.segment"
    assert said == [("A", "Hello?", kind), ("B", " Hello!", kind), ("A", " Bye.", kind)]
    assert body["text"] == "Hello? Hello! Bye." and body["duration"] == 9
    names = {"known_speaker_names[]": ["Ada", "Grace"], "response_format": "diarized_json"}
    body = serve(engine)(file, **names).json()
    assert [segment["speaker"] for segment in body["segments"]] == ["Ada", "Grace", "Ada"]


@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_speakers_need_two_channels_that_differ(serve, num_channels):
    file = wav(np.stack([noise(1.0)] * num_channels, axis=1))
    body = error(serve(Engine(""))(file, response_format="diarized_json"), 400)
    assert body["param"] == "response_format" and "verbose_json" in body["message"]
    assert ("the same" if num_channels == 2 else f"{num_channels} channel") in body["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"chunking_strategy": '{"type": "server_vad", "silence_duration_ms": 400}'},
        {"chunking_strategy[type]": "server_vad", "chunking_strategy[silence_duration_ms]": "400"},
    ],
)
def test_a_server_vad_cuts_at_its_pauses(serve, fields):
    engine = Engine(f"{ENGLISH}Hi.")
    speech = noise(9.0) + 0.01
    speech[32_000:40_000] = speech[96_000:100_000] = 0  # pauses of 0.5 and 0.25 s
    post = serve(engine)
    for strategy, num_clips in (({}, 1), ({"chunking_strategy": "auto"}, 1), (fields, 2)):
        engine.asked.clear()
        assert post(wav(speech), **strategy).status_code == 200
        assert len(engine.asked) == num_clips
    start = len(engine.asked[0][0]["multi_modal_data"]["audio"][0])
    assert start == pytest.approx(40_000 - 0.3 * 16_000, abs=1600)


def test_one_recording_takes_a_share_of_the_engine(serve):
    engine = Engine("language English<asr_text>Hi.", max_num_seqs=24)
    text = serve(engine, max_clip_s=1)(wav(noise(30.0))).json()["text"]
    assert len(engine.asked) >= 30
    assert engine.most_running == 3
    assert text == " ".join(["Hi."] * len(engine.asked))


def counted(status):
    """How many requests ended so."""
    labels = {"model_name": "asr", "route": ROUTE, "status": str(status)}
    return REGISTRY.get_sample_value("qwen3_asr_requests_total", labels) or 0


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
def test_a_failure_is_counted_once_whatever_was_sent_before(serve, stream):
    engine = Engine("language English<asr_text>Good morning.", RuntimeError("out of order"))
    before = counted(200), counted(500)
    serve(engine, max_clip_s=5)(wav(noise(9.0)), stream=stream)
    assert (counted(200), counted(500)) == (before[0], before[1] + 1)


def test_the_schema_of_the_server_can_be_made(post):
    assert ROUTE in post.client.get("/openapi.json").json()["paths"]


def test_another_model_is_not_served_by_these_routes():
    from qwen3_asr_vllm.server.plugin import EndpointPlugin

    engine = Engine("")
    engine.model_config.hf_config = SimpleNamespace(model_type="whisper")
    with pytest.raises(ValueError, match="this model is whisper"):
        asyncio.run(EndpointPlugin().init_state(engine, SimpleNamespace(), None))


def test_translation_is_refused(post):
    body = error(post.client.post("/v1/audio/translations"), 400)
    assert "does not translate" in body["message"]


# --- through a socket, with the real client; still without an engine ---------------------------


class SlowEngine(Engine):
    """Says a word every 10 ms and never ends."""

    async def generate(self, prompt, params, request_id, **options):
        self.running += 1
        try:
            yield output("language English<asr_text>", None)
            while True:
                await asyncio.sleep(0.01)
                yield output("word ", None)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1


@pytest.fixture
def connect(serve):
    """Put the route on a port; returns an asynchronous client of it."""
    with ExitStack() as stack:

        def start(engine, **options):
            url = stack.enter_context(on_a_port(serve(engine, **options).client.app))
            return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        yield start


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_aborts_its_clips(connect, stream):
    engine = SlowEngine("", max_num_seqs=24)
    client = connect(engine, max_clip_s=1)
    hung_up = counted(499)

    async def leave():
        create = client.audio.transcriptions.create(
            model="asr", file=wav(noise(9.0)), stream=stream
        )
        task = asyncio.create_task(create)
        while engine.running < 3:
            await asyncio.sleep(0.01)
        if stream:
            async for event in await task:
                assert event.type == "transcript.text.delta"
                break
        task.cancel()
        await client.close()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    eventually(lambda: not engine.running and counted(499) > hung_up)
    assert (engine.aborted, counted(499)) == (3, hung_up + 1)


def test_the_client_raises_an_error_in_the_stream(connect):
    client = connect(Engine("language English<asr_text>Hi.", RuntimeError("no")), max_clip_s=5)

    async def listen():
        events = await client.audio.transcriptions.create(
            model="asr", file=wav(noise(9.0)), stream=True
        )
        return [event async for event in events]

    with pytest.raises(openai.APIError, match="no"):
        asyncio.run(listen())


# --- in vLLM's own app: its config, renderer, middleware and handlers, still without an engine ---


@pytest.fixture(scope="module")
def app():
    """What ``vllm serve`` builds with aliases and a key; its engine says "Hi."."""
    from fastapi.testclient import TestClient
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.renderers import renderer_from_config
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = f"--model {CHECKPOINT} --served-model-name asr whisper-1 --api-key secret"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options.split())
    engine = Engine("language English<asr_text>Hi.")
    engine.vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    engine.model_config = engine.vllm_config.model_config
    engine.renderer = renderer_from_config(engine.vllm_config)
    tasks = ("generate", "transcription")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "qwen3_asr")
        app = build_app(args, tasks)
    asyncio.run(init_app_state(engine, app.state, args, tasks))
    client = TestClient(app, headers={"Authorization": "Bearer secret"})
    return SimpleNamespace(engine=engine, client=client)


def ask(app, file=SECOND, **fields):
    return app.client.post(ROUTE, files={"file": file}, data=fields)


def test_vllm_takes_the_plugins_routes_and_renders_what_they_ask(app):
    assert ask(app, model="asr", prompt="Ada").json()["languages"] == [{"code": "en"}]
    prompt, params, _ = app.engine.asked[-1]
    audio = app.engine.model_config.hf_config.thinker_config.audio_token_id
    assert prompt["prompt_token_ids"].count(audio) == 13
    assert params.temperature == 0


@pytest.mark.parametrize("model", ["asr", "whisper-1", ""])
def test_aliases_are_served(app, model):
    assert ask(app, model=model).json()["text"] == "Hi."


def test_pages_of_other_origins_open_no_session_unless_vllm_is_told(app):
    assert not app.client.app.state.qwen3_asr.realtime.allows("https://evil.test", "localhost")


def without_key(app, method, path, **options):
    headers = {"Authorization": "Bearer no"} | options.pop("headers", {})
    return app.client.request(method, path, headers=headers, **options)


OPEN = {"/", "/about", "/health", "/ping", "/metrics"}


def paths(app):
    """Every path of the server, with something in the place of its parameters."""
    for route in app.client.app.routes:
        for method in sorted(getattr(route, "methods", None) or ["GET"]):
            yield method, re.sub(r"{.*?}", "x", route.path)


def test_every_route_but_a_few_needs_the_key(app):
    closed = [(method, path) for method, path in paths(app) if path not in OPEN]
    wanted = "/pooling /tokenize /detokenize /scale_elastic_ep /invocations /docs /openapi.json"
    others = [("POST", path) for path in wanted.split()] + [
        ("GET", "/nothing"),
        ("GET", "/about/x"),
    ]
    assert len(closed) > 20
    for method, path in [*closed, *others, ("POST", ROUTE), ("GET", "/v1/models")]:
        response = without_key(app, method, path)
        assert response.status_code == 401, (method, path)
        if method != "HEAD":
            assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", sorted(OPEN - {"/health", "/ping"}))  # they ask the engine
def test_health_metrics_and_the_page_need_no_key(app, path):
    assert without_key(app, "GET", path).status_code == 200


def test_a_preflight_request_needs_no_key(app):
    asked = {"Origin": "https://a.test", "Access-Control-Request-Method": "POST"}
    assert without_key(app, "OPTIONS", ROUTE, headers=asked).status_code != 401


@pytest.mark.parametrize(
    ("key", "protocols", "is_known"),
    [
        ("secret", [], True),
        ("no", ["realtime", "openai-insecure-api-key.secret"], True),
        ("no", ["realtime", "openai-insecure-api-key.no"], False),
        ("no", ["openai-insecure-api-key."], False),
        ("no", ["secret"], False),
    ],
)
def test_sessions_take_a_key_where_browsers_put_it(app, key, protocols, is_known):
    from starlette.testclient import WebSocketDenialResponse

    headers = {"Authorization": f"Bearer {key}"}
    try:
        with app.client.websocket_connect("/v1/realtime", protocols, headers=headers) as session:
            assert session.receive_json()["type"] == "session.created" and is_known
    except WebSocketDenialResponse as refused:
        assert error(refused, 401)["code"] == "invalid_api_key" and not is_known


def test_a_key_in_a_subprotocol_opens_no_other_route(app):
    headers = {"Sec-WebSocket-Protocol": "openai-insecure-api-key.secret"}
    assert without_key(app, "GET", "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/about/", 404, "unknown_url"),
        ("GET", "/v1/audio/transcriptions/", 404, "unknown_url"),
        ("GET", ROUTE, 405, "method_not_supported"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_supported"),
        ("GET", "/v1/models/whisper-9", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/a%1B%5B2J%E2%80%AE", 404, "model_not_found"),
    ],
)
def test_what_is_not_there_is_openais_error(app, method, path, status, code):
    response = app.client.request(method, path, follow_redirects=False)
    body = error(response, status)
    assert body["code"] == code and body["type"] == "invalid_request_error"
    assert ("Allow" in response.headers) == (status == 405)
    assert body["message"].isprintable()


def test_no_redirect_goes_to_the_host_of_a_request(app):
    for _, path in paths(app):
        headers = {"Host": "evil.test"}
        response = app.client.get(f"{path}/", headers=headers, follow_redirects=False)
        assert "Location" not in response.headers, path


@pytest.mark.parametrize("name", ["asr", "whisper-1"])
def test_a_model_is_described(app, name):
    listed = {card["id"]: card for card in app.client.get("/v1/models").json()["data"]}
    card = app.client.get(f"/v1/models/{name}").json()
    assert card["id"] == name and card["object"] == "model"
    assert set(card) == set(listed[name])


@pytest.mark.parametrize("path", ["/v1/models/Qwen/ASR-1.7B", "/v1/models/Qwen%2FASR-1.7B"])
def test_a_model_with_a_slash_in_its_name_is_found(app, path):
    models = app.client.app.state.openai_serving_models.base_model_paths
    models.append(SimpleNamespace(name="Qwen/ASR-1.7B", model_path="x"))
    try:
        assert app.client.get(path).json()["id"] == "Qwen/ASR-1.7B"
    finally:
        models.pop()


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        ("req-1", "req-1"),
        ("a\x1b[31m b", "a?[31m?b"),
        ("x" * 5000, "x" * 128),
        ("", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("path", ["/about", "/v1/nothing", "/v1/chat/completions"])
def test_every_response_has_the_id_of_its_request(app, path, given, echoed):
    headers = {} if given is None else {"X-Request-Id": given}
    for key in ("secret", "no"):
        answered = app.client.get(path, headers=headers | {"Authorization": f"Bearer {key}"})
        (shown,) = answered.headers.get_list("X-Request-Id")
        assert shown == echoed if echoed else re.fullmatch("[0-9a-f]{32}", shown)


def test_an_error_of_the_server_has_an_id_too(app, monkeypatch):
    async def fail():
        raise KeyError("\x1b[2Jsecret")

    models = app.client.app.state.openai_serving_models
    monkeypatch.setattr(models, "show_available_models", fail)
    monkeypatch.setattr(app.client._transport, "raise_server_exceptions", False)
    response = app.client.get("/v1/models", headers={"X-Request-Id": "req-1"})
    assert response.headers["X-Request-Id"] == "req-1"
    error(response, 500)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("X-Vllm-Priority", str(2**70), "-9223372036854775808 to 9223372036854775807"),
        ("X-Vllm-Priority", "9" * 5000, "-9223372036854775808"),
        ("X-Vllm-Priority", "high", "whole number"),
        ("X-Vllm-Priority", "", "whole number"),
        ("X-data-parallel-rank", "1", "0 to 0"),
        ("X-data-parallel-rank", "-1", "0 to 0"),
        ("X-data-parallel-rank", "nonsense", "whole number"),
    ],
)
@pytest.mark.parametrize("path", [ROUTE, "/v1/chat/completions", "/invocations"])
def test_headers_that_no_engine_can_hold_are_refused(app, path, name, value, limit):
    body = error(app.client.post(path, headers={name: value}), 400)
    assert body["param"] == name and name in body["message"] and limit in body["message"]
    assert len(body["message"]) < 400


def test_headers_of_vllm_are_taken(app):
    headers = {"X-Vllm-Priority": " -7", "X-data-parallel-rank": "0"}
    response = app.client.post(ROUTE, files={"file": SECOND}, headers=headers)
    assert response.status_code == 200 and app.engine.asked[-1][2]["priority"] == -7


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///etc/passwd", "local_file"),
        ("http://127.0.0.1:9/a.wav", "unreachable_url"),
    ],
)
def test_media_that_cannot_be_read_is_the_clients_mistake(app, url, code):
    part = {"type": "audio_url", "audio_url": {"url": url}}
    chat = {"model": "asr", "messages": [{"role": "user", "content": [part]}]}
    body = error(app.client.post("/v1/chat/completions", json=chat), 400)
    assert body["code"] == code and body["type"] == "invalid_request_error"


def test_what_the_server_is_says_no_secret(app):
    response = app.client.get("/about")
    about = response.json()
    assert about["models"] == ["asr", "whisper-1"] and about["needs_key"]
    assert about["languages"] == LANGUAGES
    assert about["max_upload_mb"] == 1024 and about["max_duration_s"] == 14_400
    assert "secret" not in response.text


def test_nothing_may_run_on_the_page_but_what_stands_in_it(app):
    headers = app.client.get("/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and "unsafe" not in str(policy)
    assert policy["script-src"].startswith("'sha256-")
    assert headers["x-content-type-options"] == "nosniff"


def test_errors_of_vllm_and_of_the_route_look_alike(app):
    for response, status, param in (
        (ask(app, model="asr-2"), 404, "model"),
        (ask(app, top_p="7"), 400, "top_p"),
        (ask(app, ("a.wav", b"words" * 99)), 400, "file"),
        (ask(app, stream="true", language="tlh"), 400, "language"),
    ):
        assert error(response, status)["param"] == param


# --- through the server -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def transcribe(client, file=HELLO, **fields):
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


@pytest.fixture(scope="module")
def hello(client):
    return transcribe(client)


def test_json_is_what_openai_types_say(hello):
    """V5: in-tree throws the language away that the model heard."""
    assert hello.language == "en" and [x.code for x in hello.languages] == ["en"]
    assert hello.usage.type == "duration"
    assert hello.usage.seconds == round(soundfile.info(HELLO).duration, 3)
    assert isinstance(hello.languages, list)


def test_the_text_is_that_of_a_chat(client, hello):
    """The same prompt and clip on vLLM's own route, which cuts and limits nothing."""
    samples, rate = soundfile.read(HELLO, dtype="float32")
    data = base64.b64encode(wav(samples, rate)[1]).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    answer = client.chat.completions.create(
        model=str(CHECKPOINT), messages=[{"role": "user", "content": [part]}], temperature=0
    )
    assert parse_output(answer.choices[0].message.content).text == hello.text


def test_all_formats_say_the_same(client, hello):
    assert transcribe(client, response_format="text") == hello.text + "\n"
    verbose = transcribe(
        client, response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert verbose.text == hello.text == "".join(segment.text for segment in verbose.segments)
    assert verbose.duration == hello.usage.seconds
    (as_srt, srt_type), (as_vtt, vtt_type) = (typed(client, name) for name in ("srt", "vtt"))
    assert srt_type.startswith("application/x-subrip") and vtt_type.startswith("text/vtt")
    cues = [cue.content for cue in srt.parse(as_srt, ignore_errors=False)]
    captions = [caption.text for caption in webvtt.from_string(as_vtt)]
    assert " ".join(" ".join(cues).split()) == " ".join(" ".join(captions).split()) == hello.text


def typed(client, response_format):
    """A body and its media type."""
    raw = client.audio.transcriptions.with_raw_response.create(
        model=str(CHECKPOINT), file=HELLO, response_format=response_format
    )
    return raw.text, raw.headers["content-type"]


def test_channels_are_the_speakers_that_openai_knows(client, hello):
    left, rate = soundfile.read(HELLO, dtype="float32")
    right = np.concatenate([np.zeros(len(left), np.float32), left])
    stereo = np.stack([np.resize(np.append(left, np.zeros(len(left))), len(right)), right], axis=1)
    body = transcribe(client, wav(stereo, rate), response_format="diarized_json")
    answer = TranscriptionDiarized.model_validate(body.model_dump(), strict=True)
    said = {
        speaker: "".join(s.text for s in answer.segments if s.speaker == speaker).strip()
        for speaker in ("A", "B")
    }
    assert said == {"A": hello.text, "B": hello.text}
    assert answer.duration == pytest.approx(2 * hello.usage.seconds, abs=0.01)


def test_events_are_those_of_openai(client, hello):
    """V16: in-tree streams objects that this client does not know."""
    *deltas, done = transcribe(client, stream=True)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == hello.text
    assert done.languages == hello.languages
    assert done.usage.input_tokens > 13 and done.usage.output_tokens > 0


def test_a_long_recording_is_streamed_in_order(client):
    path = DATA / "three_languages.flac"
    whole = transcribe(client, path)
    *deltas, done = transcribe(client, path, stream=True)
    assert "".join(event.delta for event in deltas) == done.text == whole.text


def test_vllm_bench_understands_the_stream(server, hello):
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import (
        RequestFuncInput,
        async_request_openai_audio,
    )

    async def ask():
        samples = soundfile.read(HELLO, dtype="float32")
        asked = RequestFuncInput(
            prompt="",
            api_url=server.url + ROUTE,
            prompt_len=1,
            output_len=500,
            model=str(CHECKPOINT),
            multi_modal_content={"audio": samples},
        )
        async with aiohttp.ClientSession() as session:
            return await async_request_openai_audio(asked, session)

    answer = asyncio.run(ask())
    assert answer.success, answer.error
    assert answer.output_tokens > 0


def test_keywords_and_sampling_are_taken_from_the_client(client):
    fields = {"top_p": 0.9, "top_k": 3, "seed": 1, "repetition_penalty": 1.1}
    raw = client.audio.transcriptions.with_raw_response.create(
        model=str(CHECKPOINT),
        file=HELLO,
        keywords=["Ada", "Grace Hopper"],
        prompt="A lecture.",
        temperature=0.3,
        chunking_strategy={"type": "server_vad", "threshold": 0.4},
        extra_body=fields,
    )
    assert isinstance(raw.parse().text, str)
    assert "X-Ignored-Params" not in raw.headers


def test_a_token_limit_that_is_hit_is_told(client):
    answer = transcribe(client, extra_body={"max_completion_tokens": 3})
    assert "token limit" in answer.warnings[0]


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"language": "tlh"}, openai.BadRequestError, "language"),
        ({"timestamp_granularities": ["word"]}, openai.BadRequestError, "timestamp_granularities"),
        ({"response_format": "diarized_json"}, openai.BadRequestError, "response_format"),
        ({"include": ["logprobs"], "response_format": "vtt"}, openai.BadRequestError, "include"),
        ({"extra_body": {"top_p": 7}}, openai.BadRequestError, "top_p"),
        ({"file": ("notes.wav", b"words" * 100)}, openai.BadRequestError, "file"),
        ({"file": ("notes.wav", b"words" * 100), "stream": True}, openai.BadRequestError, "file"),
        ({"extra_body": {"model": "whisper-1"}}, openai.NotFoundError, "model"),
    ],
)
def test_mistakes_are_told_with_their_field(client, fields, error, param):
    with pytest.raises(error) as raised:
        transcribe(client, **{"file": HELLO} | fields)
    assert raised.value.param == param


def test_verbose_json_has_real_numbers(client):
    """What in-tree refuses, and could not give: confidences from the decode itself (V6, V7)."""
    verbose = transcribe(client, response_format="verbose_json", temperature=0.0)
    assert not hasattr(verbose, "unmeasured")
    for segment in verbose.segments:
        assert segment.tokens and -5 < segment.avg_logprob < 0
        assert 0 <= segment.no_speech_prob < 0.5 < segment.language_probability <= 1
        assert segment.compression_ratio > 0 and segment.seek == int(100 * segment.start)
    forced = transcribe(client, response_format="verbose_json", language="en")
    assert forced.unmeasured == ["no_speech_prob"]


@pytest.mark.parametrize("language", [None, "en"])
def test_logprobs_are_those_of_the_text(client, hello, language):
    fields = {"include": ["logprobs"]} | ({"language": language} if language else {})
    whole = transcribe(client, **fields)
    assert "".join(entry.token for entry in whole.logprobs) == whole.text
    assert all(entry.logprob <= 0 for entry in whole.logprobs)
    written = b"".join(bytes(map(int, entry.bytes)) for entry in whole.logprobs)
    assert written.decode() == whole.text
    *deltas, done = transcribe(client, stream=True, **fields)
    streamed = [entry.token for delta in deltas for entry in delta.logprobs]
    assert streamed == [entry.token for entry in done.logprobs]
    assert "".join(streamed) == done.text == whole.text


def test_languages_to_choose_from(client, hello):
    assert transcribe(client, languages=["en", "de"]).text == hello.text
    other = transcribe(client, languages=["de", "zh"])
    assert [language.code for language in other.languages] in (["de"], ["zh"])
    *deltas, done = transcribe(client, languages=["de", "zh"], stream=True)
    assert "".join(delta.delta for delta in deltas) == done.text == other.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_is_stopped_and_asked_again(server, client, hello, stream):
    """A reward for what was said already, so the engine really loops, every time (V11)."""
    counted = "request_success_total", 'finished_reason="repetition"'
    loops, told = metric(server, *counted), loops_told(server)
    reward = {"frequency_penalty": -2, "presence_penalty": -2, "repetition_penalty": 0.5}
    fields = {"extra_body": reward}
    if stream:
        *deltas, answer = transcribe(client, stream=True, **fields)
        assert "".join(delta.delta for delta in deltas) == answer.text
    else:
        answer = transcribe(client, **fields)
    assert metric(server, *counted) > loops and loops_told(server) > told
    assert answer.text and len(answer.text) < 2 * len(hello.text)


# What integrations send (file, content type and fields) and what they read of the answer.
INTEGRATIONS = {
    "Open WebUI": (("audio.webm", "audio/webm"), {}, lambda a: a.json()["text"]),
    "Open WebUI, with a language": (
        ("audio.mp3", "audio/mpeg"),
        {"language": "en"},
        lambda a: a.json()["text"],
    ),
    "LiveKit": (
        ("file.wav", "audio/wav"),
        {"language": "", "response_format": "json"},
        lambda a: Transcription.model_validate(a.json()).text,
    ),
    "LiveKit, whisper-1": (
        ("file.wav", "audio/wav"),
        {"language": "en", "response_format": "verbose_json", "prompt": "Catherine"},
        lambda a: TranscriptionVerbose.model_validate(a.json()).text,
    ),
    "Pipecat": (
        ("audio.wav", "audio/wav"),
        {"language": "en", "response_format": "json", "include[]": "logprobs"},
        lambda a: "".join(x.token for x in Transcription.model_validate(a.json()).logprobs),
    ),
    "Pipecat, Whisper": (
        ("audio.wav", "audio/wav"),
        {"language": "en", "response_format": "verbose_json", "temperature": "0.0"},
        lambda a: "".join(s.text for s in TranscriptionVerbose.model_validate(a.json()).segments),
    ),
    "wyoming-openai": (
        ("recording.wav", "audio/wav"),
        {"language": "en", "response_format": "json", "temperature": "0.0", "seed": "1"},
        lambda a: a.json()["text"],
    ),
    "wyoming-openai, gpt-transcribe": (
        ("recording.wav", "audio/wav"),
        {"languages[]": ["en", "de"], "stream": "true"},
        lambda a: "".join(e["delta"] for e in events(a) if e["type"] == "transcript.text.delta"),
    ),
    "LiteLLM": (
        ("audio.flac", "audio/flac"),
        {"response_format": "verbose_json", "timestamp_granularities[]": "segment"},
        lambda a: a.json()["text"] * (a.json()["duration"] > 10),
    ),
    "LiteLLM, text": (
        ("audio.flac", "application/octet-stream"),
        {"response_format": "text"},
        lambda a: a.text.strip(),
    ),
    "Bifrost": (
        ("audio.ogg", "audio/ogg"),
        {"stream": "true", "stream_include_usage": "true"},
        lambda a: "".join(c["delta"]["content"] for e in events(a) for c in e["choices"]),
    ),
}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integrations_get_what_they_read(server, hello, tmp_path, name):
    (file_name, content_type), fields, read = INTEGRATIONS[name]
    path = tmp_path / file_name
    command = ["ffmpeg", "-v", "error", "-i", HELLO, "-ar", "48000", "-ac", "2", path]
    subprocess.run(command, check=True)
    file = (file_name, path.read_bytes(), content_type)
    data = {"model": str(CHECKPOINT)} | fields
    answer = httpx.post(server.url + ROUTE, files={"file": file}, data=data, timeout=60)
    assert answer.status_code == 200, answer.text
    assert jiwer.cer(hello.text, read(answer)) < 0.4
    assert "X-Ignored-Params" not in answer.headers


def test_64_requests_at_once_good_and_bad(client, hello):
    kinds = (
        {},
        {"stream": True},
        {"response_format": "text"},
        {"file": ("notes.wav", b"words" * 1000)},
        {},
        {"model": "whisper-9"},
        {"stream": True},
        {"language": "klingon"},
    )
    refusals = {3: openai.BadRequestError, 5: openai.NotFoundError, 7: openai.BadRequestError}

    def ask(index):
        wanted = {"model": str(CHECKPOINT), "file": HELLO} | kinds[index % 8]
        try:
            answer = client.audio.transcriptions.create(**wanted)
        except openai.APIStatusError as error:
            return type(error)
        if "stream" in wanted:
            return list(answer)[-1].text
        return answer.strip() if isinstance(answer, str) else answer.text

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [refusals.get(index % 8, hello.text) for index in range(64)]


def metrics(server):
    return urllib.request.urlopen(f"{server.url}/metrics").read().decode().splitlines()


def hung_up(server):
    """How many clients did so."""
    return our_metric(server, "requests", 'status="499"')


def loops_told(server):
    return our_metric(server, "loops")


def our_metric(server, name, label=""):
    """The sum over all labels of a counter of ours."""
    lines = [line for line in metrics(server) if line.startswith(f"qwen3_asr_{name}_total{{")]
    return sum(float(line.split()[-1]) for line in lines if label in line)


def metric(server, name, label=""):
    """The sum over all labels of a metric of the engine; aborted requests do not count."""
    lines = [line for line in metrics(server) if line.startswith(f"vllm:{name}{{")]
    counted = (line for line in lines if 'reason="abort"' not in line and label in line)
    return sum(float(line.split()[-1]) for line in counted)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_aborts_its_engine_requests(server, stream):
    samples, rate = soundfile.read(HELLO, dtype="float32")
    lecture = wav(np.resize(samples, 1800 * rate))  # at least 150 clips
    tokens = metric(server, "generation_tokens_total")
    finished = metric(server, "request_success_total")
    gone = hung_up(server)

    async def leave():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.audio.transcriptions.create(
            model=str(CHECKPOINT), file=lecture, stream=stream, temperature=2.0
        )
        task = asyncio.create_task(answer)
        while await asyncio.to_thread(metric, server, "generation_tokens_total") == tokens:
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

    asyncio.run(leave())
    eventually(lambda: hung_up(server) > gone and not metric(server, "num_requests_running"))
    decoded = metric(server, "generation_tokens_total")
    time.sleep(1)
    assert metric(server, "generation_tokens_total") == decoded
    assert metric(server, "num_requests_waiting") == 0
    assert metric(server, "request_success_total") - finished < 150


def test_short_requests_finish_before_a_long_one(server, hello):
    samples, rate = soundfile.read(HELLO, dtype="float32")
    lecture = wav(np.resize(samples, 1800 * rate))  # at least 150 clips

    async def overtake():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask = partial(client.audio.transcriptions.create, model=str(CHECKPOINT))
        long = asyncio.create_task(ask(file=lecture))
        while not await asyncio.to_thread(metric, server, "num_requests_running"):
            await asyncio.sleep(0.05)
        texts = [(await ask(file=HELLO)).text for _ in range(3)]
        is_overtaken = not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await client.close()
        return texts, is_overtaken

    assert asyncio.run(overtake()) == ([hello.text] * 3, True)
