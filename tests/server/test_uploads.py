# SPDX-License-Identifier: Apache-2.0
"""Requests are read within bounds, in whatever form a recording comes; without an engine."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import time
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from starlette.responses import JSONResponse
from support.checks import eventually
from support.clients import counted
from support.servers import on_a_port

pytestmark = pytest.mark.vllm  # which is imported, and starts nothing

ROUTE = "/v1/audio/transcriptions"
ROUTES = (ROUTE, "/v1/audio/alignments", "/v1/audio/alignments/times")
AUDIO = b"RIFF" + bytes(range(256)) * 40
LIBRARIES = ("Input should", "pydantic", "tarlette", "multipart data", "Invalid multipart", "ctx")


@pytest.fixture
def app():
    """A route that says what it read, and those of the plugin, whose engine is never reached."""
    from fastapi import FastAPI

    from qwen3_asr_vllm.server.admission import Admission
    from qwen3_asr_vllm.server.plugin import EndpointPlugin
    from qwen3_asr_vllm.server.state import ServerState
    from qwen3_asr_vllm.server.uploads import posted

    app = FastAPI()
    EndpointPlugin().attach_router(app)
    state = {"admission": Admission(max_bytes=64 << 20)}
    state["models"] = SimpleNamespace(model_name=lambda: "uploads")
    serving = SimpleNamespace(**state)
    app.state.qwen3_asr = ServerState(transcriber=serving, aligner=serving)

    async def read(request: Any) -> JSONResponse:
        fields: dict[str, list[Any]] = {}
        async with posted(request, state["admission"]) as (form, _):
            for name, value in form.multi_items():
                fields.setdefault(name, []).append(
                    value if isinstance(value, str) else shown(value)
                )
        return JSONResponse(fields)

    app.add_route("/read", read, methods=["POST"])
    return app


def shown(file: Any) -> list[Any]:
    return [file.filename, file.content_type, base64.b64encode(file.file.read()).decode()]


@pytest.fixture
def client(app):
    from fastapi.testclient import TestClient

    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def admission(app):
    yield app.state.qwen3_asr.transcriber.admission
    left = app.state.qwen3_asr.transcriber.admission
    assert (left.num_recordings, left.audio_s, left.num_bytes) == (0, 0, 0)


@pytest.fixture
def send(client, admission):
    """Post a body to the route that says what it read."""

    def send(body, kind, *, query="", **headers):
        headers = {"content-type": kind, **headers} if kind is not None else headers
        return client.post(f"/read{query}", content=body, headers=headers)

    return send


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> tuple[bytes, str]:
    """A form of parts, each of which begins with its headers."""
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end
    return body, "multipart/form-data; boundary=b"


def part(name: str, value: bytes, more: str = "", *headers: str) -> bytes:
    lines = (f'Content-Disposition: form-data; name="{name}"{more}', *headers)
    return "\r\n".join((*lines, "", "")).encode() + value


FILE = part("file", AUDIO, '; filename="a.wav"', "Content-Type: audio/wav")


def read(response) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return response.json()


def error(response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert not any(wording in body["message"] for wording in LIBRARIES), body
    return body


# --- charsets --------------------------------------------------------------------------------


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "utf-16", "latin-1", "rot13"])
def test_no_charset_but_utf8_is_decoded(send, charset):
    """A megabyte of punycode once took 88 s of the event loop."""
    body, kind = form(part("x-" + "a" * 1_000_000, b""), FILE)
    start = time.process_time()
    message = error(send(body, f"{kind}; charset={charset}"), 400)["message"]
    assert time.process_time() - start < 2
    assert f"charset '{charset}'; send UTF-8" in message


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", "Utf-8"])
def test_utf8_may_be_named(send, charset):
    body, kind = form(
        part("prompt", "Zoë".encode(), "", f"Content-Type: text/plain; charset={charset}"), FILE
    )
    assert read(send(body, f"{kind}; charset={charset}"))["prompt"] == ["Zoë"]


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-16", "bogus"])
def test_a_part_in_another_charset_is_refused(send, charset):
    kind = f"Content-Type: text/plain; charset={charset}"
    assert "send UTF-8" in error(send(*form(part("prompt", b"a", "", kind), FILE)), 400)["message"]
    field = part("_charset_", charset.encode())
    assert "send UTF-8" in error(send(*form(field, FILE)), 400)["message"]


@pytest.mark.parametrize("charset", ["US-ASCII", "ISO-8859-1"])
def test_ascii_under_another_name_is_utf8(send, charset):
    """Java's HttpClient names ISO-8859-1 in every part of text."""
    kind = f"Content-Type: text/plain; charset={charset}"
    assert read(send(*form(part("prompt", b"Ada", "", kind), FILE)))["prompt"] == ["Ada"]
    body = form(part("prompt", "Zoë".encode("latin-1"), "", kind), FILE)
    assert "send UTF-8" in error(send(*body), 400)["message"]


