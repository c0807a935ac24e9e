# SPDX-License-Identifier: Apache-2.0
"""What does a GPU give? Runs the benchmarks of speed on it, step by step.

    python benchmarks/gpu.py --out results              # every step
    python benchmarks/gpu.py --out results --steps encoder graph
    python benchmarks/gpu.py --list

A step is one command of at most ten minutes. Its output goes to OUT/STEP.txt and its last line,
the JSON object, to OUT/STEP.json, as soon as it ends; a step whose JSON is there already is not
run again, so an interrupted run goes on where it stopped. The goals that the numbers are held
against are in ``README.md``. Without CUDA nothing runs and the exit code is 0.

In-tree is measured as it comes and as well as it can be tuned (eight API servers, and vLLM's
Rust front end is a third way that has no transcription route). Weights are random at the real
dimensions, which times everything but the text: every answer has ``MAX_TOKENS`` tokens, about
what 30 s of speech take.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP_TIMEOUT_S = 540
STOP_S = 50
MAX_TOKENS = 103
LOAD = (
    "--concurrency",
    "512",
    "--requests",
    "1536",
    "--warm-up",
    "64",
    "--clip-s",
    "30",
    "--whole",
)
GRAPH = """--compilation-config='{"cudagraph_mm_encoder": true}'"""
SERVERS = "--api-server-count 8"


def serve(
    size: str, side: str, server_args: str = "", load: tuple[str, ...] = LOAD
) -> tuple[str, ...]:
    command = ("serve.py", "--model", size, "--sides", side, *load)
    options = f"--max-num-seqs 512 --no-enable-prefix-caching {server_args}"
    return (*command, "--max-tokens", str(MAX_TOKENS), f"--server-args={options}")


LATENCY = ("--concurrency", "1", "--requests", "64", "--warm-up", "8", "--clip-s", "5")

STEPS: dict[str, tuple[str, ...]] = {
    "processor": ("processor.py",),
    "decode": ("decode.py", "--files", "64"),
    "encoder": (
        *("encoder.py", "--device", "cuda", "--dtypes", "bfloat16"),
        *("--clips", "1", "8", "32", "--rounds", "21"),
    ),
    "graph": ("encoder.py", "--graph", "--clips", "1", "8", "32", "--rounds", "21"),
    "memory": ("encoder.py", "--memory", "--device", "cuda", "--dtypes", "bfloat16"),
    "offline": ("offline.py", "--model", "0.6B", "--dtype", "bfloat16", "--clips", "256"),
} | {
    f"{name}-{size}": command
    for size in ("0.6B", "1.7B")
    for name, command in {
        "serve-ours": serve(size, "ours"),
        "serve-ours-graph": serve(size, "ours", GRAPH),
        "serve-ours-graph-servers": serve(size, "ours", f"{GRAPH} {SERVERS}"),
        "serve-ours-graph-servers-fp8": serve(
            size, "ours", f"{GRAPH} {SERVERS} --kv-cache-dtype fp8"
        ),
        "serve-in-tree": serve(size, "in-tree"),
        "serve-in-tree-servers": serve(size, "in-tree", SERVERS),
        "latency-ours-graph": serve(size, "ours", GRAPH, LATENCY),
        "latency-in-tree": serve(size, "in-tree", load=LATENCY),
    }.items()
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    args = parser.parse_args()
    if args.list:
        for name, command in STEPS.items():
            print(f"{name}: {' '.join(command)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.steps if not run(name, args.out)]
    if failed:
        print(f"failed: {' '.join(failed)}")
    return 1 if failed else 0


def run(name: str, out: Path) -> bool:
    """Whether the step has left its numbers."""
    result = out / f"{name}.json"
    if result.exists():
        return True
    script, *arguments = STEPS[name]
    start = time.monotonic()
    with (out / f"{name}.txt").open("w") as log:
        command = [sys.executable, str(HERE / script), *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            process.wait(STEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # lets it stop its servers
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    print(f"{name}: exit code {process.returncode} after {time.monotonic() - start:.0f} s")
    lines = (out / f"{name}.txt").read_text().splitlines()
    measured = [line for line in lines if line.startswith('{"benchmark"')]
    if process.returncode or not measured:
        return False
    result.write_text(json.dumps(json.loads(measured[-1]), indent=1))
    return True


if __name__ == "__main__":
    sys.exit(main())
