# SPDX-License-Identifier: Apache-2.0
"""Where does the time of one clip go, from the first byte of the upload to the end of the answer?

    python benchmarks/latency.py                                  # the tiny checkpoint
    python benchmarks/latency.py --model 0.6B --max-tokens 18     # real dimensions (counting.py)
    python benchmarks/latency.py --format FLAC                    # through a decoder process
    python benchmarks/latency.py --clients 1 32 --stream          # and in a busy server

Both servers are up, and get requests in turn. Each part is the mean of all requests, in
milliseconds, from the sums that a server keeps in its metrics; ``first text`` is a median.

    HTTP        request and response: what the client waits beyond the parts below
    decode      the upload to a waveform, in this package's server; in-tree it is part of HTTP
    processor   chunks or spectrogram, and the way to the engine and back
    queue       until a step takes the request
    prefill     encoder, prompt and the first token
    steps       the other tokens, and a step of them
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import shlex
import statistics
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import SIDES, exit_on_sigterm, print_result, print_table, server
from counting import chosen_checkpoint
from serve import Answer, default_arguments, drive
from support.audio import SAMPLE_RATE, speech
from work import CONTEXT, check_work, num_text_tokens, server_work

METRICS = {  # sums of seconds: a part, and the beginning of its metric
    "decode": "qwen3_asr_audio_decode_seconds_sum",
    "engine": "vllm:e2e_request_latency_seconds_sum",
    "queue": "vllm:request_queue_time_seconds_sum",
    "prefill": "vllm:request_prefill_time_seconds_sum",
    "steps": "vllm:request_decode_time_seconds_sum",
}


def seconds_spent(address: str) -> dict[str, float]:
    """Read the sums of a server's metrics."""
    lines = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    return {
        part: sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(metric))
        for part, metric in METRICS.items()
    }


def upload(seconds: float, seed: int, format: str) -> bytes:
    """A clip of speech as a file of 16 bits; no two seeds give the same."""
    import soundfile

    file = io.BytesIO()
    samples = speech(seconds, seed=seed)
    soundfile.write(file, samples, SAMPLE_RATE, format=format, subtype="PCM_16")
    return file.getvalue()


def row(
    side: str, clients: int, answers: list[Answer], spent: dict[str, float], num_tokens: int
) -> dict[str, Any]:
    """Return the parts of a side's requests, in milliseconds of one."""
    count = len(answers)
    part = {name: seconds / count * 1e3 for name, seconds in spent.items()}
    walls = [answer.seconds * 1e3 for answer in answers]
    mean = statistics.mean(walls)
    return {
        "side": side,
        "clients": clients,
        "first text": statistics.median(answer.first_text_s * 1e3 for answer in answers),
        "p50 ms": statistics.median(walls),
        "mean ms": mean,
        "HTTP": mean - part["decode"] - part["engine"],
        "decode": part["decode"] or None,
        "processor": part["engine"] - part["queue"] - part["prefill"] - part["steps"],
        "queue": part["queue"],
        "prefill": part["prefill"],
        "steps": part["steps"],
        "a step": spent["steps"] / max(1, num_tokens - count) * 1e3,
    }


def measured(
    addresses: dict[str, str], clients: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of all sides, which take turns; the first turn warms up."""
    answers: dict[str, list[Answer]] = {side: [] for side in addresses}
    before: dict[str, Any] = {}
    a_turn = max(4, 2 * clients)
    for turn in range(-1, args.rounds):
        for side, address in addresses.items():
            if turn == 0:
                before[side] = seconds_spent(address), server_work(address, args.text_tokens)
            seeds = range((clients * 1000 + turn) * a_turn, (clients * 1000 + turn + 1) * a_turn)
            clips = [upload(args.clip_s, seed, args.format) for seed in seeds]
            _, answered = asyncio.run(drive(address, clips, clients, args))
            answers[side] += answered if turn >= 0 else []
    rows, work = [], {}
    for side, address in addresses.items():
        spent_before, work_before = before[side]
        spent = seconds_spent(address)
        spent = {part: spent[part] - spent_before[part] for part in spent}
        work[side] = server_work(address, args.text_tokens) - work_before
        rows.append(row(side, clients, answers[side], spent, work[side].tokens))
    count = args.rounds * a_turn
    check_work(work, clips=count, audio_s=count * args.clip_s)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="tiny, counting, 0.6B, 1.7B, or a checkpoint"
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=8, help="of two clips a client, at least 4")
    parser.add_argument("--stream", action="store_true", help="ask for streams")
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--format", choices=["WAV", "FLAC"], default="WAV", help="of the upload")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--server-args", default="", help="more options of vllm serve, one string")
    args = parser.parse_args()
    exit_on_sigterm()
    args.whole, args.context = not args.stream, CONTEXT  # for ``serve.post``
    options = [*default_arguments(args), *shlex.split(args.server_args)]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = chosen_checkpoint(args.model, Path(folder))
        args.text_tokens = num_text_tokens(model)
        contexts = [server(side, model, options) for side in SIDES]
        with ThreadPoolExecutor() as pool:
            started = list(pool.map(stack.enter_context, contexts))
        addresses = {side: address for side, (address, _) in zip(SIDES, started, strict=True)}
        rows = [row for clients in args.clients for row in measured(addresses, clients, args)]
    print_table(rows)
    about = {name: value for name, value in vars(args).items() if name != "text_tokens"}
    print_result("latency", rows, load=os.getloadavg(), **about)


if __name__ == "__main__":
    main()
