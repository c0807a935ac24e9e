# SPDX-License-Identifier: Apache-2.0
"""What the command prints: results on stdout, everything else on stderr, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..printable import printable

if TYPE_CHECKING:
    from ..recordings import Progress

INTERRUPTED = 130  # what a shell expects after Ctrl-C


def print_text(text: str) -> None:
    """Print to stdout, above a progress bar. Raises OSError where it cannot be written."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout, end="")
    sys.stdout.flush()


def complain(message: str) -> None:
    """Print each line of a message to stderr, above a progress bar."""
    from tqdm import tqdm

    for line in message.split("\n"):
        line = printable(line, max_chars=len(line))
        tqdm.write(f"qwen3-asr: {line}", file=sys.stderr)


def usage_error(message: str) -> int:
    complain(message)
    return 2


@contextmanager
def bar(*, hidden: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar over seconds of audio: done of all, where those not yet read last as the others."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar}| {desc}, {remaining} left"
    disable = True if hidden else None  # None: where stderr is no terminal
    with tqdm(total=0, disable=disable, bar_format=layout) as bar:

        def show(progress: Progress) -> None:
            mean_s = progress.seconds_read / max(progress.recordings_read, 1)
            num_recordings = progress.recordings or progress.recordings_read
            unread = num_recordings - progress.recordings_read
            bar.total = max(progress.seconds_read + unread * mean_s, 1)
            speed = progress.seconds_done / max(bar.format_dict["elapsed"], 1e-3)
            told = f"{progress.recordings_done}/{num_recordings} {speed:.1f}x real time"
            bar.set_description_str(told, refresh=False)
            bar.update(progress.seconds_done - bar.n)

        yield show
