# SPDX-License-Identifier: Apache-2.0
"""Request bodies that hold a recording, read piece by piece.

    multipart/form-data   fields and files; a recording needs no file name
    application/json      {"file": base64 or data: URL, ...}, {"input_audio": {"data": ...}, ...}
    audio/*, video/*      the recording alone; its fields are in the query string

Reading takes time linear in the bytes received. Error messages of libraries never reach a client:
every error is an ApiError that names what was sent and what to send.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from .errors import ApiError, shown
from .fields import (
    FILE_NAMES,
    MAX_CONTENT_TYPE,
    MAX_FILES,
    MAX_VALUES,
    Fields,
    check_charset,
)

MAX_BOUNDARY = 256  # bytes; RFC 2046 allows 70
MAX_PART_HEADERS = 8 << 10  # bytes of the headers of one part
MAX_JSON_MB = 36  # MiB: 27 MiB of audio in base64
MAX_JSON_VALUES = 4096  # values in a JSON body
BASE64_STEP = 1 << 20  # characters decoded at a time; a multiple of 4

WAYS = (
    "Send multipart/form-data with the recording in the field file, as curl does with "
    "-F file=@talk.mp3, or JSON with it in base64, or the recording itself with its own "
    "Content-Type, such as audio/mpeg."
)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_OTHER_RAW = (b"application/octet-stream", b"application/ogg", b"application/mp4")


class Body(Protocol):
    """Reads one body into ``Fields``."""

    held_per_byte: int  # bytes held in memory and on disk per byte of the body

    async def write(self, data: bytes) -> None: ...

    async def finish(self) -> None: ...


def body_of(content_type: str, fields: Fields) -> Body:
    """Return the reader of a body. Raises ApiError for a type that holds no recording."""
    kind, options = parse_options_header(content_type[:MAX_CONTENT_TYPE])
    check_charset(options.get(b"charset", b"").decode("latin-1"), "the body")
    if kind == b"multipart/form-data":
        return Multipart(options.get(b"boundary", b""), fields)
    if kind == b"application/json":
        return Json(fields)
    if kind.startswith((b"audio/", b"video/")) or kind in _OTHER_RAW:
        return Raw(content_type, fields)
    name = shown(kind.decode("latin-1"))
    sent = f"the Content-Type is {name}" if kind else "the request has no Content-Type"
    raise ApiError(400, f"file is required, but {sent}. {WAYS}", param="file")


class Raw:
    """Reads a body that is the recording itself."""

    held_per_byte = 1

    def __init__(self, content_type: str, fields: Fields) -> None:
        self._file = fields.add_file("file", None, content_type)

    async def write(self, data: bytes) -> None:
        await self._file.write(data)

    async def finish(self) -> None:
        await self._file.seek(0)


class Multipart:
    """Reads a form. Its last boundary may be missing: some clients omit it."""

    held_per_byte = 1

    def __init__(self, boundary: bytes, fields: Fields) -> None:
        if not 0 < len(boundary) <= MAX_BOUNDARY:
            limit = f"give boundary=... of 1 to {MAX_BOUNDARY} characters, as HTTP libraries do"
            raise ApiError(400, f"the Content-Type of the form has no usable boundary; {limit}.")
        self._boundary, self._fields = boundary, fields
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._open_part,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._has_ended = False
        self._num_bytes = self._num_parts = self._num_boundaries = 0
        self._clear()
        self._files: list[UploadFile] = []
        self._unwritten: list[tuple[UploadFile, bytes]] = []

    async def write(self, data: bytes) -> None:
        self._num_boundaries += data.count(b"\r\n--" + self._boundary)
        if self._num_boundaries > MAX_VALUES + MAX_FILES:  # each costs the parser some time
            message = f"the form contains its boundary more than {MAX_VALUES + MAX_FILES} times."
            raise ApiError(413, message)
        try:
            self._parser.write(data)
        except FormParserError as error:
            at = self._num_bytes + max(getattr(error, "offset", 0), 0)
            message = (
                f"the form is broken at byte {at}, in part {self._num_parts}: it does not fit its "
                f"boundary {shown(self._boundary.decode('latin-1'))}. {WAYS}"
            )
            raise ApiError(400, message) from error
        self._num_bytes += len(data)
        for file, piece in self._unwritten:
            await file.write(piece)
        self._unwritten.clear()

    async def finish(self) -> None:
        if not self._has_ended:
            try:
                await self.write(b"\r\n--" + self._boundary + b"--\r\n")
            except ApiError:
                if self._num_header_bytes:  # the body ended inside the headers of a part
                    raise
        for file in self._files:
            await file.seek(0)

    def _begin(self) -> None:
        self._num_parts += 1
        self._clear()

    def _clear(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._num_header_bytes = 0
        self._name = self._charset = ""
        self._file: UploadFile | None = None

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_PART_HEADERS:
            limit = f"{MAX_PART_HEADERS >> 10} KiB"
            raise ApiError(400, f"the headers of part {self._num_parts} are larger than {limit}.")

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _open_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        if b"name" not in options:
            raise ApiError(400, f"part {self._num_parts} of the form has no name; give it one.")
        self._name = name = options[b"name"].decode(errors="replace")
        self._check_transfer()
        kind = self._headers.get(b"content-type", b"").decode("latin-1")
        filename = options.get(b"filename")
        if filename is not None or name in FILE_NAMES or b"filename*" in disposition.lower():
            file_name = None if filename is None else filename.decode(errors="replace")
            self._file = self._fields.add_file(name, file_name, kind)
            self._files.append(self._file)
        else:
            charset = parse_options_header(kind)[1].get(b"charset", b"")
            self._charset = charset.decode("latin-1")

    def _check_transfer(self) -> None:
        encoding = self._headers.get(b"content-transfer-encoding", b"").decode("latin-1")
        if encoding.lower() not in ("", "binary", "8bit", "7bit"):
            sent = f"{self._name} has the Content-Transfer-Encoding {shown(encoding)}"
            raise ApiError(400, f"{sent}; send its bytes as they are.", param=self._name)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._unwritten.append((self._file, data[start:end]))
        else:
            self._text += data[start:end]
            self._fields.check_size(self._name, len(self._text))

    def _end_part(self) -> None:
        if self._file is None:
            self._fields.add(self._name, bytes(self._text), self._charset)

    def _end(self) -> None:
        self._has_ended = True


class Json:
    """Reads a JSON object of fields; lists and objects become JSON text again."""

    held_per_byte = 4  # copies: the body, its text, the recording in base64 and decoded

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._body = bytearray()

    async def write(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_JSON_MB << 20:
            message = f"a JSON body may have {MAX_JSON_MB} MiB; send larger recordings as a form."
            raise ApiError(413, message, param="file")

    async def finish(self) -> None:
        await run_in_threadpool(self._read)

    def _read(self) -> None:
        for name, value in self._parse().items():
            if value is None:
                continue
            if name == "input_audio" or name in FILE_NAMES:
                self._add_recording(name, value)
            else:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                self._fields.add(name, text.encode(errors="surrogatepass"))

    def _parse(self) -> dict[str, Any]:
        """Parse the body. Raises ApiError if it is no JSON object, or has too many values."""
        if sum(map(self._body.count, b"{[,")) > MAX_JSON_VALUES:
            raise ApiError(413, f"the JSON body has more than {MAX_JSON_VALUES} values.")
        try:
            document = json.loads(self._body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ApiError(400, f"the JSON body is no object. {WAYS}", param="file")
        return document

    def _add_recording(self, name: str, value: Any) -> None:
        """Add a recording in base64, as a data: URL, or as {"data": base64, "format": "wav"}."""
        kind = ""
        if isinstance(value, dict):
            kind, value = f"audio/{value.get('format', '*')}", value.get("data")
        if not isinstance(value, str):
            raise ApiError(400, f"{name} must be a recording in base64. {WAYS}", param="file")
        if value.startswith("data:"):
            head, _, value = value.partition(",")
            kind = head.removeprefix("data:").removesuffix(";base64")
        file = self._fields.add_file("file" if name == "input_audio" else name, None, kind)
        try:
            file.size = sum(map(file.file.write, decode_base64(value)))
        except ValueError as error:
            message = f"{name} holds {shown(value)}, which is not base64. {WAYS}"
            raise ApiError(400, message, param="file") from error
        file.file.seek(0)


def decode_base64(text: str) -> Iterator[bytes]:
    """Decode base64, which may be URL-safe, unpadded, or broken into lines. Raises ValueError.

    Yields pieces, so that other threads run in between.
    """
    data = text.encode("ascii").translate(_URL_SAFE, b" \t\r\n").rstrip(b"=")
    if b"=" in data:
        raise ValueError("it has padding before its end")
    for start in range(0, len(data), BASE64_STEP):
        piece = data[start : start + BASE64_STEP]
        yield base64.b64decode(piece + b"=" * (-len(piece) % 4), validate=True)
