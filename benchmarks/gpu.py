# SPDX-License-Identifier: Apache-2.0
"""What does a GPU give? Runs a prepared plan on it, in the minutes that there are.

    python benchmarks/gpu.py --out results               # gpu.json: eight minutes on one GPU
    python benchmarks/gpu.py --out results --steps variants
    python benchmarks/gpu.py --out results --dry-run     # on a CPU: everything, but tiny

A plan is a list of steps. A step is a command, or servers that start together and then waves of
requests, one at a time and to one server after the other; a command with ``background`` runs while
the servers of the next step start. A wave is short clips in bulk, alignments, or realtime sessions.
Each leaves a line of JSON in ``OUT/summary.jsonl`` as soon as it ends, so that a run that is cut
off keeps what it has. What no time is left for is skipped, and named.

Weights count (``counting.py``), so every answer has ``max_tokens`` tokens and none is decoded
twice; a wave whose server did other work than it was sent fails (``work.py``). ``ratio`` is audio
a second over that of the first server of the wave. In-tree gets vLLM's own CUDA graph sizes
and eight API servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import serve
from aligner import wide_checkpoint
from common import exit_on_sigterm, machine, percentile, print_table, server
from counting import counting_checkpoint
from sessions import session_row
from support.audio import RECORDING, speech_clip
from support.checkpoints import ALIGNER
from work import UnequalWork, num_text_tokens

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
BESIDE_KV = {"0.6B": 6 * GIB, "1.7B": 9 * GIB, "aligner": 7 * GIB}  # weights, activations, graphs
WORDS_PER_S = 2.5  # of a text to align
KINDS = ("requests", "align", "sessions")
# What a dry run makes of a wave.
DRY = {"requests": 8, "concurrency": 4, "clip_s": 4.0, "max_tokens": 16}
DRY_SERVER = "--enforce-eager --dtype float32 --distributed-executor-backend uni".split()
DRY_COMMAND = "--model counting --dtype float32 --clips 8 --batch 4 --clients 4".split()


@dataclass
class Running:
    """A server of a step."""

    name: str
    address: str
    pid: int
    text_tokens: int


class Plan:
    """A plan that is being run: its servers' checkpoints, its clients, its clock, its results."""

    def __init__(self, plan: dict[str, Any], args: argparse.Namespace, stack: ExitStack) -> None:
        self.plan, self.is_dry, self.out = plan, args.dry_run, args.out
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._ends_s = time.monotonic() + (args.deadline_s or plan["deadline_s"])
        self._started_s = time.monotonic()
        self._first_seed = 0
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._command: Future[None] | None = None  # the last
        num_clients = 2 if self.is_dry else plan["clients"]
        self.clients = stack.enter_context(serve.client_processes(num_clients))

    @property
    def left_s(self) -> float:
        return self._ends_s - time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Add a line to the summary, and print it."""
        line = json.dumps({"at s": round(time.monotonic() - self._started_s, 1)} | row)
        with (self.out / "summary.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    # steps ----

    def run(self, names: list[str]) -> None:
        for step in self.plan["steps"]:
            if step["name"] not in names:
                continue
            if self.left_s < 0:
                self.write({"step": step["name"], "skipped": "no time is left"})
            elif "command" in step:
                self._run_command(step)
            else:
                self._run_servers(step)

    def _run_command(self, step: dict[str, Any]) -> None:
        """Run a command; one of the background is waited for before the next wave."""
        command = [sys.executable, *step["command"]]
        limit_s = min(self.left_s, step["timeout_s"])
        if self.is_dry:
            limit_s = self.left_s
            command = [part for part in command if part != "--compile"]
            command += DRY_COMMAND if "--model" in command else []
        self._command = self._pool.submit(self._finish, step["name"], command, limit_s)
        if not step.get("background"):
            self._command.result()

    def _finish(self, name: str, command: list[str], limit_s: float) -> None:
        """Run a command to its end or its limit; its output goes to a file."""
        path, start = self.out / f"{name}.txt", time.monotonic()
        with path.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=HERE.parent)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                code = process.wait()
        took = {"seconds": round(time.monotonic() - start, 1), "exit code": code}
        self.write({"step": name} | took | {"last": path.read_text().splitlines()[-1:]})

    def _run_servers(self, step: dict[str, Any]) -> None:
        start = time.monotonic()
        with ExitStack() as stack:
            running = self._start(step["servers"], stack)
            if self._command is not None:
                self._command.result()
            seconds = round(time.monotonic() - start, 1)
            self.write({"step": step["name"], "started": sorted(running), "seconds": seconds})
            for wave in step["waves"]:
                self._run_wave(step["name"], wave, running)

    def _run_wave(self, step: str, wave: dict[str, Any], running: dict[str, Running]) -> None:
        baseline = None
        self._first_seed += 100_000  # no clip comes twice but to another server
        for name in wave["servers"]:
            about = {"step": step, "server": name}
            if name not in running or self.left_s < 0:
                reason = "no time is left" if name in running else "it did not start"
                self.write(about | {"skipped": reason})
                continue
            try:
                row = self._measure(running[name], self._sized(wave))
            except (UnequalWork, RuntimeError, OSError) as error:
                self.write(about | {"failed": str(error)})
                continue
            rate = row.get("audio-s/s")
            baseline = baseline or rate
            ratio = {"ratio": rate / baseline} if rate and baseline else {}
            self.write(about | row | ratio)

    def _sized(self, wave: dict[str, Any]) -> dict[str, Any]:
        sized = {"kind": "requests", "requests": 0, "clip_s": 30, "max_tokens": 103} | wave
        if self.is_dry:
            sized |= {name: min(sized[name], DRY[name]) for name in DRY}
        return sized

    # servers ----

    def _start(self, specs: dict[str, Any], stack: ExitStack) -> dict[str, Running]:
        """Start servers at once; in a dry run, one for all that are the same there."""
        kv_bytes = _kv_bytes(specs)
        commands = {name: self._server_command(spec, kv_bytes) for name, spec in specs.items()}
        commands = {name: each for name, each in commands.items() if each is not None}
        unique = {each: name for name, each in commands.items()}

        def start(command: tuple[Any, ...]) -> tuple[str, int] | None:
            side, model, options = command
            try:
                return stack.enter_context(server(side, model, options))
            except RuntimeError as error:
                log = self.out / f"{unique[command]}.log"
                log.write_text(str(error))
                self.write({"server": unique[command], "failed": f"{log} says why"})
                return None

        with ThreadPoolExecutor() as pool:
            started = dict(zip(unique, pool.map(start, unique), strict=True))
        return {
            name: Running(name, *place, num_text_tokens(each[1]))
            for name, each in commands.items()
            if (place := started[each]) is not None
        }

    def _server_command(self, spec: dict[str, Any], kv_bytes: int) -> tuple[Any, ...] | None:
        """Return side, checkpoint and options of a server; None if this version has no such."""
        if spec.get("engines", 1) > 1 and find_spec("qwen3_asr_vllm.server.engines") is None:
            self.write({"skipped": "qwen3-asr serve has no --engines-per-gpu"})
            return None
        model, options = self._checkpoint(spec), self.plan["server_args"].split()
        options += spec.get("args", "").split()
        if self.is_dry:
            options += DRY_SERVER
        else:
            options += ["--dtype", "bfloat16", *spec.get("cuda_args", "").split()]
            of_server = str(kv_bytes * spec.get("engines", 1))
            options += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", of_server]
        if spec["model"] == "aligner" and not self.is_dry:
            options += ["--load-format", "dummy"]
        return spec.get("side", "ours"), model, tuple(options)

    def _checkpoint(self, spec: dict[str, Any]) -> Path:
        """Write the checkpoint of a server, unless there is one."""
        if spec["model"] == "aligner" and self.is_dry:
            return ALIGNER
        size = "counting" if self.is_dry else spec["model"]
        ends_after = None if self.is_dry else spec.get("ends_after")
        folder = self._folder / f"{size}-{ends_after}"
        if not folder.exists():
            folder.mkdir()
            if size == "aligner":
                return wide_checkpoint(folder, None)
            counting_checkpoint(size, folder, ends_after=ends_after)
        return folder

    # waves ----

    def _measure(self, target: Running, wave: dict[str, Any]) -> dict[str, Any]:
        if wave["kind"] == "sessions":
            count, seconds = wave["concurrency"], wave["clip_s"]
            return session_row(target.address, count, seconds, seed=self._first_seed)
        if wave["kind"] == "align":
            return asyncio.run(align_all(target, wave, first_seed=self._first_seed))
        args = argparse.Namespace(
            model=target.name,
            concurrency=[wave["concurrency"]],
            requests=wave["requests"],
            clip_s=wave["clip_s"],
            max_tokens=wave["max_tokens"],
            first_seed=self._first_seed,
            text_tokens=target.text_tokens,
            context=serve.CONTEXT,
            whole=True,
            client="own",
        )
        return serve.measure(target.name, target.address, target.pid, 0, args, self.clients)[0]


def _kv_bytes(specs: dict[str, Any]) -> int:
    """Return the bytes of KV cache that each engine gets, if all share the first GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    engines = [spec["model"] for spec in specs.values() for _ in range(spec.get("engines", 1))]
    total = torch.cuda.mem_get_info()[1] * 0.92 - sum(BESIDE_KV[model] for model in engines)
    return int(total / len(engines))


