# SPDX-License-Identifier: Apache-2.0
"""The heads of requests are bounded; through sockets, without an engine."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from support.servers import on_a_port

pytestmark = pytest.mark.vllm  # which is imported, and starts nothing


async def count(request: Any) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())} bytes")


@pytest.fixture
def port():
    from qwen3_asr_vllm.server.protocol import bound_heads

    bound_heads()
    app = Starlette()
    app.add_route("/", count, methods=["GET", "POST"])
    with on_a_port(app) as url:
        yield int(url.rsplit(":", 1)[1])


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


def answer(port: int, *requests: bytes) -> bytes:
    """All that a server sends until it closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"".join(requests))
        while data := connection.recv(1 << 16):
            received += data
    return received


@pytest.mark.parametrize(
    "head",
    [
        b"GET /?" + b"a&" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        GET + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        GET + b"X: a\r\n" * 300 + b"\r\n",
    ],
)
def test_a_large_head_is_refused(port, head):
    refusal = answer(port, head)
    assert refusal.startswith(b"HTTP/1.1 431 ") and b"64 KiB, and 256 headers" in refusal


@pytest.mark.parametrize("start", [b"GET /", GET + b"X: ", CHUNKED + b"X: "])
def test_endless_heads_and_trailers_end_the_connection(port, start):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(start)
        with pytest.raises(ConnectionError):
            for _ in range(2_000):
                connection.sendall(b"a" * 65_536)


def test_requests_on_one_connection_are_bounded_apart(port):
    get = GET + b"X: " + b"a" * 40_000 + b"\r\n\r\n"
    post = POST + b"Content-Length: 1000000\r\n\r\n" + bytes(1_000_000)
    last = GET + b"Connection: close\r\n\r\n"
    received = answer(port, get, get, post, post, get, last)
    assert received.count(b"\r\n\r\n0 bytes") == 4
    assert received.count(b"\r\n\r\n1000000 bytes") == 2


def test_a_body_in_small_chunks_is_read(port):
    body = b"1;x=y\r\na\r\n" * 20_000 + b"0\r\n\r\n"
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert answer(port, head, body).endswith(b"20000 bytes")