def test_text_that_is_not_utf8_is_refused(send):
    body = form(part("prompt", b"Zo\xeb"), FILE)
    refusal = error(send(*body), 400)
    assert refusal["param"] == "prompt" and "byte 0xeb at 2" in refusal["message"]
    assert "byte 0xeb" in error(send(*form(FILE), query="?prompt=%eb"), 400)["message"]
    surrogate = json.dumps({"prompt": "\ud800", "file": "UklGRg=="})
    assert error(send(surrogate, "application/json"), 400)["param"] == "prompt"
    name = json.dumps({"\ud800": "a" * 99_999})
    assert "printable" in error(send(name, "application/json"), 400)["message"]


# --- bounds ----------------------------------------------------------------------------------


def test_a_few_dozen_fields_are_the_most(send):
    names = [part(f"x{number}", b"1") for number in range(63)]
    assert len(read(send(*form(*names, FILE)))) == 64
    assert "64 different" in error(send(*form(*names, part("y", b"1"), FILE)), 413)["message"]
    keywords = [part("keywords[]", b"Ada")] * 500
    assert len(read(send(*form(*keywords, FILE)))["keywords[]"]) == 500
    assert "1000 fields" in error(send(*form(*keywords, *keywords, FILE)), 413)["message"]


def test_a_boundary_inside_of_parts_is_bounded(send):
    """Each takes the parser longer than the bytes that it is made of."""
    body = form(part("file", b"\r\n--bx" * 100_000))
    start = time.process_time()
    assert "1004 times" in error(send(*body), 413)["message"]
    assert time.process_time() - start < 2


def test_files_are_few(send):
    assert "more than 4 files" in error(send(*form(*[FILE] * 5)), 413)["message"]


@pytest.mark.parametrize(
    ("field", "status", "message"),
    [
        (part("prompt", b"a" * 65_537), 413, "'prompt' is text of more than 64 KiB"),
        (part("n" * 201, b""), 400, "at most 200 characters"),
        (part("a\x1bb", b""), 400, "printable"),
        (part("x", b"", "", f"X: {'a' * 9_000}"), 400, ""),
        (part("x", b"", "", *[f"X{number}: 1" for number in range(99)]), 400, ""),
        (b"Content-Disposition: form-data\r\n\r\n1", 400, "part 1 of the form has no name"),
    ],
)
def test_a_field_beyond_a_limit_is_refused(send, field, status, message):
    assert message in error(send(*form(field, FILE)), status)["message"]


def test_oversized_fields_end_the_upload_early(client, admission):
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            yield b"--b\r\n" + part("x", b"")
            for _ in range(16):
                sent += 1
                yield bytes(1 << 16)
            yield b"\r\n"

    async def post() -> int:
        return await asgi(client.app, "/read", body(), form()[1])

    assert asyncio.run(post()) == 413 and sent <= 2


async def asgi(app, path: str, body: Iterator[bytes], kind: str, *, query: bytes = b"") -> int:
    """The status of a request whose body is asked for piece by piece, and then hung up."""
    statuses = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        piece = next(body, None)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": path, "query_string": query, "state": {}}
    scope |= {"headers": [(b"content-type", kind.encode())], "root_path": ""}
    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize("boundary", ["", "; boundary=", f"; boundary={'b' * 257}"])
def test_a_boundary_is_given_and_short(send, boundary):
    body, _ = form(FILE)
    assert "boundary" in error(send(body, f"multipart/form-data{boundary}"), 400)["message"]


def test_a_query_is_bounded(send):
    assert "16384" in error(send(*form(FILE), query="?" + "a" * 16_385), 414)["message"]
    assert error(send(*form(FILE), query="?" + "&".join(f"x{n}=1" for n in range(65))), 413)


