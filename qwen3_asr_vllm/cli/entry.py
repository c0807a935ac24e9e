# SPDX-License-Identifier: Apache-2.0
"""The command ``qwen3-asr``: transcribe files and streams, time words, serve HTTP, check it all.

Exit codes: 0 success; 1 a recording failed, or doctor found a problem; 2 the command line is wrong;
130 stopped by Ctrl-C. Results go to stdout, everything else to stderr. NumPy, PyTorch and vLLM are
imported at their first use, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from . import models
from .align import align
from .arguments import with_hyphens, without_booleans
from .doctor import DECODERS, INSTALLATION
from .evaluate import evaluate
from .languages import resolve_languages
from .options import DEFAULT_MODEL, make_parser
from .serve import serve
from .stream import stream
from .terminal import (
    INTERRUPTED,
    StdoutError,
    complain,
    flush_stdout,
    open_closed_streams,
    usage_error,
)
from .transcribe import transcribe

WITH_ENGINE = {"transcribe": transcribe, "align": align, "stream": stream, "eval": evaluate}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    open_closed_streams()
    try:
        code = _run(argv)
        flush_stdout()
        return code
    except KeyboardInterrupt:
        complain("stopped")
        return INTERRUPTED
    except StdoutError as error:
        complain(str(error))
        return 1


def _run(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"] and not {"-h", "--help"} & set(argv):
        return serve(argv[1:])  # parsed by vLLM; this parser has it only for --help
    parser = make_parser()
    args, rest = parser.parse_known_args(without_booleans(map(with_hyphens, argv)))
    if args.command in WITH_ENGINE:
        try:
            resolve_languages(args, DEFAULT_MODEL)
        except ValueError as error:
            parser.error(str(error))
        return WITH_ENGINE[args.command](args, rest)
    if args.model:
        return _doctor_model(args, rest)
    if rest or args.aligner:
        parser.error(f"unrecognized arguments: {' '.join(rest) or '--aligner'} (without --model)")
    models.set_defaults({"VLLM_LOGGING_STREAM": "ext://sys.stderr"})  # stdout is for the findings
    if args.server:
        return _doctor_server(args.server, args.api_key)
    return _doctor(DECODERS if args.decoders else INSTALLATION | DECODERS)


def _doctor(checks: dict[str, Callable[[], str]]) -> int:
    """Run checks and print their findings; return 1 if there is a problem."""
    problems = 0
    for name, check in checks.items():
        try:
            print(f"ok       {name}: {check()}")
        except Exception as error:  # every error is a finding
            problems += 1
            print(f"PROBLEM  {name}: {error}")
            if isinstance(error, ConnectionError):  # the other checks would fail alike
                break
    return 1 if problems else 0


def _doctor_model(args: argparse.Namespace, rest: list[str]) -> int:
    from .checkup import model_checks

    models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
    options = models.engine_options(args.command, rest)
    return _doctor(model_checks(args.model, aligner=args.aligner, options=options))


def _doctor_server(url: str, api_key: str | None) -> int:
    from .probe import server_checks

    try:
        checks = server_checks(url, api_key=api_key)
    except ValueError as error:
        return usage_error(str(error))
    return _doctor(checks)


if __name__ == "__main__":
    sys.exit(main())
