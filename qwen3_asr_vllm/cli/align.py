# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr align``: when each word of a known text is said."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..corpus.manifests import decode_text
from ..corpus.outputs import check_file, write_file
from ..recordings import Recording
from . import models
from .options import writer, wrong_layout
from .terminal import StdoutError, check_stdout, complain, print_text, usage_error


def align(args: argparse.Namespace, rest: list[str]) -> int:
    from ..units import AlignmentError, check_language

    if len(args.formats) > 1:
        return usage_error("align writes one format; give one")
    if message := wrong_layout(args):
        return usage_error(message)
    warnings: list[str] = []
    try:
        if args.output:
            check_file(args.output)
        else:
            check_stdout()
        text = _read_text(args.text)
        audio = Recording(args.audio, args.audio).load(
            on_warning=warnings.append, audio_track=args.audio_track
        )
        if args.language:
            check_language(args.language)
    except StdoutError:
        raise
    except (OSError, ValueError) as error:
        return usage_error(str(error))
    models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
    try:
        aligner = models.load_aligner(args.model, models.engine_options(args.command, rest))
        transcript = aligner.align(audio, text, language=args.language)
    except (AlignmentError, ImportError, OSError, ValueError) as error:
        complain(str(error))
        return 1
    for warning in (*warnings, *transcript.warnings):
        complain(f"{args.audio}: {warning}")
    written = writer(args.formats[0], args)(transcript)
    if not args.output:
        print_text(written)
        return 0
    try:
        write_file(args.output, written)
    except OSError as error:
        complain(str(error))
        return 1
    return 0


def _read_text(source: str) -> str:
    """Raises ValueError, naming the file, for what is no text."""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
