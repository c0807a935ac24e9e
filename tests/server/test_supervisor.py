# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve ASR --aligner ALIGNER``: two real servers, asked for words."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import psutil
import pytest
import soundfile
import srt
import uvicorn
from fuzzing.forms import ask_aligner
from fuzzing.outcomes import at_once
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.responses import Response
from support.audio import DATA, by_voice, dialogue, heldout, noise, wav, wav_bytes
from support.checkpoints import ALIGNER, CHECKPOINT
from support.checks import assert_timed, eventually
from support.clients import speak
from support.servers import reserved_port, serving
from websockets.sync.client import connect

from qwen3_asr_vllm.formats import rounded, word_row
from qwen3_asr_vllm.server import serving as serving_state
from qwen3_asr_vllm.server import supervisor
from qwen3_asr_vllm.server.supervisor import plan

HELLO = DATA / "hello.flac"
HAS_VOICES = find_spec("resemblyzer") is not None
DIARIZER = "support.voices:diarize" if HAS_VOICES else "support.audio:dialogue_turns"
BOTH = ["asr", "--aligner", "aligner", "--port", "8000"]


# ---- what is started ----


def test_two_command_lines_are_made_of_one():
    made = plan([*BOTH, "--aligner-options", "--dtype float32"], gpu_bytes=None, port=81)
    assert made.transcriber == ["asr", "--port", "8000"]
    host = ["--host", "127.0.0.1", "--port", "81"]
    assert made.aligner[:5] == ["aligner", *host]
    assert made.aligner[-2:] == ["--dtype", "float32"]
    assert made.url == "http://127.0.0.1:81"


def test_a_diarizer_is_a_third_server():
    made = plan([*BOTH, "--diarizer", "of:me"], gpu_bytes=None, port=81, diarizer_port=82)
    assert made.transcriber == ["asr", "--port", "8000"]
    assert made.diarizer == ["--diarizer", "of:me", "--port", "82"]
    assert made.diarizer_url == "http://127.0.0.1:82"
    alone = plan(["asr", "--diarizer=of:me"], gpu_bytes=80 << 30, port=81, diarizer_port=82)
    assert alone.aligner is None
    assert alone.transcriber == ["asr", "--gpu-memory-utilization", f"{0.9 - 4 / 80:.3f}"]


def test_a_diarizer_that_cannot_start_ends_all(monkeypatch, signals):
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    made = plan(["asr", "--diarizer", "no:such"], gpu_bytes=None, port=1, diarizer_port=2)
    start, started = supervisor._start, []

    def note(argv, environment):
        started.append(argv)
        return start(argv, environment)

    monkeypatch.setattr(supervisor, "_start", note)
    assert supervisor.Supervisor(made).run() == 1
    assert started == [made.diarizer]


@pytest.mark.parametrize(("given", "both"), [([], 0.9), (["--gpu-memory-utilization=0.5"], 0.5)])
def test_a_gpu_is_shared(given, both):
    made = plan([*BOTH, *given], gpu_bytes=80 << 30, port=81)
    shares = [
        float(command[command.index("--gpu-memory-utilization") + 1])
        for command in (made.aligner, made.transcriber)
    ]
    assert shares == pytest.approx([6 / 80, both - 6 / 80])


def test_an_aligner_that_cannot_start_ends_both(monkeypatch, signals):
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    made = plan(["asr", "--aligner", "/no/such/aligner"], gpu_bytes=None, port=1)
    started = []

    def false(argv, environment):
        started.append(argv)
        return subprocess.Popen(["false"], start_new_session=True)

    monkeypatch.setattr(supervisor, "_start", false)
    assert supervisor.Supervisor(made).run() == 1
    assert started == [made.aligner]


LISTENS = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[1]))):
    time.sleep(60)
