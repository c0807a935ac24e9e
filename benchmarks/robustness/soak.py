# SPDX-License-Identifier: Apache-2.0
"""Does a server that runs for long stay as it was?

    python benchmarks/robustness/soak.py                half an hour
    python benchmarks/robustness/soak.py --minutes 5

The clients of ``load.py`` ask without a pause, fewer than the server takes. Every few seconds the
memory of the HTTP process and of the engine and the open descriptors are noted, and the latency
of every response at once. The first fifth is warm-up and is left out. ``an hour adds`` is by how
much a line through the samples would rise in an hour, ``give or take`` how well that is known, from
the ``spread`` of the samples around the line: flat is a rise that is smaller than that. The second
table is that of ``load.py``: ``lost``, ``twice`` and ``wrong`` must be 0, or it exits with 1. The
KV cache is small: the engine's pages grow for as long as its blocks are written to for the first
time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

import numpy as np
from common import print_result, print_table, server
from load import Crowd, drive, print_tallies
from support.checkpoints import CHECKPOINT

EVERY_S = 5.0
KV_BLOCKS = 1024


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    options = f"--enforce-eager --dtype {args.dtype} --num-gpu-blocks-override {KV_BLOCKS}"
    with server("ours", CHECKPOINT, options.split()) as (address, pid):
        crowd = Crowd(address, args.clients)
        begin = time.perf_counter()
        samples = asyncio.run(drive(crowd, pid, 60 * args.minutes, every_s=EVERY_S))
    series = {name: [(at, each[name]) for at, each in samples] for name in samples[0][1]}
    series |= {f"{kind}, s": tally.answered for kind, tally in crowd.tallies.items()}
    warm, end = begin + 12 * args.minutes, begin + 60 * args.minutes
    kept = {name: [s for s in series[name] if warm < s[0] < end] for name in series}
    rows = [slope(name, found) for name, found in kept.items() if len(found) > 2]
    print_table(rows)
    tallies = crowd.rows()
    is_well = print_tallies(tallies)
    minutely = [each | {"minute": (at - begin) / 60} for at, each in samples[::12]]
    print_result("soak", rows, tallies=tallies, options=vars(args), minutely=minutely)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
