# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio/transcriptions`` on a fake engine: fields, formats, streams, errors."""

from __future__ import annotations

import asyncio
import io
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import openai
import pytest
from openai.types.audio import Transcription, TranscriptionVerbose
from support.audio import DATA, noise, wav
from support.checks import eventually
from support.clients import ROUTE, counted, error, events
from support.fake_engine import ENGLISH, ROUND, EndlessEngine, FakeEngine
from support.servers import on_a_port

from qwen3_asr_vllm.alignment import AlignmentOutput
from qwen3_asr_vllm.formats import RESPONSE_FORMATS, Format
from qwen3_asr_vllm.languages import LANGUAGES

SECOND = wav(noise(1.0))


def test_json_says_text_languages_and_seconds(post):
    response = post()
    assert response.json() == {
        "text": "Good morning.",
        "language": "en",
        "languages": [{"code": "en"}],
        "usage": {"type": "duration", "seconds": 1.0},
    }
    assert "X-Ignored-Params" not in response.headers


DEFAULTS = {"temperature": 0.6, "repetition_penalty": 1.1, "top_k": 20, "max_new_tokens": 7}


def test_defaults_of_the_checkpoint_reach_the_engine(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
    engine.model_config.override_generation_config = DEFAULTS
    segments = serve(engine)(response_format="verbose_json").json()["segments"]
    params = engine.asked[0][1]
    assert (params.temperature, params.repetition_penalty, params.top_k) == (0.6, 1.1, 20)
    assert (params.max_tokens, segments[0]["temperature"]) == (7, 0.6)


def test_a_request_overrides_the_defaults(serve):
    engine = FakeEngine("language English<asr_text>Hi.")
    engine.model_config.override_generation_config = DEFAULTS
    given = {"temperature": 0, "repetition_penalty": 1.0, "max_completion_tokens": 9}
    serve(engine)(**given, stream=True)
    params = engine.asked[0][1]
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (0, 1.0, 9)


def test_the_start_line_has_the_defaults(serve):
    engine = FakeEngine("Hi.")
    engine.model_config.override_generation_config = {"temperature": 0.6, "num_beams": 4}
    transcriber = serve(engine).client.app.state.qwen3_asr.transcriber
    about = transcriber.about(SimpleNamespace(api_key=None))
    assert "decodes with temperature 0.6, 4 beams;" in str(about)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Hello. Hi."),
        ({"skip_special_tokens": "true"}, "Hello. Hi."),
        ({"skip_special_tokens": "false"}, "<|spk_0|>Hello.<|spk_0|>Hi."),
    ],
)
def test_special_tokens_are_text_on_request(serve, fields, text, stream):
    engine = FakeEngine(f"{ENGLISH}<|spk_0|>Hello.<|spk_0|>Hi.")
    response = serve(engine)(**fields, stream=stream)
    if stream:
        sent = events(response)
        assert "".join(event.get("delta", "") for event in sent) == sent[-1]["text"] == text
    else:
        assert response.json()["text"] == text
    assert engine.asked[0][1].skip_special_tokens is False  # the parser removes them


def test_contexts_without_a_place_are_warned_about(serve):
    post = serve(engine := FakeEngine(f"{ENGLISH}Ada."))
    transcriber = post.client.app.state.qwen3_asr.transcriber
    transcriber.protocol = replace(transcriber.protocol, with_context=None)
    (warning,) = post(prompt="Ada", response_format="verbose_json").json()["warnings"]
    assert "no place for a context" in warning
    assert "Ada" not in engine.asked[0][0]["prompt"]


@pytest.mark.parametrize("fields", [{}, {"max_completion_tokens": 100_000}])
def test_decoding_is_greedy_and_bounded(serve, fields):
    """V11: in-tree lets an answer fill the context."""
    from qwen3_asr_vllm.decoding import max_new_tokens

    engine = FakeEngine("language English<asr_text>Hi.")
    serve(engine)(**fields)
    params = engine.asked[0][1]
    assert (params.temperature, params.max_tokens) == (0, max_new_tokens(1.0))


