# SPDX-License-Identifier: Apache-2.0
"""Engines and clients of the commands, and the environment variables of vLLM."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from typing import Any

from .terminal import INTERRUPTED, complain

# Defaults of commands with an engine: stdout is for transcripts, stderr for errors.
TRANSCRIBE_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def engine_options(command: str, rest: list[str]) -> dict[str, Any]:
    """Parse engine options of vLLM into arguments of ``vllm.LLM``; exit with 2 for bad ones."""
    if not rest:
        return {}
    with ending_on_ctrl_c():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=f"qwen3-asr {command}"))
    given = vars(parser.parse_args(rest))
    return {name: value for name, value in given.items() if value != parser.get_default(name)}


def model_options(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Return the arguments of ``Qwen3ASR``: engine options, and declared languages."""
    declared = {"languages": args.extra_languages} if args.extra_languages else {}
    return engine_options(args.command, rest) | declared


def load_model(model: str, options: dict[str, Any]) -> Any:
    _import_vllm()
    from ..offline import Qwen3ASR

    return Qwen3ASR(model, **options)


def load_aligner(model: str, options: dict[str, Any]) -> Any:
    _import_vllm()
    from ..offline import ForcedAligner

    return ForcedAligner(model, **options)


def _import_vllm() -> None:
    with ending_on_ctrl_c(), suppress(ImportError):  # reported when the engine is created
        from vllm import LLM  # noqa: F401


@contextmanager
def ending_on_ctrl_c() -> Iterator[None]:
    """Exit at once on Ctrl-C: an interrupted import would print a traceback."""

    def end(*_: Any) -> None:
        os.write(2, b"qwen3-asr: stopped\n")
        os._exit(INTERRUPTED)

    if current_thread() is not main_thread():  # signals interrupt the main thread only
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def connect(args: argparse.Namespace) -> Any:
    from ..corpus.client import Client

    return Client(args.server, model=args.model, api_key=args.api_key, on_busy=complain)
