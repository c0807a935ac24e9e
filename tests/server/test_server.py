# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve`` on the tiny checkpoint, through OpenAI's client."""

from __future__ import annotations

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jiwer
import numpy as np
import openai
import pytest
import soundfile
from support.audio import DATA, HOSTILE, heldout, poisoned, wav, wav_bytes
from support.checkpoints import CHECKPOINT
from support.checks import MOST_ERRORS, error_rate
from support.clients import speak

import qwen3_asr_vllm
from qwen3_asr_vllm.languages import LANGUAGES

pytestmark = pytest.mark.vllm

HELLO = DATA / "hello.flac"


def transcribe(client, file, **fields):
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


@pytest.fixture(scope="module")
def hello(client):
    return transcribe(client, HELLO).text


def test_one_log_line_names_the_model(server):
    line = f"Qwen3-ASR is served by the plugin qwen3_asr_vllm {qwen3_asr_vllm.__version__}."
    assert server.log.read_text().count(line) == 1


def test_one_log_line_names_routes_and_limits(server):
    lines = [line for line in server.log.read_text().splitlines() if "page at /" in line]
    assert len(lines) == 1
    for words in (
        "INFO",
        "/v1/audio/transcriptions",
        "reads wav, flac, mp3, ogg, opus, ",
        ", m4a, mp4, ",
        ", webm, ",
        "libsndfile 1.",
        "FFmpeg through PyAV",
        "1024 MiB",
        "14400 s in a recording",
        "12 s in a clip",
        "aligner: none",
    ):
        assert words in lines[0]


def test_local_checkpoints_need_no_network(server, hello):
    """The server's processes note every address that they look up or connect to."""
    asked = set(server.addresses.read_text().split())
    assert "localhost" in asked  # the note-taking works
    assert asked <= {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


def test_a_recording_is_transcribed(hello):
    expected = HELLO.with_suffix(".txt").read_text().strip()
    assert jiwer.wer(expected.lower(), hello.lower()) < 0.05
    assert "<" not in hello and "language" not in hello


def test_heldout_error_rates(client):
    """Sentences that training never saw, half of them in unseen voices."""
    rows = heldout()
    answers = [transcribe(client, DATA / "heldout" / row["audio_filepath"]).text for row in rows]
    for language, most in MOST_ERRORS.items():
        assert error_rate(rows, answers, language) < most, language


def test_silence_is_no_text(client):
    assert transcribe(client, wav(np.zeros(32_000, np.float32))).text == ""


def test_chunks_in_vllms_dialect_join(client, hello):
    deltas, finishes = [], 0
    with client.audio.transcriptions.with_streaming_response.create(
        model=str(CHECKPOINT), file=HELLO, stream=True
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    deltas.append(choice["delta"].get("content") or "")
                    finishes += choice.get("finish_reason") is not None
    assert len(deltas) > 3
    assert "".join(deltas) == hello
    assert finishes == 1


@pytest.mark.parametrize("language", ["en", "EN", "English", "en-US", "eng", "", "auto"])
def test_a_language_is_taken_in_any_spelling(client, hello, language):
    assert transcribe(client, HELLO, language=language).text == hello


@pytest.mark.parametrize("language", ["fil", "tl", "yue", "zh-TW", "Macedonian"])
def test_languages_unknown_to_in_tree_are_forced(client, language):
    """V2: "fil" is refused, "tl" and "yue" go wrong, "zh-TW" and names are refused."""
    assert isinstance(transcribe(client, HELLO, language=language).text, str)


@pytest.mark.parametrize("language", ["tlh", "cy", "ur", "sw", "af"])
def test_an_unknown_language_lists_the_known_ones(client, language):
    """V2: in-tree takes 29 languages that the model never learnt, without a word."""
    with pytest.raises(openai.BadRequestError) as error:
        transcribe(client, HELLO, language=language)
    for code, name in LANGUAGES.items():
        assert code in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full(16_000, np.nan, np.float32), "NaN"),
        (np.zeros(0, np.float32), "empty"),
    ],
)
def test_bad_audio_is_a_bad_request(client, samples, message):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(openai.BadRequestError, match=message):
        transcribe(client, ("audio.wav", file.getvalue()))


def chat(audio):
    part = {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
    return {"model": str(CHECKPOINT), "messages": [{"role": "user", "content": [part]}]}


def test_hostile_samples_change_no_later_answer(client, server):
    """In forms, chats and /invocations; full scale is as loud as a realtime session can be."""
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout() if row["text"]][:30]

    def answers():
        with ThreadPoolExecutor(8) as pool:
            return [answer.text for answer in pool.map(lambda p: transcribe(client, p), paths)]

    before = answers()
    speech, _ = soundfile.read(paths[0], dtype="float32")
    for value in HOSTILE:
        data = wav_bytes(poisoned(speech, value), subtype="FLOAT")
        body = chat(base64.b64encode(data).decode())
        refusals = [
            httpx.post(f"{server.url}{route}", json=body, timeout=60)
            for route in ("/v1/chat/completions", "/invocations")
        ]
        if abs(value) != 1e4:  # an integer may be as large, and is scaled
            file = {"file": ("a.wav", data)}
            refusals.append(httpx.post(f"{server.url}/v1/audio/transcriptions", files=file))
        for refusal in refusals:
            assert refusal.status_code == 400
            assert f"{value:g} at " in refusal.json()["error"]["message"]
    speak(client, np.sign(speech))
    assert answers() == before


