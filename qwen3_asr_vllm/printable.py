# SPDX-License-Identifier: Apache-2.0
"""Names from outside, made safe for logs, terminals, messages and headers.

File names, request ids and field names come from clients. A line break in one forges a line of a
log; an escape sequence moves a terminal's cursor; a bidirectional override shows other text than
is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_NAME = 200  # characters of a name in a message
MAX_HEADER = 2000  # characters of an HTTP header

_NOT_IN_HEADERS = re.compile(r"[^ -~]")

# C0 and C1 controls with DEL, line and paragraph separators, marks and overrides of the direction
# of writing, lone surrogates (a file name that is not UTF-8), the byte order mark.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: object, *, max_chars: int = MAX_NAME) -> str:
    r"""Return ``text`` on one line, with control characters as ``\x1b``, cut to ``max_chars``."""
    text = str(text)
    if len(text) > max_chars:
        text = f"{text[: max_chars - 3]}..."
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def header_list(texts: Sequence[str], *, separator: str) -> str:
    """Join ``texts`` for one HTTP header: ASCII, and no longer than clients and proxies take."""
    text = _NOT_IN_HEADERS.sub("?", separator.join(texts))
    return text if len(text) <= MAX_HEADER else f"{text[:MAX_HEADER]}... ({len(texts)} in all)"
