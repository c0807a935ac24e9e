# SPDX-License-Identifier: Apache-2.0
"""Fields of a transcription request: spellings, defaults, refusals."""

from __future__ import annotations

import io

import pytest
from starlette.datastructures import UploadFile
from support.audio import HELLO, noise, wav
from support.clients import ROUTE, error
from support.fake_engine import ENGLISH, FakeEngine

SECOND = wav(noise(1.0))


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
def test_malformed_bodies_are_bad_requests(post, kind, body):
    response = post.client.post(ROUTE, content=body, headers={"Content-Type": kind})
    assert error(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["keywords", "n", "chunking_strategy", "vllm_xargs"])
def test_json_of_any_depth_is_answered(post, field):
    for text in ("[" * 10_000, '{"a": ' * 10_000):
        assert post(**{field: text}).status_code in (200, 400)


@pytest.mark.parametrize("field", ["seed", "priority", "top_k"])
def test_numbers_out_of_range_are_refused(post, field):
    for number in (2**63, -(2**63) - 1):
        assert error(post(**{field: str(number)}), 400)["param"] == field


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
    engine = FakeEngine("language English<asr_text>Hi.")
    assert serve(engine)(**fields).status_code == 200
    prompt = engine.asked[0][0]["prompt"]
    assert prompt.startswith("<|im_start|>system\nAda, Grace Hopper<|im_end|>\n")


def test_tokens_of_the_tokenizer_leave_the_context(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
    assert serve(engine)(prompt="Ada<time<timestamp>stamp> L.").status_code == 200
    prompt = engine.asked[0][0]["prompt"]
    assert prompt.startswith("<|im_start|>system\nAdatimestamp> L.<|im_end|>\n")


@pytest.mark.parametrize(
    "fields",
    [{"language": "yue"}, {"language": "Cantonese"}, {"languages[]": "zh-HK"}],
)
def test_a_language_is_forced(serve, fields):
    engine = FakeEngine("早晨。")
    assert serve(engine)(**fields).json()["languages"] == [{"code": "yue"}]
    assert engine.asked[0][0]["prompt"].endswith("assistant\nlanguage Cantonese<asr_text>")


def test_no_field_of_vllm_is_unknown():
    """Text is never cut at stop strings, which ``include_stop_str_in_output`` is about."""
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest

    from qwen3_asr_vllm.server.form import REFUSED, Form

    known = {*Form.model_fields, *(name for name, *_ in REFUSED)}
    assert set(TranscriptionRequest.model_fields) - known == {"include_stop_str_in_output"}


def test_sampling_fields_reach_the_engine(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7}
    given |= {"watermarking": False}
    given |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    fields = {"max_completion_tokens": 9, "vllm_xargs": '{"a": 1}', "priority": -2}
    assert serve(engine)(**given, **fields).status_code == 200
    _, params, options = engine.asked[0]
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.extra_args, options["priority"]) == (9, {"a": 1}, -2)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"language": "tlh"}, "language", "zh Chinese"),
        ({"languages": "en,tlh"}, "languages", "zh Chinese"),
        ({"languages": "en,de", "language": "fr"}, "languages", "candidates of detection"),
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
        ({"use_beam_search": "many"}, "use_beam_search", "true or false"),
        ({"n": "3"}, "n", "n is 3; set use_beam_search"),
        ({"n": "3", "use_beam_search": "false"}, "n", "set use_beam_search"),
        ({"n": "0", "use_beam_search": "true"}, "n", "greater than or equal to 1"),
        ({"n": "17", "use_beam_search": "true"}, "n", "less than or equal to 16"),
        ({"n": "1" + "0" * 5000, "use_beam_search": "true"}, "n", "whole number"),
        ({"n": "2.5", "use_beam_search": "true"}, "n", "whole number"),
        ({"length_penalty": "0.7"}, "length_penalty", "set use_beam_search"),
        ({"length_penalty": "nan", "use_beam_search": "1"}, "length_penalty", "finite"),
        ({"length_penalty": "1e9", "use_beam_search": "1"}, "length_penalty", "equal to 10"),
        ({"temperature": "0.5", "use_beam_search": "1"}, "temperature", "does not sample"),
        ({"repetition_penalty": "2", "use_beam_search": "1"}, "repetition_penalty", "leave it out"),
        ({"max_tokens": "9"}, "max_tokens", "max_completion_tokens"),
        ({"initial_prompt": "Ada"}, "initial_prompt", "prompt"),
        ({"word_timestamps": "true"}, "word_timestamps", "timestamp_granularities"),
        ({"stop": "."}, "stop", "leave it out"),
        ({"logit_bias": "{}"}, "logit_bias", "keywords"),
        ({"vllm_xargs": "{"}, "vllm_xargs", "JSON"),
        ({"file": None}, "file", "required"),
        ({"watermarking": "perhaps"}, "watermarking", "true or false"),
    ],
)
def test_unsupported_values_are_refused_by_name(post, fields, param, message):
    body = error(post(**fields), 400)
    assert body["param"] == param
    assert message in body["message"]
    assert body["type"] == "invalid_request_error"


def test_ignored_fields_are_named(post):
    response = post(
        **{"vad_filter": "true", "x \xe9": "1"},
        n="1",
        length_penalty="1.0",
        use_beam_search="False",
        word_timestamps="false",
        chunking_strategy="auto",
    )
    assert response.status_code == 200
    assert response.headers["X-Ignored-Params"] == "vad_filter, x??"


def test_fields_of_the_query_string_are_honoured(post):
    response = post.client.post(f"{ROUTE}?response_format=SRT&language=en", files={"file": SECOND})
    assert response.text.startswith("1\n00:00:0") and "-->" in response.text
    response = post.client.post(
        f"{ROUTE}?language=de&api-version=1",
        files={"file": SECOND},
        data={"language": "en"},
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


def test_equal_fields_may_be_repeated(post):
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
def test_transfer_params_are_ignored(serve, name, value):
    """One of these, and no object, ended in a 500."""
    engine = FakeEngine("language English<asr_text>Hi.")
    response = serve(engine)(vllm_xargs=f'{{"{name}": {value}, "a": 1}}')
    assert response.headers["X-Ignored-Params"] == f"vllm_xargs.{name}"
    assert engine.asked[0][1].extra_args == {"a": 1}


def test_fields_unused_by_the_engine_are_named(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
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


@pytest.mark.parametrize(
    "fields",
    [
        {"chunking_strategy": '{"type": "server_vad", "silence_duration_ms": 1250}'},
        {"chunking_strategy[type]": "server_vad", "chunking_strategy[silence_duration_ms]": "1250"},
    ],
)
def test_a_server_vad_cuts_at_its_pauses(serve, fields):
    """``HELLO`` pauses at 2.94 s for 1.1 s, and at 6.66 s for 1.4 s."""
    engine = FakeEngine(f"{ENGLISH}Hi.")
    post = serve(engine)
    for strategy, num_clips in (({}, 1), ({"chunking_strategy": "auto"}, 1), (fields, 2)):
        engine.asked.clear()
        assert post(HELLO.open("rb"), **strategy).status_code == 200
        assert len(engine.asked) == num_clips
    start = len(engine.asked[0][0]["multi_modal_data"]["audio"][0])
    assert start / 16_000 == pytest.approx(8.03 - 0.3, abs=0.1)
