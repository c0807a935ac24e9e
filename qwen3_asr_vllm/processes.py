# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, however it ends: normally, by a signal, or killed.

A thread in the child watches the parent. Linux's own signal for it (``PR_SET_PDEATHSIG``) also
comes when only the *thread* ends that started the child.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SUPERVISOR = "QWEN3_ASR_SUPERVISOR"  # variable: process id of the parent that a server ends with
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
POLL_S = 0.5  # seconds between two looks at the parent
_WATCH = "qwen3-asr-parent-watch"  # name of the thread


def end_with_parent() -> None:
    """Kill this child of ``multiprocessing``, and its own, once its parent has ended.

    Its own children watch it too, but not before they have imported vLLM, which takes seconds.
    Raises RuntimeError in any other process.
    """
    parent, pid = multiprocessing.parent_process(), os.getppid()
    if parent is None:
        raise RuntimeError("multiprocessing did not start this process")

    def watch() -> None:
        # A forked sibling keeps the pipe open that `is_alive` looks at, so the pid counts, too.
        while parent.is_alive() and os.getppid() == pid:
            parent.join(POLL_S)
        for child in multiprocessing.active_children():
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    _start(watch)


def end_with_spawner() -> None:
    """Kill this process, which ``multiprocessing`` is spawning, once its parent has ended."""
    pid = os.getppid()  # multiprocessing does not know the parent yet

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    _start(watch)


def kill_with_parent(parent: int) -> None:
    """Kill this process once ``parent``, a process of a single thread, has ended. Linux only.

    No thread watches it, as for engines: a decoder counts its address space and its CPU time.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def end_group_with_supervisor() -> None:
    """End the process group of this process once its supervisor, if it has one, has ended."""
    if (supervisor := os.environ.pop(SUPERVISOR, None)) is None:
        return

    def watch() -> None:
        while str(os.getppid()) == supervisor:
            time.sleep(POLL_S)
        # Not SIGKILL for all: multiprocessing's resource tracker frees shared memory at the end.
        os.killpg(0, signal.SIGTERM)
        time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)  # engines end with it

    _start(watch)


def end_engines_with_parents() -> None:
    """Make the processes of vLLM's engines end with their parents; each of them calls this.

    A spawned one does when it loads vLLM's plugins. A forked one loads none: its parent has.
    """
    _end_if_engine()
    multiprocessing.util.register_after_fork(sys.modules[__name__], _end_if_engine)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, which vLLM swallows while it waits for its engine."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _raise_interrupt)
    try:
        yield
    except _Interrupt:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Interrupt(BaseException):
    """Stands in for KeyboardInterrupt, which vLLM swallows."""


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupt


def _end_if_engine(*_: object) -> None:
    """Call ``end_with_parent`` where a function of vLLM's is all that this process runs."""
    target = getattr(multiprocessing.current_process(), "_target", None)
    if getattr(target, "__module__", "").startswith("vllm."):
        end_with_parent()


def _start(watch: Callable[[], None]) -> None:
    if all(thread.name != _WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=_WATCH, daemon=True).start()
