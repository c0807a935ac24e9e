# SPDX-License-Identifier: Apache-2.0
"""Requests of a client and its use of the responses, with a real HTTP server in a thread.

``test_offline.py`` asks the real one.
"""

from __future__ import annotations

import base64
import email
import http.server
import io
import json
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from email import policy

import numpy as np
import pytest
import soundfile
from support.checks import eventually

from qwen3_asr_vllm import audio
from qwen3_asr_vllm.corpus import client as remote
from qwen3_asr_vllm.corpus.client import Client
from qwen3_asr_vllm.formats import FORMATS, read_verbose_json, rounded
from qwen3_asr_vllm.options import TranscribeOptions
from qwen3_asr_vllm.pauses import Pauses
from qwen3_asr_vllm.recordings import Recording
from qwen3_asr_vllm.transcript import Segment, Transcript

TRANSCRIPT = Transcript("Hi.", 1.0, (Segment(0.0, 0.5, "Hi.", "English"),), ("loop",))


class Echo(http.server.BaseHTTPRequestHandler):
    """Records each form; is busy at first for a file of "busy", and rejects one of "bad"."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + body, policy=policy.HTTP).iter_parts()
        form = [(p.get_param("name", header="content-disposition"), p.get_content()) for p in parts]
        self.server.forms.append((self.headers, form))
        content = form[-1][1]
        self.server.asked[content] += 1
        if content == b"slow":
            self.server.is_over.wait(60)
        if content == b"busy" and self.server.asked[content] <= self.server.times_busy:
            self.answer(503, {"error": {"message": "later"}}, **self.server.when)
        elif content == b"cut":
            self.close_connection = True
        elif content == b"bad":
            self.answer(400, {"error": {"message": "not audio"}})
        else:
            self.answer(200, json.loads(FORMATS["verbose_json"](TRANSCRIPT)))

    def answer(self, status, document, **headers):
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client has closed the connection
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote, "BUSY_DELAY_S", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.forms, server.asked, server.is_over = [], Counter(), threading.Event()
    server.times_busy, server.when = 2, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.is_over.set()
    server.shutdown()
    server.server_close()


def test_a_form_holds_options_and_the_file(echo, tmp_path):
    (tmp_path / 'a"b.mp3').write_bytes(b"\x00sound\r\n")
    client = Client(echo.url + "/v1", api_key="secret")
    options = {"language": "German", "context": "Ämter", "keywords": ["Ulm", "Maier"]}
    (result,) = client.transcribe([Recording(str(tmp_path / 'a"b.mp3'), "a")], **options)
    assert result.transcript == TRANSCRIPT
    ((headers, form),) = echo.forms
    assert headers["Authorization"] == "Bearer secret"
    assert [name for name, _ in form[:3]] == ["model", "response_format", "language"]
    assert dict(form[:4])["model"].rstrip() == "tiny"
    assert [v for name, v in form if name == "keywords[]"] == ["Ulm", "Maier"]
    assert form[-1] == ("file", b"\x00sound\r\n")


def test_every_option_becomes_a_field(echo):
    options = TranscribeOptions(
        languages=["de", "en"],
        pauses=Pauses(threshold=0.4, silence_s=0.25, padding_s=0.1),
        confidences=True,
        word_timestamps=True,
        audio_track=2,
    )
    assert Client(echo.url).transcribe(b"y", options, context="Ulm") == TRANSCRIPT
    ((_, form),) = echo.forms
    fields = [(name, str(value).strip()) for name, value in form if name != "file"]
    assert fields == [
        ("model", "tiny"),
        ("response_format", "verbose_json"),
        ("prompt", "Ulm"),
        ("languages[]", "de"),
        ("languages[]", "en"),
        ("timestamp_granularities[]", "segment"),
        ("timestamp_granularities[]", "word"),
        ("chunking_strategy[threshold]", "0.4"),
        ("chunking_strategy[silence_duration_ms]", "250"),
        ("chunking_strategy[prefix_padding_ms]", "100"),
        ("audio_track", "2"),
    ]


def test_speakers_become_fields(echo):
    voice = np.full(16_000, 0.1, np.float32)
    options = {"diarize": True, "max_speakers": 3, "known_speakers": {"Ada, née Bea": voice}}
    assert Client(echo.url).transcribe(b"y", **options) == TRANSCRIPT
    ((_, form),) = echo.forms
    fields = {name: str(value).strip() for name, value in form if name != "file"}
    assert fields["diarize"] == "true" and fields["max_speakers"] == "3"
    assert json.loads(fields["known_speaker_names[]"]) == ["Ada, née Bea"]
    sent = base64.b64decode(fields["known_speaker_references[]"])
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(sent), dtype="float32")[0], voice)


def test_bad_options_raise_before_any_request(echo):
    client = Client(echo.url)
    with pytest.raises(ValueError, match="the server cuts clips; set QWEN3_ASR_MAX_CLIP_S there"):
        client.transcribe(b"y", max_clip_s=30)
    with pytest.raises(TypeError, match="unknown option 'lang'; the options are language, "):
        client.transcribe([b"y"], lang="de")
    assert not echo.forms


def test_one_recording_raises_its_error(echo):
    with pytest.raises(ValueError, match="audio: not audio"):
        Client(echo.url).transcribe(b"bad")


def test_waveforms_are_sent_as_wav(echo):
    samples = np.linspace(-0.5, 0.5, 8000, dtype=np.float32)
    for source in (samples, (samples, 8000), io.BytesIO(b"file")):
        Client(echo.url).transcribe(source)
    sent = [form[-1][1] for _, form in echo.forms]
    lengths = [soundfile.info(io.BytesIO(data)).frames for data in sent[:2]]
    assert lengths == [8000, 16_000] and sent[2] == b"file"


def test_results_come_in_order(echo):
    sources = [b"busy", b"x", b"bad", *[b"y"] * 100]
    seen = []
    results = list(Client(echo.url, num_connections=4).transcribe(sources, progress=seen.append))
    assert [r.index for r in results] == list(range(103))
    assert [r.index for r in results if r.error] == [2]
    assert "not audio" in str(results[2].error)
    assert echo.asked[b"busy"] == 3 and echo.asked[b"bad"] == 1
    assert (seen[-1].recordings_done, seen[-1].seconds_done) == (103, 102)


def test_unordered_results_come_once(echo):
    results = Client(echo.url, model="m").transcribe([b"busy", *[b"y"] * 50], in_order=False)
    assert sorted(r.index for r in results) == list(range(51))


def test_standard_input_is_sent_again(echo, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"busy")))
    (result,) = Client(echo.url).transcribe([Recording("-", "stdin")])
    assert result.transcript == TRANSCRIPT and echo.asked == {b"busy": 3}


def test_retry_after_is_respected(echo):
    echo.when = {"Retry_After": "0.5"}
    start = time.monotonic()
    (result,) = Client(echo.url).transcribe([b"busy"])
    assert result.transcript == TRANSCRIPT and 1 <= time.monotonic() - start < 30


@pytest.mark.parametrize("stated", [None, "Wed, 21 Oct 2026 07:28:00 GMT", "nan", "-1", "0"])
def test_bad_retry_after_counts_as_missing(stated):
    assert remote._retry_after_s(stated) == remote.BUSY_DELAY_S
    assert remote._retry_after_s("86400") == 60


def test_busy_servers_get_more_retries(echo):
    echo.times_busy = 30
    busy, cut, other = Client(echo.url).transcribe([b"busy", b"cut", b"y"])
    assert busy.transcript == other.transcript == TRANSCRIPT
    assert "closed connection" in str(cut.error)
    assert echo.asked == {b"busy": 31, b"cut": 4, b"y": 1}


def test_a_server_always_busy_ends_the_run(echo):
    echo.times_busy = 10**6
    results = Client(echo.url, most_busy_s=0.2).transcribe([b"busy"] * 100)
    with pytest.raises(ConnectionError, match="busy for too long: later"):
        list(results)


def test_on_busy_is_called_once_per_response(echo, monkeypatch):
    monkeypatch.setattr(remote, "REPORT_BUSY_S", 0.05)
    echo.times_busy, reported = 20, []

    def sources():
        for _ in range(2):
            yield b"busy"
            eventually(lambda: echo.asked[b"busy"] > 20)  # and it was answered
            echo.asked.clear()

    client = Client(echo.url, on_busy=reported.append, num_connections=4)
    results = client.transcribe(sources())
    assert [result.transcript for result in results] == [TRANSCRIPT] * 2
    assert reported == [f"{echo.url} is busy; retrying: later"] * 2


def test_a_dead_server_ends_the_run(echo):
    read = 0

    def sources():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"y"

    with socket.socket() as silent:  # bound, not listening
        silent.bind(("127.0.0.1", 0))
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", model="m", num_connections=2)
        with pytest.raises(ConnectionError, match="is unreachable"):
            list(client.transcribe(sources()))
    assert read < 20


def test_sources_may_wait_for_results(echo):
    first_is_out = threading.Event()

    def sources():
        yield b"y"
        yield b"y" if first_is_out.wait(60) else b"bad"

    results = Client(echo.url).transcribe(sources())
    assert next(results).transcript == TRANSCRIPT
    first_is_out.set()
    assert [result.transcript for result in results] == [TRANSCRIPT]


def test_errors_of_the_sources_are_raised(echo):
    def sources():
        yield b"y"
        raise RuntimeError("the list ended early")

    with pytest.raises(RuntimeError, match="ended early"):
        list(Client(echo.url).transcribe(sources()))


def test_closing_the_results_cancels_requests(echo):
    results = Client(echo.url).transcribe([b"y", *[b"slow"] * 8], in_order=False)
    assert next(results).transcript == TRANSCRIPT
    eventually(lambda: echo.asked[b"slow"] == 8)
    results.close()
    eventually(lambda: not [t for t in threading.enumerate() if "transcribe" in t.name], seconds=30)


def test_a_closed_run_leaves_other_runs_alone(echo):
    client = Client(echo.url, num_connections=1)
    first, second = (client.transcribe([b"y"] * 3) for _ in range(2))
    assert next(first).transcript == next(second).transcript == TRANSCRIPT
    first.close()
    assert [result.transcript for result in second] == [TRANSCRIPT] * 2
    assert json.loads(client.get("/v1/models"))["data"]


def test_parts_are_sent_as_samples(echo, tmp_path, monkeypatch):
    samples = np.linspace(-0.5, 0.5, 16_000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    part = Recording(str(tmp_path / "a.wav"), "a", offset_s=0.25, duration_s=0.5)
    decoded, load_audio = [], audio.load_audio
    monkeypatch.setattr(
        audio, "load_audio", lambda path, **kw: decoded.append(path) or load_audio(path, **kw)
    )
    list(Client(echo.url).transcribe([part] * 100, audio_track=1))
    assert len(decoded) == 1
    assert "audio_track" not in dict(echo.forms[0][1])  # the samples are of that track
    (tmp_path / "sent.wav").write_bytes(echo.forms[0][1][-1][1])
    sent, rate = soundfile.read(tmp_path / "sent.wav", dtype="float32")
    assert rate == 16_000 and np.array_equal(sent, samples[4000:12_000])


def test_bad_urls_are_rejected_at_once(echo):
    for url in ("ftp://h.test", "file:///etc", "http://"):
        with pytest.raises(ValueError, match="http"):
            Client(url)
    with pytest.raises(ConnectionError, match="the server at http://127.0.0.1:1 is unreachable"):
        Client("http://127.0.0.1:1")


@pytest.mark.parametrize("words", [False, True])
def test_transcripts_survive_verbose_json(words):
    from qwen3_asr_vllm.transcript import Word

    timed = (Word("Hi.", 1 / 3, 0.5),) if words else None
    segments = (
        Segment(1 / 3, 0.5, "Hi.", "English", 0.987654, 0.1, -0.123456, timed),
        Segment(0.5, 2 / 3, " 你好。", "Chinese", None, 0.2, -0.2),
        Segment(2 / 3, 0.9, " Hm.", None, None, 0.2, -0.2),
    )
    transcript = Transcript("Hi. 你好。 Hm.", 1.23456, segments, ("loop",))
    read = read_verbose_json(json.loads(FORMATS["verbose_json"](transcript)))
    assert read == rounded(transcript)
    for name, write in FORMATS.items():
        assert write(read) == write(rounded(transcript)), name


def test_responses_of_other_servers_are_read():
    read = read_verbose_json({"text": "Hallo.", "language": "german", "duration": 2})
    assert read == Transcript("Hallo.", 2.0, (Segment(0, 2.0, "Hallo.", "German"),))
    with pytest.raises(ValueError, match="no verbose_json"):
        read_verbose_json({"error": "x"})
