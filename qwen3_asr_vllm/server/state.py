# SPDX-License-Identifier: Apache-2.0
"""State of a server, built once when it starts: ``app.state.qwen3_asr``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from .alignments import AlignerServing
    from .page import About
    from .realtime_serving import Realtime
    from .transcriptions import Transcriber


@dataclass(frozen=True)
class ServerState:
    """State of all routes. A server has either an aligner, or all of the others."""

    transcriber: Transcriber | None = None
    realtime: Realtime | None = None
    about: About | None = None
    aligner: AlignerServing | None = None
    watch: asyncio.Task[None] | None = None  # fails pending requests; asyncio holds no reference

    @property
    def model_name(self) -> str:
        serving = self.transcriber or self.aligner
        assert serving is not None
        return serving.models.model_name()


def server_state(app: Starlette) -> ServerState:
    """Return the state that ``EndpointPlugin`` stored in the app."""
    state: ServerState = app.state.qwen3_asr
    return state