async def align_all(target: Running, wave: dict[str, Any], *, first_seed: int) -> dict[str, Any]:
    """Post clips and texts to an aligner; its words must be those of the texts."""
    import aiohttp

    said = RECORDING.with_suffix(".txt").read_text().split()
    text = " ".join(islice(cycle(said), round(wave["clip_s"] * WORDS_PER_S)))
    gate, count = asyncio.Semaphore(wave["concurrency"]), wave["requests"]
    clips = [speech_clip(wave["clip_s"], first_seed + number) for number in range(count)]
    took = []

    async def one(client: Any, wav: bytes) -> int:
        form = aiohttp.FormData({"text": text, "language": "en"})
        form.add_field("file", wav, filename="clip.wav", content_type="audio/wav")
        async with gate:
            began = time.perf_counter()
            async with client.post(f"{target.address}/v1/audio/alignments", data=form) as response:
                if response.status != 200:
                    raise RuntimeError((await response.text())[:500])
                words = (await response.json())["words"]
            took.append(time.perf_counter() - began)
        return len(words)

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
        start = time.perf_counter()
        counts = await asyncio.gather(*(one(client, wav) for wav in clips))
        seconds = time.perf_counter() - start
    if len(set(counts)) != 1 or not counts[0]:
        raise UnequalWork(f"an aligner gave {sorted(set(counts))} words for the same text.")
    return {
        "requests": count,
        "concurrency": wave["concurrency"],
        "words": counts[0],
        "audio-s/s": count * wave["clip_s"] / seconds,
        "p95 s": percentile(took, 0.95),
    }