"""


@pytest.fixture
def signals():
    """Handlers that a supervisor changes are restored."""
    handlers = [signal.getsignal(number) for number in supervisor.SIGNALS]
    yield
    for number, handler in zip(supervisor.SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def supervise(monkeypatch, argv, *commands):
    """Run a supervisor of one server whose starts run these commands; its code, and processes."""
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    started, commands = [], list(commands)

    def start(argv, environment):
        started.append(subprocess.Popen(commands.pop(0), start_new_session=True))
        return started[-1]

    monkeypatch.setattr(supervisor, "_start", start)
    return supervisor.Supervisor(supervisor.Plan(argv)), started


def test_several_engines_restart_once_ready(monkeypatch, signals):
    with reserved_port() as port:
        argv = ["asr", "--engines-per-gpu=2", "--port", str(port)]
        listen = [sys.executable, "-c", LISTENS, str(port)]
        made, started = supervise(monkeypatch, argv, listen, ["false"], listen)

        def kill_and_stop():
            eventually(lambda: made._is_kept)
            started[0].kill()
            eventually(lambda: len(started) == 3 and supervisor._accepts(argv))
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=kill_and_stop)
        thread.start()
        assert made.run() == 0
        thread.join()
    assert [process.returncode for process in started] == [-9, 1, -15]


@pytest.mark.parametrize("argv", [["asr"], ["asr", "--engines-per-gpu", "2"]])
def test_a_start_that_fails_is_not_repeated(monkeypatch, signals, argv):
    with reserved_port() as port:  # on which nothing listens
        made, started = supervise(monkeypatch, [*argv, "--port", str(port)], ["false"])
        assert made.run() == 1
    assert len(started) == 1


@pytest.mark.parametrize(
    ("argv", "is_so"),
    [
        ([], False),
        (["--engines-per-gpu", "1"], False),
        (["--engines_per_gpu=2"], True),
        (["--engines-per-gpu", "two"], False),  # vLLM's parser refuses it
        (["--config={}"], True),
        (["--config={}", "--engines-per-gpu=1"], False),
    ],
)
def test_engines_are_counted_in_either_place(tmp_path, argv, is_so):
    config = tmp_path / "config.yaml"
    config.write_text("engines_per_gpu: 2  # the GPU is large\nport: 8000\n")
    given = ["asr", *(arg.format(config) for arg in argv)]
    assert supervisor.has_several_engines(given) is is_so


def test_a_unix_socket_shows_readiness(tmp_path):
    argv = ["asr", "--uds", str(tmp_path / "socket")]
    assert not supervisor._accepts(argv)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(argv[-1])
        assert not supervisor._accepts(argv)  # as vLLM's while its engines load
        server.listen()
        assert supervisor._accepts(argv)


SUPERVISES_STAND_INS = """
import sys
from qwen3_asr_vllm.server import supervisor

supervisor._is_healthy = lambda url: True
supervisor.sys.executable = sys.argv[1]
supervisor.GRACE_S = 1.0
aligner = [] if sys.argv[2] == "2" else None
sys.exit(supervisor.Supervisor(supervisor.Plan([], aligner)).run())
"""
# A server that ignores what vLLM's does while it starts, and an engine that it has spawned.
LIVES = """#!{}
import os, signal, time
from multiprocessing import get_context
from qwen3_asr_vllm.processes import end_group_with_supervisor, end_with_parent

def engine():
    end_with_parent()
    os.write(1, b"An engine lives.\\n")
    time.sleep(60)
    os.write(1, b"It lives on.\\n")

if __name__ == "__main__":
    end_group_with_supervisor()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    get_context("fork").Process(target=engine).start()
    time.sleep(60)
