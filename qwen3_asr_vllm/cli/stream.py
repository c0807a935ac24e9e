# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr stream``: transcribe live audio from a pipe, or a file."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

from ..languages import display_width
from . import models
from .terminal import INTERRUPTED, check_stdout, complain, usage_error

if TYPE_CHECKING:
    import numpy as np


def stream(args: argparse.Namespace, rest: list[str]) -> int:
    check_stdout()
    if args.file == "-" and args.audio_track:
        return usage_error("--audio-track is for files; a pipe has one track")
    models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
    options = models.model_options(args, rest)
    try:
        pieces = _piped(args.rate) if args.file == "-" else _in_steps(args)
        with _hidden_from_children():
            model = models.load_model(args.model, options)
        display = _Display(sys.stdout)
        options = {
            "language": args.language,
            "languages": args.languages,
            "context": args.context,
            "skip_special_tokens": args.skip_special_tokens,
            "step_s": args.step_s,
        }
        with _ctrl_c_noted() as is_stopped:
            for update in model.stream(_until(is_stopped, pieces), **options):
                display.show(update.delta, update.tentative)
        display.end()
    except (ImportError, OSError, ValueError) as error:
        complain(str(error))
        return 1
    return INTERRUPTED if is_stopped() else 0


@contextmanager
def _hidden_from_children() -> Iterator[None]:
    """Hide Ctrl-C from the engine, which must still decode the end of the stream."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starts it now, since its start unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # child processes inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second Ctrl-C interrupts."""
    is_pressed = Event()

    def note(*_: Any) -> None:
        is_pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield is_pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _until(is_stopped: Callable[[], bool], pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield pieces until the stop, and one more: the audio that was in the pipe by then."""
    is_last = False
    for piece in pieces:
        yield piece
        if is_last:
            return
        is_last = is_stopped()


def _piped(rate: int) -> Iterator[np.ndarray]:
    from ..audio import PcmStream

    pcm = PcmStream("pcm", rate)
    while data := sys.stdin.buffer.read1(1 << 16):  # type: ignore[union-attr]
        yield pcm.push(data)
    yield pcm.finish()


def _in_steps(args: argparse.Namespace) -> Iterator[np.ndarray]:
    from ..geometry import SAMPLE_RATE
    from ..recordings import Recording

    waveform = Recording(args.file, args.file).load(
        on_warning=lambda warning: complain(f"{args.file}: {warning}"),
        audio_track=args.audio_track,
    )
    size = max(1, round(args.step_s * SAMPLE_RATE))
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


class _Display:
    """Prints final text and, on a terminal, the tentative text after it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._line = ""  # final text of the last terminal line

    def show(self, delta: str, tentative: str) -> None:
        if not self._file.isatty():
            if delta.strip():
                print(delta.strip(), file=self._file, flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        *full, self._line = _wrap(self._line + delta, columns)
        text = "".join(f"{line}\n" for line in full)
        first_line = _wrap(self._line + tentative, columns)[0]
        self._file.write(f"\r\x1b[K{text}{first_line}")
        self._file.flush()

    def end(self) -> None:
        if self._file.isatty():
            self._file.write("\n")


def _wrap(text: str, columns: int) -> list[str]:
    """Split text into lines of at most ``columns``, at spaces if possible.

    The last line may be empty.
    """
    lines = []
    while display_width(text) > columns:
        end = next(i for i in range(1, len(text) + 1) if display_width(text[:i]) > columns) - 1
        space = text.rfind(" ", 0, end + 1)
        end = space if space > 0 else max(end, 1)
        lines.append(text[:end])
        text = text[end:].lstrip()
    return [*lines, text]