def test_a_scaled_upload_has_a_warning(client, hello):
    samples, _ = soundfile.read(HELLO, dtype="float32")
    samples /= np.abs(samples).max()
    answer = transcribe(client, ("a.wav", wav_bytes(32_768 * samples, subtype="FLOAT")))
    assert answer.text == transcribe(client, ("a.wav", wav_bytes(samples, subtype="FLOAT"))).text
    assert "peaks at " in answer.model_extra["warnings"][0]


def test_other_data_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError, match="not audio"):
        transcribe(client, ("notes.wav", b"these are words, not sounds" * 100))


def test_very_short_clips_are_padded(client):
    """V13: in-tree finds no frame in 10 ms, and refuses them."""
    assert isinstance(transcribe(client, wav(np.full(160, 0.01, np.float32))).text, str)


def test_long_recordings_are_transcribed_whole(client):
    """88 s in three languages; this server's clips hold 12 s."""
    path = DATA / "three_languages.flac"
    expected = path.with_suffix(".txt").read_text()
    text = transcribe(client, path).text
    assert jiwer.cer(re.sub(r"\s+", "", expected), re.sub(r"\s+", "", text)) < 0.08


def test_twenty_minutes_in_one_clip_are_accepted(client):
    """V12: in-tree sizes its encoder budget for 30 s."""
    samples, rate = soundfile.read(HELLO, dtype="float32")
    assert rate == 16_000
    clip = np.resize(samples, 1199 * rate)
    audio = base64.b64encode(wav(clip)[1]).decode()
    part = {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
    answer = client.chat.completions.create(
        model=str(CHECKPOINT),
        messages=[{"role": "user", "content": [part]}],
        max_tokens=8,
        temperature=0,
    )
    assert answer.usage.prompt_tokens > 13 * 1199


def test_prompts_are_as_long_as_chats(client):
    """V1: in-tree leaves the empty system turn out, which the chat template writes."""
    audio = base64.b64encode(wav(*soundfile.read(HELLO))[1]).decode()
    part = {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
    message = {"role": "user", "content": [part]}
    chat = client.chat.completions.create(model=str(CHECKPOINT), messages=[message], max_tokens=1)
    assert prompt_tokens(client) == chat.usage.prompt_tokens


def test_hotwords_reach_the_model(client):
    """V8: in-tree takes the field and never reads it."""
    words = prompt_tokens(client, extra_body={"hotwords": "Ada, Grace Hopper"})
    assert words == prompt_tokens(client, prompt="Ada, Grace Hopper") > prompt_tokens(client)


def prompt_tokens(client, **fields):
    fields = {"extra_body": {}} | fields
    fields["extra_body"] |= {"stream_include_usage": True}
    *_, done = transcribe(client, HELLO, stream=True, **fields)
    return done.usage.prompt_tokens


def test_chinese_clips_are_joined_without_a_space(client):
    """V4: in-tree joins by the language that was asked for; where none was, with a space."""
    rows = [row for row in heldout() if row["language"] == "Chinese"][:14]
    paths = [DATA / "heldout" / row["audio_filepath"] for row in rows]
    clips = [soundfile.read(path, dtype="float32")[0] for path in paths]
    quiet = np.zeros(8_000, np.float32)
    answer = transcribe(client, wav(np.concatenate([x for clip in clips for x in (clip, quiet)])))
    assert answer.usage.seconds > 32 and len(answer.text) > 10  # in-tree cuts after 30
    assert not re.search(r"[\u4e00-\u9fff。，？！] +[\u4e00-\u9fff]", answer.text)


def test_fifteen_minutes_of_29_mb_are_accepted(client):
    """V10: in-tree takes 10 minutes and 25 MB."""
    answer = transcribe(client, wav(np.zeros(900 * 16_000, np.float32)))
    assert (answer.text, answer.usage.seconds) == ("", 900)


@pytest.mark.parametrize("kind", ["input_audio", "audio_url"])
def test_chat_transcribes_audio(client, hello, kind):
    audio = base64.b64encode(wav(*soundfile.read(HELLO))[1]).decode()
    part = {
        "input_audio": {"data": audio, "format": "wav"},
        "audio_url": {"url": f"data:audio/wav;base64,{audio}"},
    }[kind]
    answer = client.chat.completions.create(
        model=str(CHECKPOINT),
        messages=[{"role": "user", "content": [{"type": kind, kind: part}]}],
        temperature=0,
    )
    assert answer.choices[0].message.content == f"language English<asr_text>{hello}"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # openai, of its own method
def test_translation_is_refused(client):
    """V20: in-tree serves a route for what the model cannot do."""
    with pytest.raises(openai.BadRequestError, match="does not translate"):
        client.audio.translations.create(model=str(CHECKPOINT), file=HELLO)
