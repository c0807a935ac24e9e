# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, even where it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENGINE_PARENT = "QWEN3_ASR_ENGINE_PARENT"  # the process that starts an engine, while it does
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)  # here, for little may be done between fork and exec


def end_with_parent() -> None:
    """In a process that an engine is made of: end when the one that started it is killed.

    vLLM's engine would live on, and keep its memory from the next run.
    """
    if os.environ.get(ENGINE_PARENT) == str(os.getppid()):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Engines that are started here end with this process, even where it is killed.

    Not those of other threads: for Linux, a child's parent is a thread, and threads end early.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    os.environ[ENGINE_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[ENGINE_PARENT]


def end_with_supervisor() -> None:
    """In a server, before it starts: be asked to end when the supervisor is killed.

    Asked, and not killed as an engine is with its server: it has engines of its own to end.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if hasattr(os, "register_at_fork"):  # a forked engine does not load plugins; a spawned one does
    os.register_at_fork(after_in_child=end_with_parent)
