# SPDX-License-Identifier: Apache-2.0
"""Does a server that runs for long stay as it was?

    python benchmarks/soak.py                half an hour
    python benchmarks/soak.py --minutes 5

The clients of ``load.py`` ask without a pause, fewer than the server takes. Every few seconds the
memory of both processes and the open descriptors are noted, every answer's latency as it comes. The
first fifth is warm-up and is left out. Read the last column: what a line through the samples would
add in an hour, beside the spread of the samples around that line. Flat is a slope that the spread
explains.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import numpy as np
from common import CHECKPOINT, print_result, print_table
from load import KINDS, Crowd, watch
from serve import server

EVERY_S = 5.0


class Steady(Crowd):
    """A crowd whose latencies are noted with their time."""

    def __init__(self, address: str, num_clients: int) -> None:
        super().__init__(address, num_clients)
        self.latencies: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    async def _note(self, kind: str, variant: int, status: int, text: str, seconds: float) -> None:
        if status == 200:
            self.latencies[kind].append((time.monotonic(), seconds))
        await super()._note(kind, variant, status, text, seconds)


def slope(name: str, samples: list[tuple[float, float]]) -> dict[str, Any]:
    """The line through samples of (seconds, value): where it is, its slope, what is around it."""
    times, values = np.array(samples).T
    hours = (times - times[0]) / 3600
    rise, start = np.polyfit(hours, values, 1)
    around = values - (start + rise * hours)
    error = around.std() / max(np.sqrt(len(values)) * hours.std(), 1e-9)
    return {
        "what": name,
        "samples": len(values),
        "mean": values.mean(),
        "spread": around.std(),
        "an hour adds": rise,
        "give or take": 2 * error,
    }


async def run(crowd: Steady, pid: int, seconds: float) -> list[tuple[float, dict[str, float]]]:
    samples: list[tuple[float, dict[str, float]]] = []

    def note(sample: dict[str, float]) -> None:
        samples.append((time.monotonic(), sample))

    watcher = asyncio.create_task(watch(pid, note, every_s=EVERY_S))
    try:
        await crowd.run(seconds)
    finally:
        watcher.cancel()
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    with server("ours", CHECKPOINT, ["--enforce-eager", "--dtype", args.dtype]) as (address, pid):
        crowd = Steady(address, args.clients)
        begin = time.monotonic()
        samples = asyncio.run(run(crowd, pid, 60 * args.minutes))
    warm, end = begin + 12 * args.minutes, begin + 60 * args.minutes
    rows = [
        slope(name, [(at, each[name]) for at, each in samples if warm < at < end])
        for name in samples[0][1]
    ]
    for kind, latencies in crowd.latencies.items():
        kept = [(at, seconds) for at, seconds in latencies if warm < at < end]
        if len(kept) > 2:
            rows.append(slope(f"{kind}, s", kept))
    print_table(rows)
    tallies = crowd.rows()
    print_table([{name: row[name] for name in row if name != "notes"} for row in tallies])
    print_result("soak", rows, tallies=tallies, options=vars(args))
    return 1 if any(row["lost"] or row["wrong"] for row in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