"""


@contextmanager
def supervised(folder, *before, servers=1):
    """A supervisor of servers whose engines live; its stdout ends when all of them have."""
    server = folder / "server"
    server.write_text(LIVES.format(sys.executable))
    server.chmod(0o755)
    command = [*before, sys.executable, "-c", SUPERVISES_STAND_INS, str(server), str(servers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(servers):
            assert process.stdout.readline() == b"An engine lives.\n"
        yield process
        if process.poll() is None:
            process.terminate()


@pytest.mark.parametrize(
    ("number", "servers"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGHUP, 2), (signal.SIGKILL, 2)],
)
def test_stubborn_servers_end_with_their_engines(tmp_path, number, servers):
    with supervised(tmp_path, servers=servers) as process:
        process.send_signal(number)
        assert process.stdout.read() == b""
        assert process.wait() == (-number if number == signal.SIGKILL else 0)


def test_a_killed_server_takes_its_engine_along(tmp_path):
    with supervised(tmp_path) as process:
        (server,) = psutil.Process(process.pid).children()
        server.kill()
        assert process.stdout.read() == b""
        assert process.wait() == 128 + signal.SIGKILL


def test_a_closed_terminal_ends_nothing_under_nohup(tmp_path):
    with supervised(tmp_path, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)


@pytest.mark.parametrize(
    ("argv", "seconds"),
    [
        ([], 0),
        (["--shutdown-timeout", "100"], 100),
        (["--shutdown_timeout=7", "--config", "{}"], 7),
        (["--config={}"], 30),
        (["--config", "no-such-file"], 0),
    ],
)
def test_servers_get_their_shutdown_timeout(tmp_path, argv, seconds):
    config = tmp_path / "config.yaml"
    config.write_text("port: 8000\nshutdown-timeout: 30\n")
    given = [arg.format(config) for arg in ["asr", "--port", "1", *argv]]
    assert supervisor.shutdown_timeout_s(given) == seconds


def test_half_an_upload_delays_no_end(monkeypatch):
    monkeypatch.setattr(serving_state, "POLL_S", 0.01)
    monkeypatch.setattr(serving_state, "CLOSE_S", 1)

    async def read(request):
        return Response(await request.body())

    app = Starlette()
    app.add_route("/", read, methods=["POST"])
    app.state.server = server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))

    async def serve(listener):
        watch = serving_state.fail_pending_requests(SimpleNamespace(errored=False), app.state)
        watching = asyncio.create_task(watch)
        await server.serve(sockets=[listener])
        watching.cancel()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)))
        thread.start()
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf")
            eventually(lambda: server.server_state.tasks)
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


# ---- both, for real ----


@pytest.fixture(scope="module")
def spans():
    """The spans of the engines, from an OpenTelemetry collector."""
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                received.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield SimpleNamespace(port=collector.server_port, received=received)
        collector.shutdown()


@pytest.fixture(scope="module")
def pair(tmp_path_factory, spans):
    traces = f"--otlp-traces-endpoint http://127.0.0.1:{spans.port}/v1/traces"
    aligner = f"--aligner-options=--dtype float32 --enforce-eager {traces}"
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    options = ["--aligner", str(ALIGNER), aligner, "--diarizer", DIARIZER, *traces.split()]
    env["PYTHONPATH"] = str(DATA.parent)  # of the diarizer
    folder = tmp_path_factory.mktemp("pair")
    with serving(folder, *options, **env) as made:
        yield made


def diarized(url, **fields):
    """The dialogue of four voices, diarized by a server."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    fields |= {"model": str(CHECKPOINT), "response_format": "diarized_json"}
    return client.audio.transcriptions.create(file=wav(dialogue()[0]), **fields)


@pytest.mark.vllm
def test_four_voices_of_one_channel(pair):
    found = diarized(pair.url, extra_body={"num_speakers": 4})
    assert len(set(by_voice(found.segments).values())) == 4
    assert "".join(segment.text for segment in found.segments) == found.text


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VOICES, reason="the weights of Resemblyzer are in its package")
def test_known_voices_of_a_real_library(pair):
    waveform, turns = dialogue()
    voices = {voice: (start, end) for start, end, voice, _ in turns[:4]}
    references = [
        "data:audio/wav;base64,"
        + base64.b64encode(wav_bytes(waveform[int(16e3 * a) : int(16e3 * b)])).decode()
        for a, b in voices.values()
    ]
    known = {"known_speaker_names": list(voices), "known_speaker_references": references}
    events = list(diarized(pair.url, stream=True, **known))
    segments = [event for event in events if event.type == "transcript.text.segment"]
    assert by_voice(segments) == {voice: voice for voice in voices}


@pytest.mark.vllm
def test_a_killed_diarizer_is_started_again(pair):
    url = re.search(r"diarizer is ready at (\S+);", pair.log.read_text())[1]
    port = int(url.rpartition(":")[2])
    (diarizer,) = (
        process
        for process in psutil.Process(pair.process.pid).children(recursive=True)
        if ["--diarizer", DIARIZER, "--port", str(port)] == process.cmdline()[-4:]
    )
    diarizer.kill()
    psutil.wait_procs([diarizer])
    with pytest.raises(openai.InternalServerError, match="diarizer at .* does not answer"):
        diarized(pair.url, extra_body={"num_speakers": 4})
    assert httpx.post(
        f"{pair.url}/v1/audio/transcriptions", files={"file": HELLO.read_bytes()}, timeout=60
    ).json()["text"]
    eventually(lambda: supervisor._is_healthy(url))


@pytest.fixture(scope="module")
def minutes():
    """More than three of them, in three languages: every spoken clip that training never saw."""
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout() if row["text"]]
    parts = [soundfile.read(path, dtype="float32") for path in paths]
    pause = np.zeros(8_000, np.float32)
    recording = np.concatenate([part for samples, _ in parts for part in (samples, pause)])
    assert len(recording) > 3 * 60 * 16_000
    return recording


