# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: results on stdout, everything else and a progress bar on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..printable import printable

if TYPE_CHECKING:
    from ..recordings import Progress

INTERRUPTED = 130  # exit code after Ctrl-C


class StdoutError(OSError):
    """Results could not be written to stdout."""


def open_closed_streams() -> None:
    """Open /dev/null for closed standard streams, so that no other file gets their descriptor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stderr = sys.stderr or open(os.devnull, "w")


def check_stdout() -> None:
    """Raise StdoutError if stdout is closed, before a model is loaded."""
    if sys.stdout is None:
        raise StdoutError("stdout is closed, and results go there; write them to a file with -o")


def print_text(text: str) -> None:
    """Print to stdout, above a progress bar. Raises StdoutError if stdout is not writable."""
    from tqdm import tqdm

    check_stdout()
    try:
        tqdm.write(text, file=sys.stdout, end="")
    except OSError as error:
        raise StdoutError(f"stdout: {error.strerror or error}") from error
    flush_stdout()


def flush_stdout() -> None:
    """Flush stdout. Raises StdoutError, and discards the rest of the output."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StdoutError(f"stdout: {error.strerror or error}") from error


def complain(message: str) -> None:
    """Print each line of a message to stderr, above a progress bar."""
    from tqdm import tqdm

    for line in message.split("\n"):
        line = printable(line, max_chars=len(line))
        tqdm.write(f"qwen3-asr: {line}", file=sys.stderr)


def usage_error(message: str) -> int:
    """Print an error of the command line and return its exit code."""
    complain(message)
    return 2


@contextmanager
def bar(*, hidden: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar over seconds of audio; unread recordings count with the mean duration."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar}| {desc}, {remaining} left"
    disable = True if hidden else None  # None: hidden unless stderr is a terminal
    with tqdm(total=0, disable=disable, bar_format=layout) as bar:

        def show(progress: Progress) -> None:
            mean_s = progress.seconds_read / max(progress.recordings_read, 1)
            num_recordings = progress.recordings or progress.recordings_read
            unread = num_recordings - progress.recordings_read
            bar.total = max(progress.seconds_read + unread * mean_s, 1)
            speed = progress.seconds_done / max(bar.format_dict["elapsed"], 1e-3)
            label = f"{progress.recordings_done}/{num_recordings} {speed:.1f}x real time"
            bar.set_description_str(label, refresh=False)
            bar.update(progress.seconds_done - bar.n)

        yield show
