# SPDX-License-Identifier: Apache-2.0
"""Limits on the head of an HTTP request: target, headers and trailers.

uvicorn's default protocol, over httptools, buffers a head of any length before the application
runs, in quadratic time. vLLM's ``--h11-max-incomplete-event-size`` bounds h11 only.
"""

from __future__ import annotations

import json

from uvicorn import config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

MAX_HEAD_BYTES = 64 << 10  # bytes of URL and headers
MAX_HEADERS = 256  # headers of a request


def bound_heads() -> None:
    """Apply the limits to servers that start later in this process."""
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedProtocol"


class BoundedProtocol(HttpToolsProtocol):
    """Responds with 431 to a head that is too large, and closes the connection."""

    _num_head_bytes = 0  # received since the last piece of a body
    _is_too_large = False

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._is_too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._is_too_large = True
            # stops the parser, which calls send_400_response
            raise ValueError("the head is too large")
        self._num_head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Send a 431 instead if the head is too large."""
        if not self._is_too_large:
            return super().send_400_response(msg)
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_refusal())
        self.transport.close()


def _refusal() -> bytes:
    limit = f"{MAX_HEAD_BYTES >> 10} KiB, and {MAX_HEADERS} headers"
    error = ApiError(431, f"the limit of URL and headers is {limit}; send fields in a form.")
    body = json.dumps(error.body)
    lines = (
        "HTTP/1.1 431 Request Header Fields Too Large",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", body)).encode()