def test_json_is_bounded(send):
    audio = base64.b64encode(AUDIO).decode()
    many = json.dumps({"file": audio, "keywords": list(range(5000))})
    assert "4096 values" in error(send(many, "application/json"), 413)["message"]
    deep = '{"file": "", "a": ' + "[" * 4_000
    assert "not JSON" in error(send(deep, "application/json"), 400)["message"]
    digits = '{"file": "", "n": ' + "9" * 1_000_000 + "}"
    assert "not JSON" in error(send(digits, "application/json"), 400)["message"]


def test_json_ends_at_its_limit(client, admission):
    pieces = iter([b'{"file": "'] + [b"A" * (1 << 20)] * 60)
    admission.max_bytes = 1 << 30
    assert asyncio.run(asgi(client.app, "/read", pieces, "application/json")) == 413
    assert len(list(pieces)) == 24


# --- one budget of bytes ---------------------------------------------------------------------


def test_uploads_share_a_budget_of_bytes(send, admission):
    admission.max_bytes = 2 << 20
    body, kind = form(part("file", bytes(1 << 20)))
    with admission.reserve() as other:
        other.hold_bytes(1 << 20)
        response = send(body, kind)
        assert error(response, 503)["code"] == "busy" and response.headers["Retry-After"] == "5"
        other.hold_bytes(1 << 19)
        assert read(send(body, kind))


def test_a_full_budget_refuses_before_reading(client, admission):
    admission.max_bytes = 2 << 20
    with admission.reserve() as other:
        other.hold_bytes(2 << 20)
        pieces = iter(form(FILE)[0][i : i + 1000] for i in range(0, 9_000, 1000))
        assert asyncio.run(asgi(client.app, "/read", pieces, form()[1])) == 503
        assert len(list(pieces)) == 8  # no length was given, so one piece was read


def test_oversized_uploads_name_the_setting(send, admission):
    admission.max_bytes = 1 << 20
    message = error(send(*form(part("file", bytes(1 << 20)))), 413)["message"]
    assert "limit is 1 MiB" in message and "QWEN3_ASR_MAX_UPLOADS_MB" in message


def test_json_takes_the_memory_of_its_copies(send, admission):
    admission.max_bytes = 2 << 20
    body = json.dumps({"file": base64.b64encode(bytes(300_000)).decode()})
    assert read(send(body, "application/json"))
    with admission.reserve() as other:
        other.hold_bytes(1 << 20)
        assert error(send(body, "application/json"), 503)["code"] == "busy"


def test_uploads_are_held_until_the_response(app, client, admission):
    from qwen3_asr_vllm.server.uploads import posted

    held = []

    async def look(request: Any) -> JSONResponse:
        async with posted(request, admission):
            held.append(admission.num_bytes)
        return JSONResponse({})

    app.add_route("/look", look, methods=["POST"])
    body, kind = form(part("prompt", b"a" * 60_000), part("file", bytes(3 << 20)))
    client.post("/look", content=body, headers={"content-type": kind})
    assert held == [len(body)]


# --- clients that hang up --------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"--b\r\n", b"--b\r\n" + FILE[:-99]])
@pytest.mark.parametrize("route", ROUTES)
def test_disconnecting_during_uploads_is_a_499(app, admission, monkeypatch, route, sent):
    from qwen3_asr_vllm.server import uploads

    lines: list[str] = []
    monkeypatch.setattr(uploads.logger, "info", lambda line, *values: lines.append(line % values))
    before = counted(499, route=route, model="uploads")
    asyncio.run(asgi(app, route, iter([sent] if sent else []), form()[1]))
    assert counted(499, route=route, model="uploads") == before + 1
    assert lines == [f"A client disconnected during its upload: route={route} bytes={len(sent)}"]


@pytest.fixture
def port(app):
    with on_a_port(app) as url:
        yield int(url.rsplit(":", 1)[1])


@pytest.mark.parametrize("route", [*ROUTES, "/v1/audio/translations"])
def test_hanging_up_logs_no_traceback(port, capfd, admission, route):
    head = (
        f"POST {route} HTTP/1.1\r\nHost: a\r\nContent-Type: {form()[1]}\r\nContent-Length: 9999\r\n"
    )
    before = counted(499, route=route, model="uploads")
    for sent in (b"", b"\r\n", b"\r\n--b\r\n" + FILE[:99]):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + sent)
    num_aborted = 2 if route in ROUTES else 0
    eventually(lambda: counted(499, route=route, model="uploads") == before + num_aborted)
    eventually(lambda: admission.num_recordings == 0)
    assert "Traceback" not in "".join(capfd.readouterr())