def read_by_ai_sdk(body):
    """As @ai-sdk/openai 3 and 4 read a language: a code, or a name in small letters."""
    code_by_name = {name.lower(): code for code, name in LANGUAGES.items() if len(code) == 2}
    named = code_by_name.get(body["language"])
    return body["language"] if re.fullmatch("[a-z]{2}", body["language"]) else named


@pytest.mark.parametrize(("name", "language"), [("json", "de"), ("verbose_json", "german")])
def test_languages_are_spelled_for_their_clients(serve, name, language):
    body = serve(FakeEngine("language German<asr_text>Guten Tag."))(response_format=name).json()
    assert body["language"] == language and read_by_ai_sdk(body) == "de"
    assert body["languages"] == [{"code": "de"}]
    kind = Transcription if name == "json" else TranscriptionVerbose
    assert kind.model_validate(body, strict=True).text == "Guten Tag."


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


def test_json_rows_of_the_table_are_responses(post, monkeypatch):
    row = Format("mine", lambda transcript: '{"mine": 1}', "application/json", "verbose_json")
    monkeypatch.setitem(RESPONSE_FORMATS, "verbose_json", row)
    body = post(response_format="verbose_json").json()
    assert body["mine"] == 1 and body["text"] and "segments" not in body


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


def test_models_are_found_by_any_name(post):
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
    response = serve(FakeEngine("language English<asr_text>Hi."))(("a.m4a", file.getvalue()))
    assert response.json()["usage"]["seconds"] == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize("kind", ["audio/L16;rate=16000", "audio/pcmu", "audio/basic"])
def test_raw_audio_is_read_by_content_type(post, kind):
    samples = (noise(2.0) * 20_000).astype(">i2").tobytes()
    raw = samples if "L16" in kind else samples[:16_000]  # a byte for each sample, at 8 kHz
    body = post.client.post(ROUTE, content=raw, headers={"Content-Type": kind})
    part = post(("a.raw", raw, kind))
    assert body.json() == part.json() and body.json()["usage"]["seconds"] == 2.0


def test_a_missing_rate_is_named(post):
    response = post.client.post(ROUTE, content=bytes(999), headers={"Content-Type": "audio/L16"})
    assert "states no rate" in error(response, 400)["message"]


def test_too_long_recordings_name_the_limit(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "2")
    body = error(serve(FakeEngine(""))(wav(noise(3.0))), 400)
    assert "3.0 s" in body["message"] and "limit is 2 s" in body["message"]
    assert "VLLM_MAX_AUDIO_DECODE_DURATION_S" in body["message"]


