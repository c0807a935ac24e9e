# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr doctor --server``: on the real server, on another one, and on none."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm import __version__
from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.cli import probe


def ask(url, capsys):
    """The exit code, and what was found by name, without the problems; and the problems."""
    code = cli.main(["doctor", "--server", url])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    found = {"ok": {}, "PROBLEM": {}}
    for verdict, rest in lines:
        name, _, what = rest.partition(": ")
        found[verdict][name] = what
    return code, found["ok"], found["PROBLEM"]


@pytest.fixture
def other():
    """A server that is alive and knows nothing."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as made:
        Thread(target=made.serve_forever).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


@pytest.mark.vllm
@pytest.mark.parametrize("end", ["", "/", "/v1"])
def test_a_server_of_ours_has_no_problem(server, capsys, end):
    code, found, problems = ask(server.url + end, capsys)
    assert (code, problems) == (0, {})
    assert found["ready"] == server.url
    assert found["models"] == str(CHECKPOINT)
    assert found["routes"] == f"of qwen3_asr_vllm {__version__}"
    assert found["limits"].startswith("1024 MiB, 14400 s, 12 s in a clip")
    assert found["page"] == f"{server.url}/"
    assert found["transcribes"].startswith("a second of a tone in ")
    assert "requests running" in found["metrics"] and found["vllm"].startswith("0.3")


METRICS = """
vllm:num_requests_running{{engine="0",model_name="asr"}} 2.0
{others}vllm:num_requests_waiting{{engine="0",model_name="asr"}} 3.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="asr",reason="capacity"}} 3.0
"""


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ("", "2 requests running, 3 waiting"),
        (
            'vllm:num_requests_running{engine="1",model_name="asr"} 4.0\n',
            "6 requests running, 3 waiting on 2 engines",
        ),
    ],
)
def test_the_load_is_summed_over_engines(others, found):
    page = METRICS.format(others=others).encode()
    assert probe._metrics(SimpleNamespace(get=lambda path: page)) == found


def test_a_closed_port_is_one_problem(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, found, problems = ask(url, capsys)
    assert (code, found, set(problems)) == (1, {}, {"ready"})
    assert url in problems["ready"]


def test_another_server_is_recognized(other, capsys):
    code, found, problems = ask(other, capsys)
    assert (code, set(found)) == (1, {"ready"})
    assert "VLLM_PLUGINS=qwen3_asr" in problems["routes"]
    assert "--api-key" in problems["models"]
    assert set(problems) >= {"vllm", "limits", "page", "metrics", "transcribes"}


def test_an_invalid_address_is_a_usage_error(capsys):
    assert cli.main(["doctor", "--server", "ftp://localhost"]) == 2
    assert "cannot open ftp URLs" in capsys.readouterr().err
