# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr align``: time each word of a known text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..corpus.manifests import decode_text
from ..corpus.outputs import check_file, write_file
from ..recordings import Recording
from . import models
from .options import line_layout, writer, wrong_layout
from .terminal import check_stdout, complain, print_text, usage_error


def align(args: argparse.Namespace, rest: list[str]) -> int:
    from ..units import AlignmentError

    if len(args.formats) > 1:
        return usage_error("align writes one format; give one")
    if message := wrong_layout(args):
        return usage_error(message)
    if not args.output:
        check_stdout()
    warnings: list[str] = []
    try:
        text = _checked_text(args)
        audio = Recording(args.audio, args.audio).load(
            on_warning=warnings.append, audio_track=args.audio_track
        )
    except (OSError, ValueError) as error:
        return usage_error(str(error))
    models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
    try:
        aligner = models.load_aligner(args.model, models.engine_options(args.command, rest))
        transcript = aligner.align(audio, text, language=args.language, keep_lines=args.keep_lines)
        written = writer(args.formats[0], args)(transcript)
        if args.output:
            write_file(args.output, written)
    except (AlignmentError, ImportError, OSError, ValueError) as error:
        complain(str(error))
        return 1
    for warning in (*warnings, *transcript.warnings):
        complain(f"{args.audio}: {warning}")
    if not args.output:
        print_text(written)
    return 0


def _checked_text(args: argparse.Namespace) -> str:
    """Return the text to align. Raises OSError, ValueError before a model is loaded."""
    from ..texts import timed_texts
    from ..units import check_language

    if args.output:
        check_file(args.output)
    if args.language:
        check_language(args.language)
    text = _read_text(args.text)
    if line_layout(args) and (args.keep_lines or timed_texts(text) is not None):
        raise ValueError(
            "the lines of the text are kept; remove --max-line-width and --max-line-count"
        )
    return text


def _read_text(source: str) -> str:
    """Return the text of a file or of stdin. Raises ValueError, naming the file."""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
