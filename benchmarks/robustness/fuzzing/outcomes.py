# SPDX-License-Identifier: Apache-2.0
"""Outcomes of cases, and the cost of a case in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

MAX_GROWTH = 192 << 20  # bytes that a manifest may add to the process
HANG_S = 60.0  # no case takes one second on an idle machine
AT_ONCE = 8  # cases, at a server


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case; ``broken`` names the law that it broke, or is empty."""

    number: int
    name: str
    answer: str
    broken: str = ""
    seconds: float = 0.0
    growth: int = 0  # bytes


def measure(number: int, name: str, run: Callable[[], tuple[str, str]]) -> Outcome:
    """Runs it, and adds the seconds and the bytes by which the process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak
    before, start = memory("VmRSS"), time.perf_counter()
    answer, broken = run()
    growth = memory("VmHWM") - before
    if growth > MAX_GROWTH:
        broken = broken or f"{growth >> 20} MiB of memory"
    return Outcome(number, name, answer, broken, time.perf_counter() - start, growth)


def memory(field: str, pid: int | str = "self") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


def at_once(
    run: Callable[[str, int], Outcome], url: str, numbers: Iterable[int]
) -> Iterator[Outcome]:
    """Each case at a server that has several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(partial(run, url), numbers)
