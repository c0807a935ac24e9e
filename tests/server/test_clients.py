# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio/transcriptions`` on the real server, as OpenAI's client and integrations use it."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import jiwer
import numpy as np
import openai
import pytest
import soundfile
import srt
import webvtt
from openai.types.audio import Transcription, TranscriptionDiarized, TranscriptionVerbose
from support.audio import DATA, HELLO, wav
from support.checkpoints import CHECKPOINT
from support.checks import eventually
from support.clients import ROUTE, events, metric

from qwen3_asr_vllm.prompt import parse_output

pytestmark = pytest.mark.vllm


def transcribe(client, file=HELLO, **fields):
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


def test_json_matches_the_types_of_openai(hello):
    """V5: in-tree drops the detected language."""
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


def test_keywords_and_sampling_fields_are_accepted(client):
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


def test_a_reached_token_limit_is_a_warning(client):
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
def test_errors_name_their_field(client, fields, error, param):
    with pytest.raises(error) as raised:
        transcribe(client, **{"file": HELLO} | fields)
    assert raised.value.param == param


def test_verbose_json_has_real_numbers(client):
    """Confidences come from the decode itself; in-tree refuses them (V6, V7)."""
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
    finished = "vllm:request_success_total", 'finished_reason="repetition"'
    loops, counted = metric(server, *finished), metric(server, "qwen3_asr_loops_total")
    reward = {"frequency_penalty": -2, "presence_penalty": -2, "repetition_penalty": 0.5}
    fields = {"extra_body": reward}
    if stream:
        *deltas, answer = transcribe(client, stream=True, **fields)
        assert "".join(delta.delta for delta in deltas) == answer.text
    else:
        answer = transcribe(client, **fields)
    assert metric(server, *finished) > loops
    assert metric(server, "qwen3_asr_loops_total") > counted
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
def test_integrations_read_their_responses(server, hello, tmp_path, name):
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


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_aborts_engine_requests(server, stream):
    samples, rate = soundfile.read(HELLO, dtype="float32")
    lecture = wav(np.resize(samples, 1800 * rate))  # at least 150 clips
    tokens = metric(server, "vllm:generation_tokens_total")
    finished = metric(server, "vllm:request_success_total")
    hung_up = "qwen3_asr_requests_total", 'status="499"'
    gone = metric(server, *hung_up)

    async def leave():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.audio.transcriptions.create(
            model=str(CHECKPOINT), file=lecture, stream=stream, temperature=2.0
        )
        task = asyncio.create_task(answer)
        while await asyncio.to_thread(metric, server, "vllm:generation_tokens_total") == tokens:
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

    asyncio.run(leave())
    eventually(lambda: metric(server, *hung_up) > gone)
    eventually(lambda: not metric(server, "vllm:num_requests_running"))
    decoded = metric(server, "vllm:generation_tokens_total")
    time.sleep(1)
    assert metric(server, "vllm:generation_tokens_total") == decoded
    assert metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "vllm:request_success_total") - finished < 150


def test_short_requests_finish_before_a_long_one(server, hello):
    samples, rate = soundfile.read(HELLO, dtype="float32")
    lecture = wav(np.resize(samples, 1800 * rate))  # at least 150 clips

    async def overtake():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask = partial(client.audio.transcriptions.create, model=str(CHECKPOINT))
        long = asyncio.create_task(ask(file=lecture))
        while not await asyncio.to_thread(metric, server, "vllm:num_requests_running"):
            await asyncio.sleep(0.05)
        texts = [(await ask(file=HELLO)).text for _ in range(3)]
        is_overtaken = not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await client.close()
        return texts, is_overtaken

    assert asyncio.run(overtake()) == ([hello.text] * 3, True)