def check_step(step: dict[str, Any]) -> None:
    """Raise ValueError for a step that could not run."""
    if ("command" in step) == ("servers" in step):
        raise ValueError(f"step {step['name']}: give it either a command or servers.")
    for wave in step.get("waves", ()):
        if unknown := set(wave["servers"]) - set(step["servers"]):
            raise ValueError(f"step {step['name']}: no server is called {sorted(unknown)[0]}.")
        if wave.get("kind", "requests") not in KINDS:
            raise ValueError(f"step {step['name']}: a wave is one of {', '.join(KINDS)}.")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Plan]:
    plan = json.loads(args.plan.read_text())
    for step in plan["steps"]:
        check_step(step)
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        yield Plan(plan, args, stack)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--plan", type=Path, default=HERE / "gpu.json")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="names; default: all")
    parser.add_argument("--deadline-s", type=float, help="default: that of the plan")
    parser.add_argument("--dry-run", action="store_true", help="tiny, and without a GPU")
    args = parser.parse_args()
    exit_on_sigterm()
    import torch

    if not torch.cuda.is_available() and not args.dry_run:
        print("no CUDA device: nothing to measure; --dry-run runs the plan on the CPU")
        return 0
    with opened(args) as plan:
        plan.write({"machine": machine(), "load": os.getloadavg(), "is_dry": args.dry_run})
        plan.run(args.steps or [step["name"] for step in plan.plan["steps"]])
    rows = [json.loads(line) for line in (args.out / "summary.jsonl").read_text().splitlines()]
    shown = ("step", "server", "concurrency", "sessions", "audio-s/s", "req/s", "p50 s", "p95 s")
    print_table([{name: row.get(name) for name in shown} for row in rows if "p95 s" in row])
    return int(any("failed" in row or row.get("exit code") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
