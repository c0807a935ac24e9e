# SPDX-License-Identifier: Apache-2.0
"""Engines end with the process that started them, however it ends, by stand-ins for both.

Servers that end are in ``test_supervisor.py``; real ones in ``benchmarks/robustness/faults.py``.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from qwen3_asr_vllm import processes

ENGINE = """
import multiprocessing, os, time
from qwen3_asr_vllm.processes import end_engines_with_parents

def work():
    time.sleep(10)
    os.write(1, b"It lives on.\\n")

def run(method):
    if method != "fork":  # then it loads plugins; if it is forked, its parent has
        end_engines_with_parents()
    multiprocessing.get_context("spawn").Process(target=work).start()  # watches none
    os.write(1, b"It lives.\\n")
    time.sleep(60)
    os.write(1, b"It lives on.\\n")
"""
# vLLM's DP coordinator loads no plugins; the main module of its parent, which it imports, knows it.
SPAWNER = """
import multiprocessing, os, time
from qwen3_asr_vllm.processes import end_with_spawner

def run():
    os.write(1, b"It lives.\\n")
    time.sleep(60)
    os.write(1, b"It lives on.\\n")

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=run, daemon=True).start()
    time.sleep(60)
if __name__ == "__mp_main__":
    end_with_spawner()
"""
# A thread starts two engines, and ends.
PARENT = """
import multiprocessing, sys, threading, time
from qwen3_asr_vllm.processes import end_engines_with_parents
from {module} import run

if __name__ == "__main__":
    end_engines_with_parents()
    for _ in range(2):
        child = multiprocessing.get_context(sys.argv[1]).Process(target=run, args=sys.argv[1:])
        thread = threading.Thread(target=child.start)
        thread.start()
        thread.join()
    time.sleep(60)
"""


def parent(folder, method, *, module):
    """A process with two children in which a function of a module runs."""
    package, _, name = module.partition(".")
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / f"{name}.py").write_text(ENGINE)
    (folder / "parent.py").write_text(PARENT.format(module=module))
    command = [sys.executable, str(folder / "parent.py"), method]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("method", "number"),
    [("fork", signal.SIGKILL), ("spawn", signal.SIGKILL), ("forkserver", signal.SIGHUP)],
)
def test_engines_end_with_their_parent(tmp_path, method, number):
    with parent(tmp_path, method, module="vllm.engine") as process:
        assert [process.stdout.readline() for _ in range(2)] == 2 * ["It lives.\n"]
        process.send_signal(number)
        assert process.stdout.read() == ""  # it ends when all have that could write there


def test_spawned_children_end_with_their_spawner(tmp_path):
    (tmp_path / "spawner.py").write_text(SPAWNER)
    command = [sys.executable, str(tmp_path / "spawner.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "It lives.\n"
        process.kill()
        assert process.stdout.read() == ""


def test_children_of_users_outlive_their_parent(tmp_path):
    with parent(tmp_path, "fork", module="theirs.engine") as process:
        assert [process.stdout.readline() for _ in range(2)] == 2 * ["It lives.\n"]
        (child, other) = psutil.Process(process.pid).children()
        process.kill()
        time.sleep(2 * processes.POLL_S)
        assert child.is_running() and other.is_running()
        child.kill()
        other.kill()


def test_only_children_end_with_a_parent():
    with pytest.raises(RuntimeError, match="multiprocessing"):
        processes.end_with_parent()


def test_swallowed_interrupts_are_raised():
    with pytest.raises(KeyboardInterrupt), processes.interruptible():
        with suppress(KeyboardInterrupt):  # as vLLM does while its engine starts
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