# --- the forms of a recording ----------------------------------------------------------------

BASE64 = base64.b64encode(AUDIO).decode()
LARGE = AUDIO * 200  # more than what stays in memory


@pytest.mark.parametrize("audio", [AUDIO, LARGE])
@pytest.mark.parametrize("name", ["file", "audio", "audio_file"])
@pytest.mark.parametrize("more", ["", '; filename="a.wav"', "; filename*=utf-8''a.wav"])
def test_files_need_no_name_or_field(send, audio, name, more):
    ((_, _, content),) = read(send(*form(part(name, audio, more))))["file"]
    assert base64.b64decode(content) == audio


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"file": BASE64}, ""),
        ({"audio": BASE64.rstrip("=")}, ""),
        ({"file": base64.urlsafe_b64encode(AUDIO).decode()}, ""),
        ({"file": base64.encodebytes(AUDIO).decode()}, ""),
        ({"file": f"data:audio/L16;rate=8000;base64,{BASE64}"}, "audio/L16;rate=8000"),
        ({"input_audio": {"data": BASE64, "format": "wav"}}, "audio/wav"),
        ({"input_audio": {"data": f"data:audio/mpeg;base64,{BASE64}"}}, "audio/mpeg"),
    ],
)
def test_json_may_hold_a_recording_in_base64(send, document, kind):
    body = json.dumps({"model": "asr", **document}).replace("/", "\\/")  # as PHP writes it
    fields = read(send(body, "application/json"))
    assert fields == {"model": ["asr"], "file": [[None, kind, BASE64]]}


def test_json_values_become_fields(send):
    document = {"file": BASE64, "temperature": 0.5, "stream": True, "language": None}
    document |= {"keywords": ["Ada, B", "C"], "chunking_strategy": {"type": "server_vad"}}
    fields = read(send(json.dumps(document), "application/json; charset=utf-8"))
    del fields["file"]
    assert fields == {
        "temperature": ["0.5"],
        "stream": ["true"],
        "keywords": ['["Ada, B", "C"]'],
        "chunking_strategy": ['{"type": "server_vad"}'],
    }


@pytest.mark.parametrize("kind", ["audio/wav", "audio/L16;rate=8000", "video/mp4", "audio/x-m4a"])
def test_a_body_may_be_the_recording(send, kind):
    fields = read(send(LARGE, kind, query="?language=de&prompt=Zo%C3%AB%26&x[]=1&x[]=2"))
    assert fields.pop("file") == [[None, kind, base64.b64encode(LARGE).decode()]]
    assert fields == {"language": ["de"], "prompt": ["Zoë&"], "x[]": ["1", "2"]}


def test_body_fields_follow_query_fields(send):
    body = form(part("language", b"de"), FILE)
    assert read(send(*body, query="?language=en"))["language"] == ["en", "de"]


@pytest.mark.parametrize("end", [b"--b-", b"--b\r\n", b"--b", b"--", b"\r\n", b""])
def test_the_last_boundary_may_be_missing(send, end):
    ((_, _, content),) = read(send(*form(part("model", b"asr"), FILE, end=end)))["file"]
    audio = base64.b64decode(content)
    assert audio.startswith(AUDIO) and len(audio) <= len(AUDIO) + 8


def test_forms_cut_in_a_head_are_refused(send):
    body = form(FILE, end=b"--b\r\nContent-Disposition: form-data; name=lan")
    assert "broken at byte" in error(send(*body), 400)["message"]


@pytest.mark.parametrize("size", [1, 7, 100, 65_536])
def test_any_piece_size_gives_the_form(send, size):
    body, kind = form(part("model", b"a\r\n--"), FILE, part("x", "Zoë".encode()))
    whole = read(send(body, kind))
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    assert read(send(pieces, kind)) == whole


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_body_is_decompressed(send, encoding, compress):
    body, kind = form(part("file", LARGE))
    fields = read(send(compress(body), kind, **{"content-encoding": encoding}))
    assert base64.b64decode(fields["file"][0][2]) == LARGE