@pytest.fixture(scope="module")
def minutes_on_disk(minutes, tmp_path_factory):
    path = tmp_path_factory.mktemp("minutes") / "minutes.wav"
    soundfile.write(path, minutes, 16_000, subtype="FLOAT")
    return path


def ask(server, file=HELLO, **fields):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    fields = {"response_format": "verbose_json"} | fields
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


def ask_words(server, file=HELLO, **fields):
    return ask(server, file, timestamp_granularities=["word", "segment"], **fields)


def aligner_url(server):
    return re.search(r"aligner is ready at (\S+);", server.log.read_text())[1]


@pytest.mark.vllm
def test_sessions_time_words_as_spoken(pair):
    """Its times are espeak-ng's own, after a second of silence; the server finds the turn."""
    row = json.loads((DATA / "timed" / "manifest.jsonl").read_text().splitlines()[0])
    samples = soundfile.read(DATA / "timed" / row["audio_filepath"], dtype="float32")[0]
    audio = {"format": {"type": "audio/pcm", "rate": 16_000}}
    include = ["item.input_audio_transcription.words"]
    pcm = (32_767 * np.pad(samples, (16_000, 16_000))).astype("<i2").tobytes()
    words, text = [], None
    with connect(pair.url.replace("http", "ws") + "/v1/realtime", open_timeout=300) as socket:
        for event in (
            {"type": "session.update", "session": {"audio": {"input": audio}, "include": include}},
            {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()},
        ):
            socket.send(json.dumps(event))
        while text is None or "".join(word["word"] for word in words) != text:
            event = json.loads(socket.recv(120))
            assert "error" not in event, event
            words += event.get("words", [])
            text = event.get("transcript", text)
    assert text == row["text"]
    for word, (_, start, end) in zip(words, row["words"], strict=True):
        assert (word["start"], word["end"]) == pytest.approx((1 + start, 1 + end), abs=0.2)


@pytest.mark.vllm
def test_words_over_http_tile_the_text(pair):
    answer = ask_words(pair)
    assert "".join(word.word for word in answer.words) == answer.text
    assert "".join(segment.text for segment in answer.segments) == answer.text
    words = list(answer.words)
    for segment in answer.segments:
        text = ""
        assert segment.start == words[0].start
        while text != segment.text:
            word = words.pop(0)
            text += word.word
        assert segment.end == word.end <= answer.duration
    assert not words
    assert all(a.start < a.end <= b.start < b.end for a, b in pairwise(answer.words))


@pytest.mark.vllm
def test_http_and_offline_words_are_equal(pair, model, minutes, minutes_on_disk):
    served = ask_words(pair, minutes_on_disk)
    offline = rounded(model.transcribe(minutes, max_clip_s=12, word_timestamps=True))
    assert_timed(offline)
    assert served.text == offline.text
    assert {segment.language for segment in offline.segments} >= {"English", "German", "Chinese"}
    assert [(w.word, w.start, w.end) for w in served.words] == [
        (w.word, w.start, w.end) for w in offline.words
    ]
    assert [(s.start, s.end) for s in served.segments] == [
        (s.start, s.end) for s in offline.segments
    ]


@pytest.mark.vllm
def test_http_and_offline_alignments_are_equal(pair, model, minutes, minutes_on_disk):
    """More of it than one request of the aligner holds."""
    text = " ".join(row["text"] for row in heldout() if row["text"])
    with minutes_on_disk.open("rb") as file:
        url = f"{aligner_url(pair)}/v1/audio/alignments"
        served = httpx.post(url, files={"file": file}, data={"text": text}, timeout=600).json()
    offline = rounded(model.align(minutes, text))
    assert_timed(offline)
    assert served["text"] == offline.text == text
    assert served["words"] == list(map(word_row, offline.words))
    assert [(s["start"], s["end"], s["text"]) for s in served["segments"]] == [
        (s.start, s.end, s.text) for s in offline.segments
    ]


@pytest.mark.vllm
def test_subtitles_begin_with_their_first_word(pair):
    first = ask_words(pair).words[0]
    cue = next(srt.parse(ask(pair, response_format="srt")))
    assert cue.start.total_seconds() == pytest.approx(first.start, abs=0.001)
    vtt = ask(pair, response_format="vtt")
    assert vtt.startswith(f"WEBVTT\n\n00:00:{first.start:06.3f} --> ")


