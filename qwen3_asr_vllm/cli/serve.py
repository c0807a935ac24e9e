# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve``: ``vllm serve`` with this package's routes and limits, and an aligner."""

from __future__ import annotations

from ..server.settings import check_settings
from .options import DEFAULT_MODEL
from .terminal import usage_error


def serve(argv: list[str]) -> int:
    """Run a server, and one for ``--aligner``, until it ends or receives a signal."""
    if not argv:
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    try:
        check_settings()
    except ValueError as error:
        return usage_error(str(error))
    from ..server import supervisor

    return supervisor.serve(argv)