def test_a_compressed_body_is_bounded(client, admission):
    """A megabyte that would be a gigabyte; others are served meanwhile."""
    admission.max_bytes = 8 << 20
    bomb = gzip.compress(form(part("file", bytes(32 << 20)))[0])
    headers = {"content-type": form()[1], "content-encoding": "gzip"}
    assert "8 MiB" in error(client.post("/read", content=bomb, headers=headers), 413)["message"]


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (gzip.compress(LARGE)[:-9], "gzip", "cut off"),
        (gzip.compress(AUDIO) * 2, "gzip", "continues after its end"),
        (AUDIO, "gzip", "is no gzip"),
        (AUDIO, "br", "Content-Encoding is 'br'; use gzip or none"),
        (gzip.compress(AUDIO), "gzip, gzip", "use gzip or none"),
    ],
)
def test_unreadable_compressed_bodies_are_named(send, body, encoding, message):
    response = send(body, "audio/wav", **{"content-encoding": encoding})
    assert message in error(response, 400)["message"]


WAYS = "Send multipart/form-data with the recording in the field file"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"file=%52&model=a", "application/x-www-form-urlencoded", "x-www-form-urlencoded"),
        (AUDIO, "text/plain", "the Content-Type is 'text/plain'"),
        (AUDIO, None, "the request has no Content-Type"),
        (form(FILE)[0], "multipart/mixed; boundary=b", "multipart/mixed"),
        (form(FILE)[0], "multipart/form-data; boundary=c", "its boundary 'c'"),
        (*form(part("file", b"@talk.mp3")), "file holds the text '@talk.mp3'"),
        (*form(part("file", b"https://example.org/a.mp3\n")), "'https://example.org/a.mp3'"),
        (*form(part("recording", AUDIO, "; filename=a"), part("x", b"1")), "recording, x"),
        (*form(), "fields sent: none"),
        (b'{"file": "https://example.org/a.mp3"}', "application/json", "which is not base64"),
        (b'{"file": 7}', "application/json", "file must be a recording in base64"),
        (b'{"model": "asr"}', "application/json", "fields sent: model"),
        (b'["file"]', "application/json", "no object"),
    ],
)
def test_bodies_without_recording_get_advice(send, body, kind, message):
    refusal = error(send(body, kind), 400)
    assert refusal["param"] in ("file", None)
    assert message in refusal["message"] and WAYS in refusal["message"]


def test_json_that_is_none_says_where(send):
    assert "not JSON: Expecting" in error(send(b'{"file" 1}', "application/json"), 400)["message"]


def test_an_encoded_part_is_refused(send):
    encoded = part("file", BASE64.encode(), "", "Content-Transfer-Encoding: base64")
    assert "Content-Transfer-Encoding 'base64'" in error(send(*form(encoded)), 400)["message"]


# --- wrong values ----------------------------------------------------------------------------

ODD = ("", "x", "[", "{", "[1]", '{"a": 1}', "-1", "1.5", "1e999", "nan", "9" * 5_000, "null")


def test_messages_never_quote_a_library():
    from pydantic import BaseModel
    from starlette.datastructures import UploadFile

    from qwen3_asr_vllm.server.alignments import AlignmentForm, TimesForm
    from qwen3_asr_vllm.server.errors import ApiError, validate
    from qwen3_asr_vllm.server.form import Form

    messages = []
    file = UploadFile(None)  # type: ignore[arg-type]
    for cls in (Form, AlignmentForm, TimesForm):
        assert issubclass(cls, BaseModel)
        for name in cls.model_fields:
            for value in (*ODD, *({name: odd} for odd in ODD), [*ODD], file, None):
                try:
                    validate(
                        cls,
                        {"file": file, "samples": file, "units": "[]", "text": "a"} | {name: value},
                    )
                except ApiError as refusal:
                    assert refusal.param == name
                    messages.append(str(refusal))
    assert len(messages) > 300
    assert not [each for each in messages if any(word in each for word in LIBRARIES)]
    assert not [each for each in messages if "not valid" in each]


def test_messages_show_value_and_constraint():
    from pydantic import BaseModel, Field

    from qwen3_asr_vllm.server.errors import ApiError, validate

    class Odd(BaseModel):
        kind: Literal["a", "b"] = "a"
        number: int = Field(1, ge=1)

    for values, message in (
        ({"kind": "c" * 200}, "kind is '" + "c" * 79 + "...; it must be 'a' or 'b'."),
        ({"kind": "\x1b[2J"}, "kind is '\\x1b[2J'; it must be 'a' or 'b'."),
        ({"number": 0}, "number is 0; it must be greater than or equal to 1."),
        ({"number": "1.5"}, "number is '1.5'; it must be a whole number."),
    ):
        with pytest.raises(ApiError) as caught:
            validate(Odd, values)
        assert str(caught.value) == message