@pytest.mark.vllm
def test_segments_have_words_only_on_request(pair):
    answer = ask(pair)
    assert answer.words is None
    assert [s.start for s in answer.segments] == [s.start for s in ask_words(pair).segments]


@pytest.mark.vllm
def test_the_aligner_answers_users_too(pair):
    text = HELLO.with_suffix(".txt").read_text()
    answer = httpx.post(
        f"{aligner_url(pair)}/v1/audio/alignments",
        files={"file": HELLO.read_bytes()},
        data={"text": text, "language": "en"},
        timeout=60,
    ).json()
    assert "".join(word["word"] for word in answer["words"]) == answer["text"] == text.strip()
    assert answer["words"][-1]["end"] <= answer["duration"]


@pytest.mark.vllm
def test_the_aligner_refuses_other_data(pair):
    url = f"{aligner_url(pair)}/v1/audio/alignments"
    answer = httpx.post(url, files={"file": b"words" * 99}, data={"text": "a"}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"


@pytest.mark.vllm
def test_odd_forms_get_answers_or_error_objects(pair):
    """The cases are those of ``benchmarks/robustness/fuzz.py``."""
    outcomes = list(at_once(ask_aligner, aligner_url(pair), range(60)))
    assert [outcome for outcome in outcomes if outcome.broken] == []
    assert 10 < sum(outcome.answer.startswith("200") for outcome in outcomes) < 50


@pytest.mark.vllm
def test_traces_reach_both_engines(pair, spans):
    trace, session = secrets.token_hex(16), secrets.token_hex(16)
    parents = [{"traceparent": f"00-{name}-{'1' * 16}-01"} for name in (trace, session)]
    ask_words(pair, extra_headers=parents[0])
    client = openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)
    speak(client, noise(0.5), extra_headers=parents[1])

    def traced():
        """Of each request that was traced: which trace it belongs to, and what kind it is."""
        return {
            (span.trace_id.hex(), attribute.value.string_value.partition("-")[0])
            for span in spans.received
            for attribute in span.attributes
            if attribute.key == "gen_ai.request.id"
        }

    eventually(lambda: traced() >= {(trace, "transcribe"), (trace, "time"), (session, "realtime")})


@pytest.mark.vllm
def test_killed_aligners_restart_and_end_on_signals(pair, minutes, tmp_path):
    """The last test of this module: it stops the servers."""
    aligner, transcriber = servers_of(pair.process.pid)
    os.kill(aligner, signal.SIGKILL)
    with pytest.raises(openai.InternalServerError) as error:
        for _ in range(50):
            ask_words(pair)
    assert error.value.status_code == 503 and error.value.code == "aligner_unavailable"
    assert ask(pair, response_format="json").text
    assert "no words are timed" not in str(ask(pair))
    eventually(lambda: has_words(pair))
    again, same = servers_of(pair.process.pid)
    assert again != aligner and same == transcriber
    path = tmp_path / "half_an_hour.flac"  # which no machine transcribes in the time to stop it
    soundfile.write(path, np.tile(minutes, 10), 16_000)
    with ThreadPoolExecutor(4) as pool:
        endings = [pool.submit(ending, pair, path, stream=s) for s in (True, False) * 2]
        eventually(lambda: is_decoding(pair))
        pair.process.terminate()
        assert {future.result() for future in endings} <= {"engine_dead", "stopping"}
    assert pair.process.wait(300) == 0
    assert not living({again, transcriber})


def ending(server, file, *, stream):
    """The text of a response, or the error that ended it."""
    try:
        return str(list(ask(server, file, response_format="json", stream=stream)))
    except openai.APIError as error:
        return error.code or repr(error)


def is_decoding(server):
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return re.search(r"^vllm:num_requests_running\{.*\} [1-9]", text, re.M)


def has_words(server):
    try:
        return bool(ask_words(server).words)
    except openai.InternalServerError as error:
        assert error.code == "aligner_unavailable"
        return False


def living(groups):
    """Processes of these groups that run; a dead one is listed until its parent looks at it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) in groups and state != "Z":
            found.append(path)
    return found


def servers_of(pid):
    """The two engines' servers that a supervisor started: the aligner, the transcriber."""
    children = psutil.Process(pid).children()
    servers = [each for each in children if "--diarizer" not in each.cmdline()]
    return [each.pid for each in sorted(servers, key=lambda s: str(ALIGNER) not in s.cmdline())]
