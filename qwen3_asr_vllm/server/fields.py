# SPDX-License-Identifier: Apache-2.0
"""Fields of one request: names, texts and files, from its query string and its body.

All are bounded and in UTF-8. Errors are ApiErrors that name the field, the limit and what to do.
"""

from __future__ import annotations

from tempfile import SpooledTemporaryFile
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import FormData, Headers, UploadFile

from .errors import ApiError, shown

RECORDING_NAMES = ("file", "audio", "audio_file")  # names that clients use for a recording
FILE_NAMES = (*RECORDING_NAMES, "samples")  # fields that are files even without a file name

MAX_NAMES = 64  # different names in a request; x, x[] and x[0] count once
MAX_NAME = 200  # characters of a field name
MAX_VALUES = 1000  # fields in a request; a list may be sent as repeated fields
MAX_FILES = 4  # files in a request
MAX_FIELD_BYTES = 64 << 10  # bytes of text in one field, unless the route allows more
MAX_TEXT_BYTES = 1 << 20  # bytes of text in all fields, without voices
VOICES = "known_speaker_references"  # fields that hold recordings of voices in base64
MAX_VOICE_BYTES = 4 << 20  # bytes of base64 in one of them: 30 s, uncompressed
MAX_VOICES = 16  # of them in a request
MAX_CONTENT_TYPE = 1000  # characters of a Content-Type
MAX_QUERY = 16 << 10  # characters of a query string
SPOOL_BYTES = 1 << 20  # bytes of a file kept in memory; larger files go to TMPDIR

_UTF8 = ("", "utf-8", "utf8")
# Charsets that equal UTF-8 for ASCII text.
_LIKE_ASCII = ("us-ascii", "ascii", "iso-8859-1", "latin-1", "latin1")


class Fields:
    """Collects the fields of one request as they arrive."""

    def __init__(self, max_field_bytes: int = MAX_FIELD_BYTES) -> None:
        self.max_field_bytes = max_field_bytes
        self._items: list[tuple[str, str | UploadFile]] = []
        self._names: set[str] = set()
        self._num_files = self._num_text_bytes = self._num_voices = 0

    def add(self, name: str, text: bytes, charset: str = "") -> None:
        """Add a text. Raises ApiError if it is too large or not UTF-8."""
        self._check_name(name)
        self.check_size(name, len(text))
        if not _is_voice(name):
            self._num_text_bytes += len(text)
        if self._num_text_bytes > max(self.max_field_bytes, MAX_TEXT_BYTES):
            raise ApiError(413, f"all fields hold more than {MAX_TEXT_BYTES >> 10} KiB of text.")
        if not (charset.lower() in _LIKE_ASCII and text.isascii()):
            check_charset(charset, name)
        if name == "_charset_":  # the field that names the charset of a form
            return check_charset(text.decode("latin-1"), name)
        self._append(name, _decode(text, name))

    def add_query(self, query: bytes) -> None:
        """Add the fields of a query string."""
        if len(query) > MAX_QUERY:
            message = f"the query is {len(query)} characters; the limit is {MAX_QUERY}."
            raise ApiError(414, f"{message} Send fields in the body.")
        text = query.decode(errors="surrogateescape")
        for name, value in parse_qsl(text, keep_blank_values=True, errors="surrogateescape"):
            self.add(name, value.encode(errors="surrogateescape"))

    def add_file(self, name: str, filename: str | None, content_type: str) -> UploadFile:
        """Add an empty file to write to. Every name of a recording becomes ``file``."""
        self._check_name(name)
        self._num_files += 1
        if self._num_files > MAX_FILES:
            raise ApiError(413, f"more than {MAX_FILES} files were sent; send one recording.")
        content_type = content_type[:MAX_CONTENT_TYPE].encode("ascii", "replace").decode()
        headers = Headers({"content-type": content_type})
        spool: Any = SpooledTemporaryFile(SPOOL_BYTES)
        file = UploadFile(spool, size=0, filename=filename, headers=headers)
        self._append("file" if name in RECORDING_NAMES else name, file)
        return file

    def check_size(self, name: str, num_bytes: int) -> None:
        """Raise ApiError for a text that is too large."""
        most = MAX_VOICE_BYTES if _is_voice(name) else self.max_field_bytes
        if num_bytes > most:
            limit = f"{most >> 10} KiB"
            raise ApiError(413, f"{shown(name)} is text of more than {limit}.", param=name)

    @property
    def form(self) -> FormData:
        return FormData(self._items)

    def _check_name(self, name: str) -> None:
        if len(name) > MAX_NAME or not name.isprintable():
            limit = f"names are at most {MAX_NAME} characters, all of them printable"
            raise ApiError(400, f"a field is named {shown(name)}; {limit}.")
        self._names.add(name.partition("[")[0])
        if len(self._names) > MAX_NAMES:
            raise ApiError(413, f"the request has more than {MAX_NAMES} different fields.")

    def _append(self, name: str, value: str | UploadFile) -> None:
        self._items.append((name, value))
        self._num_voices += _is_voice(name)
        if self._num_voices > MAX_VOICES:
            raise ApiError(413, f"{VOICES}: more than {MAX_VOICES} were sent.", param=VOICES)
        if len(self._items) > MAX_VALUES:
            raise ApiError(413, f"the request has more than {MAX_VALUES} fields.")


def _is_voice(name: str) -> bool:
    return name.partition("[")[0] == VOICES


def check_charset(charset: str, where: str) -> None:
    """Raise ApiError unless the charset is UTF-8: some codecs take quadratic time."""
    if charset.lower() not in _UTF8:
        raise ApiError(400, f"{where} is in the charset {shown(charset)}; send UTF-8.")


def _decode(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        at = f"byte 0x{text[error.start]:02x} at {error.start}"
        raise ApiError(400, f"{name} is not in UTF-8 ({at}).", param=name) from error
