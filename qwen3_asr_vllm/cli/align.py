# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr align``: when each word of a known text is said."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..recordings import Recording
from . import models
from .options import writer, wrong_layout
from .terminal import complain, print_text, usage_error


def align(args: argparse.Namespace, rest: list[str]) -> int:
    from ..units import AlignmentError, check_language

    if len(args.formats) > 1:
        return usage_error("align writes one format; give one")
    if message := wrong_layout(args):
        return usage_error(message)
    warnings: list[str] = []
    try:
        text = sys.stdin.read() if args.text == "-" else Path(args.text).read_text("utf-8")
        audio = Recording(args.audio, args.audio).load(
            on_warning=warnings.append, audio_track=args.audio_track
        )
        if args.language:
            check_language(args.language)
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
    if args.output:
        args.output.write_text(written, encoding="utf-8")
    else:
        print_text(written)
    return 0
