# SPDX-License-Identifier: Apache-2.0
"""What does a GPU give? Runs the benchmarks of speed on it, step by step.

    python benchmarks/gpu.py --out results              # every step
    python benchmarks/gpu.py --out results --steps encoder graph
    python benchmarks/gpu.py --list

A step is one command of at most a few minutes, the most telling first. Its output goes to
OUT/STEP.txt and its last line, the JSON object, to OUT/STEP.json, as soon as it ends; a step whose
JSON is there already is not run again, so an interrupted run goes on where it stopped. The goals
that the numbers are held against are in ``README.md``. Without CUDA nothing runs and the exit code
is 0.

In-tree is measured with its defaults and with more API servers; vLLM's Rust front end has no
transcription route. Its server and ours run side by side and take turns, each with
``KV_BYTES`` for its KV cache, so that both fit into 80 GB and start at once. Weights are random at
the real dimensions, which times everything but the text: every answer has ``MAX_TOKENS`` tokens,
about what 30 s of speech take.
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
KV_BYTES = 24 << 30
CLIENTS = 4  # one process that asks cannot keep up with several API servers


def serve(
    size: str,
    *options: str,
    sides: str = "in-tree ours",
    concurrency: int = 512,
    requests: int = 1024,
    clip_s: int = 30,
    max_tokens: int = MAX_TOKENS,
) -> tuple[str, ...]:
    room = f"--gpu-memory-utilization 0.35 --kv-cache-memory-bytes {KV_BYTES}"
    server_args = " ".join(("--max-num-seqs 512 --no-enable-prefix-caching", room, *options))
    return (
        *("serve.py", "--model", size, "--sides", *sides.split(), "--together"),
        *("--whole", "--clients", str(CLIENTS), "--warm-up", "64"),
        *("--concurrency", str(concurrency), "--requests", str(requests)),
        *("--clip-s", str(clip_s), "--max-tokens", str(max_tokens)),
        f"--server-args={server_args}",
    )


def one_short_clip(size: str) -> tuple[str, ...]:
    return serve(size, concurrency=1, requests=64, clip_s=5, max_tokens=18)


SERVERS = "--api-server-count 4"
BF16 = ("--device", "cuda", "--dtypes", "bfloat16")
CLIPS = ("--clips", "1", "8", "32", "--rounds", "21")

STEPS: dict[str, tuple[str, ...]] = {
    "serve-0.6B": serve("0.6B"),
    "serve-0.6B-servers": serve("0.6B", SERVERS),
    "serve-0.6B-servers-fp8": serve("0.6B", SERVERS, "--kv-cache-dtype fp8", sides="ours"),
    "encoder": ("encoder.py", *BF16, *CLIPS),
    "graph": ("encoder.py", "--graph", *CLIPS),
    "serve-1.7B-servers": serve("1.7B", SERVERS),
    "latency-0.6B": one_short_clip("0.6B"),
    "latency-1.7B": one_short_clip("1.7B"),
    "profile": ("encoder.py", "--profile", "--clips", "1", "32"),
    "memory": ("encoder.py", "--memory", *BF16),
    "offline": ("offline.py", "--model", "0.6B", "--dtype", "bfloat16", "--clips", "256"),
    "serve-1.7B": serve("1.7B"),
    "serve-1.7B-servers-fp8": serve("1.7B", SERVERS, "--kv-cache-dtype fp8", sides="ours"),
    "processor": ("processor.py",),
    "decode": ("decode.py", "--files", "64"),
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
    """Return whether the step has written its results."""
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
