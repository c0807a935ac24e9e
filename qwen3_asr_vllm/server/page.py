# SPDX-License-Identifier: Apache-2.0
"""The page at ``/`` and the description of the server at ``/about``.

The page is one file that requests nothing from other hosts. Its Content-Security-Policy allows its
own style and script only, by their hashes, so text on the page never runs. Neither route needs a
key: the page asks for one and sends it with each request.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .. import __version__
from .errors import IS_ALIGNER, ApiError
from .state import server_state


@dataclass(frozen=True)
class About:
    """Public description of a server: models, formats, limits."""

    models: tuple[str, ...]
    languages: dict[str, str]  # names by code
    decodes: tuple[str, ...]  # audio formats
    decoders: tuple[str, ...]  # libraries that read them
    max_upload_mb: int  # MiB
    max_duration_s: float
    max_clip_s: float
    needs_key: bool
    words: bool  # True: a forced aligner times words
    speakers: bool  # True: a diarizer finds speakers
    decoding: str  # default parameters: "temperature 0"

    def __str__(self) -> str:
        return (
            f"reads {', '.join(self.decodes)} by {' and '.join(self.decoders)}; "
            f"takes {self.max_upload_mb} MiB and {self.max_duration_s:g} s in a recording, "
            f"{self.max_clip_s:g} s in a clip; "
            f"decodes with {self.decoding}; "
            f"aligner: {'yes' if self.words else 'none'}; "
            f"diarizer: {'yes' if self.speakers else 'none'}"
        )


def attach(app: FastAPI) -> None:
    """Add the routes of this module."""
    app.add_api_route("/", show_page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/about", show_about, methods=["GET"])


async def show_page() -> Response:
    page, headers = _page()
    return Response(page, media_type="text/html", headers=headers)


async def show_about(request: Request) -> JSONResponse:
    """Return the languages, limits and models of this server."""
    if (about := server_state(request.app).about) is None:
        raise ApiError(404, IS_ALIGNER)
    return JSONResponse({"version": __version__} | asdict(about))


@cache
def _page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers."""
    page = files(__package__).joinpath("static/index.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "connect-src": "'self'",
        "media-src": "blob:",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {
        "Content-Security-Policy": "; ".join(map(" ".join, policy.items())),
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _hash(page: str, tag: str) -> str:
    """Return the CSP source that allows the only element with this tag."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
