# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve``: ``vllm serve`` with this package's routes and limits, and an aligner."""

from __future__ import annotations

import argparse
import os

from ..languages import VARIABLE
from ..server.settings import check_settings
from .options import DEFAULT_MODEL
from .terminal import usage_error


def serve(argv: list[str]) -> int:
    """Run a server, and one for ``--aligner``, until it ends or receives a signal."""
    if not argv:
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    argv = _declare_languages(argv)
    try:
        check_settings()
    except ValueError as error:
        return usage_error(str(error))
    from ..server import supervisor

    return supervisor.serve(argv)


def _declare_languages(argv: list[str]) -> list[str]:
    """Move --extra-languages to the environment of the server; return the other arguments."""
    parser = argparse.ArgumentParser(prog="qwen3-asr serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--extra-languages", "--extra_languages", default="")
    args, rest = parser.parse_known_args(argv)
    if args.extra_languages:
        declared = (os.environ.get(VARIABLE), args.extra_languages)
        os.environ[VARIABLE] = ",".join(filter(None, declared))
    return rest