def test_an_upload_too_large_is_refused(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    post = serve(FakeEngine("language English<asr_text>Hi."))
    body = error(post(wav(noise(60.0))), 413)
    assert "limit is 1 MiB" in body["message"]
    assert post(wav(noise(20.0))).status_code == 200


def test_chunked_uploads_end_at_the_limit(serve, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    post = serve(FakeEngine(""))
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


def test_silence_is_no_text_and_no_language(serve):
    engine = FakeEngine("")
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
    whole = serve(FakeEngine(*answers), max_clip_s=5)(long).json()
    streamed = events(serve(FakeEngine(*answers), max_clip_s=5)(long, stream="true"))
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
def test_only_usage_chunks_have_no_choice(post, fields, num_choices, has_usage):
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


def test_streams_warn_about_the_token_limit(serve):
    engine = FakeEngine("language English<asr_text>Hi.", finish_reason="length")
    *_, finish, done = events(serve(engine)(stream="true"))
    assert finish["choices"][0]["finish_reason"] == "length"
    assert "token limit" in done["warnings"][0]


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_plain_formats_carry_warnings_in_headers(serve, response_format):
    post = serve(FakeEngine("language English<asr_text>Hi.", finish_reason="length"))
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
def test_json_warns_about_unreadable_audio(post, response_format):
    body = post(unfinished_wav(), response_format=response_format).json()
    assert body["warnings"] == [UNFINISHED]
    assert body["usage"]["seconds"] == 1.0


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_headers_warn_about_unreadable_audio(post, response_format):
    response = post(unfinished_wav(), response_format=response_format)
    assert response.headers["X-Warnings"] == UNFINISHED


def test_streams_warn_about_unreadable_audio(post):
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
def test_files_of_users_are_read_completely(post, name, seconds, warnings):
    body = post((name, (DATA / "field" / name).read_bytes())).json()
    assert body["usage"]["seconds"] == pytest.approx(seconds, abs=0.02)
    assert body.get("warnings", []) == warnings


def test_speakers_have_the_warnings_of_their_file(post):
    name, data, kind = wav(np.stack([noise(1.0), noise(1.0, seed=1)], axis=1))
    place = data.index(b"data") + 4
    stereo = name, data[:place] + bytes(4) + data[place + 4 :], kind
    body = post(stereo, response_format="diarized_json").json()
    assert body["warnings"] == [UNFINISHED.replace("32,000", "64,000")]


def test_missing_tracks_are_named(post):
    assert post(SECOND, audio_track="1").status_code == 200
    body = error(post(SECOND, audio_track="2"), 400)
    assert "audio_track is 2; the file has 1" in body["message"]
    assert error(post(SECOND, audio_track="0"), 400)["param"] == "audio_track"


def test_warning_headers_are_bounded():
    from qwen3_asr_vllm.server.responses import warning_headers

    header = warning_headers(["The clip at 0:30 looped."] * 500)["X-Warnings"]
    assert len(header) < 2100 and header.endswith("(500 in all)")


def test_text_like_a_header_is_streamed_immediately(serve):
    """V15: where the language is forced, in-tree withholds 50 characters after "language"."""
    text = "language is what makes us human, said the linguist to the engineer."
    *deltas, done = events(serve(FakeEngine(text))(stream="true", language="en"))
    assert done["text"] == text == "".join(event["delta"] for event in deltas)
    assert len(deltas[0]["delta"]) < 12


def test_usage_comes_with_every_event_on_request(post):
    streamed = events(post(stream="true", stream_continuous_usage_stats="true"))
    tokens = [event["usage"]["completion_tokens"] for event in streamed]
    assert tokens == sorted(tokens)


def test_stream_errors_are_error_objects(serve):
    engine = FakeEngine("language English<asr_text>Good morning.", RuntimeError("out of order"))
    *deltas, last = events(serve(engine, max_clip_s=5)(wav(noise(9.0)), stream="true"))
    assert "".join(event["delta"] for event in deltas) == "Good morning."
    assert "out of order" in last["error"]["message"]


def test_errors_before_the_stream_have_statuses(post):
    error(post(("notes.wav", b"words" * 100), stream="true"), 400)


def test_streamed_text_of_a_loop_stays(serve):
    """The first of two clips loops, and is asked for again from where it was good."""
    engine = FakeEngine(f"{ENGLISH}Round{ROUND}", f"{ENGLISH}Bye.", " we go.")
    speech = noise(15.0)
    speech[7 * 16_000 : 8 * 16_000] = 0  # where it is cut
    *deltas, done = events(serve(engine, max_clip_s=10)(wav(speech), stream="true"))
    assert done["text"] == "Round and round and round and round we go. Bye."
    assert "".join(event["delta"] for event in deltas) == done["text"]
    prompt, params, _ = engine.asked[-1]
    assert prompt["prompt"].endswith("<asr_text>Round and round and round and round")
    assert params.repetition_penalty > 1
    assert "warnings" not in done


def test_unstreamed_loops_are_retried_in_halves(serve):
    engine = FakeEngine(f"{ENGLISH}Round{ROUND}", f"{ENGLISH}One.", f"{ENGLISH}Two.")
    body = serve(engine)(wav(noise(9.0))).json()
    assert body["text"] == "One. Two." and len(engine.asked) == 3
    assert all(params.repetition_detection.min_count > 1 for _, params, _ in engine.asked)


def words_of(serve, output, text="language English<asr_text>Hi.", granularity="word"):
    """A request for words, where this is what the aligner says."""

    async def is_up():
        return True

    async def answer(request, headers):
        return output

    post = serve(FakeEngine(text))
    aligner = SimpleNamespace(url="http://aligner", is_up=is_up, answer=answer)
    post.client.app.state.qwen3_asr.transcriber.aligner = aligner
    return post(response_format="verbose_json", **{"timestamp_granularities[]": granularity})


def test_unreachable_aligners_are_retryable(serve):
    response = words_of(serve, AlignmentOutput((), error="it is gone"))
    assert error(response, 503)["code"] == "aligner_unavailable"
    assert response.headers["Retry-After"] == "5" and "x-should-retry" not in response.headers


def test_an_aligner_that_refuses_is_not(serve):
    response = words_of(serve, AlignmentOutput((), error="401: no key", is_permanent=True))
    body = error(response, 502)
    assert body["code"] == "aligner_refuses" and "401: no key" in body["message"]
    assert response.headers["x-should-retry"] == "false" and "Retry-After" not in response.headers


def test_segments_contain_words_only_on_request(serve):
    timed = AlignmentOutput((0, 400, 400, 800))
    text = "language English<asr_text>Hi there."
    asked = words_of(serve, timed, text).json()
    assert [word["word"] for word in asked["segments"][0]["words"]] == ["Hi", " there."]
    unasked = words_of(serve, timed, text, granularity="segment").json()
    assert "words" not in unasked and "words" not in unasked["segments"][0]
    assert unasked["segments"][0]["start"] == asked["segments"][0]["start"]


def test_unalignable_languages_get_segments_and_warnings(serve):
    text = "language Polish<asr_text>Dzień dobry."
    body = words_of(serve, AlignmentOutput(()), text).json()
    assert body["words"] == [] and [s["text"] for s in body["segments"]] == ["Dzień dobry."]
    assert "Polish" in body["warnings"][0]


def test_each_channel_is_a_speaker(serve):
    engine = FakeEngine(f"{ENGLISH}Hello? Bye.", f"{ENGLISH}Hello!")
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
    body = error(serve(FakeEngine(""))(file, response_format="diarized_json"), 400)
    assert body["param"] == "response_format" and "verbose_json" in body["message"]
    assert ("the same" if num_channels == 2 else f"{num_channels} channel") in body["message"]


def test_the_openapi_schema_can_be_built(post):
    assert ROUTE in post.client.get("/openapi.json").json()["paths"]


def test_translation_is_refused(post):
    body = error(post.client.post("/v1/audio/translations"), 400)
    assert "does not translate" in body["message"]


# --- through a socket, with OpenAI's client ------------------------------------------------------


@pytest.fixture
def connect(serve):
    """Put the route on a port; returns an asynchronous client of it."""
    with ExitStack() as stack:

        def start(engine, **options):
            url = stack.enter_context(on_a_port(serve(engine, **options).client.app))
            return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        yield start


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_aborts_the_clips(connect, stream):
    engine = EndlessEngine("", max_num_seqs=24)
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


def test_the_client_raises_stream_errors(connect):
    client = connect(FakeEngine("language English<asr_text>Hi.", RuntimeError("no")), max_clip_s=5)

    async def listen():
        events = await client.audio.transcriptions.create(
            model="asr", file=wav(noise(9.0)), stream=True
        )
        return [event async for event in events]

    with pytest.raises(openai.APIError, match="no"):
        asyncio.run(listen())
